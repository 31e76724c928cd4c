"""One rank's model on the meta device, for ``moe-groups plan``."""
