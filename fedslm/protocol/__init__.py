"""What server and clients say to each other, and what both know of it."""
