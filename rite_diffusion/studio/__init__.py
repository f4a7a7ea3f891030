"""The studio: train, generate, fuse and compare in one web page, over the recipes of the CLI."""
