"""DoRA layers for PEFT's LoRA, built so that an adapter's weight scales the whole update.

The update of a weight W (Liu et al. 2024, Eq. 5), with D = scale * up @ down and a gain
g = m / |W + D| per output, is a LoRA of full rank:

    m (W + D) / |W + D| - W  =  g D + (g - 1) W  =  [scale * g * up | g - 1] [down ; W]

`DoraDown` computes down x and W x, `DoraUp` combines them. PEFT's own DoRA is not used: its weight
acts inside the norm, and with several adapters it takes the output of earlier ones for W x.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.adapters.delta import gains
from rite_diffusion.types import LoraPair


class DoraDown(nn.Module):
    """[down ; W] x along the channels, (…, rank + out) or (B, rank + out, h, w)."""

    def __init__(self, down: nn.Module, base: nn.Linear | nn.Conv2d):
        super().__init__()
        self.down = down
        self._base = (base,)  # a tuple hides it from PyTorch: parameters are listed once

    @property
    def weight(self) -> nn.Parameter:
        """The factor `down`; PEFT reads its dtype."""
        weight = self.down.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Down x, then W x without the base's bias, joined along the channels."""
        [base] = self._base
        cast = inputs.to(base.weight.dtype)
        if isinstance(base, nn.Linear):
            whole = F.linear(cast, base.weight)
        else:
            whole = base._conv_forward(cast, base.weight, None)
        low = self.down(inputs)
        return torch.cat([low, whole.to(low.dtype)], _channels(base))


class DoraUp(nn.Module):
    """[scale * g * up | g - 1] times the output of `DoraDown`: the update's output."""

    gain: Tensor  # (out,) or (out, 1, 1)
    magnitude: Tensor  # (out,)

    def __init__(self, up: nn.Module, pair: LoraPair, base: nn.Linear | nn.Conv2d):
        super().__init__()
        assert pair.magnitude is not None
        self.up = up
        self.scale = pair.scale
        self._split = ([pair.rank, len(pair.up)], _channels(base))
        gain = gains(pair, base.weight).to(base.weight.device)
        shape = (-1,) if isinstance(base, nn.Linear) else (-1, 1, 1)
        self.register_buffer("gain", gain.reshape(shape), persistent=False)
        self.register_buffer("magnitude", pair.magnitude.clone(), persistent=False)

    @property
    def weight(self) -> nn.Parameter:
        """The factor `up`."""
        weight = self.up.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, both: Tensor) -> Tensor:
        """The update's output (…, out) or (B, out, h, w) at weight 1."""
        low, whole = both.split(*self._split)
        gain = self.gain.to(both.dtype)
        return self.scale * gain * self.up(low) + (gain - 1) * whole


def _channels(base: nn.Module) -> int:
    return -1 if isinstance(base, nn.Linear) else 1


def make_dora(layer: LoraLayer, name: str, pair: LoraPair) -> None:
    """Replace the factors of a PEFT layer, a LoRA of scale 1, by the pair's DoRA."""
    base = layer.get_base_layer()
    assert isinstance(base, nn.Linear | nn.Conv2d)
    layer.lora_A[name] = DoraDown(layer.lora_A[name], base)
    layer.lora_B[name] = DoraUp(layer.lora_B[name], pair, base)
