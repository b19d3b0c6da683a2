"""What `scalemoe bench` and `scalemoe topology measure` run on the ranks."""
