"""What commands share: settings as options and `--set` give them, and lines for a terminal."""

from typing import Any

from rite_diffusion.files.writing import printable


def say(text: object) -> None:
    """Print a line, which may hold what a file says."""
    print(printable(str(text)))


def settings_tree(given: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """The settings tree of command-line options that were given, `--set` first."""
    from rite_diffusion.config import merge, parse_assignments

    pairs = {key: value for key, value in given.items() if value is not None}
    tree: dict[str, Any] = {}
    for key, value in pairs.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return merge(parse_assignments(assignments), tree)
