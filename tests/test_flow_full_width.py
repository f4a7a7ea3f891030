"""One block of each kind at the published widths: a step of training, and the file in diffusers."""

import diffusers
import pytest
import torch

from flow_bases import opened
from flow_models import DYNAMIC, Scheduler, film_vae, tokenizer, vae
from rite_diffusion.adapters import Adapter, AdapterInfo, save_adapter
from rite_diffusion.adapters.delta import delta_weight
from rite_diffusion.adapters.verify import attached_pairs
from rite_diffusion.backbones.conditioning import MASK
from rite_diffusion.backbones.protocols import Conditioning
from rite_diffusion.methods.lora import Lora

TOKENS = 32
FLUX2 = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": False}
# Family -> pipeline, transformer, its configuration, width of text states, other conditioning.
MODELS = {
    "z-image": ("ZImagePipeline", "ZImageTransformer2DModel",
                {"n_layers": 1, "n_refiner_layers": 1}, 2560, {MASK: ()}),
    "flux": ("FluxPipeline", "FluxTransformer2DModel",
             {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}, 4096,
             {"pooled": (768,)}),
    "chroma": ("ChromaPipeline", "ChromaTransformer2DModel",
               {"num_layers": 1, "num_single_layers": 1}, 4096, {"seen": ()}),
    "flux2": ("Flux2KleinPipeline", "Flux2Transformer2DModel",
              FLUX2 | {"num_attention_heads": 24, "joint_attention_dim": 7680}, 7680, {}),
    "qwen-image": ("QwenImagePipeline", "QwenImageTransformer2DModel", {"num_layers": 1}, 3584,
                   {MASK: ()}),
    "krea2": ("Krea2Pipeline", "Krea2Transformer2DModel", {"num_layers": 1}, 12 * 2560,
              {MASK: ()}),
    "sd3": ("StableDiffusion3Pipeline", "SD3Transformer2DModel",
            {"num_layers": 1, "num_attention_heads": 24, "caption_projection_dim": 1536,
             "qk_norm": "rms_norm", "pos_embed_max_size": 96, "out_channels": 16}, 4096,
            {"pooled": (2048,)}),
    "lumina2": ("Lumina2Pipeline", "Lumina2Transformer2DModel",
                {"num_layers": 1, "num_refiner_layers": 1, "cap_feat_dim": 2304}, 2304, {MASK: ()}),
}  # fmt: skip


def pipeline_of(name):
    """The family's pipeline without text encoders."""
    kind, transformer, config, _, _ = MODELS[name]
    torch.manual_seed(0)
    parts = {"transformer": getattr(diffusers, transformer)(**config).to(torch.bfloat16)}
    if name in ("qwen-image", "krea2"):
        parts["vae"] = film_vae()
    elif name == "flux2":
        parts["vae"] = diffusers.AutoencoderKLFlux2(
            block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=32
        )
    else:
        parts["vae"] = vae()
    dynamic = name in ("flux", "flux2", "qwen-image", "krea2")
    parts["scheduler"] = Scheduler(**DYNAMIC) if dynamic else Scheduler(shift=3.0)
    parts |= {"tokenizer": tokenizer(512), "text_encoder": None}
    for number in {"flux": (2,), "sd3": (2, 3)}.get(name, ()):
        parts |= {f"tokenizer_{number}": tokenizer(512), f"text_encoder_{number}": None}
    return getattr(diffusers, kind)(**parts)


@pytest.mark.full_size
@pytest.mark.parametrize("name", MODELS)
def test_a_block_at_full_width_trains_and_its_file_loads(name, tmp_path):
    base = opened(pipeline_of(name), name)
    _, _, _, width, extra = MODELS[name]
    conditioning = Conditioning(
        torch.randn(1, TOKENS, width),
        {key: torch.ones(1, TOKENS, dtype=torch.bool) if not shape else torch.randn(1, *shape)
         for key, shape in extra.items()},
    )  # fmt: skip
    lora = Lora(base, rank=4, layers="blocks", text_encoder=False)
    before = {pair.name: pair.up.detach().clone() for pair in lora.pairs()}
    weights = [each for group in lora.parameter_groups() for _, each in group["params"]]
    optimizer = torch.optim.AdamW(weights, 1e-2)
    base.checkpoint_gradients(True)
    cells = 256 // base.pixels_per_latent
    noisy = torch.randn(1, base.latent_channels, cells, cells)
    velocity = base.denoise(noisy, torch.tensor([700.0]), conditioning)
    assert velocity.shape == noisy.shape and torch.isfinite(velocity).all()
    velocity.float().square().mean().backward()
    optimizer.step()
    changed = [pair.name for pair in lora.pairs() if not torch.equal(pair.up, before[pair.name])]
    assert len(changed) == len(before) > 5
    pairs = [
        type(pair)(pair.name, pair.down.detach(), pair.up.detach(), pair.scale)
        for pair in lora.pairs()
    ]
    lora.remove()
    save_adapter(tmp_path / "a.safetensors", Adapter(pairs, AdapterInfo(family=name)))
    pipeline = base.pipeline
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    found = attached_pairs({"transformer": pipeline.transformer})
    assert found.keys() == {pair.name for pair in pairs}
    for pair in pairs:
        wanted = delta_weight(pair)
        error = (delta_weight(found[pair.name]) - wanted).norm() / wanted.norm()
        assert error < 1e-2  # diffusers loads into bf16
