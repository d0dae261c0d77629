"""Drawings, plots and tables for the terminal."""
