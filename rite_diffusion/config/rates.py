"""Learning rates in a configuration."""

from rite_diffusion.config import TrainConfig


def with_rates(config: TrainConfig, rate: float) -> TrainConfig:
    """The configuration with the rates of the UNet and, if it trains, the text encoder (half)."""
    text_encoder = rate / 2 if config.trains_text_encoder else config.optim.lr_text_encoder
    rates = {"lr_unet": rate, "lr_text_encoder": text_encoder}
    return config.model_copy(update={"optim": config.optim.model_copy(update=rates)})
