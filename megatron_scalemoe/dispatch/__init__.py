"""Dispatchers: plain objects that carry tokens to their experts and the results back. Shape letters are listed in `ops`."""
