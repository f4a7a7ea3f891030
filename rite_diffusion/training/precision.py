"""Mixed precision (Micikevicius et al. 2018): half-precision arithmetic, weights in fp32."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class MixedPrecision:
    """Autocast and gradient steps in `precision` (fp32, fp16, bf16), with loss scaling in fp16."""

    def __init__(self, device: torch.device, precision: str):
        self._type = device.type
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
        self._scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None

    def autocast(self) -> torch.autocast:
        """A context in which operations run in half precision, unless `precision` is fp32."""
        dtype = self._dtype or torch.bfloat16
        return torch.autocast(self._type, dtype, enabled=self._dtype is not None)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the loss's gradients, scaled in fp16."""
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def clip(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Unscale gradients and clip their norm to `most`; returns the norm before."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        return nn.utils.clip_grad_norm_(parameters, most)

    def step(self, optimizer: Optimizer) -> None:
        """Take an optimizer step; in fp16, none after an overflow, which lowers the scale."""
        if self._scaler is None:
            optimizer.step()
            return
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Tensor]:
        """The loss scale and the steps since it last changed; empty unless in fp16."""
        if self._scaler is None:
            return {}
        state = self._scaler.state_dict()
        return {
            "scale": torch.tensor(state["scale"]),
            "growth": torch.tensor(state["_growth_tracker"]),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`; an empty one, as of older checkpoints, changes nothing."""
        if self._scaler is not None and state:
            kept = {"scale": state["scale"].item(), "_growth_tracker": int(state["growth"])}
            self._scaler.load_state_dict(self._scaler.state_dict() | kept)

    @property
    def handles_overflow(self) -> bool:
        """Whether `step` skips gradients that are not finite."""
        return self._scaler is not None
