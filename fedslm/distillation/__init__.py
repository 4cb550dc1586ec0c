"""What the federated small model teaches a larger one, and the proof that it arrived."""
