"""Photo folder -> checked pictures with captions -> batches of latents."""
