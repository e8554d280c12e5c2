"""Features to one number an image, higher = more OOD."""
