"""A base whose tensors have shapes and no values, on which memory is counted without being used."""

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rite_diffusion.backbones.parts import Parts
from rite_diffusion.backbones.pipeline import PipelineBackbone

META = torch.device("meta")


class _AsTheyAre(Parts):
    """Parts that are neither loaded nor moved."""

    def __getitem__(self, name: str) -> Any:
        return self.as_it_is(name)


class _States(nn.Module):
    """Stands in for a text encoder that does not train: zeros in the shapes of its states."""

    def __init__(self, encoder: Any):
        super().__init__()
        self.config, self.dtype = encoder.config, encoder.dtype
        self._projects = type(encoder).__name__.endswith("WithProjection")
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, *_: Any, **__: Any) -> "_Output":
        config = getattr(self.config, "text_config", self.config)
        width = getattr(config, "hidden_size", None) or config.d_model
        states = torch.zeros(1, dtype=self.dtype).expand(*input_ids.shape, width)
        layers = getattr(config, "num_hidden_layers", None) or config.num_layers
        pooled = config.projection_dim if self._projects else width
        vectors = states[:, 0, :1].expand(-1, pooled)
        return _Output(states, layers, vectors, vectors if self._projects else states)


class _Output:
    """The states of a text encoder by the names that pipelines read."""

    def __init__(self, states: Tensor, layers: int, pooled: Tensor, first: Tensor):
        self.last_hidden_state = states
        self.hidden_states = (states,) * (layers + 1)
        self.pooler_output = self.text_embeds = pooled
        self._first = first

    def __getitem__(self, place: int) -> Tensor:
        return self._first


class SimulatedBase:
    """A copy of a base without values: first on "meta", where adapters attach, then `started`."""

    def __init__(self, backbone: PipelineBackbone):
        self._device, self._mode = backbone.device, FakeTensorMode(allow_non_fake_inputs=True)
        found: Any = copy.copy(backbone)
        pipeline = copy.copy(backbone.parts.pipeline)
        names = list(backbone.parts.names)
        for name in names:
            part = backbone.parts.as_it_is(name)
            object.__setattr__(pipeline, name, _on_meta(part))
        found.parts = _AsTheyAre(
            pipeline, names, found.denoiser_name, found.device, backbone.parts.source, _nowhere
        )
        found.prepare(found.denoiser_name, found.parts[found.denoiser_name])
        found.device, found.embeddings, found.triggers = META, {}, {}
        self.backbone = found

    def start(self) -> None:
        """Put the base, with what was attached, on its device; its tensors still have no values."""
        found = self.backbone
        found.device = self._device
        for name in found.parts.names:
            part = found.parts[name]
            if name in found.parts.text_names and not found.support.text_encoder:
                object.__setattr__(found.parts.pipeline, name, _States(part))
            else:
                self._without_values(part)

    @property
    def weights(self) -> list[Tensor]:
        """All parameters and buffers."""
        parts = [self.backbone.parts[name] for name in self.backbone.parts.names]
        return [each for part in parts for each in (*part.parameters(), *part.buffers())]

    def tensor(self, *shape: int) -> Tensor:
        """A tensor (…) fp32 without values on the base's device."""
        with self._mode:
            return torch.empty(shape, device=self._device)

    def _without_values(self, part: nn.Module) -> None:
        made: dict[Tensor, nn.Parameter] = {}
        for module in part.modules():
            for name, old in module._parameters.items():
                if old is not None and old not in made:
                    made[old] = nn.Parameter(self._like(old), requires_grad=old.requires_grad)
                module._parameters[name] = None if old is None else made[old]
            for name, old in module._buffers.items():
                module._buffers[name] = None if old is None else self._like(old)

    def _like(self, tensor: Tensor) -> Tensor:
        with self._mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)


def _on_meta(part: nn.Module) -> nn.Module:
    """A copy of a part on "meta"."""
    memo: dict[int, Any] = {}
    for old in part.parameters():
        memo[id(old)] = nn.Parameter(torch.empty_like(old, device=META), requires_grad=False)
    return copy.deepcopy(part, memo).to(META)


def _nowhere(name: str, part: Any) -> None:
    """Parts without values are not moved."""


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors that operations make within its context, now and at the peak.

    `known` are there before, and not counted. `kind` is the class of tensors that are: by default
    those without values. What an operation uses while it runs is not seen.
    """

    def __init__(self, known: Iterable[Tensor], kind: type[Tensor] = FakeTensor):
        super().__init__()
        self._kind = kind
        self._known = {each.untyped_storage()._cdata for each in known}
        self.live, self.peak = 0, 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        result = operation(*arguments, **options or {})
        for each in tree_leaves(result):
            if isinstance(each, self._kind):
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes and key not in self._known:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
