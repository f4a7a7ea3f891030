"""A training run before it starts: settings resolved, photos read, the base open."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from rite_diffusion.backbones.prompt_syntax import read_prompt
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import default_device, load_backbone, usable_precision
from rite_diffusion.config import (
    PhotoSource,
    TrainConfig,
    fill,
    load_preset,
    merge,
    preset_names,
    resolve,
)
from rite_diffusion.config.rates import with_rates
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import cache_folder, user_path
from rite_diffusion.generation.class_pictures import class_pictures
from rite_diffusion.methods import METHODS
from rite_diffusion.methods.triggers import check_triggers, contains_word, with_trigger_kept
from rite_diffusion.methods.weights import adapted_paths
from rite_diffusion.optim import optimizer_spec
from rite_diffusion.photos.class_photos import (
    given_class_photos,
    read_class_photos,
    refuse_concepts,
)
from rite_diffusion.photos.dataset import Encoding, balanced, target_sizes, training_side
from rite_diffusion.photos.folder import PhotoFolder, joined, read_folder
from rite_diffusion.seeding import Stream, generator
from rite_diffusion.training.processes import leftovers, own_device
from rite_diffusion.training.resume import inputs_of
from rite_diffusion.types import Concept, Photo

PAIR_RATES = ("lr", "lr_unet", "lr_text_encoder")


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


def captions_without_trigger(folder: PhotoFolder, config: TrainConfig) -> list[str]:
    """Captions that teach no trigger."""
    triggers = [concept.trigger for concept in config.concepts()]
    captions = [photo.caption for photo in folder.photos]
    return [text for text in captions if not any(contains_word(text, each) for each in triggers)]


def configure(settings: Mapping[str, Any], preset: str | None = None) -> TrainConfig:
    """The resolved configuration: settings over a preset, every rate filled in.

    The preset defaults to `pocket` on the pocket base and to `sd15` elsewhere, for other methods
    than LoRA to `pocket-pivotal` and the like. A preset's rates belong to its optimizer: another
    optimizer without a rate takes its own default, but for new words, which AdamW trains. With
    `optim.lr = "auto"` the rates stay open until the probe has found them.
    """
    low = load_preset(preset or _default_preset(settings))
    given, usual = _table(settings, "optim"), _table(low, "optim")
    if given.get("name") and given["name"] != usual.get("name"):
        usual = {key: value for key, value in usual.items() if key not in PAIR_RATES}
    if "lr" in given:
        usual.pop("lr_text_encoder", None)
    if usual:
        low = low | {"optim": usual}
    config = resolve(merge(low, dict(settings)))
    if config.method not in METHODS:
        raise ConfigError(f"no method '{config.method}': choose one of {', '.join(METHODS)}")
    if not config.trains_text_encoder and "lr_text_encoder" not in given:
        held = config.optim.model_copy(update={"lr_text_encoder": None})
        config = config.model_copy(update={"optim": held})
    optim = config.optim
    if optim.lr == "auto":
        optimizer_spec(optim.name)  # refuses an unknown name here
        return config
    lr = optim.lr or optimizer_spec(optim.name).lr
    given = {"lr": lr, "lr_unet": optim.lr_unet, "lr_text_encoder": optim.lr_text_encoder}
    rates = {key: rate for key, rate in given.items() if rate is not None}
    filled = with_rates(config, lr)
    return filled.model_copy(update={"optim": filled.optim.model_copy(update=rates)})


def _table(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A table of a settings tree; empty where there is none, or what is no table."""
    found = tree.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _idle_rate(config: TrainConfig) -> str:
    """A line about a rate for a text encoder that does not train; empty where there is none."""
    rate = config.optim.lr_text_encoder
    if rate is None or config.trains_text_encoder:
        return ""
    custom = config.method == "custom_diffusion"
    why = "method = custom_diffusion" if custom else "lora.text_encoder = false"
    return f"optim.lr_text_encoder = {rate:g} is for nothing: the text encoder is held ({why})"


def _default_preset(settings: Mapping[str, Any]) -> str:
    base = "pocket" if settings.get("base", "pocket") == "pocket" else "sd15"
    own = f"{base}-{settings.get('method', 'lora')}"
    return own if own in preset_names() else base


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
    folders = [_read(source) for source in config.sources()]
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
    check_triggers(backbone, config.concepts())
    _check_previews(config)
    side = training_side(backbone, config.resolution)
    _check_rank(backbone, config)
    config = config.model_copy(update={"resolution": side, "precision": precision})
    triggers = [concept.trigger for concept in config.concepts()]
    folders, moved = _with_triggers_kept(backbone, found.folders, triggers)
    groups, held_out = _hold_out(folders, config)
    photos = balanced(groups) if config.balance else [photo for group in groups for photo in group]
    whole, classes = joined(folders), found.classes
    told = (fallback, leftovers(os.environ), _idle_rate(config))
    fallbacks = [line for line in told if line]
    plan = Plan(
        config, backbone, whole, photos, classes, [], found.undrawn, moved, held_out, fallbacks
    )
    return plan if plan.undrawn or not classes.photos else _with_class_photos(plan, classes.photos)


def _with_triggers_kept(
    backbone: Backbone, folders: list[PhotoFolder], triggers: list[str]
) -> tuple[list[PhotoFolder], list[tuple[str, str]]]:
    """The folders with captions that keep their trigger, and the captions that would not have."""
    moved: dict[str, str] = {}
    result = []
    for folder in folders:
        photos = []
        for photo in folder.photos:
            caption, trigger = with_trigger_kept(backbone, photo.caption, triggers)
            if trigger:
                moved[photo.caption] = trigger
            photos.append(replace(photo, caption=caption))
        result.append(replace(folder, photos=photos))
    return result, list(moved.items())


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


def _check_previews(config: TrainConfig) -> None:
    """ConfigError for a preview's prompt with syntax that is not supported."""
    triggers = [concept.trigger for concept in config.concepts()]
    for prompt in config.previews.prompts:
        for trigger in triggers:
            read_prompt(prompt.replace("{trigger}", trigger), triggers)


def _check_rank(backbone: Backbone, config: TrainConfig) -> None:
    """ConfigError for a rank that the narrowest adapted layer cannot have."""
    lora = config.lora
    layers = [
        backbone.components[part].get_submodule(path)
        for part, paths in adapted_paths(backbone, lora.layers, lora.text_encoder).items()
        for path in paths
    ]
    weights = [each.weight for each in layers if isinstance(each, nn.Linear | nn.Conv2d)]
    widths = [min(len(weight), weight[0].numel()) for weight in weights]
    if config.lora.rank > min(widths):
        raise ConfigError(
            f"lora.rank = {config.lora.rank} is more than the narrowest layer of {config.base} has "
            f"({min(widths)}): choose a smaller rank."
        )


def _read(source: PhotoSource) -> PhotoFolder:
    folder = user_path(source.photos)
    return read_folder(folder, source.concept, source.templates, source.repeats)


def _hold_out(
    folders: list[PhotoFolder], config: TrainConfig
) -> tuple[list[list[Photo]], list[Photo]]:
    """Each concept's photos to train on, and those that a seeded draw holds out."""
    photos = [photo for folder in folders for photo in folder.photos]
    order = torch.randperm(
        len(photos), generator=generator(config.seed, 0, Stream.HELD_OUT)
    ).tolist()
    held_out = [photos[place] for place in sorted(order[: config.validation.photos])]
    names = {photo.path for photo in held_out}
    groups: dict[Concept, list[Photo]] = {concept: [] for concept in config.concepts()}
    for source, folder in zip(config.sources(), folders, strict=True):
        groups[source.concept] += [photo for photo in folder.photos if photo.path not in names]
    for concept, kept in groups.items():
        if not kept:
            raise ConfigError(
                f"validation.photos = {config.validation.photos} leaves no photo of "
                f"{concept.trigger} to train on: hold out fewer."
            )
    return list(groups.values()), held_out
