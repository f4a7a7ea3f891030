"""Training of the judge of the bases, on scenes of its own.

python -m train.pocket judge --work DIR

Nothing of a base is ever trained against the judge, and the judge sees no picture of a base.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from rite_diffusion.evaluation.judge import JudgeNetwork, Shape, on_object

from . import judge_scenes as scenes
from .judge_scenes import GROUPS, PAIRS, UNKNOWN
from .machine import Machine, Progress, load_state, rate_at, save_state, set_rate

SHARPNESS, MARGIN = 20.0, 0.2  # scale and margin of the softmax over cosines
NOTHING_WEIGHT = 0.25  # of pictures without a noun, which are many, in the noun's loss
GRADED = 20.0  # weight of the losses of cosines that are given
LABELLED = ("noun", "left", "right", "colour")
STATE = "judge_state.safetensors"


@dataclass(frozen=True)
class Settings:
    """One training of the judge."""

    pictures: int = 275_000
    rate: float = 2e-3
    widths: tuple[int, ...] = (24, 48, 80, 112)
    blocks: tuple[int, ...] = (0, 1, 1, 1)  # residual blocks of each width
    embedding: int = 64
    cells: int = 6

    @property
    def shape(self) -> Shape:
        """The sizes of the network."""
        stages = tuple(zip(self.widths, self.blocks, strict=True))
        return Shape(scenes.SIZE, stages, self.embedding, self.cells)


class Batches(Dataset):
    """The batches of `scenes.batch` from one index to another."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return scenes.batch([self.first + index])


def batches(seen: int, total: int, machine: Machine) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Batches on the machine's device, from picture `seen` to the end of the training."""
    first, last = seen // scenes.BATCH, -(-total // scenes.BATCH)
    data = Batches(first, max(0, last - first))
    for pixels, labels in DataLoader(data, None, num_workers=machine.workers):
        pixels = pixels.to(machine.device, memory_format=torch.channels_last)
        yield pixels, {name: value.to(machine.device) for name, value in labels.items()}


# --- losses ------------------------------------------------------------------------------------


def sameness_loss(embeddings: Tensor, identities: Tensor) -> Tensor:
    """Softmax loss, with a margin, of each pair of one identity against all other identities.

    Embeddings (n, e) of unit length; identities (n,) or UNKNOWN.
    """
    known = identities != UNKNOWN
    embeddings, identities = embeddings[known], identities[known]
    cosines = embeddings @ embeddings.T
    is_same = identities[:, None] == identities
    others = (SHARPNESS * cosines).masked_fill(is_same, -torch.inf).logsumexp(1, keepdim=True)
    loss = F.softplus(others - SHARPNESS * (cosines - MARGIN))
    pairs = is_same & ~torch.eye(len(identities), dtype=torch.bool, device=is_same.device)
    return loss[pairs].mean()


def group_losses(whole: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """What near misses' cosines exceed, and the error of poor pictures' cosines, squared.

    `whole` are the embeddings of the groups, in the order of `scenes.batch`.
    """
    one, two, near, poor = whole.split([GROUPS, GROUPS, 2 * GROUPS, GROUPS])
    own = F.normalize(one + two, dim=-1)
    is_near = labels["identity"][2 * GROUPS : 4 * GROUPS] != UNKNOWN
    excess = F.relu((near * own.repeat(2, 1)).sum(-1) - labels["allowed"])[is_near]
    error = (poor * own.detach()).sum(-1) - labels["deserved"]
    return {"near": GRADED * excess.square().mean(), "poor": GRADED * error.square().mean()}


GROUPED, NEAR = slice(0, 5 * GROUPS), slice(2 * GROUPS, 4 * GROUPS)  # rows of a batch
PAIRED = slice(5 * GROUPS, 5 * GROUPS + PAIRS)


@torch.no_grad()
def enlarged(network: JudgeNetwork, pixels: Tensor) -> Tensor:
    """Pictures around the objects of groups, then of pairs' left and right halves.

    The network looks for objects as it does when it judges, by its running norms.
    """
    network.eval()
    masks = network.masks(network.fine(pixels).float())
    network.train()
    rows = zip((GROUPED, PAIRED, PAIRED), masks, strict=True)
    return torch.cat([on_object(pixels[row], mask[row]) for row, mask in rows])


def losses(
    network: JudgeNetwork, pixels: Tensor, labels: dict[str, Tensor], machine: Machine
) -> dict[str, Tensor]:
    """The loss of each question on a batch."""
    is_whole = torch.ones(len(pixels), dtype=torch.bool)  # near misses are only seen enlarged
    is_whole[NEAR] = False
    count = int(is_whole.sum())
    with machine.autocast():
        fine = network.fine(torch.cat([pixels[is_whole], enlarged(network, pixels)]))
        deep = network.deep(fine)
    middle, coarse = (each.float() for each in deep)
    whole, left, right = network.pools(coarse[:count])
    answers = {
        "noun": network.noun(whole),
        "left": network.noun(left),
        "right": network.noun(right),
        "colour": network.colour(whole),
    }
    rarity = torch.ones(answers["noun"].shape[1], device=pixels.device)
    rarity[scenes.NOTHING] = NOTHING_WEIGHT
    found = {
        name: F.cross_entropy(
            answer,
            labels[name][is_whole],
            None if name == "colour" else rarity,
            ignore_index=UNKNOWN,
        )
        for name, answer in answers.items()
    }
    embeddings = network.embedding(middle[count:], coarse[count:])
    identities = [labels["identity"][GROUPED]]
    identities += [labels[name][PAIRED] for name in ("left_identity", "right_identity")]
    found["same"] = sameness_loss(embeddings, torch.cat(identities))
    mask = network.mask(fine[:count].float())
    found["mask"] = F.binary_cross_entropy_with_logits(mask, labels["mask"][is_whole])
    return found | group_losses(embeddings[GROUPED], labels)


# --- training ----------------------------------------------------------------------------------


class Training:
    """The network and optimizer of one training."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        torch.manual_seed(0)
        self.settings, self.machine = settings, machine
        nouns, colours = len(scenes.NOUNS) + 1, len(scenes.COLOURS)
        self.network = JudgeNetwork(nouns, colours, settings.shape)
        self.network.to(machine.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), settings.rate, betas=(0.9, 0.99), weight_decay=0.05
        )

    def step(self, pixels: Tensor, labels: dict[str, Tensor], seen: int) -> dict[str, Tensor]:
        """One step on a batch; returns the losses."""
        found = losses(self.network, pixels, labels, self.machine)
        self.optimizer.zero_grad()
        torch.stack(list(found.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        set_rate(
            self.optimizer, rate_at(self.settings.rate, seen, self.settings.pictures, flat=0.2)
        )
        self.optimizer.step()
        return {name: loss.detach() for name, loss in found.items()}


def train(work: Path, settings: Settings, machine: Machine) -> None:
    """Train until `settings.pictures`, from the state in `work` if there is one."""
    path = work / STATE
    training = Training(settings, machine)
    optimizers, modules = {"network": training.optimizer}, {"network": training.network}
    seen = load_state(path, optimizers, modules)
    progress, mean = Progress("judge", seen, settings.pictures), {}
    for pixels, labels in batches(seen, settings.pictures, machine):
        found = training.step(pixels, labels, seen)
        mean = {name: mean.get(name, loss).lerp(loss, 0.02) for name, loss in found.items()}
        seen += scenes.BATCH
        if progress.is_due(seen):
            progress.report(seen, {name: value.item() for name, value in mean.items()})
            save_state(path, seen, optimizers, modules)


def finished(work: Path, settings: Settings) -> JudgeNetwork:
    """The network of a finished training."""
    network = JudgeNetwork(len(scenes.NOUNS) + 1, len(scenes.COLOURS), settings.shape)
    seen = load_state(work / STATE, {}, {"network": network})
    if seen < settings.pictures:
        raise SystemExit(f"the judge learns until {settings.pictures} pictures, {seen} are seen.")
    return network.eval().requires_grad_(False)
