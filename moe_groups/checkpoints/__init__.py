"""Checkpoints that say what their groups were: layout, manifest and files."""
