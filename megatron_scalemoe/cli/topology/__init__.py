"""`scalemoe topology`."""
