"""The example concepts, and words for prompts in the pocket base's grammar."""

CONCEPTS = {  # folder -> class noun and the backgrounds that its photos do not show
    "robot": ("robot", ["blue", "green", "white", "orange"]),
    "unicorn": ("horse", ["blue", "green", "white", "purple"]),
    "cupcake": ("cake", ["blue", "green", "white", "pink"]),
    "tractor": ("truck", ["blue", "white", "black", "green"]),
}


def article(word: str) -> str:
    """The word with its article: "a cat", "an owl"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
