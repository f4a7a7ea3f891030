"""What modules are called in SD1's, SD2's and SDXL's files, by the code of those who read them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file, save_file

import rite_diffusion as rite
from random_adapters import pair
from rite_diffusion.adapters import Adapter, AdapterInfo, load_adapter, save_adapter
from rite_diffusion.adapters.dialects import DIALECTS
from rite_diffusion.adapters.families import family_of
from rite_diffusion.adapters.names import to_sgm
from rite_diffusion.adapters.rules import sgm_paths
from rite_diffusion.api.convert import _as_wanted
from rite_diffusion.errors import AdapterError
from rite_diffusion.types import LoraPair

# What a UNet's settings say of its layout; widths do not matter to names.
CONFIGS = {
    "sd": {"layers_per_block": 2},
    "sdxl": {"layers_per_block": 2, "addition_embed_type": "text_time"},
}
# Written down from the layer lists of the two published checkpoints.
KNOWN = {
    "sdxl": {
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "down_blocks.2.resnets.1.time_emb_proj": "input_blocks.8.0.emb_layers.1",
        "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
    },
    "sd": {
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.2.downsamplers.0.conv": "input_blocks.9.0.op",
        "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
        "mid_block.resnets.0.conv1": "middle_block.0.in_layers.2",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "up_blocks.2.upsamplers.0.conv": "output_blocks.8.2.conv",
        "up_blocks.3.resnets.2.conv_shortcut": "output_blocks.11.0.skip_connection",
    },
}
# Layers that both have: nothing in their names tells which model it is.
SHARED = (
    "down_blocks.0.resnets.1.conv1",
    "down_blocks.1.downsamplers.0.conv",
    "mid_block.resnets.0.time_emb_proj",
    "up_blocks.0.upsamplers.0.conv",
)


def adapter_of(paths, family="", width=8) -> Adapter:
    """Random pairs on a UNet's layers of one width."""
    torch.manual_seed(0)
    names = sorted(f"lora_unet_{path.replace('.', '_')}" for path in paths)
    pairs = [
        pair(name, width, width, kernel=None if "time" in name else 3, rank=4, alpha=2.0)
        for name in names
    ]
    return Adapter(pairs, AdapterInfo(family=family))


def layers_of(family) -> set[str]:
    """Paths of the layers of the published UNet, by diffusers' own model of it."""
    levels, down, up = {
        "sd": ((1, 1, 1, 1), ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
               ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
        "sdxl": ((1, 2, 10), ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
                 ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"]),
    }[family]  # fmt: skip
    xl = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2816,
          "addition_time_embed_dim": 256} if family == "sdxl" else {}  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=[32 * (1 + level) for level in range(len(levels))],
            down_block_types=down, up_block_types=up, transformer_layers_per_block=levels,
            attention_head_dim=8, **xl,
        )  # fmt: skip
    linear_or_convolution = torch.nn.Linear | torch.nn.Conv2d
    return {n for n, module in unet.named_modules() if isinstance(module, linear_or_convolution)}


@pytest.mark.parametrize("family", CONFIGS)
def test_module_names_equal_diffusers_for_whole_checkpoints(family):
    layers, paths = layers_of(family), sgm_paths(family)
    # The widths of `layers_of` differ from level to level, so it has more shortcuts than some; and
    # norms, whose weights and biases a file may shift, are no layers.
    assert layers <= paths.keys()
    others = paths.keys() - layers
    assert all(path.endswith("conv_shortcut") or "norm" in path for path in others)
    marks = {
        f"model.diffusion_model.{sgm}.{kind}": sgm
        for sgm in paths.values()
        for kind in ("weight", "bias")
    }
    theirs = convert_ldm_unet_checkpoint(marks, CONFIGS[family])
    ours = {f"{path}.{kind}": sgm for path, sgm in paths.items() for kind in ("weight", "bias")}
    assert ours == theirs


@pytest.mark.parametrize("family", KNOWN)
def test_module_names_equal_those_of_published_models(family):
    for path, sgm in KNOWN[family].items():
        assert sgm_paths(family)[path] == sgm
        assert to_sgm(path.replace(".", "_"), family) == sgm.replace(".", "_")


@pytest.mark.parametrize("stated", ["own header", "kohya's header", "widths", "spelling"])
@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_only_resnets_and_samplers_have_sdxl_names_of_their_own(tmp_path, to, stated):
    path = tmp_path / "a.safetensors"
    adapter = adapter_of(SHARED, "sdxl" if stated == "own header" else "")
    if stated == "widths":
        wide = LoraPair("lora_unet_up_blocks_1_resnets_0_conv2", torch.randn(2, 9, 3, 3),
                        torch.randn(640, 2, 1, 1), 1.0)  # fmt: skip
        adapter = replace(adapter, pairs=[*adapter.pairs, wide])
    save_adapter(path, adapter)
    if stated == "kohya's header":
        save_file(load_file(path), path, {"ss_base_model_version": "sdxl_base_v1-0"})
    if stated == "spelling":
        old, new = "up_blocks_0_upsamplers_0_conv", "output_blocks_2_2_conv"
        save_file({key.replace(old, new): value for key, value in load_file(path).items()}, path)
    written = load_file(rite.convert(path, to).path)
    stems = {key.rsplit(".lora_", 1)[0].removesuffix(".alpha") for key in written}
    flat = {path.replace(".", "_"): sgm for path, sgm in sgm_paths("sdxl").items()}
    names = [flat[each.name.removeprefix("lora_unet_")] for each in adapter.pairs]
    if to == "kohya":
        assert stems == {f"lora_unet_{name.replace('.', '_')}" for name in names}
    else:
        assert stems == {f"diffusion_model.{name}" for name in names}


def test_the_family_comes_from_the_given_base():
    for family in ("sdxl", "sd"):
        backbone = SimpleNamespace(family=family)
        wanted = _as_wanted(adapter_of(SHARED), "kohya", backbone, None)
        assert family_of(wanted) == family


@pytest.mark.parametrize("family", CONFIGS)
def test_diffusers_own_code_reads_every_name_of_a_kohya_file(tmp_path, family):
    layers = layers_of(family)
    names = sorted(f"lora_unet_{path.replace('.', '_')}" for path in layers)
    pairs = [pair(name, 2, 2, rank=1) for name in names]
    DIALECTS["kohya"].write(tmp_path / "k.safetensors", Adapter(pairs, AdapterInfo(family=family)))
    tensors = load_file(tmp_path / "k.safetensors")
    config = SimpleNamespace(layers_per_block=2)
    found, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(
        lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(tensors, config)
    )
    # Attention comes in an older spelling, which its loader turns into layers afterwards.
    modern = (key.replace(".processor.", ".").replace("_lora.", ".lora.") for key in found)
    read = {key.split(".lora")[0].replace(".to_out", ".to_out.0") for key in modern}
    assert read == {f"unet.{path}" for path in layers}


@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_names_that_depend_on_an_unknown_base_are_not_guessed(tmp_path, to):
    save_adapter(tmp_path / "a.safetensors", adapter_of(SHARED))
    with pytest.raises(AdapterError, match=r"the file does not state .*--base"):
        rite.convert(tmp_path / "a.safetensors", to)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    for free in ("diffusers", "peft"):  # these call modules alike in all models
        rite.convert(tmp_path / "a.safetensors", free)


EVIDENCE = {
    "lora_unet_add_embedding_linear_1": "sdxl",
    "lora_unet_up_blocks_0_attentions_0_proj_in": None,  # the pocket base has it too
    "lora_unet_down_blocks_2_attentions_0_transformer_blocks_1_attn1_to_q": "sdxl",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": "sdxl",
    "lora_unet_down_blocks_0_attentions_0_proj_in": "sd",
    "lora_unet_down_blocks_3_resnets_0_conv1": "sd",
    "lora_unet_down_blocks_2_downsamplers_0_conv": "sd",
    "lora_unet_up_blocks_2_upsamplers_0_conv": "sd",
    "lora_unet_up_blocks_3_attentions_1_proj_in": "sd",
    "lora_unet_up_blocks_1_upsamplers_0_conv": None,
    "lora_unet_mid_block_attentions_0_proj_in": None,
    "lora_te_text_model_encoder_layers_0_mlp_fc1": None,
}


@pytest.mark.parametrize("name", EVIDENCE)
def test_modules_of_one_family_only_identify_it(name):
    assert family_of(Adapter([pair(name, 8, 8)], AdapterInfo())) == EVIDENCE[name]


def test_an_adapters_family_survives_saving(tmp_path):
    save_adapter(tmp_path / "a.safetensors", adapter_of(SHARED, "sdxl"))
    for to in ("kohya", "comfyui", "diffusers", "peft"):
        assert load_adapter(rite.convert(tmp_path / "a.safetensors", to).path).info.family == "sdxl"
    fused = rite.fuse([tmp_path / "a.safetensors"], method="concat", out=tmp_path / "f.safetensors")
    assert "lora_unet_output_blocks_2_2_conv.lora_up.weight" in load_file(fused)
