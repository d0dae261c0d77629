"""Datasets: one file a kind of data."""
