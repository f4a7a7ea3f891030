"""The photos' report: what will hurt a training, in which photos, and what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass

from rite_diffusion.photos.caption_words import concept_words, same_captions, shared_words
from rite_diffusion.photos.folder import PhotoFolder
from rite_diffusion.photos.grounds import OVERLAY_PHOTOS, has_overlay, one_ground, subject_share
from rite_diffusion.photos.likeness import near_duplicates
from rite_diffusion.types import Concept, Photo

SHARP = 0.5  # sharpness of the sharpest part that a photo needs; good ones have 0.6 and more
TINY = 0.04  # share of the picture below which a subject is small
GROUND_PHOTOS = 3  # photos at least, for grounds and captions to be compared


@dataclass(frozen=True)
class PhotoFinding:
    """Something in photos that will hurt a training."""

    kind: str  # blurred, tiny, framed, alike, one ground, overlay, describes, same words, …
    photos: tuple[str, ...]  # names of the files
    text: str  # what was found
    remedy: str  # what to do


def find_faults(folder: PhotoFolder, concept: Concept) -> list[PhotoFinding]:
    """The findings in one concept's photos, first those of pictures, then those of captions.

    Faces are not looked for. A subject's size is known from masks and on plain grounds only. The
    words of captions are compared with lists of English words.
    """
    return [*_of_pictures(folder.photos), *_of_sets(folder.photos), *_of_captions(folder, concept)]


def _of_pictures(photos: list[Photo]) -> Iterator[PhotoFinding]:
    for photo in photos:
        name, measures = (photo.path.name,), photo.measures
        if measures.sharpness < SHARP:
            text = f"nothing in it is sharp ({measures.sharpness:.2f} of 1)"
            yield PhotoFinding("blurred", name, text, "take it out, or bring a sharper one")
        share = subject_share(photo)
        if share is not None and share < TINY:
            text = f"the subject takes {share:.1%} of the picture"
            yield PhotoFinding("tiny", name, text, "cut the photo closer to it")
        if measures.frame:
            text = f"a plain frame takes {measures.frame:.0%} at its sides"
            yield PhotoFinding("framed", name, text, "cut it off, or pictures will have frames too")


def _of_sets(photos: list[Photo]) -> Iterator[PhotoFinding]:
    for names in near_duplicates(photos):
        text = f"nearly one picture {len(names)} times"
        yield PhotoFinding("alike", tuple(names), text, "keep one, or it counts as often")
    names = tuple(photo.path.name for photo in photos)
    if len(photos) >= GROUND_PHOTOS and one_ground(photos):
        remedy = "bring photos in other places, name it in the captions, or make masks"
        yield PhotoFinding("one ground", names, "all have the same background", remedy)
    elif len(photos) >= OVERLAY_PHOTOS and has_overlay(photos):
        text = "all have the same marks near the border, as of a watermark"
        yield PhotoFinding("overlay", names, text, "cut them off, or they are learned too")


def _of_captions(folder: PhotoFolder, concept: Concept) -> Iterator[PhotoFinding]:
    photos = [photo for photo in folder.photos if photo.captioned]
    bare = [photo.path.name for photo in folder.photos if not photo.captioned]
    if photos and bare:
        text = f"no caption, while {len(photos)} others have one"
        yield PhotoFinding("no caption", tuple(bare), text, "write theirs too: rite caption --keep")
    for photo in photos:
        words = concept_words(photo.caption, concept)
        if words:
            text = f'its caption describes the concept itself: "{", ".join(words)}"'
            remedy = f"leave that to {concept.trigger}: say what is not it"
            yield PhotoFinding("describes", (photo.path.name,), text, remedy)
    if len(photos) < GROUND_PHOTOS:
        return
    for names in same_captions(photos):
        text = f"{len(names)} photos have the same caption"
        remedy = "say what differs: background, pose, surroundings"
        yield PhotoFinding("same words", tuple(names), text, remedy)
    words = shared_words(photos, concept)
    if words:
        text = f'all captions say "{", ".join(words)}"'
        remedy = f"leave out what is part of {concept.trigger}; vary in the photos what is not"
        names = tuple(photo.path.name for photo in photos)
        yield PhotoFinding("same words", names, text, remedy)
