"""One picture from its parameters, and the parameters from what a user leaves open."""

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
from rite_diffusion.generation.denoise import Predict, denoising, guided, pictures
from rite_diffusion.generation.layout import find_boxes
from rite_diffusion.generation.regional import regionally_guided
from rite_diffusion.generation.regions import Sought, adapter_weights, parse_region, parse_regions
from rite_diffusion.generation.request import Parameters, PictureRequest

LONGEST_SIDE = 4096  # pixels


def resolved(
    backbone: Backbone, request: PictureRequest, adapters: Sequence[Record] = ()
) -> Parameters:
    """Everything that decides a picture of this model; what the request leaves open is the base's.

    ConfigError for what the model cannot draw.
    """
    width = backbone.resolution if request.width is None else request.width
    height = backbone.resolution if request.height is None else request.height
    for side in (width, height):
        if side % backbone.multiple or not 0 < side <= LONGEST_SIDE:
            raise ConfigError(
                f"side {side} is not a multiple of {backbone.multiple} up to {LONGEST_SIDE}"
            )
    request.check(backbone.protected_words)
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
        combine=request.combine,
        controls=list(request.controls),
        base=backbone.name,
        base_fingerprint=backbone.fingerprint,
        adapters=list(adapters),
        version=__version__,
        sampler="Euler" if backbone.prediction_type == "flow" else "DDIM",
    )


def with_boxes(
    backbone: Backbone,
    parameters: Parameters,
    adapters: Sequence[Attached] = (),
    controls: Sequence[Control] = (),
) -> Parameters:
    """The parameters with a box for each region that names a word of the prompt instead of one.

    Boxes are those of the things in the prompt's own picture, without the adapters that regions
    call.
    """
    parts = parse_regions(parameters.regions, parameters.prompt)
    words = [part.word for part in parts if isinstance(part, Sought)]
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
    regions = [part.at(*next(found)) if isinstance(part, Sought) else part for part in parts]
    return replace(parameters, regions=[str(region) for region in regions])


def estimates(
    backbone: Backbone,
    parameters: Parameters,
    adapters: Sequence[Attached] = (),
    controls: Sequence[Control] = (),
) -> Iterator[Tensor]:
    """The latents (1, C, h, w) that the model expects after each step; the last are the result.

    `adapters` are those in the model; regions and compositions turn them up and down. `controls`
    are those that the parameters name. Every region has its box: see `placed`.
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
