"""A federation of plain Flower that does not train."""
