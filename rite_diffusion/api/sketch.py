"""`rite.sketch`: statistics of adapters' inputs, read from sketch files or measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.attach import check_base
from rite_diffusion.api.bases import PLAIN, open_base
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import FusionError
from rite_diffusion.files.writing import check_outputs, file_output, user_path
from rite_diffusion.fusion.measure import measure, measure_concepts, sketched_layers
from rite_diffusion.fusion.members import Member
from rite_diffusion.fusion.prompts import concept_prompts
from rite_diffusion.fusion.sketch import load_sketch, save_sketch, sketch_path
from rite_diffusion.fusion.statistics import DEFAULT_DRAWING, Drawing, SecondMoments
from rite_diffusion.training.memory import is_out_of_memory

SKETCH_DIRECTIONS = 64  # per layer in a sketch file


def sketch(
    adapter: str | Path,
    *,
    out: str | Path | None = None,
    base: str | Backbone | None = None,
    prompts: Sequence[str] = (),
    directions: int = SKETCH_DIRECTIONS,
    drawing: Drawing = DEFAULT_DRAWING,
    overwrite: bool = False,
    memory: Mapping[str, str] = PLAIN,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write an adapter's sketch, by default `FILE.sketch.safetensors`, and return its path.

    The sketch holds second moments of the adapted layers' inputs while the base draws `prompts`, by
    default a few with the adapter's trigger: with it, others can fuse the adapter without drawing.
    `directions`, 1 to 4096 per layer, bounds its size. An existing file of the default name is
    replaced only with `overwrite`. `memory` holds settings of a training's `[memory]` table.
    `progress` is called with the pictures done and their number. Raises RiteError where adapter,
    base or output cannot be used.
    """
    if not 1 <= directions <= 4096:
        raise FusionError(f"{directions} directions are not between 1 and 4096")
    path = user_path(adapter)
    content = load_adapter(path)
    target = file_output(out, ".safetensors") if out else sketch_path(path)
    wanted = list(prompts) or concept_prompts(content.info, path)
    named, derived = ([target], []) if out else ([], [target])
    check_outputs(named, derived, sources=[path], overwrite=overwrite)
    backbone = open_base(base, [content.info], memory)
    check_base(backbone, content)
    with out_of_memory_explained():
        [made] = measure(backbone, [content], [wanted], drawing, progress)
    save_sketch(target, made, directions)
    return target


def with_sketches(
    members: list[Member],
    open_backbone: Callable[[], Backbone],
    drawing: Drawing,
    progress: Callable[[int, int], None],
) -> list[Member]:
    """The members with sketches: those of files beside the adapters, the others measured."""
    members = [_with_file(member) for member in members]
    bare = [member for member in members if member.sketch is None]
    if not bare:
        return members
    prompts = [concept_prompts(member.adapter.info, member.file) for member in bare]
    backbone = open_backbone()
    with out_of_memory_explained():
        sketches = measure(backbone, [m.adapter for m in bare], prompts, drawing, progress)
    measured = {member.digest: sketch for member, sketch in zip(bare, sketches, strict=True)}
    return [replace(m, sketch=m.sketch or measured[m.digest]) for m in members]


def with_statistics_of(
    fused: Adapter,
    members: list[Member],
    backbone: Backbone,
    drawing: Drawing,
    progress: Callable[[int, int], None],
) -> list[Member]:
    """The members with second moments of the layers' inputs while the fused adapter draws.

    An error in one layer changes the inputs of the next, which statistics of the single adapters do
    not contain. Measuring on the inputs that the result itself produces is the idea of DAgger (Ross
    et al. 2011, arXiv 1011.0686).
    """
    prompts = [concept_prompts(member.adapter.info, member.file) for member in members]
    names = sketched_layers(backbone, [member.adapter for member in members])
    with out_of_memory_explained():
        found = measure_concepts(
            backbone, [fused] * len(members), prompts, names, drawing, progress
        )
    return [_with_moments(member, moments) for member, moments in zip(members, found, strict=True)]


def _with_moments(member: Member, moments: SecondMoments) -> Member:
    """The member with other second moments of its concept; the base's stay."""
    assert member.sketch is not None  # measured with each adapter alone before
    return replace(member, sketch=replace(member.sketch, concept=moments))


def _with_file(member: Member) -> Member:
    """The member with the sketch beside its file, if there is one."""
    path = sketch_path(member.file)
    if not path.is_file():
        return member
    sketch = load_sketch(path)
    if sketch.metadata.adapter != member.digest:
        raise FusionError(
            f"{path} was made from another version of {member.file.name}: "
            f"make it again with `rite sketch {member.file} --overwrite`, or delete it."
        )
    return replace(member, sketch=sketch)


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turn out-of-memory errors into a FusionError with remedies."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise FusionError(
            f"not enough memory for the statistics ({error}): make a sketch of one adapter after "
            "the other with `rite sketch`, or use a method without statistics."
        ) from None
