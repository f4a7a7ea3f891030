"""The conflict report as HTML: errors per concept, crosstalk, and the worst layers."""

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rite_diffusion.api.fuse import FusionPreview
    from rite_diffusion.fusion.merge import Merged
    from rite_diffusion.fusion.report import ConflictReport

INTACT, RECOGNISABLE = 0.35, 0.75  # largest error of a concept that counts as such
WIDEST = 1.5  # error at which a bar is full


def fusion_html(made: "FusionPreview | Merged") -> str:
    """HTML of the loss by a limited rank, and of the conflict report where there is one."""
    from rite_diffusion.api.fuse import FusionPreview
    from rite_diffusion.fusion.loss import describe_loss

    cut = f"<p>Cut in rank: {describe_loss(made.loss)}.</p>" if made.loss else ""
    return cut + (report_html(made.report) if isinstance(made, FusionPreview) else "")


def report_html(report: "ConflictReport") -> str:
    """HTML of a conflict report: before the fusion and after it."""
    return (
        '<div class="conflicts">'
        f"<p>{escape(verdict(report))}</p>"
        f"{_errors(report)}{_crosstalk(report)}{_worst(report)}</div>"
    )


def verdict(report: "ConflictReport") -> str:
    """A sentence that sums the report up, with what to do about a loss."""
    before, after = _largest(report.before), _largest(report.after)
    if after <= INTACT:
        lost = "they also would side by side, without fusion" if before <= INTACT else (
            "side by side, without fusion, they would not"
        )  # fmt: skip
        return f"The concepts fit together by {report.method}; {lost}."
    worst = report.concepts[max(range(len(report.after)), key=lambda i: _known(report.after[i]))]
    if after <= RECOGNISABLE:
        return f"Some of {worst} is lost by {report.method}. Compare the pictures before you save."
    return (
        f"Most of {worst} is lost by {report.method}. Try gram, smaller weights, or adapters that "
        "were trained with the purpose “several concepts later”."
    )


def _known(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _largest(values: Sequence[float]) -> float:
    return max(map(_known, values), default=0.0)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def _errors(report: "ConflictReport") -> str:
    """Each concept's error before and after, as bars."""
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{_bar('before', before)}{_bar('after', after)}</dd>"
        for name, before, after in zip(report.concepts, report.before, report.after, strict=True)
    )
    drifts = f"<dd>{_bar('before', report.drift_before)}{_bar('after', report.drift_after)}</dd>"
    return (
        "<h4>What is lost <small>0: as by its adapter alone, 1: as without it</small></h4>"
        f"<dl>{rows}<dt>everything else</dt>{drifts}</dl>"
        '<p class="key"><i class="before"></i>side by side <i class="after"></i>'
        f"fused by {escape(report.method)}</p>"
    )


def _bar(kind: str, value: float) -> str:
    width = 100 * min(_known(value), WIDEST) / WIDEST
    return (
        f'<span><i class="{kind}" style="width:{max(width, 0.5):.1f}%"></i>{_number(value)}</span>'
    )


def _crosstalk(report: "ConflictReport") -> str:
    """A table: the size of a column's update on a row's inputs, relative to the row's own."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in report.concepts)
    rows = ""
    for i, name in enumerate(report.concepts):
        cells = "".join(
            "<td>own</td>" if i == j else f'<td style="--share:{_shade(value):.0f}%">'
            f"{_number(value)}</td>"
            for j, value in enumerate(report.crosstalk[i])
        )  # fmt: skip
        rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    return (
        "<h4>Crosstalk <small>size of a column's update on a row's inputs, relative to the row's "
        "own</small></h4>"
        f"<table><tr><td></td>{heads}</tr>{rows}</table>"
    )


def _shade(value: float) -> float:
    return 55 * min(_known(value), 1.0)


def _worst(report: "ConflictReport") -> str:
    rows = "".join(
        f"<tr><td>{_number(layer.worst)}</td><td>{escape(layer.name)}</td></tr>"
        for layer in report.worst_layers()
    )
    return (
        f"<details><summary>The layers that lose most, of {len(report.layers)}</summary>"
        f"<table>{rows}</table></details>"
    )
