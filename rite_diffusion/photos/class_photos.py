"""Class pictures for prior preservation (Ruiz et al. 2023)."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rite_diffusion.config import PhotoSource
from rite_diffusion.errors import ConfigError, PhotoFolderError
from rite_diffusion.files.writing import reading, user_path
from rite_diffusion.photos.folder import PhotoFolder, read_photos
from rite_diffusion.types import Photo

TEMPLATE = "a {class_noun}"  # the caption of a picture that has none


def read_class_photos(folder: Path, class_noun: str) -> PhotoFolder:
    """The class pictures of a folder; PhotoFolderError as of `read_photos`.

    Captions may contain `{class_noun}`; the default caption is "a {class_noun}".
    """
    return read_photos(folder, {"class_noun": class_noun}, [TEMPLATE])


def given_class_photos(sources: Sequence[PhotoSource]) -> tuple[list[PhotoFolder], list[str]]:
    """The given folders of class pictures, and the class nouns without any.

    Raises ConfigError for a folder that holds the photos of a concept.
    """
    photos = {_resolved(source.photos): source.concept for source in sources}
    folders: dict[str, dict[Path, Path]] = {}
    for source in sources:
        given = folders.setdefault(source.concept.class_noun, {})
        if source.class_photos is None:
            continue
        key = _resolved(source.class_photos)
        if key in photos:
            raise ConfigError(
                f"class_photos = {source.class_photos} holds the photos of {photos[key].trigger}. "
                "Give pictures of other things of its class, or leave class_photos out."
            )
        given[key] = user_path(source.class_photos)
    read = [
        read_class_photos(folder, noun)
        for noun, given in folders.items()
        for folder in given.values()
    ]
    return read, [noun for noun, given in folders.items() if not given]


def _resolved(folder: str) -> Path:
    with reading(Path(folder), PhotoFolderError):
        return user_path(folder).resolve()


def refuse_concepts(
    pictures: Sequence[Photo],
    photos: Sequence[Photo],
    triggers: Sequence[str],
    contains: Callable[[str, str], bool],
) -> None:
    """ConfigError where a class picture is a concept's photo or its caption has a trigger.

    `contains(caption, trigger)` returns whether a caption has a trigger.
    """
    concepts = {photo.digest: photo for photo in photos}
    for picture in pictures:
        own = concepts.get(picture.digest)
        if own is not None:
            raise ConfigError(
                f"class_photos: {picture.path} is the concept's photo {own.path.name}. Give "
                "pictures of other things of its class, or leave class_photos out."
            )
        for trigger in triggers:
            if contains(picture.caption, trigger):
                raise ConfigError(
                    f'class_photos: the caption "{picture.caption}" of {picture.path} holds the '
                    f"trigger {trigger}, which pictures of the class must not have: reword it."
                )
