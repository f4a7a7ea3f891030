"""The memory of a training, stage by stage, before any weights are loaded."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rite_diffusion.backbones.conditioning import rows
from rite_diffusion.backbones.simulated import Counted, SimulatedBase
from rite_diffusion.config import MemorySection, TrainConfig
from rite_diffusion.methods import METHODS, Method, PlainLora
from rite_diffusion.optim import optimizer_spec
from rite_diffusion.training.batch import Batch
from rite_diffusion.training.configured import step_loss
from rite_diffusion.training.precision import MixedPrecision
from rite_diffusion.training.settings import captions_come_first


@dataclass(frozen=True)
class Stage:
    """What is in memory at the peak of a stage, in bytes."""

    name: str
    device: dict[str, float]
    main: dict[str, float] = field(default_factory=dict)  # of main memory, beside the device

    @property
    def bytes(self) -> float:
        """All that is on the device."""
        return sum(self.device.values())


def part_bytes(part: Any, storage: str = "full", whole: tuple[str, ...] = ()) -> float:
    """Bytes of a part's weights where its linear layers but those at `whole` are in `storage`."""
    tensors = {id(each): each for each in (*part.parameters(), *part.buffers())}
    total = sum(each.numel() * each.element_size() for each in tensors.values())
    for path, module in part.named_modules():
        if storage == "full" or not isinstance(module, nn.Linear) or path in whole:
            continue
        weight = module.weight
        total -= weight.numel() * weight.element_size()
        total += quantised_bytes(weight, storage)
    return total


def quantised_bytes(weight: Tensor, storage: str) -> float:
    """Bytes of a quantised weight with its scales."""
    if storage == "nf4":  # a scale in 8 bits for 64 values, as bitsandbytes nests them
        return weight.numel() * (0.5 + 1 / 64)
    return weight.numel() + len(weight) * weight.element_size()


def state_bytes(method: Method, config: TrainConfig) -> float:
    """Bytes of the optimizer's states, found by a step on one pair of each shape."""
    groups, counts = [], dict[Any, int]()
    for group in method.groups():
        kept = []
        for pair in _pairs(group["params"]):
            key = (group["name"], *(tuple(each.shape) for _, each in pair))
            counts[key] = counts.get(key, 0) + 1
            if counts[key] == 1:
                kept.append((key, pair))
        groups.append((group, kept))
    total = 0.0
    for group, kept in groups:
        for key, pair in kept:
            total += counts[key] * _states_of(group, pair, config)
    return total


def _pairs(named: list[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    """A group's parameters, with both factors of a LoRA pair together."""
    together: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        layer = name.replace(".lora_A.", ".").replace(".lora_B.", ".")
        together.setdefault(layer, []).append((name, parameter))
    return list(together.values())


def _states_of(
    group: dict[str, Any], pair: list[tuple[str, nn.Parameter]], config: TrainConfig
) -> float:
    """Bytes of the optimizer's states of the factors of one pair."""
    made = [(name, nn.Parameter(torch.randn(each.shape) * 0.01)) for name, each in pair]
    for _, each in made:
        each.grad = torch.randn(each.shape) * 0.01
    optim = config.optim
    own = group | {"params": made, "lr": group["lr"] or optimizer_spec(optim.name).lr}
    optimizer = optimizer_spec(optim.name).build([own], **optim.options)
    optimizer.step()
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in _tensors_in(state)
        if value.ndim
    )


def _tensors_in(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [each for value in tree.values() for each in _tensors_in(value)]
    if isinstance(tree, list | tuple):
        return [each for value in tree for each in _tensors_in(value)]
    return []


@dataclass(frozen=True)
class Step:
    """What a training step adds to the base's weights, in bytes."""

    trained: float  # LoRA pairs and other weights that train
    states: float  # of the optimizer
    activations: float  # at the peak, with gradients


def simulate_step(backbone: Any, config: TrainConfig, side: int) -> Step:
    """The memory of a step, by taking it on tensors without values."""
    simulated = SimulatedBase(backbone)
    base: Any = simulated.backbone
    method = METHODS[config.method](base, config)
    trained = method.parameters()
    states = state_bytes(method, config)
    simulated.start()
    base.checkpoint_gradients(config.gradient_checkpointing)
    batch = _batch(simulated, config, side)
    if method.text_is_frozen(config):
        encoded = base.encode_captions([_caption(config)])
        method.conditioning = lambda captions: rows(encoded, [0] * len(captions))
    counted = Counted(simulated.weights)
    with counted, MixedPrecision(base.device, config.precision).autocast():
        step_loss(base, method, batch, config).backward()
    sizes = sum(each.numel() * each.element_size() for each in trained)
    return Step(sizes, states, counted.peak)


def _caption(config: TrainConfig) -> str:
    return f"a photo of a {config.concepts()[0].trigger} on a table in a room"


def _batch(simulated: SimulatedBase, config: TrainConfig, side: int) -> Batch:
    base: Any = simulated.backbone
    count = config.batch
    cells = side // base.pixels_per_latent
    latents, noise = (simulated.tensor(count, base.latent_channels, cells, cells) for _ in "ab")
    return Batch(
        list(range(count)),
        [_caption(config)] * count,
        latents,
        noise,
        noise,
        torch.full((count,), 0.5, device=base.device),
        torch.ones(count, device=base.device),
        None,
    )


def simulate_photos(backbone: Any, side: int, views: int) -> float:
    """Bytes at the peak of encoding the views of one photo, beside the autoencoder's weights."""
    simulated = SimulatedBase(backbone)
    simulated.start()
    base: Any = simulated.backbone
    with Counted(simulated.weights) as counted:
        base.encode_images(simulated.tensor(views, 3, side, side))
    return counted.peak


def can_be_estimated(config: TrainConfig) -> bool:
    """Whether a method's memory is known without weights, at which learned embeddings begin."""
    return issubclass(METHODS[config.method], PlainLora)


class Estimates:
    """The memory of a training with any settings of memory; nothing is loaded."""

    def __init__(self, backbone: Any, config: TrainConfig, photos: int):
        """`photos` is how many pictures the training has."""
        self.backbone, self.config, self.photos = backbone, config, photos
        self._steps: dict[bool, Step] = {}

    @property
    def side(self) -> int:
        """Pixels of the training pictures."""
        return self.config.resolution or self.backbone.resolution

    @cached_property
    def _photos(self) -> float:
        augment = self.config.augment
        return simulate_photos(self.backbone, self.side, augment.views * (1 + augment.flip))

    def _step(self, config: TrainConfig) -> Step:
        key = config.gradient_checkpointing
        if key not in self._steps:
            self._steps[key] = simulate_step(self.backbone, config, self.side)
        return self._steps[key]

    def stages(self, config: TrainConfig) -> list[Stage]:
        """The stages with other settings of memory and of recomputation than the training's own."""
        backbone, memory = self.backbone, config.memory
        parts = {name: _stored(backbone, name, memory) for name in backbone.parts.names}
        main = {"latents": self._latents()}
        if memory.offload == "model":
            main |= parts
        texts = {name: parts[name] for name in backbone.text_encoders}
        step = self._step(config)
        needed = {
            "trained": step.trained * (2 if config.ema else 1),
            "optimizer": step.states,
            "activations": step.activations,
        }
        denoiser = {backbone.denoiser_name: parts[backbone.denoiser_name]}
        waiting = dict[str, float]()
        if memory.offload == "layers":
            waiting = denoiser
            denoiser = {backbone.denoiser_name: _resident(backbone)}
        trained = {} if captions_come_first(config) else texts
        return [
            Stage("photos", {"vae": parts["vae"], "activations": self._photos}, main),
            Stage("captions", texts, main),
            Stage("steps", denoiser | trained | needed, main | waiting),
        ]

    def _latents(self) -> float:
        """Bytes of the photos' latents, which are kept in main memory."""
        augment, cells = self.config.augment, self.side // self.backbone.pixels_per_latent
        views = self.photos * augment.views * (1 + augment.flip)
        return views * self.backbone.latent_channels * cells**2 * 4.0


def _stored(backbone: Any, name: str, memory: MemorySection) -> float:
    part = backbone.parts.as_it_is(name)
    if name == backbone.denoiser_name:
        return part_bytes(part, memory.weights, backbone.ends)
    return part_bytes(part, "full" if name == "vae" else memory.encoder_weights)


def _resident(backbone: Any) -> float:
    """Bytes of a denoiser on the device whose linear layers wait in main memory: all but one."""
    part = backbone.parts.as_it_is(backbone.denoiser_name)
    linear = [each for each in part.modules() if isinstance(each, nn.Linear)]
    sizes = [part_bytes(each) for each in linear]
    return part_bytes(part) - sum(sizes) + max(sizes, default=0.0)
