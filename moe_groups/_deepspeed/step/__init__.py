"""The optimizer step of the wrappers: hooks around it, its norms and settings, and the lean one."""
