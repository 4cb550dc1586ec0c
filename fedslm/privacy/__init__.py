"""Plans, accounting and ledgers: torch-free, with stricter checks than the rest of the package."""
