"""Plans, accounting and ledgers: torch-free, and held to a higher standard."""
