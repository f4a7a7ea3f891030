"""Training: objective, loop, run folder."""
