"""One client's side of a round."""
