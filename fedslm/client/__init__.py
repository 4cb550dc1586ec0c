"""The client's side of a round."""
