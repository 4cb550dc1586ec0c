"""Base models and the adapters attached to them."""
