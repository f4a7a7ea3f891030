"""Settings as options and `--set` give them."""

from typing import Any


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
