"""What knows nothing of experts: arguments, units, tables, paths."""
