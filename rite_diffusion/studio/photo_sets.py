"""Photo sets, the folders in `photos/`: their pictures with captions; made, renamed, deleted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rite_diffusion.errors import StudioError
from rite_diffusion.photos.sidecars import (
    MASK_FOLDER,
    is_caption,
    is_mask,
    is_picture,
    match_captions,
    match_masks,
    new_caption_path,
)
from rite_diffusion.studio.jobs import ACTIVE, settings_of, state_of
from rite_diffusion.studio.uploads import save_photos
from rite_diffusion.studio.workspace import Workspace, checked_name, name_from

LONGEST_CAPTION = 2000  # characters


@dataclass(frozen=True)
class CaptionedPhoto:
    """A photo of a set with its caption."""

    path: Path
    caption: str
    sidecars: tuple[Path, ...]  # the files of its captions, then of its masks


def read_set(folder: Path) -> list[CaptionedPhoto]:
    """The photos of a set in the order of their names."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in files if is_picture(path)]
    inner = folder / MASK_FOLDER
    masks = [path for path in files if is_mask(path)]
    masks += sorted(inner.iterdir()) if inner.is_dir() else []
    captions = match_captions([path for path in files if is_caption(path)], pictures)
    of_mask = match_masks(masks, pictures)
    return [
        CaptionedPhoto(
            path,
            _read(captions.of[path]) if path in captions.of else "",
            (*captions.all_of(path), *of_mask.all_of(path)),
        )
        for path in pictures
    ]


def _read(caption: Path) -> str:
    text = caption.read_text(encoding="utf-8-sig", errors="replace")
    return " ".join(text.split())[:LONGEST_CAPTION]


def write_captions(folder: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write the captions of rows (photo, caption); an empty one deletes the photo's caption."""
    known = {photo.path.name: photo for photo in read_set(folder)}
    for name, text in rows:
        caption = " ".join(str(text or "").split())
        if name not in known:
            raise StudioError(f"'{name}' is not a photo of this set: load the set again.")
        if len(caption) > LONGEST_CAPTION:
            raise StudioError(f"the caption of {name} is over {LONGEST_CAPTION} characters.")
        if caption == known[name].caption:
            continue
        for path in filter(is_caption, known[name].sidecars):
            path.unlink(missing_ok=True)
        if caption:
            pictures = [photo.path for photo in known.values()]
            target = new_caption_path(known[name].path, pictures)
            target.write_text(caption + "\n", encoding="utf-8")


def remove_photo(folder: Path, name: str) -> None:
    """Delete a photo of a set with its caption and mask."""
    photo = next((each for each in read_set(folder) if each.path.name == name), None)
    if photo is None:
        raise StudioError(f"'{name}' is not a photo of this set: choose one of its pictures.")
    for path in photo.sidecars:
        path.unlink(missing_ok=True)
    photo.path.unlink()


def new_set(space: Workspace, uploads: Sequence[str], stem: str) -> tuple[Path, list[str]]:
    """A new set of uploaded files, named `stem` or after their archive, and what was left out."""
    archive = next((path for path in map(Path, uploads) if path.suffix.lower() == ".zip"), None)
    folder = space.new("photos", name_from(stem or (archive.stem if archive else ""), "photos"))
    return folder, save_photos(uploads, folder)


def concept_of(space: Workspace, name: str) -> tuple[str, str]:
    """Trigger and class noun of the newest run on a set; empty where there is none."""
    for run in _runs_on(space, space.find("photos", name)):
        settings = settings_of(run)
        return settings.get("trigger", ""), settings.get("class_noun", "")
    return "", ""


def rename_set(space: Workspace, name: str, to: str) -> str:
    """Give a set another name; returns it."""
    folder = _idle(space, name)
    target = space.folder("photos") / checked_name(to.strip())
    if target.exists():
        raise StudioError(f"there is another '{target.name}': choose another name.")
    folder.rename(target)
    return target.name


def clear_set(space: Workspace, name: str) -> None:
    """Empty a set; its photos go into the trash."""
    folder = _idle(space, name)
    space.move_to_trash(folder)
    folder.mkdir()


def delete_set(space: Workspace, name: str) -> None:
    """Move a set into the trash."""
    space.move_to_trash(_idle(space, name))


def _runs_on(space: Workspace, folder: Path) -> list[Path]:
    """The runs that train on a set, newest first."""
    runs = [space.folder("runs") / name for name in space.names("runs")]
    return [run for run in runs if settings_of(run).get("photos") == str(folder)]


def _idle(space: Workspace, name: str) -> Path:
    """The folder of a set; StudioError while a run on it is queued or active."""
    folder = space.find("photos", name)
    for run in _runs_on(space, folder):
        if state_of(run) in (*ACTIVE, "queued"):
            raise StudioError(f"'{run.name}' trains on '{name}': wait for its end, or stop it.")
    return folder
