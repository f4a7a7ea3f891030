"""The studio: train, generate, fuse and compare in one web page, by the functions of `api`."""
