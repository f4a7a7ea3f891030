"""Tokenizers of the bases, and what a text encoder learns before any picture."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, Qwen2Tokenizer

from . import canvas, emoji, world
from .machine import Machine, Progress, load_state, rate_at, save_state, set_rate
from .muon import Muon

WORDS = 32  # CLIP's tokens for a caption; at 16 the background at its end was cut off
TOKENS = WORDS + canvas.PATCHES  # length of CLIP's prompts; the last states show the picture
PATCH_TOKENS = [f"<|patch_{i}|>" for i in range(canvas.PATCHES)]  # of the chat template
VOCABULARY = 2500
CAPTIONS_SEED = 31
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n" + "".join(PATCH_TOKENS) + "{% endif %}"
)


def captions(count: int) -> list[str]:
    """Captions of `count` scenes, without the scenes' pictures."""
    return [
        world.described(np.random.default_rng([CAPTIONS_SEED, i])).caption for i in range(count)
    ]


def corpus() -> list[str]:
    """Captions, and the names of the emoji that may be seen, for words of few tokens."""
    names = sorted({name.replace("-", " ") for _, name in emoji.training_keys()})
    return captions(10_000) + [f"{name} {name}" for name in names]


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer with a small byte-pair vocabulary: grammar words are whole."""
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    lines = (line.replace(",", " ,").split() for line in corpus())
    bpe.train_from_iterator((word for line in lines for word in line), trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    CLIPTokenizer(vocabulary, merges, model_max_length=TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Qwen's tokenizer with a small byte-pair vocabulary and its chat template."""
    if folder.exists():
        return Qwen2Tokenizer.from_pretrained(folder)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator([*corpus(), *["user\n", "assistant\n"] * 50], trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    words = [*dict.fromkeys(letters + ["".join(pair) for pair in merges])]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Qwen2Tokenizer(
        vocabulary,
        merges,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", *PATCH_TOKENS],
        chat_template=CHAT,
        model_max_length=512,
    )
    tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def facts_of(scene: world.Description) -> list[int]:
    """What a caption says as class numbers: first noun, second noun, colour, place, style."""
    nouns, colours, places = list(world.NOUNS), list(world.COLOURS), list(world.PLACES)
    is_pair = len(scene.nouns) == 2
    named = f"{scene.colour} background" in scene.caption
    return [
        nouns.index(scene.nouns[0]),
        nouns.index(scene.nouns[1]) + 1 if is_pair else 0,
        colours.index(scene.colour) + 1 if named else 0,
        0 if is_pair else places.index(scene.place),
        list(world.STYLES).index(scene.style),
    ]


def fact_sizes() -> list[int]:
    """How many values each of `facts_of` has."""
    nouns = len(world.NOUNS)
    return [nouns, nouns + 1, len(world.COLOURS) + 1, len(world.PLACES), len(world.STYLES)]


@dataclass(frozen=True)
class Taught:
    """The states of captions that a text encoder's training looks at."""

    speaking: Tensor  # (n, width), each of which must say everything of a caption
    owners: Tensor  # (n,), whose they are
    picture: Tensor  # (captions, PATCHES, width), which show the scene


def teach(
    encoder: nn.Module,
    taught_states: Callable[[list[str]], Taught],
    latents: Tensor,
    machine: Machine,
    captions_seen: int,
    path: Path,
    batch: int = 64,
    rates: tuple[float, float] = (0.01, 1e-3),
) -> tuple[float, float]:
    """Train a text encoder alone, from the state at `path` if it is there.

    Returns the share of nouns it tells, and its error in latents, of the last batch.

    `latents` is what `canvas.table` gives, `rates` are Muon's and AdamW's. Every fact of a caption
    is a fixed random direction that the speaking states should point to, and a linear readout of
    the picture states should give the latents of the scene without its shades. The directions are
    fixed so that the states must move: readouts that learn were content with states that differ by
    3 % from noun to noun. One caption of 20 is empty; it shows the mean.
    """
    sizes, width = fact_sizes(), encoder.config.hidden_size
    draws = torch.randn(sum(sizes), width, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(draws, dim=-1).to(machine.device)
    readout = nn.Linear(width, 4 * latents.shape[3]).to(machine.device)
    inner = [
        weight
        for name, weight in encoder.named_parameters()
        if weight.ndim == 2 and "embed" not in name
    ]
    ids = {id(weight) for weight in inner}
    others = [w for w in (*encoder.parameters(), *readout.parameters()) if id(w) not in ids]
    muon, adamw = Muon(inner, rates[0]), torch.optim.AdamW(others, rates[1], betas=(0.9, 0.99))
    optimizers = {"muon": muon, "adamw": adamw}
    modules = {"text_encoder": encoder, "readout": readout}
    begun = load_state(path, optimizers, modules)
    progress, right, error = Progress("text", begun, captions_seen), 0.0, 0.0
    for seen in range(begun, captions_seen, batch):
        for optimizer, rate in zip(optimizers.values(), rates, strict=True):
            set_rate(optimizer, rate_at(rate, seen, captions_seen))
            optimizer.zero_grad()
        scenes = [
            world.described(np.random.default_rng([CAPTIONS_SEED + 1, i]))
            for i in range(seen, seen + batch)
        ]
        empty = torch.arange(seen, seen + batch) % 20 == 0
        said = ["" if e else scene.caption for e, scene in zip(empty, scenes, strict=True)]
        facts = torch.tensor([facts_of(scene) for scene in scenes], device=machine.device)
        shown = canvas.patches(torch.stack([canvas.latents_of(s, latents) for s in scenes]))
        with machine.autocast():
            states = taught_states(said)
        spoken = ~empty.to(states.owners.device)[states.owners]
        answers = (states.speaking.float() @ directions.T)[spoken].split(sizes, dim=-1)
        wanted = facts[states.owners[spoken]]
        loss = sum(F.cross_entropy(a, w) for a, w in zip(answers, wanted.T, strict=True))
        # normalised as Z-Image reads them
        picture = F.rms_norm(states.picture.float(), directions.shape[1:])
        misses = (readout(picture) - shown.to(machine.device)).square()
        (0.05 * loss + misses.mean()).backward()
        nn.utils.clip_grad_norm_([*inner, *others], 1.0)
        muon.step()
        adamw.step()
        right = (answers[0].argmax(-1) == wanted[:, 0]).float().mean().item()
        error = misses[~empty.to(misses.device)].mean().item()
        if progress.is_due(seen + batch):
            progress.report(seen + batch, {"error": error, "noun": right})
            save_state(path, seen + batch, optimizers, modules)
    return right, error
