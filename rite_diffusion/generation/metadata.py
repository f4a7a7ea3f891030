"""Parameters in PNG files: JSON for this toolkit, and text in A1111's form for other tools."""

import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin
from pydantic import TypeAdapter

from rite_diffusion.generation.request import Parameters

KEY = "rite"


def encode_png(image: Image.Image, parameters: Parameters) -> bytes:
    """The bytes of a PNG file with a picture and its parameters."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters.as_text())
    info.add_text(KEY, json.dumps(asdict(parameters)))
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read_parameters(path: Path) -> Parameters:
    """The parameters that `encode_png` wrote into a PNG file.

    KeyError where it has none, ValueError where they are invalid.
    """
    with Image.open(path, formats=("PNG",)) as image:
        return TypeAdapter(Parameters).validate_json(image.info[KEY])
