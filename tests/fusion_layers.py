"""Random adapters and layers for the tests of fusion."""

from pathlib import Path

import torch

from rite_diffusion.adapters import Adapter, AdapterInfo
from rite_diffusion.fusion.layer import Layer, Part, flat
from rite_diffusion.fusion.members import Member
from rite_diffusion.fusion.second_moments import SecondMoment, from_eigen
from rite_diffusion.fusion.sketch import Sketch, SketchMetadata
from rite_diffusion.types import LoraPair

SHAPES = {  # layer -> shape of its weight: linear, 1x1 and 3x3 convolutions, text encoder
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (12, 20),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (16, 16),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (10, 14, 1, 1),
    "lora_unet_mid_block_resnets_0_conv1": (9, 4, 3, 3),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (18, 18),
}


def random_pair(name: str, rank: int, alpha: float, draws: torch.Generator) -> LoraPair:
    """A pair for a layer of SHAPES."""
    out, *kernel = SHAPES[name]
    down = torch.randn(rank, *kernel, generator=draws)
    up = torch.randn(out, rank, *[1] * (len(kernel) - 1), generator=draws)
    return LoraPair(name, down, up, alpha / rank)


def random_adapter(seed: int, rank: int = 3, alpha: float = 2.0, names=tuple(SHAPES)) -> Adapter:
    """An adapter on some layers, called <0>, <1>, … after its seed."""
    draws = torch.Generator().manual_seed(seed)
    pairs = [random_pair(name, rank, alpha, draws) for name in names]
    info = AdapterInfo(
        trigger=f"<{seed}>", class_noun="toy", base="tiny", base_fingerprint="f", licence="CC0"
    )
    return Adapter(pairs, info)


def random_second_moment(width: int, seed: int, rows: int = 12) -> SecondMoment:
    """The Gram of a few random inputs of very unequal directions."""
    draws = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, width, generator=draws, dtype=torch.float64)
    inputs = inputs * torch.logspace(0, -2, width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(inputs.mT @ inputs / rows)
    return from_eigen(vectors.mT.flip(0), values.flip(0).clamp(min=0), 0.0, rows)


def width_of(name: str) -> int:
    """Inputs of a layer's flat weight."""
    return torch.Size(SHAPES[name][1:]).numel()


def random_sketch(seed: int) -> Sketch:
    """Random statistics for every layer of SHAPES."""
    concept = {name: random_second_moment(width_of(name), 100 + seed) for name in SHAPES}
    base = {name: random_second_moment(width_of(name), 99) for name in SHAPES}
    return Sketch(concept, base, SketchMetadata("", "f", "", "0"))


def random_member(seed: int, weight: float = 1.0, **adapter) -> Member:
    """A member with statistics."""
    return Member(
        random_adapter(seed, **adapter), weight, Path(f"{seed}.safetensors"), random_sketch(seed)
    )


def random_layer(count: int, out: int = 12, width: int = 20, seed: int = 0) -> Layer:
    """A linear layer with `count` concepts of different ranks, and statistics."""
    draws = torch.Generator().manual_seed(seed)
    parts = []
    for index in range(count):
        down = torch.randn(2 + index, width, generator=draws)
        up = torch.randn(out, 2 + index, generator=draws)
        factors = flat(LoraPair("x", down, up, 0.3), 1.0)
        parts.append(
            Part(str(index), factors, random_second_moment(width, 10 * seed + index, rows=30))
        )
    return Layer("x_attn1_to_q", parts, random_second_moment(width, 77, rows=30))


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Layer -> its update as a dense flat matrix in float64."""
    return {
        pair.name: pair.scale * pair.up.double().flatten(1) @ pair.down.double().flatten(1)
        for pair in adapter.pairs
    }
