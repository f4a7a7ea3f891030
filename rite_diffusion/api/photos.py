"""`rite.check_photos`: what in a photo folder will hurt a training."""

from pathlib import Path

from rite_diffusion.config import TrainConfig
from rite_diffusion.files.writing import user_path
from rite_diffusion.photos.findings import PhotoFinding, find_faults
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.types import Concept


def check_photos(photos: str | Path, trigger: str, class_noun: str) -> list[PhotoFinding]:
    """What in a photo folder will hurt a training, each with the photos' names and what to do.

    The same findings stand in the report of `rite train`. No model is opened. An empty list is
    good. Raises PhotoFolderError for a folder or captions that cannot be used.
    """
    concept = Concept(trigger, class_noun)
    templates = TrainConfig.model_fields["templates"].default
    return find_faults(read_folder(user_path(photos), concept, templates), concept)
