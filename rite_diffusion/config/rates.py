"""Learning rates in a configuration."""

from rite_diffusion.config import TrainConfig


def with_rates(config: TrainConfig, rate: float) -> TrainConfig:
    """The configuration with the rates of the UNet and the text encoder (half) set."""
    rates = {"lr_unet": rate, "lr_text_encoder": rate / 2}
    return config.model_copy(update={"optim": config.optim.model_copy(update=rates)})
