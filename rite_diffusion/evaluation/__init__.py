"""Scores of generated pictures by networks that no training here has ever used as a signal."""
