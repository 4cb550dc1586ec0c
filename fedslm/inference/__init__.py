"""Use what was trained: predict, generate, evaluate, export."""
