"""What trains on what, and what of it can leave memory meanwhile."""

from dataclasses import dataclass

from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.config import TrainConfig
from rite_diffusion.methods import Method
from rite_diffusion.photos.dataset import LatentSet


@dataclass(frozen=True)
class Job:
    """What trains on what."""

    backbone: Backbone
    method: Method
    data: LatentSet
    config: TrainConfig
    held_out: LatentSet | None = None  # for the validation loss


def captions_are_cached(job: Job) -> bool:
    """Whether the conditioning of every caption to come can be on disk before the first step."""
    config = job.config
    return job.method.text_is_frozen and config.cache and not config.captions.shuffle


def cache_captions(job: Job) -> None:
    """Have the conditioning of every caption to come on disk, where that is possible."""
    if captions_are_cached(job):
        held_out = job.held_out.captions if job.held_out else []
        dropped = [""] if job.config.captions.dropout else []
        for caption in dict.fromkeys([*job.data.captions, *held_out, *dropped]):
            job.method.conditioning([caption])


def release_encoders(job: Job) -> None:
    """Let encoders leave memory that no step needs: all samples are encoded.

    Previews do need them. On a CPU they stay for previews to come, as they would have to be read
    from the disk each time; elsewhere they wait in the computer's memory.
    """
    if job.config.previews.every and job.backbone.device.type == "cpu":
        return
    texts = [name for name in job.backbone.components if name != job.backbone.denoiser_name]
    job.backbone.release(["vae", *(texts if captions_are_cached(job) else [])])
