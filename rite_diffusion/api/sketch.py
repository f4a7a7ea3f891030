"""Statistics of adapters: from the sketches beside their files, or drawn by the base model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rite_diffusion.adapters import Adapter, load_adapter
from rite_diffusion.adapters.attach import check_base
from rite_diffusion.api.bases import open_base
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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `FILE.sketch.safetensors` beside an adapter: what others need to fuse it.

    `prompts` default to a few with the adapter's trigger; `directions` bounds the file's size. A
    file of the default name is replaced with `overwrite` alone.
    """
    if not 1 <= directions <= 4096:
        raise FusionError(f"{directions} directions are not between 1 and 4096")
    path = user_path(adapter)
    content = load_adapter(path)
    target = file_output(out, ".safetensors") if out else sketch_path(path)
    wanted = list(prompts) or concept_prompts(content.info, path)
    named, derived = ([target], []) if out else ([], [target])
    check_outputs(named, derived, sources=[path], overwrite=overwrite)
    backbone = open_base(base, [content.info])
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
    """The members with their sketches: from files beside the adapters, the others measured now."""
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
    """The members with what flows into the layers when the fused adapter draws their concepts.

    An error in one layer changes the inputs of the next, which statistics of each adapter alone
    never see; aggregating on the learner's own inputs is the idea of DAgger (Ross et al. 2011,
    arXiv 1011.0686).
    """
    prompts = [concept_prompts(member.adapter.info, member.file) for member in members]
    names = sketched_layers(backbone, [member.adapter for member in members])
    with out_of_memory_explained():
        seen = measure_concepts(backbone, [fused] * len(members), prompts, names, drawing, progress)
    return [_seeing(member, moments) for member, moments in zip(members, seen, strict=True)]


def _seeing(member: Member, moments: SecondMoments) -> Member:
    """The member with other statistics of its concept; those of the base stay."""
    assert member.sketch is not None  # taken of each alone before
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
    """Turn running out of memory into a FusionError that says what helps."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise FusionError(
            f"not enough memory for the statistics ({error}): make a sketch of one adapter after "
            "the other with `rite sketch`, or use a method without statistics."
        ) from None
