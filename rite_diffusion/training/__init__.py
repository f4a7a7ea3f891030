"""Training: batches, loss, the loop, and the run folder."""
