"""Helpers that do not depend on MoE: arguments, units, tables, paths."""
