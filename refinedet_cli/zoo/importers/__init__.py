"""Weights of other projects: their layouts, and ours."""
