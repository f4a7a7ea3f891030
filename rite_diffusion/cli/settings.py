"""What commands share: the settings tree of their options, and printing of lines."""

from typing import Annotated, Any

import typer

from rite_diffusion.files.writing import printable

Weights = Annotated[
    str, typer.Option(help="How the denoiser's weights are stored: full, int8, fp8 or nf4.")
]
EncoderWeights = Annotated[
    str, typer.Option(help="How the text encoders' weights are stored: full, int8, fp8 or nf4.")
]
Offload = Annotated[
    str, typer.Option(help="What waits in main memory until it is used: none, layers or model.")
]


def memory_table(weights: str, encoder_weights: str, offload: str) -> dict[str, str]:
    """The settings of `[memory]` that a command's options give."""
    return {"weights": weights, "encoder_weights": encoder_weights, "offload": offload}


def say(text: object) -> None:
    """Print a line without control characters, as it may quote a file."""
    print(printable(str(text)))


def settings_tree(given: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """The settings tree of `--set` assignments and of the options given, which win."""
    from rite_diffusion.config import merge, nest, parse_assignments

    pairs = {key: value for key, value in given.items() if value is not None}
    tree: dict[str, Any] = {}
    for key, value in pairs.items():
        tree = merge(tree, nest(key, value))
    return merge(parse_assignments(assignments), tree)
