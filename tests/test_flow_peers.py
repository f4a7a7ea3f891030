"""Exports of flow adapters at the published widths, as diffusers' own converters read them."""

import diffusers
import pytest
import torch

from rite_diffusion.adapters import Adapter, AdapterInfo
from rite_diffusion.adapters.dialects import DIALECTS
from rite_diffusion.adapters.names import module_name
from rite_diffusion.types import LoraPair

FLUX, QWEN, SD3, Z, KREA = 3072, 3072, 1536, 3840, 6144  # widths
DOUBLE = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


def double(width):
    return {f"transformer_blocks.0.attn.{name}": (width, width) for name in DOUBLE}


# Family -> pipeline, and path -> (outputs, inputs) of a block of each kind.
LAYERS = {
    "flux": ("FluxPipeline", double(FLUX) | {
        "transformer_blocks.0.ff.net.0.proj": (4 * FLUX, FLUX),
        "transformer_blocks.0.ff.net.2": (FLUX, 4 * FLUX),
        "transformer_blocks.0.ff_context.net.0.proj": (4 * FLUX, FLUX),
        "transformer_blocks.0.ff_context.net.2": (FLUX, 4 * FLUX),
        "single_transformer_blocks.0.attn.to_q": (FLUX, FLUX),
        "single_transformer_blocks.0.attn.to_k": (FLUX, FLUX),
        "single_transformer_blocks.0.attn.to_v": (FLUX, FLUX),
        "single_transformer_blocks.0.proj_mlp": (4 * FLUX, FLUX),
        "single_transformer_blocks.0.proj_out": (FLUX, 5 * FLUX),
    }),
    "flux2": ("Flux2KleinPipeline", double(FLUX) | {
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (9 * FLUX, FLUX),
        "single_transformer_blocks.0.attn.to_out": (FLUX, 4 * FLUX),
    }),
    "z-image": ("ZImagePipeline", {
        **{f"layers.0.attention.{name}": (Z, Z) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        "layers.0.feed_forward.w1": (10240, Z),
        "layers.0.feed_forward.w2": (Z, 10240),
    }),
    "qwen-image": ("QwenImagePipeline", double(QWEN) | {
        "transformer_blocks.0.img_mlp.net.0.proj": (4 * QWEN, QWEN),
        "transformer_blocks.0.txt_mlp.net.2": (QWEN, 4 * QWEN),
    }),
    "krea2": ("Krea2Pipeline", {
        "transformer_blocks.0.attn.to_q": (KREA, KREA),
        "transformer_blocks.0.attn.to_k": (1536, KREA),  # fewer heads of keys than of queries
        "transformer_blocks.0.attn.to_out.0": (KREA, KREA),
        "transformer_blocks.0.attn.to_gate": (KREA, KREA),
    }),
    "sd3": ("StableDiffusion3Pipeline", double(SD3)),
}  # fmt: skip
# What diffusers 0.42 converts; it leaves other names as they are or raises.
READ = [(family, "diffusers") for family in LAYERS] + [
    ("flux", "kohya"), ("flux2", "kohya"), ("flux2", "comfyui"), ("z-image", "kohya"),
    ("qwen-image", "kohya"), ("qwen-image", "comfyui"), ("krea2", "comfyui"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "target"), READ)
def test_diffusers_reads_the_export_at_the_same_strength(family, target, tmp_path):
    """Ranks and scales differ from layer to layer; fused layers come apart again."""
    name, layers = LAYERS[family]
    torch.manual_seed(0)
    pairs = [
        LoraPair(module_name("transformer", path), torch.randn(2 + n % 3, shape[1]),
                 torch.randn(shape[0], 2 + n % 3), 0.5 + n % 2)
        for n, (path, shape) in enumerate(layers.items())
    ]  # fmt: skip
    file = tmp_path / "export.safetensors"
    DIALECTS[target].write(file, Adapter(pairs, AdapterInfo(family=family)))
    read = getattr(diffusers, name).lora_state_dict(str(tmp_path), weight_name=file.name)
    tensors = read[0] if isinstance(read, tuple) else read
    assert not any("alpha" in key for key in tensors)
    for pair, (path, shape) in zip(pairs, layers.items(), strict=True):
        down = tensors.pop(f"transformer.{path}.lora_A.weight").float()
        up = tensors.pop(f"transformer.{path}.lora_B.weight").float()
        probe = torch.randn(shape[1], 2)
        wanted = pair.scale * (pair.up @ (pair.down @ probe))
        torch.testing.assert_close(up @ (down @ probe), wanted, rtol=1e-4, atol=1e-2)
    assert not any(value.any() for key, value in tensors.items() if "lora_B" in key)
