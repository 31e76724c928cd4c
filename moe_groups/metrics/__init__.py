"""Norms and learning rates by layer and expert, with pictures."""
