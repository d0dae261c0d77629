"""Data sets: one file a kind of data."""
