"""Base models: where they come from and how the toolkit talks to them."""
