"""Photos: reading folders, captions and masks, views, buckets, and encoding to latents."""
