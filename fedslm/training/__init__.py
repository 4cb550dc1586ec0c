"""Local training on one client."""
