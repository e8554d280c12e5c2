"""Bytes on disk and on the hub."""
