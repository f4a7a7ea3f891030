"""Pictures for the report of a fusion: each concept before and after."""

from PIL.Image import Image

from rite_diffusion.adapters import Adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.fusion.conflict_sheet import ConceptPictures
from rite_diffusion.fusion.members import Member
from rite_diffusion.generation.denoise import sample

SHOWN = 2  # pictures of each concept in a report


def draw_concepts(
    backbone: Backbone, members: list[Member], fused: Adapter, seed: int
) -> list[ConceptPictures]:
    """Pictures of each concept by its adapter alone, by all attached, and by the fused one."""
    prompts = [_shown_prompt(member) for member in members]
    alone = [_draw(backbone, [(m.adapter, m.weight)], [p], seed)[0]
             for m, p in zip(members, prompts, strict=True)]  # fmt: skip
    summed = _draw(backbone, [(m.adapter, m.weight) for m in members], prompts, seed)
    together = _draw(backbone, [(fused, 1.0)], prompts, seed)
    return [ConceptPictures(*three) for three in zip(alone, summed, together, strict=True)]


def _shown_prompt(member: Member) -> str:
    triggers = member.adapter.info.triggers()
    if not triggers:
        assert member.sketch is not None  # made with prompts of its own
        return member.sketch.metadata.prompts.splitlines()[0]
    return f"a {triggers[0]} on a blue background"


def _draw(
    backbone: Backbone, adapters: list[tuple[Adapter, float]], prompts: list[str], seed: int
) -> list[list[Image]]:
    """Pictures of each prompt with these adapters attached."""
    names = [f"report_{index}" for index in range(len(adapters))]
    for name, (adapter, weight) in zip(names, adapters, strict=True):
        attach(backbone, adapter, name, weight)
    try:
        seeds = list(range(seed, seed + SHOWN))
        guidance = backbone.defaults.guidance
        return [sample(backbone, [prompt] * SHOWN, seeds, guidance=guidance) for prompt in prompts]
    finally:
        for name in names:
            detach(backbone, name)
