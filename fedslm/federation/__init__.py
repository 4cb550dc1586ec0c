"""Federated rounds on Flower: server loop, client functions, grids, checkpoints."""
