"""Metrics, protocols, baselines and benchmark suites."""
