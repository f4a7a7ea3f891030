"""Parameters inside PNG files: JSON for this toolkit, text for tools that read A1111's."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image, PngImagePlugin

import rite_diffusion
from rite_diffusion.adapters.choice import Chosen
from rite_diffusion.generation.regions import Region
from rite_diffusion.generation.sampler import Sampling
from rite_diffusion.types import Backbone

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
    adapters: list[dict]  # file name, weight, sha256 of each
    version: str
    regions: list[str] = field(default_factory=list)  # as `--region` takes them

    def as_text(self) -> str:
        """The parameters in A1111's form."""
        lines = [self.prompt]
        if self.negative:
            lines.append(f"Negative prompt: {self.negative}")
        lines.append(
            f"Steps: {self.steps}, Sampler: DDIM, CFG scale: {self.guidance:g}, Seed: {self.seed}, "
            f"Size: {self.width}x{self.height}, Model: {self.base}"
        )
        return "\n".join(lines)


def parameters_of(
    backbone: Backbone,
    prompt: str,
    seed: int,
    sampling: Sampling,
    adapters: Sequence[Chosen],
    regions: Sequence[Region] = (),
) -> Parameters:
    """All that decides a picture."""
    width, height = sampling.size(backbone)
    return Parameters(
        prompt=prompt,
        negative=sampling.negative,
        seed=seed,
        steps=sampling.steps,
        guidance=sampling.guidance,
        width=width,
        height=height,
        base=backbone.name,
        base_fingerprint=backbone.fingerprint,
        adapters=[each.record() for each in adapters],
        version=rite_diffusion.__version__,
        regions=[str(region) for region in regions],
    )


def save_png(image: Image.Image, path: Path, parameters: Parameters) -> None:
    """Write a picture with its parameters."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", parameters.as_text())
    info.add_text(KEY, json.dumps(asdict(parameters)))
    image.save(path, "PNG", pnginfo=info)


def read_parameters(path: Path) -> Parameters:
    """The parameters that `save_png` wrote; KeyError where a picture has none."""
    with Image.open(path, formats=("PNG",)) as image:
        return Parameters(**json.loads(image.info[KEY]))
