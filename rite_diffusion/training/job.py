"""A training's parts together, and the release of encoders that no step needs."""

from dataclasses import dataclass

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods import Method
from rite_diffusion.photos.dataset import LatentSet


@dataclass(frozen=True)
class Job:
    """A method on a backbone, the data it trains on, and the settings."""

    backbone: Backbone
    method: Method
    data: LatentSet
    config: TrainConfig
    held_out: LatentSet | None = None  # for the validation loss


def captions_are_cached(job: Job) -> bool:
    """Whether the conditioning of every caption can be computed before the first step."""
    config = job.config
    return job.method.text_is_frozen and config.cache and not config.captions.shuffle


def cache_captions(job: Job) -> None:
    """Compute and cache the conditioning of every caption, where `captions_are_cached`."""
    if captions_are_cached(job):
        held_out = job.held_out.captions if job.held_out else []
        dropped = [""] if job.config.captions.dropout else []
        for caption in dict.fromkeys([*job.data.captions, *held_out, *dropped]):
            job.method.conditioning([caption])


def release_encoders(job: Job) -> None:
    """Release the encoders that no step needs, as all samples are encoded.

    On a CPU, where released parts are read from disk again, they stay if there are previews, which
    need them; from other devices they move to main memory.
    """
    if job.config.previews.every and job.backbone.device.type == "cpu":
        return
    texts = [name for name in job.backbone.components if name != job.backbone.denoiser_name]
    job.backbone.release(["vae", *(texts if captions_are_cached(job) else [])])
