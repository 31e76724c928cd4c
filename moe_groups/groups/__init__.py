"""Parameters to keys, keys to groups, names and tiles: pure, without DeepSpeed."""
