"""Engines that run clients: worker processes on one machine, or Flower on Ray."""
