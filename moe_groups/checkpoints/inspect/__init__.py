"""Looking into a checkpoint, offline."""
