"""Aggregation of client updates into one adapter."""
