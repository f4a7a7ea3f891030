"""The settings of a training run: every key, its range and its default."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rite_diffusion.config.lora import LoraSection, lora_conflict
from rite_diffusion.config.memory import MemorySection, memory_conflict
from rite_diffusion.config.section import Section
from rite_diffusion.config.templates import ClassTemplate, ConceptTemplate
from rite_diffusion.seeding import SEEDS
from rite_diffusion.types import Concept

Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64)]


class OptimSection(Section):
    """The optimizer; a rate that is not set defaults to `lr`, and `lr` to the optimizer's own."""

    name: str = Field(default="adamw", description="see rite_diffusion.optim.OPTIMIZERS")
    lr: Rate | Literal["auto"] | None = Field(
        default=None, description="default: the optimizer's own; auto: found by a short probe"
    )
    lr_unet: Rate | None = Field(default=None, description="of the UNet's pairs; default: lr")
    lr_text_encoder: Rate | None = Field(default=None, description="default: half of lr")
    lr_tokens: Rate = Field(
        default=1e-3, description="of new words' embeddings, which LoRA optimizers leave to AdamW"
    )
    lr_magnitudes: Rate | None = Field(
        default=None,
        description="of DoRA's magnitudes, which LoRA optimizers leave to AdamW; default: "
        "the pairs' under adamw and sgd, else adamw's own",
    )
    options: dict[str, Any] = Field(
        default={}, description="the optimizer's own, such as {damping = 1e-4}"
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="decoupled from the gradient")
    clip_norm: float = Field(default=1.0, gt=0, description="bound on the norm of all gradients")
    warmup: int = Field(
        default=10, ge=0, description="steps, at most a fifth of all; the decay begins after them"
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="course of the rates after the warm-up; the others end at 0"
    )


class TokenSection(Section):
    """Learned embeddings, for the methods that have them."""

    init: ClassTemplate = Field(
        default="{class_noun}",
        description="word whose embedding a concept's last vector starts from; empty: random",
    )
    vectors: int | None = Field(
        default=None, ge=1, le=16, description="per new word; default: 1, ed_lora's only word: 2"
    )
    deviation: float | None = Field(
        default=None, gt=0, le=1, description="of random starts; default: that of all embeddings"
    )
    first: int = Field(default=0, ge=0, description="pivotal: steps that train embeddings only")
    stop_norm: float | None = Field(
        default=None, gt=0, description="mean norm of the vectors at which their training ends"
    )


class CustomDiffusionSection(Section):
    """Training of the cross-attentions' keys and values."""

    weights: Literal["full", "lora"] = Field(
        default="full", description="whole matrices, or pairs of lora.rank"
    )


class AttentionSection(Section):
    """Regularisation of the new words' attention maps by the subject's mask."""

    weight: float = Field(default=0.01, ge=0, description="of the loss on attention maps; 0: none")
    subject: Literal["outside", "fit"] = Field(
        default="outside",
        description="a concept's last vector: kept inside the mask, or fitted to it",
    )


class CaptionSection(Section):
    """Changes of captions in training."""

    shuffle: bool = Field(default=False, description="the order of comma-separated parts")
    keep: int = Field(default=1, ge=0, description="first parts that stay in place")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of samples without caption")


class AugmentSection(Section):
    """Views of each picture; the first is the picture, and all are encoded before training."""

    flip: bool = Field(default=False, description="every view also mirrored")
    views: int = Field(default=1, ge=1, le=1000, description="number of views of each picture")
    crop: float = Field(default=0.0, ge=0, le=0.5, description="most cut off width and height")
    colour: float = Field(
        default=0.0, ge=0, le=0.5, description="most that brightness, contrast, saturation change"
    )
    scale_and_prefix: bool = Field(
        default=False,
        description="small and close-up views, named in the caption: Kumari et al. 2023",
    )

    @model_validator(mode="after")
    def _one_view_is_the_picture(self):
        if self.views == 1 and (self.crop or self.colour or self.scale_and_prefix):
            raise ValueError("crop, colour and scale_and_prefix need augment.views of 2 or more")
        return self


class PriorSection(Section):
    """Prior preservation (Ruiz et al. 2023, Eq. 2): pictures of the class train along."""

    weight: float = Field(default=0.0, ge=0, le=10, description="of their loss; 0: none")
    count: int = Field(default=24, ge=1, le=10_000, description="pictures that the base draws")
    prompts: list[ClassTemplate] = Field(
        default=["a {class_noun}"], min_length=1, description="what the base draws, in turn"
    )


class ObjectiveSection(Section):
    """The loss: its form, its weighting, and how timesteps and noise are drawn."""

    loss: Literal["mse", "huber"] = Field(default="mse", description="of the prediction's error")
    huber_delta: float = Field(default=0.1, gt=0, description="errors above it count linearly")
    weighting: Literal["none", "min_snr", "debiased"] = Field(
        default="none", description="of timesteps: Hang et al. 2023, Yu et al. 2023"
    )
    min_snr_gamma: float = Field(default=5.0, gt=0, description="min_snr: the cap on the SNR")
    timesteps: Literal["uniform", "logit_normal"] = Field(
        default="uniform", description="density that timesteps are drawn from: Esser et al. 2024"
    )
    timestep_mean: float = Field(default=0.0, description="of logit_normal")
    timestep_deviation: float = Field(default=1.0, gt=0, description="of logit_normal")
    shift: float | None = Field(
        default=None, gt=0, description="flow: towards noise; default: the base's, by picture size"
    )
    guidance: float | None = Field(
        default=None, ge=0, description="bases with embedded guidance: the scale while training"
    )
    noise_offset: float = Field(
        default=0.0, ge=0, le=1, description="share of noise that is one value per channel"
    )
    input_perturbation: float = Field(
        default=0.0, ge=0, le=1, description="extra noise that the target ignores: Ning et al. 2023"
    )
    mask_floor: float = Field(
        default=0.1, ge=0, le=1, description="weight of what a mask leaves out; 1: no masks"
    )


class ValidationSection(Section):
    """The loss on held-out pictures, at fixed timesteps and noise."""

    every: int = Field(default=50, ge=1, description="steps")
    photos: int = Field(default=0, ge=0, description="how many are held out; 0: no validation")


class PreviewSection(Section):
    """Pictures drawn during training."""

    every: int = Field(default=100, ge=0, description="steps; 0: none")
    prompts: list[ConceptTemplate] = Field(
        default=["a {trigger} on a blue background", "a {trigger} on a green background"],
        description="what is drawn, for every concept",
    )
    steps: int = Field(default=20, ge=1, description="denoising steps")
    guidance: float = Field(default=3.0, ge=0, description="classifier-free guidance scale")
    seed: int = Field(default=0, ge=0, lt=SEEDS, description="of the pictures' noise")


class CheckpointSection(Section):
    """When the adapter is written during training, and which files are kept."""

    every: int = Field(default=100, ge=1, description="steps")
    keep: int = Field(default=2, ge=1, description="newest checkpoints to keep")
    milestones: list[int] = Field(default=[], description="steps whose checkpoints always stay")


class SourceSection(Section):
    """A photo folder and its concept; a missing setting is taken from the table above."""

    photos: str | None = Field(default=None, description="folder with the pictures")
    trigger: Name | None = Field(default=None, description="new word that calls the concept")
    class_noun: Name | None = Field(default=None, description="what it is: dog, robot")
    class_photos: str | None = Field(
        default=None, description="folder with pictures of the class, for prior preservation"
    )
    templates: list[ConceptTemplate] | None = Field(
        default=None, min_length=1, description="captions of pictures that have none, in turn"
    )
    repeats: int | None = Field(
        default=None, ge=1, le=1000, description="how often an epoch shows each picture"
    )


class DatasetSection(SourceSection):
    """Photo folders that share settings."""

    subset: list[SourceSection] = []

    @model_validator(mode="after")
    def _holds_photos(self):
        if not self.subset and not self.photos:
            raise ValueError("neither photos nor a subset")
        return self


@dataclass(frozen=True)
class PhotoSource:
    """A photo folder with its settings, those of the tables above it included."""

    photos: str
    concept: Concept
    class_photos: str | None
    templates: list[str]
    repeats: int


class TrainConfig(SourceSection):
    """Everything that decides a training run."""

    base: str = Field(
        "pocket", description="`pocket`, a hub id, a diffusers folder or a .safetensors"
    )
    # At the top level these have defaults, which the tables below may override.
    templates: list[ConceptTemplate] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=["a {trigger}", "a photo of a {trigger}"],
        min_length=1,
        description="captions of pictures that have none, in turn",
    )
    repeats: int = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=1, ge=1, le=1000, description="how often an epoch shows each picture"
    )
    dataset: list[DatasetSection] = Field(default=[], description="several photo folders")
    balance: bool = Field(
        default=True, description="show several concepts equally often, whatever their photos"
    )
    method: str = Field(
        default="lora", description="lora, pivotal, custom_diffusion, ed_lora or one of your own"
    )
    steps: int = Field(default=300, ge=1, le=1_000_000, description="optimizer steps")
    batch: int = Field(default=4, ge=1, le=1024, description="pictures in a batch")
    accumulate: int = Field(
        default=1, ge=1, le=1024, description="batches whose gradients one step adds up"
    )
    ema: float = Field(
        default=0.0, ge=0, lt=1, description="decay of averaged weights, which are saved; 0: none"
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory, more time")
    compile: bool = Field(
        default=False, description="torch.compile the denoiser: minutes at first, faster steps"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of everything random")
    resolution: int | None = Field(
        default=None, ge=16, le=4096, description="pixels; default: the base's"
    )
    buckets: bool = Field(
        default=False, description="keep the pictures' shapes; else they are cut to squares"
    )
    cache: bool = Field(default=True, description="keep encoded pictures on disk for the next run")
    precision: Literal["fp32", "fp16", "bf16"] = Field(
        default="fp32", description="of the arithmetic; trained weights stay in fp32"
    )
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[], description="where metrics go besides metrics.jsonl"
    )
    captions: CaptionSection = CaptionSection()
    augment: AugmentSection = AugmentSection()
    prior: PriorSection = PriorSection()
    lora: LoraSection = LoraSection()
    tokens: TokenSection = TokenSection()
    custom_diffusion: CustomDiffusionSection = CustomDiffusionSection()
    attention: AttentionSection = AttentionSection()
    optim: OptimSection = OptimSection()
    objective: ObjectiveSection = ObjectiveSection()
    validation: ValidationSection = ValidationSection()
    memory: MemorySection = MemorySection()
    previews: PreviewSection = PreviewSection()
    checkpoints: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _every_source_is_whole(self):
        for number, found in enumerate(self._tables(), 1):
            for key in ("photos", "trigger", "class_noun"):
                if not found.get(key):
                    where = f" for photo folder {number}" if self.dataset else ""
                    raise ValueError(f"'{key}' is missing{where}")
            if found["class_photos"] and not self.prior.weight:
                raise ValueError("class_photos train along only with prior.weight above 0")
        return self

    @model_validator(mode="after")
    def _method_uses_its_tables(self):
        users = {
            "tokens": ("pivotal", "custom_diffusion", "ed_lora"),
            "custom_diffusion": ("custom_diffusion",),
            "attention": ("ed_lora",),
        }
        for table, methods in users.items():
            changed = getattr(self, table) != type(self).model_fields[table].default
            if changed and self.method not in methods:
                raise ValueError(f"[{table}] is for method {' or '.join(methods)}")
        if conflict := lora_conflict(self):
            raise ValueError(conflict)
        if self.tokens.first and (self.method != "pivotal" or self.tokens.first >= self.steps):
            raise ValueError("tokens.first is for method pivotal, and less than its steps")
        return self

    @model_validator(mode="after")
    def _memory_fits_the_training(self):
        if conflict := memory_conflict(self):
            raise ValueError(conflict)
        return self

    @property
    def trains_text_encoder(self) -> bool:
        """Whether the text encoder's layers train; their rate is `optim.lr_text_encoder`."""
        return self.lora.text_encoder and self.method != "custom_diffusion"

    def with_rates(self, rate: float) -> "TrainConfig":
        """With `rate` for the denoiser and half of it for a text encoder that trains."""
        text_encoder = rate / 2 if self.trains_text_encoder else self.optim.lr_text_encoder
        rates = {"lr_unet": rate, "lr_text_encoder": text_encoder}
        return self.model_copy(update={"optim": self.optim.model_copy(update=rates)})

    def _tables(self) -> list[dict[str, Any]]:
        """Each photo folder's settings; those missing are its dataset's, else the top level's."""
        general = self.model_dump(include=set(SourceSection.model_fields))
        tables = []
        for dataset in self.dataset:
            shared = general | dataset.model_dump(exclude={"subset"}, exclude_none=True)
            tables += [shared | own.model_dump(exclude_none=True) for own in dataset.subset]
            tables += [] if dataset.subset else [shared]
        return tables or [general]

    def sources(self) -> list[PhotoSource]:
        """The photo folders to train on; a single one where there are no `[[dataset]]` tables."""
        return [
            PhotoSource(
                table["photos"],
                Concept(table["trigger"], table["class_noun"]),
                table["class_photos"],
                table["templates"],
                table["repeats"],
            )
            for table in self._tables()
        ]

    def concepts(self) -> list[Concept]:
        """The distinct concepts to learn, in order."""
        return list(dict.fromkeys(source.concept for source in self.sources()))
