"""The plan of a training run: settings resolved, photos read, the base opened."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.sizes import refuse_too_large
from rite_diffusion.backbones.source import (
    DTYPES,
    default_device,
    open_backbone,
    usable_precision,
)
from rite_diffusion.config import TrainConfig, fill
from rite_diffusion.files.writing import cache_folder
from rite_diffusion.generation.class_pictures import class_pictures
from rite_diffusion.methods.start import check_start, digest_of_start
from rite_diffusion.methods.support import check_support
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
from rite_diffusion.training.assistant import load_assistant
from rite_diffusion.training.fit import with_memory_that_fits
from rite_diffusion.training.processes import ignored_variables_note, process_device
from rite_diffusion.training.resume import inputs_of
from rite_diffusion.training.settings import stage_names, unused_rate_note
from rite_diffusion.types import Photo


@dataclass(frozen=True)
class FoundPictures:
    """The pictures of a training on disk, read before any model is opened."""

    folders: list[PhotoFolder]  # one for each source
    classes: PhotoFolder  # given class pictures, for prior preservation
    undrawn: list[str]  # class nouns whose pictures the base still has to draw

    @property
    def folder(self) -> PhotoFolder:
        """The photos of all concepts as one folder."""
        return joined(self.folders)


@dataclass(frozen=True)
class Plan:
    """A checked training run: settings, base and photos."""

    config: TrainConfig
    backbone: Backbone
    folder: PhotoFolder  # the concepts' photos, as found
    photos: list[Photo]  # to train on, class pictures included, with balanced repeats
    classes: PhotoFolder  # given class pictures, as found
    class_photos: list[Photo]  # the class pictures among `photos`
    undrawn: list[str]  # class nouns whose pictures the base has yet to draw
    moved: list[tuple[str, str]]  # captions too long, and the triggers moved to stay within
    held_out: list[Photo]  # for the validation loss
    fallbacks: list[str]  # lines about settings that cannot be followed, with what is done

    @property
    def encoding(self) -> Encoding:
        """The settings that decide the latents."""
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
        """Digests of photos, base and `lora.init_from`, which a resumed run compares."""
        photos = [*self.photos, *self.held_out]
        return inputs_of(photos, self.backbone.fingerprint) | digest_of_start(self.config.lora)

    def buckets(self) -> dict[tuple[int, int], list[str]]:
        """Training size (width, height) -> names of the photos scaled and cropped to it."""
        photos, how = self.folder.photos, self.encoding
        table: dict[tuple[int, int], list[str]] = {}
        sizes = target_sizes(photos, how.resolution, self.backbone.multiple, how.bucketed)
        for photo, size in zip(photos, sizes, strict=True):
            table.setdefault(size, []).append(photo.path.name)
        return dict(sorted(table.items()))


class PlanObserver:
    """Callbacks while a plan is made, which do nothing; override those that you need."""

    def found(self, pictures: FoundPictures, config: TrainConfig) -> None:
        """Called once the pictures are read, before a model is opened."""

    def planned(self, plan: Plan) -> None:
        """Called once base and settings are checked, before class pictures are drawn."""

    def drawing(self, line: str) -> None:
        """Called with lines about the progress of class pictures."""


def plan_training(config: TrainConfig, observer: PlanObserver | None = None) -> Plan:
    """The plan of a training: finds pictures, opens the base, draws class pictures.

    Raises RiteError for settings, pictures and bases that cannot be used.
    """
    observer = observer or PlanObserver()
    pictures = find_pictures(config)
    observer.found(pictures, config)
    plan = plan_without_drawing(config, pictures)
    observer.planned(plan)
    return draw_class_pictures(plan, observer.drawing)


def find_pictures(config: TrainConfig) -> FoundPictures:
    """The pictures of a training; RiteError where they cannot be used."""
    folders = [read_source(source) for source in config.sources()]
    given, undrawn = given_class_photos(config.sources()) if config.prior.weight else ([], [])
    classes = joined(given)
    triggers = [concept.trigger for concept in config.concepts()]
    refuse_concepts(classes.photos, joined(folders).photos, triggers, contains_word)
    return FoundPictures(folders, classes, undrawn)


def plan_without_drawing(config: TrainConfig, found: FoundPictures) -> Plan:
    """The plan of a training before class pictures are drawn; opens the base.

    Raises RiteError for settings, pictures and bases that cannot be used.
    """
    device = process_device(default_device())
    precision, fallback = usable_precision(config.precision, device)
    config, backbone = _opened(config, precision, device, found)
    triggers = [concept.trigger for concept in config.concepts()]
    check_on_base(backbone, config)
    load_assistant(backbone, config)
    side = training_side(backbone, config.resolution)
    config = config.model_copy(update={"resolution": side, "precision": precision})
    folders, moved = with_triggers_kept(backbone, found.folders, triggers)
    concepts = [source.concept for source in config.sources()]
    groups, held_out = hold_out(folders, concepts, config.validation.photos, config.seed)
    photos = balanced(groups) if config.balance else [photo for group in groups for photo in group]
    whole, classes = joined(folders), found.classes
    notes = (fallback, ignored_variables_note(os.environ), unused_rate_note(config))
    fallbacks = [line for line in notes if line]
    plan = Plan(
        config, backbone, whole, photos, classes, [], found.undrawn, moved, held_out, fallbacks
    )
    return plan if plan.undrawn or not classes.photos else _with_class_photos(plan, classes.photos)


def check_on_base(backbone: Backbone, config: TrainConfig) -> None:
    """Raise RiteError for settings that cannot be trained on this base."""
    check_support(backbone, config)
    check_triggers(backbone, config.concepts())
    check_prompts(config.previews.prompts, [concept.trigger for concept in config.concepts()])
    check_rank(backbone, config.lora, config.optim.name)
    check_start(backbone, config.lora)


def _opened(
    config: TrainConfig, precision: str, device: torch.device, found: FoundPictures
) -> tuple[TrainConfig, Backbone]:
    """The settings, with `memory.weights = auto` resolved, and the base without weights."""
    base, dtype = config.base, DTYPES[precision]
    if config.memory.weights == "auto":
        plain = open_backbone(
            base, precision, device, config.memory.model_copy(update={"weights": "full"})
        )
        count = len(found.folder.photos) + len(found.classes.photos)
        config = config.model_copy(update={"precision": precision})
        config = with_memory_that_fits(plain, config, count)
    stages = None if found.undrawn else stage_names(config)
    refuse_too_large(base, dtype, device, config.memory, stages)
    return config, open_backbone(base, precision, device, config.memory)


def draw_class_pictures(plan: Plan, progress: Callable[[str], None] = lambda line: None) -> Plan:
    """The plan with class pictures that the base draws, or that the cache has.

    `progress` is called with a line about each class that is drawn.
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
