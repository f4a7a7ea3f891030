"""A training run before it starts: settings resolved, photos read, the base open."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import default_device, load_backbone, usable_precision
from rite_diffusion.config import TrainConfig, fill
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.generation.class_pictures import class_pictures
from rite_diffusion.methods.triggers import (
    check_prompts,
    check_triggers,
    contains_word,
    with_triggers_kept,
)
from rite_diffusion.methods.weights import check_rank
from rite_diffusion.photos.class_photos import (
    given_class_photos,
    read_class_photos,
    refuse_concepts,
)
from rite_diffusion.photos.dataset import (
    Encoding,
    balanced,
    hold_out,
    target_sizes,
    training_side,
)
from rite_diffusion.photos.folder import PhotoFolder, joined, read_source
from rite_diffusion.training.processes import leftovers, own_device
from rite_diffusion.training.resume import inputs_of
from rite_diffusion.training.settings import idle_rate
from rite_diffusion.types import Photo


@dataclass(frozen=True)
class Found:
    """The pictures of a training as they are on disk, read before any model is opened."""

    folders: list[PhotoFolder]  # one for each source
    classes: PhotoFolder  # given pictures of the class, for prior preservation
    undrawn: list[str]  # class nouns whose pictures the base has yet to draw

    @property
    def folder(self) -> PhotoFolder:
        """The concepts' photos together."""
        return joined(self.folders)


@dataclass(frozen=True)
class Plan:
    """A checked training run, ready to start."""

    config: TrainConfig
    backbone: Backbone
    folder: PhotoFolder  # the concepts' photos, as found
    photos: list[Photo]  # what the steps draw from, balanced
    classes: PhotoFolder  # given pictures of the class, for prior preservation, as found
    class_photos: list[Photo]  # those of `photos` that show the class
    undrawn: list[str]  # class nouns whose pictures the base has yet to draw
    moved: list[tuple[str, str]]  # over-long captions, and the trigger at their end that was kept
    held_out: list[Photo]  # for the validation loss
    fallbacks: list[str]  # what is not done as asked, and what is done instead

    @property
    def encoding(self) -> Encoding:
        """How the photos become latents."""
        config = self.config
        return Encoding(
            config.resolution or self.backbone.resolution,
            config.buckets,
            config.augment,
            config.objective.mask_floor,
            config.seed,
            cache_folder() / "latents" if config.cache else None,
        )

    def cut_captions(self) -> list[str]:
        """Captions longer than the base model's token budget."""
        budget = self.backbone.token_budget
        captions = {photo.caption for photo in self.folder.photos}
        return sorted(text for text in captions if self.backbone.token_count(text) > budget)

    def inputs(self) -> dict[str, str]:
        """What the run learns from and with, for a continued run to compare."""
        return inputs_of([*self.photos, *self.held_out], self.backbone.fingerprint)

    def buckets(self) -> dict[tuple[int, int], list[str]]:
        """Size (width, height) that is trained on -> names of the photos cut to it."""
        photos, how = self.folder.photos, self.encoding
        table: dict[tuple[int, int], list[str]] = {}
        sizes = target_sizes(photos, how.resolution, self.backbone.multiple, how.bucketed)
        for photo, size in zip(photos, sizes, strict=True):
            table.setdefault(size, []).append(photo.path.name)
        return dict(sorted(table.items()))


class PlanObserver:
    """What is told while a plan is made; a subclass takes what it wants to know."""

    def found(self, pictures: Found, config: TrainConfig) -> None:
        """The pictures were read; no model is open yet."""

    def planned(self, plan: Plan) -> None:
        """The base is open and all is checked; class pictures are drawn next."""

    def drawing(self, line: str) -> None:
        """How far the class pictures are."""


def plan_training(config: TrainConfig, observer: PlanObserver | None = None) -> Plan:
    """The plan of a training: pictures found, base opened, class pictures drawn.

    Raises a RiteError for all that cannot be trained on.
    """
    observer = observer or PlanObserver()
    pictures = find_pictures(config)
    observer.found(pictures, config)
    plan = survey(config, pictures)
    observer.planned(plan)
    return draw_class_pictures(plan, observer.drawing)


def find_pictures(config: TrainConfig) -> Found:
    """The pictures to train on; raises a RiteError for those that cannot be."""
    folders = [read_source(source) for source in config.sources()]
    given, undrawn = given_class_photos(config.sources()) if config.prior.weight else ([], [])
    classes = joined(given)
    triggers = [concept.trigger for concept in config.concepts()]
    refuse_concepts(classes.photos, joined(folders).photos, triggers, contains_word)
    return Found(folders, classes, undrawn)


def survey(config: TrainConfig, found: Found) -> Plan:
    """The plan of a training as far as it needs no drawing, for a report before what takes time.

    Opens the base; raises a RiteError for all that cannot be trained on.
    """
    device = own_device(default_device())
    precision, fallback = usable_precision(config.precision, device)
    backbone = load_backbone(config.base, precision, device)
    triggers = [concept.trigger for concept in config.concepts()]
    check_triggers(backbone, config.concepts())
    check_prompts(config.previews.prompts, triggers)
    check_rank(backbone, config.lora)
    side = training_side(backbone, config.resolution)
    config = config.model_copy(update={"resolution": side, "precision": precision})
    folders, moved = with_triggers_kept(backbone, found.folders, triggers)
    concepts = [source.concept for source in config.sources()]
    groups, held_out = hold_out(folders, concepts, config.validation.photos, config.seed)
    photos = balanced(groups) if config.balance else [photo for group in groups for photo in group]
    whole, classes = joined(folders), found.classes
    told = (fallback, leftovers(os.environ), idle_rate(config))
    fallbacks = [line for line in told if line]
    plan = Plan(
        config, backbone, whole, photos, classes, [], found.undrawn, moved, held_out, fallbacks
    )
    return plan if plan.undrawn or not classes.photos else _with_class_photos(plan, classes.photos)


def draw_class_pictures(plan: Plan, progress: Callable[[str], None] = lambda line: None) -> Plan:
    """The plan with the pictures of its classes that the base draws, or has drawn before.

    `progress` is called with a line about those that are drawn.
    """
    if not plan.undrawn:
        return plan
    prior, photos = plan.config.prior, list(plan.classes.photos)
    for noun in plan.undrawn:
        prompts = [fill(prompt, {"class_noun": noun}) for prompt in prior.prompts]
        folder = class_pictures(plan.backbone, prompts, prior.count, progress)
        photos += read_class_photos(folder, noun).photos
    return _with_class_photos(replace(plan, undrawn=[]), photos)


def _with_class_photos(plan: Plan, pictures: list[Photo]) -> Plan:
    weighted = [replace(photo, weight=plan.config.prior.weight) for photo in pictures]
    photos = balanced([plan.photos, weighted])
    return replace(plan, photos=photos, class_photos=photos[len(plan.photos) :])
