"""Helpers that tests share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""Root folder of the repository."""
