"""Sizes of the published flow transformers: parameters, LoRA pairs, bytes. Nothing is downloaded.

python benchmarks/flow_sizes.py        # writes results/flow_sizes.json and prints its table

The models are built on torch's meta device with the shapes of diffusers' default configurations, or
of the variant that is named. Bytes are of weights in bf16, of a LoRA's factors in fp32 with AdamW's
two moments, and of one caption's conditioning in bf16.
"""

from types import SimpleNamespace

import diffusers
import torch
from machine import write_result

from rite_diffusion.backbones.families import family_class

RANKS = (4, 16, 64)
GB = 1e9
KLEIN = {"joint_attention_dim": 7680, "guidance_embeds": False}
# Name -> pipeline, transformer, what differs from its defaults, width and tokens of a caption.
MODELS = {
    "Z-Image": ("ZImagePipeline", "ZImageTransformer2DModel", {}, (2560, 512)),
    "FLUX.2 klein 4B": (
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        KLEIN | {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24},
        (7680, 512),
    ),
    "FLUX.2 klein 9B": (
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        KLEIN
        | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32}
        | {"joint_attention_dim": 12288},
        (12288, 512),
    ),
    "FLUX.2 dev": ("Flux2Pipeline", "Flux2Transformer2DModel", {}, (15360, 512)),
    "FLUX.1 dev": (
        "FluxPipeline", "FluxTransformer2DModel", {"guidance_embeds": True}, (4096, 512),
    ),
    "Chroma": ("ChromaPipeline", "ChromaTransformer2DModel", {}, (4096, 512)),
    "Qwen-Image": ("QwenImagePipeline", "QwenImageTransformer2DModel", {}, (3584, 1024)),
    "Krea 2": ("Krea2Pipeline", "Krea2Transformer2DModel", {}, (12 * 2560, 512)),
    "SD3.5 Medium": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
        | {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
        | {"pos_embed_max_size": 384, "sample_size": 128},
        (4096, 333),
    ),
    "SD3.5 Large": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}
        | {"qk_norm": "rms_norm", "pos_embed_max_size": 192, "sample_size": 128},
        (4096, 333),
    ),
    "Lumina 2": (
        "Lumina2Pipeline", "Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, (2304, 256),
    ),
}  # fmt: skip


def sizes(pipeline: str, transformer: str, changes: dict, caption: tuple[int, int]) -> dict:
    """Parameters of a model, LoRA pairs and parameters by layer set and rank, and bytes."""
    with torch.device("meta"):
        model = getattr(diffusers, transformer)(**changes)
    kind = family_class(pipeline)
    base = SimpleNamespace(
        transformer=model,
        block_prefixes=kind.block_prefixes,
        attention_layers=kind.attention_layers,
        other_layers=kind.other_layers,
    )
    base.is_in_last = lambda path, blocks: kind.is_in_last(base, path, blocks)
    base.has_no_effect = lambda path: kind.has_no_effect(base, path)
    parameters = sum(weight.numel() for weight in model.parameters())
    found = {
        "family": kind.family,
        "parameters": parameters,
        "weights_bf16_gb": parameters * 2 / GB,
    }
    for layers in ("attention", "blocks"):
        paths = kind.lora_targets(base, "transformer", layers == "blocks")
        shapes = [model.get_submodule(path).weight.shape for path in paths]
        found[layers] = {"pairs": len(paths)}
        for rank in RANKS:
            count = rank * sum(sum(shape) for shape in shapes)
            found[layers][f"rank {rank}"] = {"parameters": count, "with_adamw_gb": 12 * count / GB}
    found["caption_mb"] = 2 * caption[0] * caption[1] / 1e6
    return found


def main() -> None:
    """Write the results and print a table."""
    found = {name: sizes(*model) for name, model in MODELS.items()}
    write_result("flow_sizes", {"models": found})
    print("| model | parameters | bf16 | pairs | rank 16 with AdamW | one caption |")
    print("|---|---|---|---|---|---|")
    for name, each in found.items():
        pairs = f"{each['attention']['pairs']} / {each['blocks']['pairs']}"
        states = [each[layers]["rank 16"]["with_adamw_gb"] for layers in ("attention", "blocks")]
        print(
            f"| {name} | {each['parameters'] / 1e9:.2f} B | {each['weights_bf16_gb']:.1f} GB "
            f"| {pairs} | {states[0]:.2f} / {states[1]:.2f} GB | {each['caption_mb']:.1f} MB |"
        )


if __name__ == "__main__":
    main()
