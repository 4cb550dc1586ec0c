"""Load examples, and assign them to clients and units."""
