"""Distills the federated small model into a larger one, and measures the transfer."""
