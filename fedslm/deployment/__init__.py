"""Real federations: certificates and keys, a server, and nodes, over TLS."""
