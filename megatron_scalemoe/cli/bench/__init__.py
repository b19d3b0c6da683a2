"""`scalemoe bench`."""
