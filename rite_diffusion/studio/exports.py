"""Adapters converted for other programs, checked by loading, as one file to download."""

import shutil
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rite_diffusion.errors import StudioError
from rite_diffusion.studio import library
from rite_diffusion.studio.library import SUFFIX
from rite_diffusion.studio.page import facts_html, link_to
from rite_diffusion.studio.state import Studio
from rite_diffusion.studio.workspace import Workspace

if TYPE_CHECKING:
    from rite_diffusion.api.convert import Export

# Dialect of rite_diffusion.adapters -> the programs that read it.
PROGRAMS = {
    "kohya": "A1111, Forge, kohya's scripts",
    "comfyui": "ComfyUI",
    "diffusers": "diffusers",
    "peft": "PEFT (a folder)",
}


def export(
    studio: Studio, space: Workspace, name: str, to: str, rank: int | None, allow_loss: bool
) -> tuple[str, str]:
    """A link to the converted adapter, and HTML with the checks of it.

    Modules of a larger rank are cut to `rank`; a loss above 1 % is refused unless `allow_loss`.
    """
    from rite_diffusion.api.convert import convert

    if to not in PROGRAMS:
        raise StudioError(f"no program '{to}': choose one of {', '.join(PROGRAMS)}.")
    card = library.find(space, name)
    # Conversion opens models of its own to load the export: drawings wait, for memory's sake.
    with TemporaryDirectory() as folder, studio.engine.pause():
        suffix = "" if to == "peft" else SUFFIX
        out = Path(folder) / f"{card.name}-{to}{suffix}"
        made = convert(card.path, to, out, rank=rank, allow_loss=allow_loss)
        return link_to(_one_file(made, Path(folder))), _report(made)


def _one_file(made: "Export", folder: Path) -> Path:
    """The export as one file: itself, or a zip of its folder or of it and its embeddings."""
    if made.path.is_file() and made.embeddings in ([], [made.path]):
        return made.path
    inside = folder / "export"
    inside.mkdir()
    for path in {made.path, *made.embeddings}:
        shutil.move(path, inside / path.name)
    return Path(shutil.make_archive(str(folder / made.path.stem), "zip", inside))


def _report(made: "Export") -> str:
    """HTML of what was read and what the checks showed."""
    facts = [("Read", f"{len(made.adapter.pairs)} modules in {made.adapter.dialect}'s names")]
    facts += [("Note", note) for note in made.adapter.notes]
    facts += [("Lossy", f"{what}: relative error {e:.2g}") for what, e in made.lossy.items()]
    facts += [
        ("Loaded back", f"{each.modules} modules by {each.reader}, largest difference "
         f"{each.difference:.1e}") for each in made.checks
    ]  # fmt: skip
    if made.pixels is not None:
        facts.append(("Same picture", f"largest difference {made.pixels} of 255"))
    return f"<p><b>{escape(made.path.name)}</b></p>{facts_html(facts)}"
