"""What an optimizer step takes, plans that take less, and measuring it."""
