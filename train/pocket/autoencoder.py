"""Training of the autoencoder, on crops of varied pictures.

It learns with many latent channels, because that is easier, and is then narrowed to those that
carry something, because denoisers learn few of them faster; the decoder learns on with those.

python -m train.pocket autoencoder --work DIR
python -m train.pocket decoder --work DIR
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from . import held_out, images
from .losses import PatchCritic, RandomFeatures, critic_loss, pixel_loss
from .machine import (
    Machine,
    Progress,
    load_state,
    rate_at,
    save_state,
    set_rate,
    update_average,
)
from .networks import LATENT_NOISE, new_autoencoder

SEED = 11  # of the training's pictures; held_out uses others
CROPS = 2  # of each picture


@dataclass(frozen=True)
class Settings:
    """One training of the autoencoder. Shares are of `pictures`, the length of the training."""

    pictures: int = 130_000
    batch: int = 8  # pictures, so CROPS times as many crops
    rate: float = 1.5e-3
    crop: int = 64  # pixels
    whole_from: float = 0.8  # from this share on, whole pictures, and the decoder alone learns
    features: float = 0.05  # weight of the distance in random features
    critic: float = 0.02  # weight of the critic ...
    critic_from: float = 0.85  # ... from this share on
    prior: float = 1e-4  # weight of the latents' mean square
    decay: float = 0.999  # of the average of the weights
    latent_channels: int = 32
    widths: tuple[int, ...] = (16, 32, 64, 128)
    kept_channels: int = 16  # after narrowing
    decoder_pictures: int = 24_000  # that the decoder sees after that

    @property
    def narrow(self) -> "Settings":
        """The training of the decoder after narrowing."""
        return replace(
            self,
            pictures=self.decoder_pictures,
            rate=self.rate / 3,
            latent_channels=self.kept_channels,
            whole_from=0.0,
            critic=0.05,
            critic_from=0.05,
        )


class Crops(Dataset):
    """Crops (CROPS, crop, crop, 3) uint8 of each picture, or the whole picture (1, ...)."""

    def __init__(self, first: int, count: int, crop: int) -> None:
        self.first, self.count, self.crop = first, count, crop

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng([SEED, self.first + index])
        image = images.any_image(rng)
        crops = image[None] if self.crop == images.SIZE else lively_crops(rng, image, self.crop)
        return torch.from_numpy(np.ascontiguousarray(crops))


def lively_crops(rng: np.random.Generator, image: np.ndarray, crop: int) -> np.ndarray:
    """CROPS squares of a picture, each the one with more edges of two random ones."""
    edges = np.abs(np.diff(image.astype(np.int16), axis=1)).sum(-1)
    chosen = []
    for _ in range(CROPS):
        corners = rng.integers(0, image.shape[0] - crop + 1, (2, 2))
        energy = [edges[y : y + crop, x : x + crop - 1].sum() for y, x in corners]
        y, x = corners[int(np.argmax(energy))]
        chosen.append(image[y : y + crop, x : x + crop])
    return np.stack(chosen)


def batches(seen: int, settings: Settings, machine: Machine) -> Iterator[Tensor]:
    """Batches of pixels in [-1, 1] from picture `seen` to the end of the training."""
    turn = round(settings.pictures * settings.whole_from)
    phases = [(turn, settings.crop), (settings.pictures, images.SIZE)]
    for end, crop in phases:
        if seen >= end:
            continue
        data = Crops(seen, end - seen, crop)
        loader = DataLoader(data, settings.batch, num_workers=machine.workers)
        for stack in loader:
            yield held_out.as_pixels(stack.flatten(0, 1).to(machine.device))
        seen = end


class Training:
    """The networks and optimizers of one training."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        torch.manual_seed(0)
        self.settings, self.machine = settings, machine
        like = {"device": machine.device, "memory_format": torch.channels_last}
        self.network = new_autoencoder(settings.widths, settings.latent_channels).to(**like)
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.features = RandomFeatures().to(**like)
        self.critic = PatchCritic().to(**like)
        adam = torch.optim.AdamW
        self.optimizer = adam(
            self.network.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.critic_optimizer = adam(
            self.critic.parameters(), 2e-4, betas=(0.5, 0.99), weight_decay=0.0
        )

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a state holds, by name."""
        return {"network": self.network, "average": self.average, "critic": self.critic}

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers whose moments a state holds, by name."""
        return {"network": self.optimizer, "critic": self.critic_optimizer}

    def hold_encoder(self) -> None:
        """Keep the averaged encoder as it is: a denoiser may learn its latents from here on."""
        for name in ("encoder", "quant_conv"):
            part = self.network.get_submodule(name)
            part.load_state_dict(self.average.get_submodule(name).state_dict())
            part.requires_grad_(False)

    def reconstruct(self, pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Reconstructions from latents with noise, and the latents."""
        with self.machine.autocast():
            latents = self.network.encode(pixels).latent_dist.mean
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            output = self.network.decode(latents + LATENT_NOISE * noise).sample
        return output.float(), latents.float()

    def step(self, pixels: Tensor, seen: int) -> dict[str, float]:
        """One step on a batch; returns the losses."""
        settings = self.settings
        generator = torch.Generator().manual_seed(seen)
        output, latents = self.reconstruct(pixels, generator)
        losses = {"pixels": pixel_loss(output, pixels)}
        losses["features"] = settings.features * self.features.distance(output, pixels)
        losses["prior"] = settings.prior * latents.square().mean()
        if settings.critic and seen >= settings.critic_from * settings.pictures:
            losses["critic"] = self._criticise(pixels, output)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 0.5)
        set_rate(self.optimizer, rate_at(settings.rate, seen, settings.pictures))
        self.optimizer.step()
        update_average(self.average, self.network, round(seen / settings.batch), settings.decay)
        return {name: loss.item() for name, loss in losses.items()}

    def _criticise(self, pixels: Tensor, output: Tensor) -> Tensor:
        """Teach the critic; returns what it says of the reconstructions, as a loss."""
        self.critic_optimizer.zero_grad()
        critic_loss(self.critic(pixels), self.critic(output.detach())).backward()
        self.critic_optimizer.step()
        self.critic.requires_grad_(False)
        opinion = -self.settings.critic * self.critic(output).mean()
        self.critic.requires_grad_(True)
        return opinion


def train(work: Path, settings: Settings, machine: Machine) -> None:
    """Train until `settings.pictures`, from the state in `work` if there is one."""
    go_on(Training(settings, machine), work / "autoencoder.safetensors")


def train_decoder(work: Path, settings: Settings, machine: Machine) -> None:
    """Narrow the trained autoencoder and train its decoder, from its state in `work` if any."""
    training = Training(settings.narrow, machine)
    if not (work / "decoder.safetensors").exists():
        start = finished(work, settings).state_dict()
        training.network.load_state_dict(start)
        training.average.load_state_dict(start)
    go_on(training, work / "decoder.safetensors")


def go_on(training: Training, path: Path) -> None:
    """Train to the end from the state at `path` if there is one; save and show now and then."""
    settings, machine = training.settings, training.machine
    seen = load_state(path, training.optimizers, training.modules)
    progress = Progress(path.stem, seen, settings.pictures)
    for pixels in batches(seen, settings, machine):
        if seen >= settings.whole_from * settings.pictures:
            training.hold_encoder()
        losses = training.step(pixels, seen)
        seen = min(seen + settings.batch, settings.pictures)
        if progress.is_due(seen):
            progress.report(seen, losses | held_out.brief_figures(training.average, machine))
            save_state(path, seen, training.optimizers, training.modules)
            held_out.show(training.average, machine, path.with_suffix(".png"))


@torch.no_grad()
def standardise(autoencoder: AutoencoderKL, pixels: Tensor) -> None:
    """Fold the latents' means and their one deviation into the 1x1 convolutions around them.

    Afterwards each channel has mean 0 and all latents together deviation 1, so the pipeline's
    scaling factor is 1. Channels keep their share of the variance: those that carry little detail
    stay small, so that a denoiser settles them last.
    """
    latents = autoencoder.encode(pixels).latent_dist.mean
    mean = latents.mean((0, 2, 3))
    scale = (latents - mean[:, None, None]).std()
    inward, outward, half = autoencoder.quant_conv, autoencoder.post_quant_conv, len(mean)
    inward.weight[:half] /= scale
    inward.bias[:half] = (inward.bias[:half] - mean) / scale
    inward.bias[half:] -= 2 * scale.log()
    outward.bias += outward.weight[..., 0, 0] @ mean
    outward.weight *= scale


@torch.no_grad()
def narrowed(autoencoder: AutoencoderKL, widths: tuple[int, ...], kept: int) -> AutoencoderKL:
    """The autoencoder with only the `kept` principal components of its latents as channels.

    The components are folded into the encoder's last and the decoder's first convolution. What is
    lost is their remainder, and a constant along the picture's border.
    """
    pixels = held_out.as_pixels(_varied(300))
    latents = torch.cat([autoencoder.encode(p).latent_dist.mean for p in pixels.split(50)])
    vectors = latents.movedim(1, -1).flatten(0, -2)
    mean = vectors.mean(0)
    covariance = (vectors - mean).T @ (vectors - mean)
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :kept]  # (channels, kept)
    found = new_autoencoder(widths, kept)
    changed = ("encoder.conv_out.", "quant_conv.", "post_quant_conv.", "decoder.conv_in.")
    weights = autoencoder.state_dict()
    weights = {n: w for n, w in weights.items() if not n.startswith(changed)}
    found.load_state_dict(weights, strict=False)
    _fold_encoder(autoencoder, found, axes, mean)
    _fold_decoder(autoencoder, found, axes, mean)
    return found


def _varied(count: int) -> np.ndarray:
    drawn = [images.any_image(np.random.default_rng([SEED + 2, i])) for i in range(count)]
    return np.stack(drawn)


def _fold_encoder(wide: AutoencoderKL, narrow: AutoencoderKL, axes: Tensor, mean: Tensor) -> None:
    """Make the narrow encoder give the wide one's components along `axes` around `mean`."""
    channels, kept = axes.shape
    last, inward = wide.encoder.conv_out, wide.quant_conv
    project = axes.T @ inward.weight[:channels, :, 0, 0]
    narrow.encoder.conv_out.weight.zero_()
    narrow.encoder.conv_out.bias.zero_()
    narrow.encoder.conv_out.weight[:kept] = torch.einsum("kc,cihw->kihw", project, last.weight)
    narrow.encoder.conv_out.bias[:kept] = project @ last.bias + axes.T @ (
        inward.bias[:channels] - mean
    )
    narrow.quant_conv.weight.zero_()
    narrow.quant_conv.weight[:kept, :kept, 0, 0] = torch.eye(kept)
    narrow.quant_conv.bias[:kept] = 0


def _fold_decoder(wide: AutoencoderKL, narrow: AutoencoderKL, axes: Tensor, mean: Tensor) -> None:
    """Make the narrow decoder read components along `axes` around `mean`."""
    first, outward = wide.decoder.conv_in, wide.post_quant_conv
    expand = outward.weight[..., 0, 0] @ axes
    constant = outward.weight[..., 0, 0] @ mean + outward.bias
    narrow.decoder.conv_in.weight.copy_(torch.einsum("oihw,ik->okhw", first.weight, expand))
    narrow.decoder.conv_in.bias.copy_(
        first.bias + torch.einsum("oihw,i->o", first.weight, constant)
    )
    narrow.post_quant_conv.weight.copy_(torch.eye(axes.shape[1])[..., None, None])
    narrow.post_quant_conv.bias.zero_()


def finished(work: Path, settings: Settings) -> AutoencoderKL:
    """The averaged narrow autoencoder with standardised latents, once the encoder is held.

    Its decoder is that of the decoder's training as far as that has come.
    """
    path = work / "decoder.safetensors"
    if path.exists():
        module = new_autoencoder(settings.widths, settings.kept_channels)
        load_state(path, {}, {"average": module})
    else:
        wide = new_autoencoder(settings.widths, settings.latent_channels)
        seen = load_state(work / "autoencoder.safetensors", {}, {"average": wide})
        if seen < (held := settings.whole_from * settings.pictures):
            raise SystemExit(
                f"the encoder learns until {held:.0f} pictures, {seen} are seen: wait."
            )
        module = narrowed(wide, settings.widths, settings.kept_channels)
    pictures = [images.world_scene(np.random.default_rng([SEED + 1, i])) for i in range(256)]
    standardise(module, held_out.as_pixels(np.stack(pictures)))
    return module.eval()
