"""Prompts and adapters in, pictures out."""
