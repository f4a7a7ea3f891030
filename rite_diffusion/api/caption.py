"""`rite.caption`: caption files beside the photos, by an image-to-text model or from templates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rite_diffusion.backbones.families import (
    CAPTION_STYLES,
    CaptionStyle,
    caption_style,
    pipeline_name,
)
from rite_diffusion.config import fill, words_of
from rite_diffusion.errors import ConfigError, PhotoFolderError
from rite_diffusion.files.writing import check_outputs, user_path, write_output
from rite_diffusion.photos.caption_shape import ShapedCaption, shape_caption
from rite_diffusion.photos.captioner import load_captioner
from rite_diffusion.photos.images import open_image
from rite_diffusion.photos.listing import Picture, list_pictures
from rite_diffusion.photos.pixels import UnreadableImage
from rite_diffusion.photos.sidecars import is_caption, new_caption_path
from rite_diffusion.training.settings import configure
from rite_diffusion.types import Concept


@dataclass(frozen=True)
class CaptionReport:
    """The captions that were written, and the photos that got none."""

    written: dict[Path, str] = field(default_factory=dict)  # caption file -> caption
    left: list[tuple[str, str]] = field(default_factory=list)  # photo's name, reason
    unsure: list[str] = field(default_factory=list)  # photos in which the model named no concept


def caption(
    photos: str | Path,
    trigger: str,
    class_noun: str,
    *,
    model: str | Path | None = None,
    base: str = "pocket",
    style: CaptionStyle | None = None,
    names: Sequence[str] = (),
    keep: bool = False,
    override: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> CaptionReport:
    """Write a caption file beside each photo of a folder: the trigger, and what is not the concept.

    `model` is an image-to-text model that transformers opens, a hub id or a local folder of
    `.safetensors`; without one the captions are the templates of the preset for `base`, in turn.
    What the model says of the concept itself gives way to the trigger: the class noun, the other
    `names` it may use ("puppy"), and words of looks before them. `style` is "tags", "phrase" or
    "sentences"; by default the one of the base's family. Photos that have a caption, in a file or
    in metadata.jsonl, keep it with `keep` and get a new one with `override`; one is needed where
    there are such photos. `progress` is called with the number of photos done.

    Raises PhotoFolderError for a folder without photos, OutputError where captions cannot be
    written, ConfigError for a style or a model that cannot be used. No file has changed then.
    """
    if keep and override:
        raise ConfigError("--keep and --override exclude each other: pass one of them.")
    wanted = style or _style_of(base)
    if wanted not in CAPTION_STYLES:
        raise ConfigError(f"no style '{style}': choose {', '.join(CAPTION_STYLES)}.")
    concept = Concept(trigger, class_noun)
    settings = {"photos": str(photos), "trigger": trigger, "class_noun": class_noun, "base": base}
    templates = configure(settings, None).templates
    targets, report = _targets(user_path(photos), keep, override), CaptionReport()
    if model is None:
        describe = _from_templates(templates, concept)
    else:
        describe = _by_model(str(model), concept, wanted, names)
    for done, (picture, target) in enumerate(targets, 1):
        if target is None:
            report.left.append((picture.path.name, "has a caption already"))
        else:
            _write(picture.path, target, describe, report)
        progress(done)
    return report


def _style_of(base: str) -> CaptionStyle:
    """The style of a base's family; ConfigError where there is no such base."""
    is_file = base.endswith(".safetensors") and user_path(base).is_file()
    if not is_file and pipeline_name(base) is None:
        raise ConfigError(
            f"{base}: no base model whose style of captions could be told. Pass a diffusers "
            "folder, a .safetensors file or a hub id, or --style."
        )
    return caption_style(base)


def _targets(folder: Path, keep: bool, override: bool) -> list[tuple[Picture, Path | None]]:
    """Each picture with the path of its new caption; None where it keeps the one it has."""
    pictures = list_pictures(folder).pictures
    if not pictures:
        raise PhotoFolderError(f"no images in {folder}: pass the folder that holds the photos.")
    has = [picture.path.name for picture in pictures if picture.caption]
    if has and not keep and not override:
        raise PhotoFolderError(
            f"{', '.join(has[:5])}{' and others' if len(has) > 5 else ''} have captions already: "
            "pass --keep to leave them, or --override to replace them."
        )
    paths = [picture.path for picture in pictures]
    found = [
        (picture, None if keep and picture.caption else _target(picture, paths))
        for picture in pictures
    ]
    written = [target for _, target in found if target is not None]
    check_outputs(named=written, sources=paths)
    return found


def _target(picture: Picture, paths: Sequence[Path]) -> Path:
    """Where a picture's caption is written: over its caption file, else at its own name."""
    own = picture.caption_from
    return own if own is not None and is_caption(own) else new_caption_path(picture.path, paths)


def _from_templates(templates: Sequence[str], concept: Concept) -> Callable[[Path], ShapedCaption]:
    filled = _in_turn([fill(template, words_of(concept)) for template in templates])
    return lambda path: ShapedCaption(next(filled), named=True)


def _by_model(
    model: str, concept: Concept, style: CaptionStyle, names: Sequence[str]
) -> Callable[[Path], ShapedCaption]:
    captioner = load_captioner(model, concept, style)
    return lambda path: shape_caption(captioner(open_image(path)), concept, style, names)


def _in_turn(texts: Sequence[str]) -> Iterator[str]:
    while True:
        yield from texts


def _write(
    photo: Path,
    target: Path,
    describe: Callable[[Path], ShapedCaption],
    report: CaptionReport,
) -> None:
    try:
        made = describe(photo)
    except UnreadableImage as fault:
        report.left.append((photo.name, str(fault)))
        return
    write_output(target, f"{made.text}\n".encode())
    report.written[target] = made.text
    if not made.named:
        report.unsure.append(photo.name)
