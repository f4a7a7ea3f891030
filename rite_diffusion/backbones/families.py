"""The families of base models, and which one a base is of before it is opened."""

import importlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

from rite_diffusion.files.writing import user_path

CaptionStyle = Literal["tags", "phrase", "sentences"]
CAPTION_STYLES: tuple[CaptionStyle, ...] = get_args(CaptionStyle)

POCKET = Path(__file__).parent / "pocket" / "weights"

# The class of a diffusers pipeline, and the module and class that make a backbone of it; imported
# when one of its models is opened.
FAMILIES = {
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "StableDiffusionXL"),
    "ZImagePipeline": ("flow.z_image", "ZImage"),
    "Flux2KleinPipeline": ("flow.flux2", "Flux2"),
    "Flux2Pipeline": ("flow.flux2", "Flux2"),
    "FluxPipeline": ("flow.flux", "Flux"),
    "ChromaPipeline": ("flow.chroma", "Chroma"),
    "QwenImagePipeline": ("flow.qwen_image", "QwenImage"),
    "StableDiffusion3Pipeline": ("flow.sd3", "StableDiffusion3"),
    "Krea2Pipeline": ("flow.krea2", "Krea2"),
    "Lumina2Pipeline": ("flow.lumina2", "Lumina2"),
}


def pipeline_name(base: str) -> str | None:
    """The pipeline class that a folder's or a hub model's index names, before it is opened.

    None for other kinds of bases, and where there is no index.
    """
    try:
        index = index_of(denoiser_and_whole(base)[1])
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def is_flow(base: str) -> bool:
    """Whether a base is known for a flow transformer before it is opened."""
    module, _ = FAMILIES.get(pipeline_name(base) or "", ("", ""))
    return module.startswith("flow.")


def family_name(base: str) -> str | None:
    """A base's family, such as `z-image`, before it is opened; None where that is not known."""
    name = pipeline_name(base)
    return family_class(name).family if name in FAMILIES else None


def caption_style(base: str) -> CaptionStyle:
    """The form of captions that a base's text encoders were trained on, before it is opened.

    Phrases for CLIP, sentences for the language models of flow transformers. Tags are for
    checkpoints of these families that were trained on them, which no file says.
    """
    return "sentences" if is_flow(base) else "phrase"


def family_class(name: str) -> Any:
    """The class that makes a backbone of a pipeline of this class name."""
    module, kind = FAMILIES[name]
    return getattr(importlib.import_module(f"rite_diffusion.backbones.{module}"), kind)


def family_of(pipeline: Any) -> Any:
    """The class that makes a backbone of a pipeline."""
    return family_class(type(pipeline).__name__)


def denoiser_and_whole(base: str) -> tuple[Path | None, str]:
    """The file of `FILE.safetensors@MODEL` and its model; None and the base for other bases."""
    file, _, whole = base.partition(".safetensors@")
    return (user_path(f"{file}.safetensors"), whole) if whole else (None, base)


def denoiser_class(source: str) -> Any:
    """The class of the transformer in a folder's or a hub model's index."""
    parts = json.loads(index_of(source).read_text(encoding="utf-8"))
    import diffusers

    return getattr(diffusers, parts["transformer"][1])


def index_of(base: str) -> Path:
    """The path of a base's model_index.json; of a hub id that in the cache, or downloaded."""
    path = POCKET if base == "pocket" else user_path(base)
    if not path.exists() and base.count("/") == 1:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        found = try_to_load_from_cache(base, "model_index.json")
        return Path(found if isinstance(found, str) else hf_hub_download(base, "model_index.json"))
    return path / "model_index.json"
