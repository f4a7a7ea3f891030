"""Parameters inside PNG files: JSON for this toolkit, text for tools that read A1111's."""

import json
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin
from pydantic import TypeAdapter

from rite_diffusion.generation.request import Parameters

KEY = "rite"


def png_of(image: Image.Image, parameters: Parameters) -> bytes:
    """A picture as a PNG file that holds its parameters."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters.as_text())
    info.add_text(KEY, json.dumps(asdict(parameters)))
    stream = BytesIO()
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def read_parameters(path: Path) -> Parameters:
    """The parameters that `png_of` put in.

    KeyError where a picture has none, ValueError where they are not what they should be.
    """
    with Image.open(path, formats=("PNG",)) as image:
        return TypeAdapter(Parameters).validate_json(image.info[KEY])
