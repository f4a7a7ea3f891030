"""Make the pocket base model: `python train/base.py --work DIR` runs what is missing, in order.

Stages: `vae` (autoencoder), `decoder` (refine it with the latents fixed), `tokenizer`, `latents`
(a pool of encoded scenes), `denoiser` (text encoder, then UNet), `export` (a folder that
`diffusers.StableDiffusionPipeline.from_pretrained` opens). Each stage writes its state into DIR
and continues from there when started again.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

import world
from autoencoder import load_vae, train_vae
from denoiser import assemble, make_tokenizer, train_denoiser
from networks import new_text_encoder, new_unet

HERE = Path(__file__).parent


def export(work: Path, out: Path) -> None:
    """Write the averaged weights in fp16 as a diffusers folder."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text_encoder, unet = new_text_encoder(tokenizer), new_unet()
    state = load_file(work / "denoiser.safetensors")
    for name, module in (("text_encoder", text_encoder), ("unet_average", unet)):
        prefix = f"{name}/"
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
    pipeline = assemble(load_vae(work), text_encoder, tokenizer, unet).to(torch.float16)
    pipeline.save_pretrained(out)
    _state_precision(out / "text_encoder" / "config.json")


def _state_precision(config: Path) -> None:
    """Let the text encoder open in float32 where nobody asks for a precision.

    transformers opens in the type that the configuration states, diffusers in float32: a pipeline
    would have parts of two types.
    """
    facts = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Run every stage that is not yet done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, default=HERE.parent / "runs/base", help="state and sheets"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "rite_diffusion/backbones/pocket/weights"
    )
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=4750, help="steps of the denoiser")
    parser.add_argument("--pair-steps", type=int, default=2500, help="more, most with two objects")
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    world.fetch_emoji()
    train_vae(options.work, options.vae_steps)
    train_vae(options.work, options.decoder_steps, stage="decoder", rate=1e-3)
    if not (options.work / "tokenizer").exists():
        make_tokenizer(options.work / "tokenizer")
    train_denoiser(options.work, options.steps, options.batch)
    steps = options.steps + options.pair_steps
    train_denoiser(options.work, steps, options.batch, rate=7e-4, pairs=0.6, decay=0.998)
    export(options.work, options.out)


if __name__ == "__main__":
    main()
