"""Scores of generated pictures by a network that is never used in training."""
