"""Scores to p-values, flags and results."""
