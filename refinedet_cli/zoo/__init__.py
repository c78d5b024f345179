"""Weights: checkpoints that rebuild their own model, and the places they come from."""
