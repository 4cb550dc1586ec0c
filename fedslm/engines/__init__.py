"""Where clients run: worker processes of one machine, or Flower on Ray."""
