"""A first config for one's own data: what the data is like, and the file that follows from it."""
