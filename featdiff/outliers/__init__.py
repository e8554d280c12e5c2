"""In-domain features -> synthetic outliers just beyond them."""
