"""Scoring past one machine: manifests and blocks of images, Ray clusters, and a server."""
