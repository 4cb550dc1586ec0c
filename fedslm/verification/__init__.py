"""The promises of the private path, tried out."""
