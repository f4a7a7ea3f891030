"""Matching of captions and masks (sidecars) to pictures by file name.

A sidecar has its picture's full name (`a.jpg.txt`, `masks/a.jpg.png`), or its stem (`a.txt`,
`masks/a.png`, `a-masklabel.png`) where no other picture beside it has that stem.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

from rite_diffusion.photos.images import SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")  # in order of preference
MASK_ENDING = "-masklabel"
MASK_FOLDER = "masks"

Unused = tuple[Path, str]  # a file, and the reason why it is not used


@dataclass(frozen=True)
class Matches:
    """Each picture's sidecar, and the sidecars that are not used."""

    of: dict[Path, Path] = field(default_factory=dict)
    others: dict[Path, list[Path]] = field(default_factory=dict)  # a picture's further sidecars
    unused: list[Unused] = field(default_factory=list)  # includes `others`

    def all_of(self, picture: Path) -> list[Path]:
        """All sidecars of a picture, first the one that is used."""
        return [self.of[picture], *self.others[picture]] if picture in self.of else []


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name, not a mask beside one."""
    return path.suffix.lower() in SUFFIXES and not path.stem.endswith(MASK_ENDING)


def is_mask(path: Path) -> bool:
    """Whether a file beside pictures is a mask by its name."""
    return path.suffix.lower() in SUFFIXES and path.stem.endswith(MASK_ENDING)


def is_caption(path: Path) -> bool:
    """Whether a file is a caption by its name."""
    return path.suffix.lower() in CAPTION_SUFFIXES


def match_captions(captions: Iterable[Path], pictures: Sequence[Path]) -> Matches:
    """Each picture's caption file."""
    return _match({path: path.stem for path in captions}, pictures, "caption", _caption_rank)


def match_masks(masks: Iterable[Path], pictures: Sequence[Path]) -> Matches:
    """Each picture's mask file."""
    named = {path: path.stem.removesuffix(MASK_ENDING) for path in masks}
    return _match(named, pictures, "mask", _mask_rank)


def new_mask_path(picture: Path, pictures: Iterable[Path]) -> Path:
    """The path for a new mask of a picture."""
    return picture.parent / MASK_FOLDER / f"{_unshared(picture, pictures)}.png"


def new_caption_path(picture: Path, pictures: Iterable[Path]) -> Path:
    """The path for a new caption of a picture."""
    return picture.with_name(f"{_unshared(picture, pictures)}{CAPTION_SUFFIXES[0]}")


def _unshared(picture: Path, pictures: Iterable[Path]) -> str:
    """The picture's stem, or its full name where another picture has that stem or name."""
    beside = [each for each in pictures if each.parent == picture.parent]
    key = _key(picture.stem)
    alone = [_key(each.stem) for each in beside].count(key) == 1
    return (
        picture.stem if alone and key not in map(_key, (p.name for p in beside)) else picture.name
    )


def _key(name: str) -> str:
    """A name in Unicode's composed form, for comparison: macOS decomposes accented letters."""
    return normalize("NFC", name)


def _caption_rank(path: Path) -> tuple:
    return (CAPTION_SUFFIXES.index(path.suffix.lower()),)


def _mask_rank(path: Path) -> tuple:
    return (path.suffix.lower() != ".png", not path.stem.endswith(MASK_ENDING))


def _match(named: Mapping[Path, str], pictures: Sequence[Path], kind: str, rank) -> Matches:
    """Each picture's best sidecar; `named` is sidecar -> name or stem of its picture."""
    names, stems = _grouped(pictures, "name"), _grouped(pictures, "stem")
    candidates: dict[Path, list[tuple[bool, Path]]] = {}
    found = Matches()
    for path, name in named.items():
        full = names.get(_key(name), [])
        meant = full or stems.get(_key(name), [])
        if len(meant) == 1:
            candidates.setdefault(meant[0], []).append((not full, path))
        elif meant:
            shared = " and ".join(each.name for each in meant)
            found.unused.append(
                (path, f"a {kind} that {shared} share: name it {meant[0].name}{path.suffix}")
            )
        else:
            found.unused.append((path, f"a {kind} of no picture here"))
    for picture, several in candidates.items():
        ordered = sorted(several, key=lambda each: (each[0], *rank(each[1]), each[1].name))
        found.of[picture] = ordered[0][1]
        found.others[picture] = [path for _, path in ordered[1:]]
        reason = f"{picture.name} has its {kind} from {found.of[picture].name}"
        found.unused.extend((path, reason) for path in found.others[picture])
    return found


def _grouped(pictures: Sequence[Path], part: str) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for picture in pictures:
        name = picture.name if part == "name" else picture.stem
        groups.setdefault(_key(name), []).append(picture)
    return groups
