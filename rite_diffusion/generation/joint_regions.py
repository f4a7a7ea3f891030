"""Drawing with regions in a transformer whose attentions join the tokens of text and picture.

The texts of all parts (the whole picture and its regions) enter one forward pass. A bias on the
attention scores keeps them apart: the tokens of a part's text see each other and the cells of the
part, and a cell sees the texts of its own parts, with weights in proportion to their shares. Cells
see each other everywhere, so that the picture stays one. An adapter's output is multiplied, token
by token, by the adapter's factor there.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.adapters.attach import lora_layers
from rite_diffusion.backbones.conditioning import side_by_side
from rite_diffusion.backbones.protocols import Backbone, JointAttention
from rite_diffusion.generation.attached import Attached
from rite_diffusion.generation.denoise import Predict, guidance_prompts, guided_prediction

MASK_ARGUMENT = "attention_mask"  # of the attention modules


def _padded_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


class JointPlan:
    """Which part every token belongs to, for the rows of one forward pass.

    `shares` (parts, rows, columns) are on the grid of picture tokens; `lengths` (B, parts) are the
    numbers of text tokens of each part in each row; `factors` (parts, adapters) are the adapters'.
    """

    def __init__(self, layout: JointAttention, shares: Tensor, lengths: Tensor, factors: Tensor):
        self.layout, self.factors = layout, factors
        cells = shares.flatten(1)
        self.picture = _padded_to(cells.shape[1], layout.multiple)
        rest = cells.mean(1, keepdim=True).expand(-1, self.picture - cells.shape[1])
        self.cells = torch.cat([cells, rest], 1)  # (parts, picture tokens), padding included
        self.owners = [self._owners(row) for row in lengths.tolist()]

    def _owners(self, lengths: list[int]) -> Tensor:
        """The part (tokens,) of each text token of a row; padding belongs to the last part."""
        owners = [part for part, count in enumerate(lengths) for _ in range(count)]
        padding = _padded_to(len(owners), self.layout.multiple) - len(owners)
        return torch.tensor(owners + [owners[-1]] * padding)

    def bias(self, tokens: int, is_text: bool) -> Tensor | None:
        """What is added to attention scores (B, 1, tokens, tokens); None where nothing is."""
        if tokens == self.picture and not is_text:
            return None
        rows = [self._row_bias(owners, is_text) for owners in self.owners]
        if max(len(row) for row in rows) != tokens:
            return None  # an attention over something else, such as a token's layers
        return torch.stack([F.pad(row, (0, tokens - len(row)) * 2) for row in rows])[:, None]

    def _row_bias(self, owners: Tensor, is_text: bool) -> Tensor:
        apart = owners[:, None] != owners[None, :]
        within = torch.zeros(apart.shape).masked_fill(apart, -math.inf)
        if is_text:
            return within
        across = self.cells.log()[owners]  # (text tokens, picture tokens)
        picture = torch.zeros(self.picture, self.picture)
        if self.layout.text_first:
            upper, lower = [within, across], [across.mT, picture]
        else:
            upper, lower = [picture, across.mT], [across, within]
        return torch.cat([torch.cat(upper, 1), torch.cat(lower, 1)])

    def factor_map(self, adapter: int, tokens: int, is_text: bool) -> Tensor:
        """An adapter's factors, (1 or B, tokens, 1), on the output of a layer."""
        factors = self.factors[:, adapter]
        cells = factors @ self.cells
        if tokens == self.picture and not is_text:
            return cells[None, :, None]
        rows = []
        for owners in self.owners:
            texts = factors[owners]
            order = (texts, cells) if self.layout.text_first else (cells, texts)
            row = texts if is_text else torch.cat(order)
            rows.append(F.pad(row, (0, tokens - len(row))))
        return torch.stack(rows)[..., None]


@contextmanager
def _kept_apart(
    backbone: Backbone, plan: JointPlan, adapters: Sequence[Attached]
) -> Iterator[None]:
    """Bias attentions and scale adapters by the plan until the block ends."""
    denoiser = backbone.components[backbone.denoiser_name]
    with ExitStack() as stack:
        paths = {module: path for path, module in denoiser.named_modules()}
        for module, path in paths.items():
            if hasattr(module, "set_processor"):  # diffusers' attentions, of whatever class
                hook = _biased(plan, plan.layout.is_text(path))
                handle = module.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        for index, adapter in enumerate(adapters):
            for layer in lora_layers(backbone, adapter.name).values():
                hook = _scaled(plan, index, plan.layout.is_text(paths[layer]))
                stack.callback(layer.lora_B[adapter.name].register_forward_hook(hook).remove)
        yield


def _biased(plan: JointPlan, is_text: bool):
    """A hook that adds the plan's bias to the mask that an attention is called with."""

    def hook(module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
        bound = inspect.signature(module.forward).bind(*arguments, **named)
        call = bound.arguments
        hidden, text = call["hidden_states"], call.get("encoder_hidden_states")
        tokens = hidden.shape[1] + (0 if text is None else text.shape[1])
        bias = plan.bias(tokens, is_text)
        if bias is not None:
            call[MASK_ARGUMENT] = _joined(bias.to(hidden), call.get(MASK_ARGUMENT))
        return bound.args, bound.kwargs

    return hook


def _joined(bias: Tensor, mask: Tensor | None) -> Tensor:
    """The bias with masked keys out of sight; `mask` is (B, keys) or broadcasts to the bias."""
    if mask is None:
        return bias
    seen = mask.bool()
    return bias.masked_fill(~(seen[:, None, None, :] if seen.ndim == 2 else seen), -math.inf)


def _scaled(plan: JointPlan, adapter: int, is_text: bool):
    def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
        return output * plan.factor_map(adapter, output.shape[1], is_text).to(output)

    return hook


def jointly_guided(
    backbone: Backbone,
    texts: Sequence[tuple[str, str]],
    shares: Tensor,
    guidance: float,
    count: int,
    adapters: Sequence[Attached],
    factors: list[list[float]],
) -> Predict:
    """A predictor with the regions' texts, kept apart, in one forward pass.

    `texts` are the parts' (prompt, negative prompt), `shares` (parts, rows, columns) their shares
    of the picture tokens' grid. Conditioning other than states, such as pooled states, is that of
    the whole picture.
    """
    layout = backbone.joint_attention
    assert layout is not None
    encoded = [
        backbone.encode_prompts(guidance_prompts(backbone, [prompt] * count, negative))
        for prompt, negative in texts
    ]
    kept = [part for part, share in enumerate(shares) if share.any()]
    conditioning, lengths = side_by_side([encoded[part] for part in kept], encoded[0].extra)
    table = torch.tensor(factors)[kept]
    plan = JointPlan(layout, shares[kept], lengths, table)

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        with _kept_apart(backbone, plan, adapters):
            return guided_prediction(
                latents, timestep, backbone=backbone, conditioning=conditioning, guidance=guidance
            )

    return predict
