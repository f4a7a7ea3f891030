"""A model of one's own: what training, adapters and generation ask of it, on a toy that is quick.

The toy has no autoencoder: its latents are pictures of 16 x 16 pixels. Its text is the mean of the
words' embeddings. Nothing in it is trained; a LoRA on it learns all the same.
"""

import math

import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.nn import functional as F

import rite_diffusion as rite
from rite_diffusion.backbones.protocols import Conditioning, Defaults, Guidance, Support
from rite_diffusion.backbones.schedule import TableSchedule
from rite_diffusion.generation.denoise import sample

STEPS, WIDTH, TOKENS = 100, 64, 512


class Network(nn.Module):
    """Predicts noise (B, 3, 16, 16) from noisy pictures, times and text states (B, width)."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(WIDTH, WIDTH)})
        self.conv_norm_out = nn.GroupNorm(8, WIDTH)
        self.conv_out = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, noisy, times, text):
        """The prediction."""
        waves = torch.outer(times.float(), torch.logspace(0, -2, WIDTH // 2))
        about = torch.cat([waves.sin(), waves.cos()], 1) + text
        about = self.time_embedding["linear_1"](about)[:, :, None, None]
        return self.conv_out(F.silu(self.conv_norm_out(self.conv_in(noisy) + about)))


class ToyBackbone:
    """The members of ImageCodec, TextConditioner, Denoiser and AdapterHost."""

    # AdapterHost: where adapters go, and what files record of the base
    name, fingerprint, denoiser_name, family, support = "toy", "toy", "unet", "toy", Support()
    # ImageCodec
    resolution, multiple, latent_channels, pixels_per_latent = 16, 1, 3, 1
    # Denoiser
    prediction_type, guidance = "epsilon", Guidance()
    defaults = Defaults(steps=20, guidance=1.0)
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        torch.manual_seed(0)
        self.unet = Network().requires_grad_(False)
        self.table = torch.randn(TOKENS, WIDTH)
        angle = torch.linspace(0.02, 0.98, STEPS) * math.pi / 2
        signal, sigma = angle.cos(), angle.sin()
        self.noise_schedule = TableSchedule(
            signal, sigma, torch.arange(STEPS), (signal / sigma).square()
        )
        self.embeddings, self.triggers, self.token_tables = {}, {}, [self.table]
        self.token_budget, self.protected_words, self.text_fingerprint = 64, (), "toy"

    @property
    def components(self):
        """The parts that adapters attach to."""
        return {"unet": self.unet}

    def lora_targets(self, component, blocks=False):
        """Paths of the layers that a LoRA adapts."""
        return ["conv_in", "time_embedding.linear_1", "conv_out"]

    def encoder_fingerprint(self):
        """For the cache of latents."""
        return "toy"

    def encode_images(self, pixels):
        """Pictures are their own latents."""
        return pixels

    def decode(self, latents):
        """Latents are pictures."""
        return latents.clamp(-1, 1)

    def token_ids(self, text):
        """A token for each word, by its letters."""
        return [sum(map(ord, word)) % TOKENS for word in text.lower().split()]

    def token_count(self, prompt):
        """How many of the budget a prompt takes."""
        return len(self.token_ids(prompt))

    def encoded_length(self, prompts):
        """The mean of a prompt stands in one place."""
        return 1

    def encode_captions(self, captions):
        """The mean of each caption's embeddings."""
        rows = [self.table[self.token_ids(text) or [0]].mean(0) for text in captions]
        return Conditioning(torch.stack(rows))

    encode_prompts = encode_captions

    def denoise(self, noisy, times, conditioning, guidance=None):
        """The predicted noise."""
        return self.unet(noisy, times, conditioning.states)

    def sampler(self, steps, cells):
        """A diffusers scheduler with the same forward process, set to so many steps."""
        alphas = self.noise_schedule.signal.square()
        betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
        scheduler = DDIMScheduler(STEPS, trained_betas=betas.tolist(), clip_sample=True)
        scheduler.set_timesteps(steps)
        return scheduler


def main(photos: str = "examples/photos/robot", steps: int = 200, out: str = "toy.safetensors"):
    """Train a LoRA on the toy, save it and draw with it; returns losses and a picture."""
    base = ToyBackbone()
    data = rite.encode_photos(base, photos, trigger="<robot>", class_noun="robot", cache=False)
    lora = rite.Lora(base, rank=4, text_encoder=False)
    optimizer = rite.optim.LoraRite(lora.parameter_groups(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = rite.diffusion_loss(base, rite.draw_batch(base, data, step, size=8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    lora.save(out, trigger="<robot>", class_noun="robot")
    return losses, sample(base, ["a <robot>"], [0], steps=20, guidance=1.0)[0]


if __name__ == "__main__":
    losses, image = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    image.resize((128, 128), 0).save("toy.png")
