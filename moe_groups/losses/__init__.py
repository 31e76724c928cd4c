"""Load-balancing losses, carried along a pipeline or attached, and tracked."""
