"""Real federations: certificates, keys, a server and nodes that communicate over TLS."""
