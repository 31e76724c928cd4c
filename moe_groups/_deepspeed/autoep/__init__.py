"""DeepSpeed's AutoEP: groups made before it, layers made before it, and names from before it."""
