"""Use a trained model: predict, generate, evaluate, export."""
