"""The messages between server and clients, and the run constants that both sides share."""
