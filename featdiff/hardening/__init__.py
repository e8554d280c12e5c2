"""Outlier-aware learning of classifiers."""
