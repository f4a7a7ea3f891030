"""Purposes of a training, in words, and the settings that follow from them."""

from dataclasses import dataclass, field
from typing import Any

from rite_diffusion.config import load_preset, merge, parse_assignments
from rite_diffusion.errors import StudioError

# Settings with fields of their own. Lines must not set them: some are paths.
FIXED = {"photos", "class_photos", "dataset", "base", "trigger", "class_noun", "trackers"}


@dataclass(frozen=True)
class Purpose:
    """A purpose: its label, and what it changes of the base's preset."""

    label: str
    steps: float  # times the steps of the base's preset
    settings: dict[str, Any] = field(default_factory=dict)


PURPOSES = {
    "quick": Purpose("Quick: see in half the time whether it works", 0.5),
    "faithful": Purpose(
        "Faithful: the closest likeness, in twice the time",
        2.0,
        {"lora": {"rank": 16}, "augment": {"flip": True}},
    ),
    "several": Purpose(
        "Several concepts later: keeps the class apart, so that adapters fuse well",
        1.5,
        {"lora": {"rank": 4}, "prior": {"weight": 1.0}},
    ),
}
STANDARD = "quick"


def training_settings(
    purpose: str, needed: dict[str, Any], chosen: dict[str, Any], lines: str
) -> dict[str, Any]:
    """The settings tree of a run: the purpose's, then `chosen`, then `key=value` lines.

    `needed` are photos, trigger, class noun and base. Raises StudioError for a purpose that does
    not exist and for lines that set one of those.
    """
    if purpose not in PURPOSES:
        raise StudioError(f"no purpose '{purpose}': choose one of {', '.join(PURPOSES)}.")
    wanted = PURPOSES[purpose]
    preset = "pocket" if needed["base"] == "pocket" else "sd15"
    usual = load_preset(preset)
    assigned = parse_assignments([line for line in lines.splitlines() if line.strip()])
    refused = sorted(FIXED & assigned.keys())
    if refused:
        raise StudioError(f"'{refused[0]}' cannot be set by a line: it has its own field.")
    own = merge({"steps": round(usual["steps"] * wanted.steps)}, wanted.settings)
    return merge(merge(merge(own, chosen), assigned), needed)
