"""Training batches; every random choice is a function of (seed, step)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import CaptionSection, ObjectiveSection
from rite_diffusion.methods.triggers import with_trigger_kept
from rite_diffusion.photos.buckets import batch_indices
from rite_diffusion.photos.dataset import LatentSet
from rite_diffusion.seeding import Stream, generator
from rite_diffusion.training.objective import offset_noise, perturb, stratified_places

DEFAULT_OBJECTIVE, DEFAULT_CAPTIONS = ObjectiveSection(), CaptionSection()


@dataclass(frozen=True)
class Batch:
    """The samples of a step with captions, noise and timesteps."""

    indices: list[int]  # of the samples in the data
    captions: list[str]
    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # of the same shape
    input_noise: Tensor  # noise of the model's input; differs with input perturbation
    places: Tensor  # (B,) in [0, 1), in the noise schedule
    weights: Tensor  # (B,) of the samples' losses
    masks: Tensor | None  # (B, 1, h, w) weights of the latent cells' errors in [0, 1]

    def parts(self, count: int) -> list["Batch"]:
        """The batch in `count` equal parts."""
        size = len(self.indices) // count
        slices = [slice(start, start + size) for start in range(0, size * count, size)]
        return [
            Batch(
                self.indices[part],
                self.captions[part],
                self.latents[part],
                self.noise[part],
                self.input_noise[part],
                self.places[part],
                self.weights[part],
                self.masks[part] if self.masks is not None else None,
            )
            for part in slices
        ]


def draw_batch(
    backbone: Backbone,
    data: LatentSet,
    step: int,
    *,
    size: int = 4,
    seed: int = 0,
    objective: ObjectiveSection = DEFAULT_OBJECTIVE,
    captions: CaptionSection = DEFAULT_CAPTIONS,
) -> Batch:
    """The batch of a step, counted from 0: a function of `seed` and `step`.

    `size` is the number of samples, all of one shape. `objective` sets how timesteps and noise are
    drawn, `captions` how captions are shuffled and dropped.
    """
    goal = objective

    def stream(number: int) -> torch.Generator:
        return generator(seed, step, number)

    indices = batch_indices(data.buckets, size, seed, step)
    texts = [data.captions[index] for index in indices]
    texts = shuffle_parts(texts, captions, stream(Stream.CAPTION_SHUFFLE))
    texts = drop_captions(texts, captions.dropout, stream(Stream.CAPTION_DROPOUT))
    density = (goal.timestep_mean, goal.timestep_deviation)
    places = stratified_places(
        size, stream(Stream.TIMESTEPS), density if goal.timesteps == "logit_normal" else None
    )
    noise = torch.randn((size, *latents_shape(data, indices)), generator=stream(Stream.NOISE))
    if goal.noise_offset:
        noise = offset_noise(noise, goal.noise_offset, stream(Stream.NOISE_OFFSET))
    input_noise = noise
    if goal.input_perturbation:
        input_noise = perturb(noise, goal.input_perturbation, stream(Stream.INPUT_PERTURBATION))
    return make_batch(backbone, data, indices, texts, noise, input_noise, places)


def latents_shape(data: LatentSet, indices: list[int]) -> torch.Size:
    """Shape (C, h, w) of the latents of samples that share one shape."""
    return data.latents[data.samples[indices[0]]].shape


def make_batch(
    backbone: Backbone,
    data: LatentSet,
    indices: list[int],
    captions: list[str],
    noise: Tensor,
    input_noise: Tensor,
    places: Tensor,
) -> Batch:
    """The batch of samples of one shape, on the backbone's device.

    Captions above the text encoder's limit of tokens are cut so that triggers stay.
    """
    triggers = [trigger for each in backbone.triggers.values() for trigger in each]
    captions = [with_trigger_kept(backbone, caption, triggers)[0] for caption in captions]
    rows = [data.samples[index] for index in indices]
    masks = torch.stack([data.masks[row] for row in rows]) if data.masks is not None else None
    return Batch(
        indices,
        captions,
        torch.stack([data.latents[row] for row in rows]).to(backbone.device),
        noise.to(backbone.device),
        input_noise.to(backbone.device),
        places.to(backbone.device),
        torch.tensor([data.weights[index] for index in indices], device=backbone.device),
        None if masks is None else masks.to(backbone.device),
    )


def shuffle_parts(captions: list[str], how: CaptionSection, draws: torch.Generator) -> list[str]:
    """The captions with the comma-separated parts after the first `keep` in random order."""
    if not how.shuffle:
        return captions
    result = []
    for caption in captions:
        parts = [part.strip() for part in caption.split(",")]
        fixed, loose = parts[: how.keep], parts[how.keep :]
        order = torch.randperm(len(loose), generator=draws).tolist()
        result.append(", ".join(fixed + [loose[place] for place in order]))
    return result


def drop_captions(captions: list[str], share: float, draws: torch.Generator) -> list[str]:
    """The captions, a random share of them empty (Ho & Salimans 2022, Alg. 1)."""
    values = torch.rand(len(captions), generator=draws).tolist()
    return ["" if value < share else text for value, text in zip(values, captions, strict=True)]
