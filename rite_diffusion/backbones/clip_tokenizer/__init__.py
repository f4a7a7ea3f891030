"""OpenAI CLIP's tokenizer, built from the merges beside this file."""

import gzip
from pathlib import Path

from transformers import CLIPTokenizer

_MERGES = Path(__file__).with_name("merges.txt.gz")  # one pair a line, the most frequent first


def clip_tokenizer(pad_token: str = "<|endoftext|>", length: int = 77) -> CLIPTokenizer:
    """A new tokenizer of 49408 tokens for encoders of `length` positions, marks included.

    OpenAI's CLIP pads with the end mark, SD2 and SDXL's second text encoder with "!". Ids are those
    of OpenAI's SimpleTokenizer: the 256 bytes, the 256 bytes at a word's end, merges, marks.
    """
    merges = gzip.decompress(_MERGES.read_bytes()).decode().split("\n")
    letters = _byte_letters()
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(pair.replace(" ", "") for pair in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(pair.split(" ")) for pair in merges]
    return CLIPTokenizer(
        vocab=vocab,
        merges=pairs,  # pyright: ignore[reportArgumentType] (annotated too narrowly there)
        model_max_length=length,
        pad_token=pad_token,
    )


def _byte_letters() -> list[str]:
    """A visible letter for each byte: printable bytes as they are, then letters for the others."""
    printable = [chr(code) for code in range(256) if chr(code).isprintable() and chr(code) != " "]
    return printable + [chr(256 + index) for index in range(256 - len(printable))]
