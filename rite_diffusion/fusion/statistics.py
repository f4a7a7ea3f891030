"""Second moments of layers' inputs while a base model draws, as running sums.

Inputs are not stored: each is added to its layer's sum during the forward pass. Layers with the
same input tensor (queries, keys and values of one attention; keys and values of all
cross-attentions) share one sum.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rite_diffusion.adapters.attach import adaptable_layers, base_layer
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.errors import ConfigError
from rite_diffusion.fusion.second_moments import (
    AnySecondMoment,
    FullSecondMoment,
    SecondMoment,
    from_eigen,
    full_second_moment,
)
from rite_diffusion.generation.denoise import conditional, denoising
from rite_diffusion.seeding import check_seed

EXACT_WIDTH = 2048  # inputs; a wider linear layer's second moment is sketched
EXACT_WIDTH_CONVOLUTION = 768  # the same for unfolded convolutions, of which a model has dozens
SKETCH_WIDTH = 256  # directions of a sketch
ROUNDING = 1e-6  # error of products in single precision, relative to the largest
CHUNK = 8192  # rows in one product
TEXT_SHARE = 0.5  # of the weight of all rows, where text and picture enter a layer together

SecondMoments = dict[str, AnySecondMoment]  # layer name -> second moment of its inputs


# --- running sums ------------------------------------------------------------------------------


class ExactSum:
    """Sum of x x^T (inputs, inputs): products in the inputs' precision, their sum in float64."""

    def __init__(self, width: int, device: torch.device):
        self.total = torch.zeros(width, width, dtype=_sum_dtype(device), device=device)
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Add rows (n, inputs)."""
        for chunk in inputs.split(CHUNK):
            self.total += chunk.mT @ chunk
        self.rows += len(inputs)

    def second_moment(self) -> FullSecondMoment:
        """The mean of x x^T."""
        return full_second_moment(self.total.cpu().double() / self.rows, self.rows)


class SketchSum:
    """Sum of x x^T times a fixed random matrix, for Nystrom's approximation.

    Tropp et al. 2017, arXiv 1706.05736. Instead of their shift, directions below the rounding error
    of the products are left out.
    """

    def __init__(self, width: int, device: torch.device):
        draws = torch.Generator().manual_seed(width)
        test = torch.randn(width, SKETCH_WIDTH, generator=draws, dtype=torch.float64)
        self.test = torch.linalg.qr(test).Q.to(device, _sum_dtype(device))  # (inputs, SKETCH_WIDTH)
        self.seen = torch.zeros_like(self.test)
        self.energy = 0.0
        self.rows = 0

    def add(self, inputs: Tensor) -> None:
        """Add rows (n, inputs)."""
        test = self.test.to(inputs.dtype)
        for chunk in inputs.split(CHUNK):
            self.seen += chunk.mT @ (chunk @ test)
            self.energy += chunk.double().square().sum().item()
        self.rows += len(inputs)

    def second_moment(self) -> SecondMoment:
        """The mean of x x^T: its leading directions, and the rest of the trace as tail."""
        seen, test = self.seen.cpu().double(), self.test.cpu().double()
        inner = test.mT @ seen
        values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
        real = values > ROUNDING * values[-1]
        half = (vectors[:, real] / values[real].sqrt()).mT @ seen.mT  # G ~ half^T half
        _, singular, basis = torch.linalg.svd(half, full_matrices=False)
        found = singular.square() / self.rows
        rest = max(self.energy / self.rows - found.sum().item(), 0.0)
        return from_eigen(basis, found, rest, self.rows)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def running_sum(layer: nn.Module, width: int, device: torch.device) -> ExactSum | SketchSum:
    """An exact sum, or for rows wider than the layer's limit a sketch."""
    most = EXACT_WIDTH if isinstance(layer, nn.Linear) else EXACT_WIDTH_CONVOLUTION
    return (ExactSum if width <= most else SketchSum)(width, device)


# --- layers' inputs ----------------------------------------------------------------------------


def input_rows(layer: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
    """Rows (n, inputs) that a linear or convolutional layer multiplies by its flat weight.

    The inputs of a convolution are unfolded one sample at a time.
    """
    if inputs.dtype in (torch.float16, torch.bfloat16):
        inputs = inputs.float()
    if isinstance(layer, nn.Linear):
        yield inputs.flatten(0, -2)
        return
    assert isinstance(layer, nn.Conv2d)
    for picture in inputs.split(1):
        columns = F.unfold(
            picture, layer.kernel_size, layer.dilation, _padding(layer), layer.stride
        )
        yield columns[0].mT


def balanced(inputs: Tensor, text: slice) -> Tensor:
    """Inputs (B, tokens, width) scaled so that the tokens in `text` have TEXT_SHARE of all weight.

    A picture has ten to forty times as many tokens as its prompt, whose effect on the picture does
    not shrink with that.
    """
    tokens, texts = inputs.shape[1], len(range(*text.indices(inputs.shape[1])))
    weights = torch.full((tokens, 1), tokens * (1 - TEXT_SHARE) / (tokens - texts))
    weights[text] = tokens * TEXT_SHARE / texts
    return inputs * weights.sqrt().to(inputs)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str)  # 'same' and 'valid' occur in no supported base
    return layer.padding[0], layer.padding[1]


@dataclass(frozen=True)
class Watched:
    """A layer whose inputs are recorded: the module that is called, and the base's own layer."""

    called: nn.Module
    layer: nn.Module
    text_first: bool | None = None  # where tokens of text and picture enter together


def watched(backbone: Backbone, names: Sequence[str]) -> dict[str, Watched]:
    """The layers of these names, whether or not LoRA wraps them."""
    known, joint = adaptable_layers(backbone), backbone.joint_attention
    found = {}
    for name in names:
        component, path = known[name]
        called = backbone.components[component].get_submodule(path)
        text_first = joint.text_first if joint and not joint.is_text(path) else None
        found[name] = Watched(called, base_layer(called), text_first)
    return found


@contextmanager
def _watch(
    layers: dict[str, Watched], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    def hook(name: str, layer: nn.Module):
        return lambda _, arguments: see(name, layer, arguments[0].detach())

    with ExitStack() as stack:
        for name, place in layers.items():
            handle = place.called.register_forward_pre_hook(hook(name, place.layer))
            stack.callback(handle.remove)
        yield


# --- drawing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn for statistics: without guidance, as in Mix-of-Show."""

    steps: int = 20
    pictures: int = 1  # per prompt
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        if not (1 <= self.steps <= 1000 and self.pictures >= 1):
            raise ConfigError(
                f"{self.pictures} pictures of {self.steps} steps: draw 1 or more, in 1 to 1000."
            )


DEFAULT_DRAWING = Drawing()


def _draw(backbone: Backbone, prompt: str, seed: int, steps: int) -> None:
    """Denoise one picture of a prompt, for the hooks only."""
    for _ in denoising(backbone, conditional(backbone, [prompt]), [seed], steps=steps):
        pass


def shared_inputs(
    backbone: Backbone, layers: dict[str, Watched], prompts: Sequence[str]
) -> dict[str, str]:
    """Layer name -> the first layer with the same input tensors and the same unfolding.

    Found by one denoising step of each prompt, as layer-wise embeddings give cross-attentions
    different inputs. The inputs of a step are kept, so that no address is used twice.
    """
    seen: dict[str, list[tuple]] = {name: [] for name in layers}
    held: list[Tensor] = []

    def see(name: str, layer: nn.Module, inputs: Tensor) -> None:
        held.append(inputs)
        unfold = (layer.kernel_size, layer.stride) if isinstance(layer, nn.Conv2d) else ()
        seen[name].append((inputs.data_ptr(), inputs.shape, inputs.stride(), unfold))

    with _watch(layers, see):
        for prompt in dict.fromkeys(prompts):
            _draw(backbone, prompt, 0, 1)
            held.clear()
    first: dict[tuple, str] = {}
    return {name: first.setdefault(tuple(keys), name) for name, keys in seen.items() if keys}


@torch.no_grad()
def collect(
    backbone: Backbone,
    prompts: Sequence[str],
    names: Sequence[str],
    drawing: Drawing,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SecondMoments:
    """Second moments of the named layers' inputs while the backbone draws the prompts.

    Attached adapters act. `progress` is called with the numbers of pictures drawn and in total.
    """
    layers = watched(backbone, names)
    shared = shared_inputs(backbone, layers, prompts)
    sums: dict[str, ExactSum | SketchSum] = {}
    joint, side = backbone.joint_attention, backbone.resolution // backbone.pixels_per_latent
    picture = joint.picture_tokens(side, side) if joint else 0

    def see(name: str, layer: nn.Module, inputs: Tensor) -> None:
        first = layers[name].text_first
        if first is not None and (texts := inputs.shape[1] - picture) > 0:
            inputs = balanced(inputs, slice(texts) if first else slice(picture, None))
        for rows in input_rows(layer, inputs):
            if name not in sums:
                sums[name] = running_sum(layer, rows.shape[1], rows.device)
            sums[name].add(rows)

    with _watch({name: layers[name] for name in sorted(set(shared.values()))}, see):
        total = len(prompts) * drawing.pictures
        for index in range(total):
            prompt = prompts[index // drawing.pictures]
            _draw(backbone, prompt, drawing.seed + index, drawing.steps)
            progress(index + 1, total)
    found = {name: total.second_moment() for name, total in sums.items()}
    return {name: found[shared[name]] for name in names if name in shared}
