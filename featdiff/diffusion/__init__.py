"""Noise schedules, networks, the training loop, reconstructions."""
