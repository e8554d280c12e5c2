"""Scoring past one machine: the names of many images in one file, and blocks of them that are scored anywhere."""
