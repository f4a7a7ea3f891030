"""Drawing with regions: each has its own prompt in every cross-attention and its own adapters.

A cross-attention is computed for every region's prompt, each with that region's adapters, and the
outputs are averaged with the regions' shares as weights (Mix-of-Show, arXiv 2305.18292, regionally
controllable sampling, with shares instead of hard boxes). In every other layer the output of an
adapter is multiplied, cell by cell, by the adapter's factor there. Models without cross-attention
have other ways: `mixed`, and that of `joint_regions`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from rite_diffusion.adapters.attach import lora_layers
from rite_diffusion.backbones.protocols import Backbone, Conditioning
from rite_diffusion.generation.attached import Attached, scaled_by
from rite_diffusion.generation.denoise import Predict, guidance_prompts, guided, guided_prediction
from rite_diffusion.generation.joint_regions import jointly_guided
from rite_diffusion.generation.regions import (
    ATTENTION,
    PREDICTIONS,
    Region,
    adapter_weights,
    region_shares,
)


def ways(backbone: Backbone) -> list[str]:
    """How regions can be drawn on a backbone, its default first."""
    if backbone.cross_attentions:
        return [ATTENTION, PREDICTIONS]
    joint = backbone.joint_attention
    return [PREDICTIONS, ATTENTION] if joint and joint.takes_mask else [PREDICTIONS]


class RegionPlan:
    """Each part's share in every cell, at every resolution, and the adapters' factors.

    Parts are the whole picture and then the regions.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        height: int,
        width: int,
        factors: list[list[float]],
        lengths: list[int],
    ):
        self.regions = regions
        self.height, self.width = height, width  # of the latents, in cells
        self.factors = torch.tensor(factors)  # (1 + regions, adapters)
        self.lengths = lengths  # number of tokens of each part's states
        self.branch: int | None = None  # the part whose prompt a cross-attention uses now
        self._shares: dict[tuple[int, int], Tensor] = {}

    def shares(self, height: int, width: int, like: Tensor) -> Tensor:
        """Shares (1 + regions, height, width) on `like`'s device and of its dtype."""
        key = height, width
        if key not in self._shares:
            self._shares[key] = region_shares(self.regions, height, width)
        return self._shares[key].to(like)

    def grid(self, cells: int) -> tuple[int, int]:
        """Height and width of a map of so many cells: the latents' halved repeatedly, rounded up.

        (0, 0) where no such size has that many cells: the values are not a map.
        """
        height, width = self.height, self.width
        while height * width > cells:
            height, width = -(-height // 2), -(-width // 2)
        return (height, width) if height * width == cells else (0, 0)

    def factor_map(self, adapter: int, output: Tensor) -> Tensor:
        """The factor on an adapter's output: a scalar, or a map that broadcasts to it.

        Outputs are (B, C, h, w) or (B, cells, C). Any other, such as a time embedding's, belongs to
        the whole picture and takes the mean factor.
        """
        factors = self.factors[:, adapter].to(output)
        if self.branch is not None:
            return factors[self.branch]
        if output.ndim == 4:
            return self._map(factors, output.shape[2], output.shape[3])
        height, width = self.grid(output.shape[1]) if output.ndim == 3 else (0, 0)
        if not height:
            return self._map(factors, self.height, self.width).mean()
        return self._map(factors, height, width).reshape(-1, 1)

    def _map(self, factors: Tensor, height: int, width: int) -> Tensor:
        """An adapter's factor (height, width) in every cell."""
        return torch.einsum("r,rhw->hw", factors, self.shares(height, width, factors))


class RegionalAttention:
    """An attention processor that attends to each part's prompt separately.

    `encoder_hidden_states` holds the parts' states concatenated, (B, tokens of all, width).
    """

    def __init__(self, original, plan: RegionPlan):
        self.original = original
        self.plan = plan

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        **others,
    ) -> Tensor:
        """The mean of the parts' outputs (B, cells, C), weighted by their shares."""
        plan = self.plan
        height, width = plan.grid(hidden_states.shape[1])
        shares = plan.shares(height, width, hidden_states).flatten(1)  # (parts, cells)
        result = None
        for part, states in enumerate(encoder_hidden_states.split(plan.lengths, 1)):
            share = shares[part][None, :, None]
            if not share.any():
                continue
            plan.branch = part
            output = self.original(attn, hidden_states, states, attention_mask, **others) * share
            plan.branch = None
            result = output if result is None else result + output
        assert result is not None  # shares sum to 1
        return result


@contextmanager
def regional(backbone: Backbone, plan: RegionPlan, adapters: Sequence[Attached]) -> Iterator[None]:
    """Use regional cross-attentions and adapter factors in the denoiser until the block ends."""
    denoiser = backbone.components[backbone.denoiser_name]
    with ExitStack() as stack:
        for module in denoiser.modules():
            if isinstance(module, Attention) and module.is_cross_attention:
                original = module.processor
                # diffusers calls any processor, though it names its own as types
                module.processor = RegionalAttention(original, plan)  # pyright: ignore[reportAttributeAccessIssue]
                stack.callback(setattr, module, "processor", original)
        inside = set(denoiser.modules())
        for index, adapter in enumerate(adapters):
            for layer in lora_layers(backbone, adapter.name).values():
                if layer in inside:  # PEFT mixes adapters per sample at most, not per cell
                    handle = layer.lora_B[adapter.name].register_forward_hook(_scaled(plan, index))
                    stack.callback(handle.remove)
        yield


def _scaled(plan: RegionPlan, adapter: int):
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return output * plan.factor_map(adapter, output)

    return hook


@torch.no_grad()
def encode_parts(
    backbone: Backbone,
    texts: Sequence[tuple[str, str]],
    count: int,
    adapters: Sequence[Attached],
    factors: list[list[float]],
) -> tuple[Conditioning, list[int]]:
    """Conditioning (2 count, …, tokens of all, width) of the parts, and each part's token count.

    `texts` are (prompt, negative prompt) of each part, encoded with the part's adapter factors.
    Rows are [negatives; prompts]. Conditioning other than states, such as SDXL's pooled states, is
    that of the whole picture.
    """
    parts = []
    for (prompt, negative), row in zip(texts, factors, strict=True):
        with scaled_by(backbone, adapters, row):
            asked = guidance_prompts(backbone, [prompt] * count, negative)
            parts.append(backbone.encode_prompts(asked))
    joined = Conditioning(concatenated_states([part.states for part in parts]), parts[0].extra)
    return joined, [part.states.shape[-2] for part in parts]


def concatenated_states(states: Sequence[Tensor]) -> Tensor:
    """States (B, tokens, width) or layer-wise (B, layers, tokens, width), concatenated by tokens.

    Where one is layer-wise, the others are repeated for every layer.
    """
    depth = max((each.shape[1] for each in states if each.ndim == 4), default=0)
    if depth:
        states = [
            each if each.ndim == 4 else each[:, None].expand(-1, depth, -1, -1) for each in states
        ]
    return torch.cat(list(states), -2)


def mixed(
    backbone: Backbone,
    texts: Sequence[tuple[str, str]],
    shares: Tensor,
    guidance: float,
    count: int,
    adapters: Sequence[Attached],
    factors: list[list[float]],
) -> Predict:
    """A predictor that mixes each part's prediction by its shares (parts, height, width).

    Every part, of a (prompt, negative prompt), is predicted alone for the whole picture, with its
    own adapter factors (MultiDiffusion, Bar-Tal et al. 2023, with shares instead of masks).
    """
    predictors = []
    for (prompt, negative), row in zip(texts, factors, strict=True):
        with scaled_by(backbone, adapters, row):
            predictors.append(guided(backbone, [prompt] * count, negative, guidance))

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        result = torch.zeros_like(latents)
        for alone, row, share in zip(predictors, factors, shares.to(latents), strict=True):
            if share.any():
                with scaled_by(backbone, adapters, row):
                    result += share * alone(latents, timestep)
        return result

    return predict


def regionally_guided(
    backbone: Backbone,
    prompt: str,
    regions: Sequence[Region],
    *,
    negative: str,
    guidance: float,
    width: int,
    height: int,
    count: int = 1,
    adapters: Sequence[Attached] = (),
    region_by: str | None = None,
) -> Predict:
    """A predictor of a picture of the prompt with regions, for a batch of `count`.

    A region without a negative prompt takes the picture's. Sides are in pixels. `region_by` is one
    of `ways(backbone)`, by default the first. The denoiser is changed only during each prediction.
    """
    factors = adapter_weights(regions, prompt, [adapter.triggers for adapter in adapters])
    texts = [(prompt, negative)]
    texts += [(region.prompt, region.negative or negative) for region in regions]
    rows, columns = (side // backbone.pixels_per_latent for side in (height, width))
    if (region_by or ways(backbone)[0]) == PREDICTIONS:
        shares = region_shares(regions, rows, columns)
        return mixed(backbone, texts, shares, guidance, count, adapters, factors)
    if joint := backbone.joint_attention:
        shares = region_shares(regions, rows // joint.patch, columns // joint.patch)
        return jointly_guided(backbone, texts, shares, guidance, count, adapters, factors)
    conditioning, lengths = encode_parts(backbone, texts, count, adapters, factors)
    plan = RegionPlan(regions, rows, columns, factors, lengths)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        with regional(backbone, plan, adapters):
            return guided_prediction(
                latents, timestep, backbone=backbone, conditioning=conditioning, guidance=guidance
            )

    return predict
