"""Converting a checkpoint to other groups, offline."""
