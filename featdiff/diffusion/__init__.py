"""Noise schedules, networks, the training loop, and reconstructions of vectors and images."""
