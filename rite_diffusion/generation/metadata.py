"""Parameters inside PNG files: JSON for this toolkit, text for tools that read A1111's."""

import json
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image, PngImagePlugin
from pydantic import TypeAdapter

from rite_diffusion.adapters.choice import Record

KEY = "rite"


@dataclass(frozen=True)
class Parameters:
    """Everything that decides a picture's pixels."""

    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    base: str
    base_fingerprint: str
    adapters: list[Record]
    version: str
    regions: list[str] = field(default_factory=list)  # as `--region` takes them
    sampler: str = "DDIM"
    combine: str = "sum"  # how several adapters act together
    controls: list[str] = field(default_factory=list)  # condition pictures and their networks

    def as_text(self) -> str:
        """The parameters in A1111's form."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        lines.append(
            f"Steps: {self.steps}, Sampler: {self.sampler}, CFG scale: {self.guidance:g}, "
            f"Seed: {self.seed}, Size: {self.width}x{self.height}, Model: {self.base}"
        )
        return "\n".join(lines)


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
