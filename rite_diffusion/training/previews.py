"""Pictures drawn during training."""

from PIL import Image

from rite_diffusion.backbones.conditioning import moved
from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.config import TrainConfig
from rite_diffusion.errors import BackboneError
from rite_diffusion.generation.denoise import encode_for_guidance, sample_encoded
from rite_diffusion.training.assistant import unassisted
from rite_diffusion.training.memory import is_out_of_memory
from rite_diffusion.training.run_folder import RunFolder
from rite_diffusion.training.stages import preview_prompts, release_autoencoder


def write_previews(
    backbone: Backbone,
    config: TrainConfig,
    run: RunFolder,
    step: int,
    encoded: list[Conditioning] | None,
) -> None:
    """Draw every preview prompt for every concept; a failure is logged, and the run goes on.

    `encoded` has the prompts' conditioning, None where it changes with the training.
    """
    try:
        with unassisted(backbone, config):
            for index, prompt in enumerate(preview_prompts(config)):
                conditioning = None if encoded is None else encoded[index]
                image = _drawn(backbone, config, prompt, conditioning)
                image.save(run.path / "previews" / f"step-{step:06d}-{index}.png")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        run.log(f"out of memory for the previews of step {step}: left out")
    except BackboneError as error:  # released parts are read from the base's files again
        run.log(f"no previews of step {step}: {error}")
    release_autoencoder(backbone, config)


def _drawn(
    backbone: Backbone, config: TrainConfig, prompt: str, conditioning: Conditioning | None
) -> Image.Image:
    if conditioning is None:
        conditioning = encode_for_guidance(backbone, [prompt], "")
    else:
        conditioning = moved(conditioning, backbone.device)
    previews, side = config.previews, config.resolution
    [image] = sample_encoded(
        backbone,
        conditioning,
        [previews.seed],
        steps=previews.steps,
        guidance=previews.guidance,
        width=side,
        height=side,
    )
    return image
