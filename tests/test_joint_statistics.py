"""Fusion's statistics where the tokens of text and picture enter a layer together."""

import pytest
import torch

from flow_bases import SIDE, family
from rite_diffusion.fusion.statistics import Drawing, collect
from rite_diffusion.generation.denoise import conditional, denoising

# A layer that sees both, one that sees the picture, one that sees text; None where there is none.
LAYERS = {
    "z-image": ("layers.0.feed_forward.w1", None, None),
    "flux": (
        "single_transformer_blocks.0.proj_mlp",
        "transformer_blocks.0.ff.net.0.proj",
        "transformer_blocks.0.attn.add_q_proj",
    ),
    "flux2": (
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        "transformer_blocks.0.ff.linear_in",
        "transformer_blocks.0.ff_context.linear_in",
    ),
    "krea2": ("transformer_blocks.0.ff.up", None, None),
    "lumina2": ("layers.0.feed_forward.linear_1", None, None),
}
PROMPT, FEW = "a cat on a blue background", Drawing(steps=2)


@pytest.fixture(params=LAYERS)
def base(request, monkeypatch):
    found = family(request.param)
    monkeypatch.setattr(type(found), "resolution", SIDE)
    return found


@torch.no_grad()
def inputs_of(base, path):
    """All inputs (steps, tokens, width) of a layer while the prompt is drawn."""
    seen = []
    module = base.transformer.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0]))
    for _ in denoising(base, conditional(base, [PROMPT]), [FEW.seed], steps=FEW.steps):
        pass
    handle.remove()
    return torch.cat(seen).double()


def mean_square(rows):
    rows = rows.flatten(0, -2)
    return rows.mT @ rows / len(rows)


def test_text_and_picture_weigh_alike_whatever_their_numbers(base):
    both, picture, text = LAYERS[base.family]
    paths = [path for path in (both, picture, text) if path]
    names = {path: f"transformer.{path}".replace(".", "_") for path in paths}
    names = {path: f"lora_{name}" for path, name in names.items()}
    moments = collect(base, [PROMPT], list(names.values()), FEW)
    cells = SIDE // base.pixels_per_latent // base.patch
    count = 32 if base.family == "z-image" else cells**2  # Z-Image pads the picture's 16 tokens
    inputs = inputs_of(base, both)
    assert inputs.shape[1] > count
    first = base.family != "z-image"
    texts = inputs[:, :-count] if first else inputs[:, count:]
    pictures = inputs[:, -count:] if first else inputs[:, :count]
    wanted = (mean_square(texts) + mean_square(pictures)) / 2
    found = moments[names[both]].matrix()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    for path in paths[1:]:
        wanted = mean_square(inputs_of(base, path))
        found = moments[names[path]].matrix()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
