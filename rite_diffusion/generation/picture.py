"""Resolving a request into parameters, and drawing the picture of parameters."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL.Image import Image
from torch import Tensor

from rite_diffusion._version import __version__
from rite_diffusion.adapters.choice import Record
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.attached import Attached, scaled_by
from rite_diffusion.generation.composition import COMPOSITIONS, SUM
from rite_diffusion.generation.control import Control, under_control
from rite_diffusion.generation.denoise import Predict, decode_pictures, denoising, guided
from rite_diffusion.generation.layout import find_boxes
from rite_diffusion.generation.regional import regionally_guided, ways
from rite_diffusion.generation.regions import (
    WordRegion,
    adapter_weights,
    parse_region,
    parse_regions,
)
from rite_diffusion.generation.request import Parameters, PictureRequest

LONGEST_SIDE = 4096  # pixels


def resolve_request(
    backbone: Backbone, request: PictureRequest, adapters: Sequence[Record] = ()
) -> Parameters:
    """The parameters of a request; what it leaves None takes the base's default.

    `adapters` are the records of those attached. ConfigError for what the base cannot draw.
    """
    width = backbone.resolution if request.width is None else request.width
    height = backbone.resolution if request.height is None else request.height
    for side in (width, height):
        if side % backbone.multiple or not 0 < side <= LONGEST_SIDE:
            raise ConfigError(
                f"side {side} is not a multiple of {backbone.multiple} up to {LONGEST_SIDE}"
            )
    request.check(backbone.protected_words)
    if request.negative and backbone.guidance.kind != "classifier_free":
        raise ConfigError(f"{backbone.name} has no negative prompt: leave it out.")
    guidance = backbone.defaults.guidance if request.guidance is None else request.guidance
    return Parameters(
        prompt=request.prompt,
        negative=request.negative,
        seed=request.seed,
        steps=backbone.defaults.steps if request.steps is None else request.steps,
        guidance=guidance,
        width=width,
        height=height,
        regions=[str(region) for region in parse_regions(request.regions, request.prompt)],
        region_by=_resolved_way(backbone, request),
        combine=request.combine,
        controls=list(request.controls),
        base=backbone.name,
        base_fingerprint=backbone.fingerprint,
        adapters=list(adapters),
        version=__version__,
        sampler="Euler" if backbone.prediction_type == "flow" else "DDIM",
    )


def _resolved_way(backbone: Backbone, request: PictureRequest) -> str | None:
    """How the request's regions are drawn; None without regions."""
    if not request.regions:
        return None
    known = ways(backbone)
    if request.region_by not in (None, *known):
        raise ConfigError(
            f"{backbone.name} draws no regions by {request.region_by}: choose {' or '.join(known)}."
        )
    return request.region_by or known[0]


def resolve_boxes(
    backbone: Backbone,
    parameters: Parameters,
    adapters: Sequence[Attached] = (),
    controls: Sequence[Control] = (),
) -> Parameters:
    """The parameters with a box found for each region that names a word.

    Words are located in the picture of the prompt, without the adapters that regions call.
    """
    parts = parse_regions(parameters.regions, parameters.prompt)
    words = [part.word for part in parts if isinstance(part, WordRegion)]
    if not words:
        return parameters
    prompt = parameters.prompt
    texts = (prompt, parameters.negative)
    factors = adapter_weights(parts, prompt, [adapter.triggers for adapter in adapters])
    with scaled_by(backbone, adapters, factors[0]):
        plain = guided(backbone, [prompt], parameters.negative, parameters.guidance)
        boxes = find_boxes(
            backbone, under_control(plain, backbone, controls, texts), prompt, words,
            seed=parameters.seed, steps=parameters.steps, width=parameters.width,
            height=parameters.height,
        )  # fmt: skip
    found = iter(boxes)
    regions = [part.at(*next(found)) if isinstance(part, WordRegion) else part for part in parts]
    return replace(parameters, regions=[str(region) for region in regions])


def estimates(
    backbone: Backbone,
    parameters: Parameters,
    adapters: Sequence[Attached] = (),
    controls: Sequence[Control] = (),
) -> Iterator[Tensor]:
    """The estimate of the final latents (1, C, h, w) after each step; the last are the result.

    `adapters` are those attached; regions and compositions scale them. `controls` are those that
    the parameters name. Every region must have a box: see `resolve_boxes`.
    """
    return denoising(
        backbone,
        under_control(
            _prediction(backbone, parameters, adapters),
            backbone,
            controls,
            (parameters.prompt, parameters.negative),
        ),
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
            region_by=parameters.region_by,
        )
    asked = parameters.prompt, parameters.negative, parameters.guidance
    if parameters.combine != SUM:
        return COMPOSITIONS[parameters.combine](backbone, *asked, adapters)
    prompt, negative, guidance = asked
    return guided(backbone, [prompt], negative, guidance)


def draw_picture(
    backbone: Backbone,
    parameters: Parameters,
    adapters: Sequence[Attached] = (),
    controls: Sequence[Control] = (),
) -> Image:
    """The picture of the parameters; the adapters they name must be attached already."""
    *_, latents = estimates(backbone, parameters, adapters, controls)
    return decode_pictures(backbone, latents)[0]
