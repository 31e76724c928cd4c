"""Hugging Face checkpoints to and from expert-parallel ranks."""
