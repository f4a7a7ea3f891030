"""How well `rite mask` finds the subject without a segmenter, on the example concepts.

`python benchmarks/masks.py` has the pocket base's attention and the photo's colours mask every
photo, and compares with the truth, which these photos tell: behind their subjects is one colour.
It writes results/masks.json, the overlaps (intersection over union) per photo and their means.
"""

import statistics

import numpy as np
from machine import write_result
from PIL import Image
from prompts import CONCEPTS

from rite_diffusion.api.demo import example_photos
from rite_diffusion.api.masks import attention_segmenter
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.photos.folder import read_folder
from rite_diffusion.photos.segmenter import NoSubject
from rite_diffusion.types import Concept


def truth(photo: Image.Image) -> np.ndarray:
    """Where (height, width) the photo is not of its background's colour."""
    pixels = np.asarray(photo, int)
    ground = np.median(pixels[[0, -1]].reshape(-1, 3), axis=0)
    return np.abs(pixels - ground).sum(-1) > 60


def overlap(mask: Image.Image, subject: np.ndarray) -> float:
    """Intersection over union of the mask's lighter half and the subject."""
    found = np.asarray(mask.convert("L")) > 127
    return float((found & subject).sum() / (found | subject).sum())


def main() -> None:
    """Mask, compare, write."""
    backbone = load_backbone("pocket")
    figures = {}
    for name, (noun, _) in CONCEPTS.items():
        segment = attention_segmenter(backbone, noun)
        overlaps = {}
        for photo in read_folder(example_photos(name), Concept(f"<{name}>", noun), ["a"]).photos:
            try:
                value = overlap(segment(photo.image), truth(photo.image))
            except NoSubject:
                value = 0.0
            overlaps[photo.path.name] = round(value, 3)
        figures[name] = {"mean": round(statistics.mean(overlaps.values()), 3), "photos": overlaps}
        print(name, figures[name])
    print(write_result("masks", {"unit": "intersection over union", "concepts": figures}))


if __name__ == "__main__":
    main()
