"""Sketches measured on a base model, with an adapter and without."""

from collections.abc import Callable, Iterable, Sequence

from rite_diffusion._version import __version__
from rite_diffusion.adapters import Adapter
from rite_diffusion.adapters.attach import attach, detach
from rite_diffusion.adapters.names import module_name
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.fusion.members import digest_of
from rite_diffusion.fusion.prompts import ordinary_prompts
from rite_diffusion.fusion.sketch import Sketch, SketchMetadata
from rite_diffusion.fusion.statistics import Drawing, SecondMoments, collect

NAME = "sketched"  # of the adapter while it is attached


def measure_concept(
    backbone: Backbone,
    adapter: Adapter,
    prompts: Sequence[str],
    names: Sequence[str],
    drawing: Drawing,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SecondMoments:
    """Second moments of the layers' inputs while the adapter, at weight 1, draws the prompts."""
    attach(backbone, adapter, NAME)
    try:
        return collect(backbone, prompts, names, drawing, progress)
    finally:
        detach(backbone, NAME)


def measure_concepts(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    prompts: Sequence[Sequence[str]],
    names: Sequence[str],
    drawing: Drawing,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[SecondMoments]:
    """Second moments of the layers' inputs for each adapter, which draws its own prompts alone."""
    total, done = sum(map(len, prompts)) * drawing.pictures, 0
    found = []
    for adapter, each in zip(adapters, prompts, strict=True):
        before = done
        found.append(
            measure_concept(
                backbone, adapter, each, names, drawing,
                lambda pictures, _, before=before: progress(before + pictures, total),
            )
        )  # fmt: skip
        done += len(each) * drawing.pictures
    return found


def measure(
    backbone: Backbone,
    adapters: Sequence[Adapter],
    prompts: Sequence[Sequence[str]],
    drawing: Drawing,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sketch]:
    """A sketch of each adapter, with the base's statistics, of the layers in `sketched_layers`."""
    names = sketched_layers(backbone, adapters)
    ordinary = unique(prompt for adapter in adapters for prompt in ordinary_prompts(adapter.info))
    own = sum(map(len, prompts)) * drawing.pictures
    total = own + len(ordinary) * drawing.pictures
    concepts = measure_concepts(
        backbone, adapters, prompts, names, drawing, lambda done, _: progress(done, total)
    )
    base = collect(backbone, ordinary, names, drawing, lambda done, _: progress(own + done, total))
    return [
        Sketch(concept, base, sketch_metadata(backbone, adapter, each))
        for adapter, concept, each in zip(adapters, concepts, prompts, strict=True)
    ]


def sketch_metadata(backbone: Backbone, adapter: Adapter, prompts: Sequence[str]) -> SketchMetadata:
    """The metadata of a sketch's header."""
    return SketchMetadata(
        adapter=digest_of(adapter),
        base_fingerprint=backbone.fingerprint,
        prompts="\n".join(prompts),
        version=__version__,
    )


def sketched_layers(backbone: Backbone, adapters: Sequence[Adapter]) -> list[str]:
    """The layers of the adapters, and all attention projections, which other adapters may use."""
    own = [pair.name for adapter in adapters for pair in adapter.pairs]
    common = [
        module_name(component, path)
        for component in backbone.components
        for path in backbone.lora_targets(component)
    ]
    return sorted({*own, *common})


def unique(words: Iterable[str]) -> list[str]:
    """The words without duplicates, in order."""
    return list(dict.fromkeys(words))
