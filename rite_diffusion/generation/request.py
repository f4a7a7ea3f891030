"""One picture from its parameters, and the parameters from what a user leaves open."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL.Image import Image
from torch import Tensor

from rite_diffusion._version import __version__
from rite_diffusion.adapters.choice import Record
from rite_diffusion.backbones.prompt_syntax import read_prompt
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.generation.attached import Attached, turned
from rite_diffusion.generation.composition import COMPOSITIONS, SUM
from rite_diffusion.generation.control import Control, under_control
from rite_diffusion.generation.denoise import Predict, denoising, guided, pictures
from rite_diffusion.generation.layout import find_boxes
from rite_diffusion.generation.metadata import Parameters
from rite_diffusion.generation.regional import regionally_guided
from rite_diffusion.generation.regions import Sought, adapter_weights, parse_region, parse_regions
from rite_diffusion.seeding import check_seed

LONGEST_SIDE = 4096  # pixels
MOST_PICTURES, MOST_STEPS, MOST_GUIDANCE = 10_000, 1000, 100


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
    width = backbone.resolution if width is None else width
    height = backbone.resolution if height is None else height
    for side in (width, height):
        if side % backbone.multiple or not 0 < side <= LONGEST_SIDE:
            raise ConfigError(
                f"side {side} is not a multiple of {backbone.multiple} up to {LONGEST_SIDE}"
            )
    check_amounts(seed, steps, guidance)
    check_prompts([prompt, negative], regions, backbone.literal_words)
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
        guidance=backbone.default_guidance if guidance is None else guidance,
        width=width,
        height=height,
        base=backbone.name,
        base_fingerprint=backbone.fingerprint,
        adapters=list(adapters),
        version=__version__,
        regions=[str(region) for region in parse_regions(regions, prompt)],
        sampler="Euler" if backbone.prediction_type == "flow" else "DDIM",
        combine=combine,
        controls=list(controls),
    )


def check_amounts(seed: int, steps: int, guidance: float | None, num: int = 1) -> None:
    """ConfigError where so many pictures from a seed on cannot be drawn so."""
    if not 1 <= num <= MOST_PICTURES:
        raise ConfigError(f"{num} pictures are not between 1 and {MOST_PICTURES}")
    check_seed(seed, num)
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"{steps} steps are not between 1 and {MOST_STEPS}")
    if guidance is not None and not 0 <= guidance <= MOST_GUIDANCE:
        raise ConfigError(f"guidance {guidance} is not between 0 and {MOST_GUIDANCE}")


def check_prompts(prompts: Sequence[str], regions: Sequence[str], literal: Sequence[str]) -> None:
    """ConfigError for syntax in prompts or regions that is not supported; `literal` is text."""
    for text in (*prompts, *regions):
        read_prompt(text, literal)


def placed(
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
    with turned(backbone, adapters, factors[0]):
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
