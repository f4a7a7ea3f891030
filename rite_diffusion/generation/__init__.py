"""Generation: pictures of prompts, with adapters, regions and condition pictures."""
