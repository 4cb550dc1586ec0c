"""One client's local work."""
