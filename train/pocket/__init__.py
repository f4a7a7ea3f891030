"""What makes the embedded base models: their pictures, networks and training."""
