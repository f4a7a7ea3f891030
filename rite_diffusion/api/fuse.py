"""Fusion of adapter files into one file, and the report of their conflicts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Unpack

from rite_diffusion.adapters import Adapter, save_adapter
from rite_diffusion.adapters.attach import base_weights, check_base, check_fit
from rite_diffusion.adapters.choice import choose_adapters, notes
from rite_diffusion.api.bases import open_base
from rite_diffusion.api.concept_pictures import draw_concepts
from rite_diffusion.api.sketch import with_sketches, with_statistics_of
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import FusionError
from rite_diffusion.files.writing import check_outputs, file_output, print_to_stderr, write_output
from rite_diffusion.fusion.conflict_sheet import conflict_sheet
from rite_diffusion.fusion.dora import as_plain, has_dora
from rite_diffusion.fusion.loss import ALLOWED, describe_loss
from rite_diffusion.fusion.members import Member, check_and_sort
from rite_diffusion.fusion.merge import Merged, merge_with_loss, method_named
from rite_diffusion.fusion.report import ConflictReport, report_on
from rite_diffusion.fusion.settings import FusionOptions, FusionSettings, checked_settings
from rite_diffusion.fusion.statistics import DEFAULT_DRAWING, Drawing

FUSED, SUFFIX = "fused.safetensors", ".safetensors"


@dataclass(frozen=True)
class Outcome:
    """The files that `fuse_and_report` wrote, and the report."""

    adapter: Path
    loss: float  # as in FusionPreview
    report: ConflictReport
    json: Path
    sheet: Path


@dataclass(frozen=True)
class FusionPreview:
    """The adapter that a fusion would write, its loss and its conflicts."""

    adapter: Adapter
    loss: float  # relative Frobenius error from the limit on the rank
    report: ConflictReport


def fuse(
    adapters: Sequence[str | Path],
    *,
    method: str = "gram",
    out: str | Path | None = None,
    base: str | Backbone | None = None,
    drawing: Drawing = DEFAULT_DRAWING,
    overwrite: bool = False,
    allow_loss: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Unpack[FusionOptions],
) -> Path:
    """Fuse adapters, `FILE` or `FILE:WEIGHT`, into one file and return its path.

    `settings` are those of `FusionSettings`, such as `rank=8` or `preserve=0.5`. Methods that need
    statistics take them from sketches beside the files, else from a few pictures that the base
    model draws; `progress` is called with the numbers of pictures drawn and in total. `out`
    defaults to `fused.safetensors`, which is replaced only with `overwrite`. The loss from a limit
    on the rank is printed on stderr, and refused above 1 % unless `allow_loss`. Raises RiteError
    before a file is written.
    """
    how = _checked(method, settings)
    target = file_output(out or FUSED, SUFFIX)
    members = _chosen_members(adapters)
    check_outputs(*_named(out, target), sources=_files(members), overwrite=overwrite)
    measured = how.needs_statistics and len(members) > 1
    fused = _solve_within_loss(members, how, base, drawing, progress, measured, allow_loss)
    save_adapter(target, fused.adapter)
    return target


def fused_adapter(
    adapters: Sequence[str | Path],
    *,
    method: str = "gram",
    base: str | Backbone | None = None,
    drawing: Drawing = DEFAULT_DRAWING,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Unpack[FusionOptions],
) -> Merged:
    """The adapter that `fuse` would write, and its loss; nothing is written."""
    how = _checked(method, settings)
    members = _chosen_members(adapters)
    measured = how.needs_statistics and len(members) > 1
    fused = _solve(members, how, base, drawing, progress, measured)
    return Merged(fused.adapter, fused.loss)


def check_loss(loss: float, settings: FusionSettings, allow_loss: bool) -> None:
    """Raise FusionError for a loss above both 1 % and `settings.error`, unless it is allowed."""
    if not allow_loss and loss > max(ALLOWED, settings.error or 0):
        raise FusionError(
            f"cut in rank, the fused adapter has a {describe_loss(loss)}, more than {ALLOWED:.0%}: "
            "raise --rank, or accept the loss with --allow-loss."
        )


def fuse_and_report(
    adapters: Sequence[str | Path],
    *,
    method: str = "gram",
    out: str | Path | None = None,
    base: str | Backbone | None = None,
    drawing: Drawing = DEFAULT_DRAWING,
    overwrite: bool = False,
    allow_loss: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Unpack[FusionOptions],
) -> Outcome:
    """Fuse as `fuse` does, and write the conflict report: `.report.json` and `.report.png`.

    The base model draws each concept by its adapter alone, by the plain sum, and by the result.
    Earlier reports are replaced only with `overwrite`.
    """
    how = _checked(method, settings)
    target = file_output(out or FUSED, SUFFIX)
    figures, sheet = (target.with_name(f"{target.stem}.report.{kind}") for kind in ("json", "png"))
    members = _chosen_members(adapters)
    outputs = _named(out, target, figures, sheet)
    check_outputs(*outputs, sources=_files(members), overwrite=overwrite)
    fused = _solve_within_loss(
        members, how, base, drawing, progress, measured=True, allow_loss=allow_loss
    )
    report = report_on(fused.members, fused.adapter)
    pictures = draw_concepts(fused.open_backbone(), fused.members, fused.adapter, drawing.seed)
    drawn = BytesIO()
    conflict_sheet(report, pictures).save(drawn, "PNG")
    save_adapter(target, fused.adapter)
    content = report.as_dict() | {"loss": fused.loss}
    write_output(figures, (json.dumps(content, indent=1) + "\n").encode())
    write_output(sheet, drawn.getvalue())
    return Outcome(target, fused.loss, report, figures, sheet)


def _named(
    out: str | Path | None, target: Path, *reports: Path
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The files to write: those that the user named, and those with derived names."""
    return ((target,), reports) if out else ((), (target, *reports))


def _files(members: Sequence[Member]) -> list[Path]:
    return [member.file for member in members]


def preview_fusion(
    adapters: Sequence[str | Path],
    *,
    method: str = "gram",
    base: str | Backbone | None = None,
    drawing: Drawing = DEFAULT_DRAWING,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **settings: Unpack[FusionOptions],
) -> FusionPreview:
    """The adapter of a fusion, its loss and its conflict report; nothing is written.

    Arguments are those of `fuse`. Statistics come from sketches beside the files, else from a few
    pictures that the base model draws.
    """
    how = _checked(method, settings)
    fused = _solve(_chosen_members(adapters), how, base, drawing, progress, measured=True)
    return FusionPreview(fused.adapter, fused.loss, report_on(fused.members, fused.adapter))


@dataclass(frozen=True)
class _How:
    """A fusion method and its settings, both checked."""

    method: str
    settings: FusionSettings

    @property
    def needs_statistics(self) -> bool:
        """Whether the method uses statistics of layers' inputs."""
        return method_named(self.method).statistics


def _checked(method: str, settings: FusionOptions) -> _How:
    checked = checked_settings(settings)
    method_named(method)
    return _How(method, checked)


@dataclass(frozen=True)
class _Fused:
    """A fused adapter in memory, and its members."""

    adapter: Adapter
    loss: float
    members: list[Member]  # with statistics where these were measured
    open_backbone: Callable[[], Backbone]


def _solve(
    members: list[Member],
    how: _How,
    base: str | Backbone | None,
    drawing: Drawing,
    progress: Callable[[int, int], None],
    measured: bool,
) -> _Fused:
    """The fused adapter in memory; with `measured`, its members get statistics."""
    open_backbone = _opener(base, members)
    members = with_plain_updates(members, open_backbone)
    if measured:
        members = with_sketches(members, open_backbone, drawing, progress)
    fused = _merged(members, how.method, how.settings, open_backbone, drawing, progress)
    return _Fused(fused.adapter, fused.loss, members, open_backbone)


def _solve_within_loss(
    members: list[Member],
    how: _How,
    base: str | Backbone | None,
    drawing: Drawing,
    progress: Callable[[int, int], None],
    measured: bool,
    allow_loss: bool,
) -> _Fused:
    """What `_solve` returns; the loss is checked, and printed on stderr where there is one."""
    fused = _solve(members, how, base, drawing, progress, measured)
    check_loss(fused.loss, how.settings, allow_loss)
    if fused.loss:
        print_to_stderr(f"cut in rank: {describe_loss(fused.loss)}")
    return fused


def _merged(
    members: list[Member],
    method: str,
    settings: FusionSettings,
    open_backbone: Callable[[], Backbone],
    drawing: Drawing,
    progress: Callable[[int, int], None],
) -> Merged:
    """The fused adapter, refined `settings.refine` times."""
    fused = merge_with_loss(members, method, settings)
    if len(members) > 1 and method_named(method).statistics:
        for _ in range(settings.refine):
            seen = with_statistics_of(fused.adapter, members, open_backbone(), drawing, progress)
            fused = merge_with_loss(seen, method, settings)
    return fused


def _chosen_members(adapters: Sequence[str | Path]) -> list[Member]:
    """The adapters, checked and sorted; notes about them are printed on stderr."""
    chosen = choose_adapters(adapters)
    members = check_and_sort([Member(each.adapter, each.weight, each.path) for each in chosen])
    for line in notes(chosen):
        print_to_stderr(line)
    return members


def _opener(base: str | Backbone | None, members: list[Member]) -> Callable[[], Backbone]:
    """A function that opens the base model and checks that the members fit, at its first call."""

    @cache
    def opened() -> Backbone:
        backbone = open_base(base, [member.adapter.info for member in members])
        for member in members:
            check_base(backbone, member.adapter)
        return backbone

    return opened


def with_plain_updates(
    members: list[Member], open_backbone: Callable[[], Backbone]
) -> list[Member]:
    """The members, with DoRA layers as plain updates of the base's weights."""
    if not any(has_dora(member.adapter) for member in members):
        return members
    backbone = open_backbone()
    weights = base_weights(backbone)
    for member in members:
        check_fit(backbone, member.adapter)
    return [
        replace(m, plain=as_plain(m.adapter, weights)) if has_dora(m.adapter) else m
        for m in members
    ]
