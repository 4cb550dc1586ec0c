"""Flower App component: the server."""
