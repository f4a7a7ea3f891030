"""One picture from its parameters, and the parameters from what a user leaves open."""

from collections.abc import Iterator, Sequence

from PIL.Image import Image
from torch import Tensor

import rite_diffusion
from rite_diffusion.adapters.choice import Record
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.composition import COMPOSITIONS, SUM
from rite_diffusion.generation.control import Control, under_control
from rite_diffusion.generation.metadata import Parameters
from rite_diffusion.generation.regional import regionally_guided
from rite_diffusion.generation.regions import parse_region
from rite_diffusion.generation.sampler import (
    Predict,
    default_guidance,
    denoising,
    guided,
    pictures,
)
from rite_diffusion.types import Backbone, ConfigError

LONGEST_SIDE = 4096  # pixels


def complete(
    backbone: Backbone,
    adapters: Sequence[Record],
    *,
    prompt: str,
    negative: str,
    seed: int,
    steps: int,
    guidance: float | None,
    width: int | None,
    height: int | None,
    regions: Sequence[str] = (),
    combine: str = SUM,
    controls: Sequence[str] = (),
) -> Parameters:
    """Everything that decides a picture of this model; what is None is the base's own.

    Sides are in pixels; ConfigError where the model cannot draw one, or a word is not known.
    """
    width, height = width or backbone.resolution, height or backbone.resolution
    for side in (width, height):
        if side % backbone.multiple or not 0 < side <= LONGEST_SIDE:
            raise ConfigError(
                f"side {side} is not a multiple of {backbone.multiple} up to {LONGEST_SIDE}"
            )
    if combine not in (SUM, *COMPOSITIONS):
        known = ", ".join((SUM, *COMPOSITIONS))
        raise ConfigError(f"no way '{combine}' to combine adapters: choose one of {known}")
    if regions and combine != SUM:
        raise ConfigError(f"regions have their own adapters each: leave out '{combine}'")
    return Parameters(
        prompt=prompt,
        negative=negative,
        seed=seed,
        steps=steps,
        guidance=default_guidance(backbone) if guidance is None else guidance,
        width=width,
        height=height,
        base=backbone.name,
        base_fingerprint=backbone.fingerprint,
        adapters=list(adapters),
        version=rite_diffusion.__version__,
        regions=[str(parse_region(text)) for text in regions],
        sampler="Euler" if backbone.prediction_type == "flow" else "DDIM",
        combine=combine,
        controls=list(controls),
    )


def estimates(
    backbone: Backbone,
    parameters: Parameters,
    adapters: Sequence[Attached] = (),
    controls: Sequence[Control] = (),
) -> Iterator[Tensor]:
    """The latents (1, C, h, w) that the model expects after each step; the last are the result.

    `adapters` are those in the model; regions and compositions turn them up and down. `controls`
    are those that the parameters name.
    """
    return denoising(
        backbone,
        under_control(_prediction(backbone, parameters, adapters), backbone, controls),
        [parameters.seed],
        steps=parameters.steps,
        width=parameters.width,
        height=parameters.height,
    )


def _prediction(
    backbone: Backbone, parameters: Parameters, adapters: Sequence[Attached]
) -> Predict:
    if parameters.regions:
        return regionally_guided(
            backbone,
            parameters.prompt,
            [parse_region(text) for text in parameters.regions],
            negative=parameters.negative,
            guidance=parameters.guidance,
            width=parameters.width,
            height=parameters.height,
            adapters=adapters,
        )
    asked = parameters.prompt, parameters.negative, parameters.guidance
    if parameters.combine != SUM:
        return COMPOSITIONS[parameters.combine](backbone, *asked, adapters)
    prompt, negative, guidance = asked
    return guided(backbone, [prompt], negative, guidance)


def picture(
    backbone: Backbone,
    parameters: Parameters,
    adapters: Sequence[Attached] = (),
    controls: Sequence[Control] = (),
) -> Image:
    """The picture that the parameters decide; the adapters they name are in the model already."""
    *_, latents = estimates(backbone, parameters, adapters, controls)
    return pictures(backbone, latents)[0]
