"""Image-to-text models of transformers that describe a photo."""

import re
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from rite_diffusion.backbones.families import CaptionStyle
from rite_diffusion.backbones.source import default_device
from rite_diffusion.errors import ConfigError
from rite_diffusion.files.writing import user_path
from rite_diffusion.types import Concept

Captioner = Callable[[Image.Image], str]  # photo -> what the model says of it

MOST_TOKENS: dict[CaptionStyle, int] = {"tags": 80, "phrase": 40, "sentences": 160}

# What models without a chat template are asked, by the kind of their configuration. Others, such as
# BLIP and GIT, are shown the picture alone.
TASKS: dict[str, dict[CaptionStyle, str]] = {
    "florence2": {
        "tags": "<DETAILED_CAPTION>",
        "phrase": "<CAPTION>",
        "sentences": "<MORE_DETAILED_CAPTION>",
    },
    "paligemma": dict.fromkeys(MOST_TOKENS, "caption en"),
    "kosmos-2": dict.fromkeys(MOST_TOKENS, "<grounding>An image of"),
}
FORMS: dict[CaptionStyle, str] = {
    "tags": "a comma-separated list of short tags",
    "phrase": "one short phrase, without a full stop",
    "sentences": "two or three plain sentences",
}
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


def instruction(concept: Concept, style: CaptionStyle) -> str:
    """What a model with a chat template is asked."""
    noun = concept.class_noun
    return (
        f"Describe this picture as {FORMS[style]}. Call the {noun} {concept.trigger}. Say nothing "
        f"of how the {noun} itself looks, such as its colours, shape or material. Say what it "
        "does, how it is placed, what is around and behind it, and how the picture is taken. "
        "Answer with the description alone."
    )


def load_captioner(model: str, concept: Concept, style: CaptionStyle) -> Captioner:
    """The captioner of a hub id or a local folder that transformers opens as image-text-to-text.

    Only `.safetensors` are read, and no code of a hub is run. Decoding is greedy, so captions are
    repeatable. Raises ConfigError where there is no such model or it cannot caption.
    """
    processor, network = _open(model)
    device = default_device()
    network = network.to(device).eval()

    @torch.no_grad()
    def caption(photo: Image.Image) -> str:
        try:
            inputs = _inputs(processor, network.config.model_type, photo, concept, style)
            inputs = inputs.to(device, network.dtype)
            most = MOST_TOKENS[style]
            tokens = network.generate(**inputs, max_new_tokens=most, do_sample=False)[0]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(f"{model} cannot caption a picture: {reason}") from None
        prompt = inputs["input_ids"][0] if "input_ids" in inputs else tokens[:0]
        if torch.equal(tokens[: len(prompt)], prompt):  # decoder-only models repeat it
            tokens = tokens[len(prompt) :]
        text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return " ".join(_THOUGHT.sub("", text).split())

    return caption


def _open(model: str) -> tuple[Any, Any]:
    """The processor and the network of a captioning model."""
    import transformers

    folder = user_path(model)
    if folder.is_file():
        raise ConfigError(
            f"{model} is a file: pass a captioning model's folder, as save_pretrained writes it, "
            "or a hub id."
        )
    source, local = (str(folder), True) if folder.is_dir() else (model, False)
    options = {"trust_remote_code": False, "local_files_only": local}
    try:
        processor = transformers.AutoProcessor.from_pretrained(source, **options)
        network = transformers.AutoModelForImageTextToText.from_pretrained(
            source, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"{model} does not open as an image-to-text model with .safetensors: {reason} Pass the "
            "folder or hub id of one, or leave --model out for templates."
        ) from None
    if not isinstance(processor, transformers.ProcessorMixin):
        raise ConfigError(f"{model} has no processor of pictures and text: pass another model.")
    return processor, network


def _inputs(
    processor: Any, kind: str, photo: Image.Image, concept: Concept, style: CaptionStyle
) -> Any:
    """The network's inputs for a photo, on the CPU."""
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": instruction(concept, style)}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return processor(images=[photo], text=[text], return_tensors="pt")
    if kind in TASKS:
        return processor(images=photo, text=TASKS[kind][style], return_tensors="pt")
    if kind == "instructblip":
        return processor(images=photo, text=instruction(concept, style), return_tensors="pt")
    return processor(images=photo, return_tensors="pt")
