"""Tokenizers of the bases, and what a text encoder learns before any picture."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, Qwen2Tokenizer

from . import emoji, world
from .machine import Machine, Progress, rate_at, set_rate

TOKENS = 32  # length of CLIP's prompts; at 16 the background at a caption's end was cut off
VOCABULARY = 2500
CAPTIONS_SEED = 31
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
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
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
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


def teach(
    encoder: nn.Module,
    speaking_states: Callable[[list[str]], tuple[Tensor, Tensor]],
    width: int,
    machine: Machine,
    captions_seen: int = 50_000,
    batch: int = 128,
    rate: float = 1e-3,
) -> float:
    """Train a text encoder alone, as the large bases' were; the share of nouns it then tells.

    `speaking_states` gives, for captions, states (n, width) that must say everything, and which
    caption (n,) each belongs to. Every fact of a caption is a fixed random direction that these
    states should point to. The directions are fixed so that the states must move: readouts that
    learn were content with states that differ by 3 % from noun to noun, and from such states a
    denoiser learned every background and, in 60,000 pictures, not one object.
    """
    sizes = fact_sizes()
    draws = torch.randn(sum(sizes), width, generator=torch.Generator().manual_seed(0))
    directions = F.normalize(draws, dim=-1).to(machine.device)
    optimizer = torch.optim.AdamW(encoder.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    progress, right = Progress("text", 0, captions_seen), 0.0
    for seen in range(0, captions_seen, batch):
        set_rate(optimizer, rate_at(rate, seen, captions_seen))
        seeds = range(seen, seen + batch)
        scenes = [world.described(np.random.default_rng([CAPTIONS_SEED + 1, i])) for i in seeds]
        facts = torch.tensor([facts_of(scene) for scene in scenes], device=machine.device)
        states, owners = speaking_states([scene.caption for scene in scenes])
        answers = (states @ directions.T).split(sizes, dim=-1)
        wanted = facts[owners]
        loss = sum(F.cross_entropy(a, w) for a, w in zip(answers, wanted.T, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = (answers[0].argmax(-1) == wanted[:, 0]).float().mean().item()
        if progress.is_due(seen + batch):
            progress.report(seen + batch, {"loss": loss.item(), "noun": right})
    return right
