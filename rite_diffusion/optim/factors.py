"""LoRA factors: found by name, checked, and stacked by shape for batched updates."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rite_diffusion.errors import OptimizerError

# The part of a parameter's dotted name that tells the factors apart: PEFT's lora_A and lora_B (and
# lora_embedding_A, …), kohya's lora_down and lora_up, diffusers' older lora.down and lora.up.
# Each of the two products of a LoHa is a pair, and so is a factored matrix of a LoKr.
_ROLE = re.compile(
    r"(?:^|(?<=\.))"
    r"(?:lora(?:_embedding)?[._](?P<lora>A|B|down|up)|(?:hada|lokr)_w[12]_(?P<lycoris>a|b))"
    r"(?=\.|$)"
)
_DOWN = ("A", "down", "b")

State = dict[str, Tensor]  # of one part of a stack: values (n, …) for its n parameters


def factor_of(name: str, parameter: Tensor) -> tuple[str, str] | None:
    """("down" or "up", the pair's name) of a factor; None for any other parameter."""
    found = _ROLE.search(name)
    if found is None or parameter.dim() < 2:  # a LoRA layer's bias is not a factor
        return None
    role = "down" if (found["lora"] or found["lycoris"]) in _DOWN else "up"
    which = f"{found[0][:-2]}." if found["lycoris"] else ""  # hada_w1: a layer has two such pairs
    return role, f"{name[: found.start()]}*{which}{name[found.end() :]}"


def module_of(pair: str) -> str:
    """The adapted module's name, for messages."""
    return pair.partition(".*")[0]


def lora_param_groups(
    model: nn.Module, lr_other: float | None = None, weight_decay_other: float | None = None
) -> list[dict]:
    """Parameter groups for a model with LoRA layers: the factors, and all other trainable ones.

    Parameters are listed with their names, by which the optimizers here find the pairs. The second
    group has embeddings, DoRA's magnitudes, norms and biases; `lr_other` and `weight_decay_other`
    are its learning rate and weight decay, by default the optimizer's. Raises OptimizerError where
    no factor is trainable; a pair with one frozen factor is refused by the optimizer.
    """
    names = dict(model.named_parameters())
    factors = {name: factor_of(name, parameter) for name, parameter in names.items()}
    active = {pair[1] for name, pair in factors.items() if pair and names[name].requires_grad}
    pairs = [(n, p) for n, p in names.items() if (pair := factors[n]) and pair[1] in active]
    others = [(n, p) for n, p in names.items() if p.requires_grad and factors[n] is None]
    if not pairs:
        raise OptimizerError(
            f"no trainable LoRA factors among {len(names)} parameters: put LoRA layers into the "
            "model first, such as with peft.get_peft_model"
        )
    groups: list[dict] = [{"params": pairs}]
    if others:
        rates = {"lr": lr_other, "weight_decay": weight_decay_other}
        own = {key: value for key, value in rates.items() if value is not None}
        groups.append({"params": others} | own)
    return groups


@dataclass
class Stack:
    """n parameters, or n LoRA pairs, of equal shapes, which are updated as one tensor per part.

    A stack of pairs has two parts, `down` (rank, …) and `up` (out, rank, …), in this order.
    """

    group: dict  # PyTorch's parameter group
    names: list[str]  # of the pairs, or of the single parameters
    parts: list[list[Tensor]]  # n parameters for each part
    step: int = 0
    state: list[State] = field(default_factory=list)  # one per part; empty before the first step

    @property
    def is_pair(self) -> bool:
        """Whether the members are LoRA pairs."""
        return len(self.parts) == 2

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float32, or float64 for float64 parameters."""
        return torch.promote_types(self.parts[0][0].dtype, torch.float32)

    def gather(self, part: int, gradients: bool) -> Tensor:
        """Values or gradients (n, rows, columns) of one part, convolutions flattened."""
        tensors = [gradient_of(p) if gradients else p.detach() for p in self.parts[part]]
        first = tensors[0]
        stacked = first.unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
        if self.is_pair:
            stacked = stacked.flatten(2)
            if stacked.dim() == 4:  # (n, out, rank, 1)
                stacked = stacked.squeeze(-1)
        return stacked.to(self.dtype)

    def scatter(self, part: int, values: Tensor) -> None:
        """Write values (n, rows, columns) back into one part's parameters."""
        parameters = self.parts[part]
        values = values.reshape(len(parameters), *parameters[0].shape)
        torch._foreach_copy_(parameters, list(values.unbind()))

    def select(self, members: list[int]) -> "Stack":
        """A stack of the members at these indices, with their state."""
        return Stack(
            self.group,
            [self.names[i] for i in members],
            [[part[i] for i in members] for part in self.parts],
            self.step,
            [{key: value[members] for key, value in state.items()} for state in self.state],
        )


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def pair_up(names: list[str], parameters: list[Tensor]) -> dict[str, list[Tensor]]:
    """[down, up] by the pair's name, and [parameter] by name for other parameters.

    Raises OptimizerError naming a module whose factor is missing, frozen or of another rank.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    found: dict[str, list[Tensor]] = {}
    for name, parameter in zip(names, parameters, strict=True):
        factor = factor_of(name, parameter)
        if factor is None:
            found[name] = [parameter]
        else:
            halves.setdefault(factor[1], {})[factor[0]] = parameter
    for pair, half in halves.items():
        check_pair(pair, half)
        found[pair] = [half["down"], half["up"]]
    return found


def check_pair(pair: str, half: dict[str, Tensor]) -> None:
    """Raise OptimizerError unless both factors exist, are trainable, and have the same rank."""
    module = module_of(pair)
    if len(half) == 1:
        raise OptimizerError(
            f"{module}: only the LoRA factor '{next(iter(half))}' is among the parameters of this "
            "group; a pair is updated as one, so pass both factors"
        )
    down, up = half["down"], half["up"]
    frozen = [role for role, factor in half.items() if not factor.requires_grad]
    if frozen:
        raise OptimizerError(
            f"{module}: the LoRA factor '{frozen[0]}' is frozen; this optimizer moves both factors "
            "of a pair. Let it train, or use optimizer adamw"
        )
    if down.shape[0] != up.shape[1] or up[0, 0].numel() != 1:
        raise OptimizerError(
            f"{module}: down {tuple(down.shape)} and up {tuple(up.shape)} are not a LoRA pair: "
            "expected (rank, in, …) and (out, rank)"
        )
    if down.device != up.device or down.dtype != up.dtype:
        raise OptimizerError(
            f"{module}: the factors differ: down is {down.dtype} on {down.device}, up is "
            f"{up.dtype} on {up.device}"
        )


def stacks_of(group: dict) -> Iterator[Stack]:
    """The stacks of a parameter group; members have the same shape, dtype and device."""
    if "param_names" not in group:
        raise OptimizerError(
            "parameters need their names, by which LoRA pairs are found: pass "
            "lora_param_groups(model) or model.named_parameters(); to transformers.Trainer, "
            "optimizer_cls_and_kwargs=(LoraRite, {'params': lora_param_groups(model)})"
        )
    members = pair_up(group["param_names"], group["params"])
    alike: dict[tuple, list[str]] = {}
    for name, parts in members.items():
        key = (parts[0].dtype, parts[0].device, *[part.shape for part in parts])
        alike.setdefault(key, []).append(name)
    for names in alike.values():
        parts = [list(part) for part in zip(*[members[name] for name in names], strict=True)]
        yield Stack(group, names, parts)
