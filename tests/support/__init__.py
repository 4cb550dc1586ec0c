"""What tests share: small real things, real processes, and what they compare."""
