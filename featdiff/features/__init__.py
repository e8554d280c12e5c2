"""Images to named columns of features."""
