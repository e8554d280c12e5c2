"""Synthetic outliers in feature space."""
