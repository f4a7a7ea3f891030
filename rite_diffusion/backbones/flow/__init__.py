"""Flow-matching transformers: one module for each family, on one shared class."""
