"""What commands share: the settings tree of their options, and printing of lines."""

from typing import Any

from rite_diffusion.files.writing import printable


def say(text: object) -> None:
    """Print a line without control characters, as it may quote a file."""
    print(printable(str(text)))


def settings_tree(given: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """The settings tree of `--set` assignments and of the options given, which win."""
    from rite_diffusion.config import merge, parse_assignments

    pairs = {key: value for key, value in given.items() if value is not None}
    tree: dict[str, Any] = {}
    for key, value in pairs.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return merge(parse_assignments(assignments), tree)
