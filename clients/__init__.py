"""Flower App component: the client."""
