"""What the user named to decoded batches, rows and splits."""
