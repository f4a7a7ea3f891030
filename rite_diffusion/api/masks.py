"""Masks of the subject for a photo folder, by a segmenter or by the base model's attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from rite_diffusion.backbones.attention_maps import AttentionRecorder
from rite_diffusion.backbones.protocols import Backbone
from rite_diffusion.backbones.source import load_backbone
from rite_diffusion.errors import ConfigError, PhotoFolderError
from rite_diffusion.files.writing import check_outputs, user_path, write_output
from rite_diffusion.photos.buckets import bucket_of, bucket_sizes
from rite_diffusion.photos.cutout import cut_out
from rite_diffusion.photos.images import open_upright, to_tensor
from rite_diffusion.photos.listing import Picture, list_pictures
from rite_diffusion.photos.pixels import UnreadableImage
from rite_diffusion.photos.segmenter import NoSubject, Segmenter, load_segmenter
from rite_diffusion.photos.sidecars import new_mask_path
from rite_diffusion.seeding import generator
from rite_diffusion.training.objective import add_noise

LEVELS = (0.2, 0.35, 0.5, 0.65)  # places in the noise schedule at which attention is measured
DRAWS = 4  # random noises per level


@dataclass(frozen=True)
class MaskReport:
    """The masks that were written, and the photos without one."""

    written: list[Path]
    left: list[tuple[str, str]]  # photo's name, reason


def make_masks(
    photos: str | Path,
    class_noun: str,
    *,
    base: str = "pocket",
    model: str | Path | None = None,
    override: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> MaskReport:
    """Write `masks/<name>.png` for each photo of a folder, white where the subject is.

    `model` is a segmenter's `.onnx` file; without one the mask comes from the base's
    cross-attention to the class noun. Existing masks stay, unless `override`. `progress` is called
    with the number of photos done. Raises PhotoFolderError for a folder without photos or where
    masks cannot be written, ConfigError for a model that cannot be used.
    """
    listing = list_pictures(user_path(photos))
    pictures = {each: mask_target(each, listing.pictures) for each in listing.pictures}
    if not pictures:
        raise PhotoFolderError(f"no images in {photos}: pass the folder that holds the photos.")
    check_outputs(
        derived=[target for each, target in pictures.items() if each.mask is None or override],
        sources=[each.path for each in pictures],
        overwrite=override,
    )
    if model is None:
        segment = attention_segmenter(load_backbone(base), class_noun)
    else:
        segment = load_segmenter(user_path(model))
    written, left = list[Path](), [(path.name, reason) for path, reason in listing.unused]
    for done, (picture, target) in enumerate(pictures.items(), 1):
        try:
            if picture.mask is not None and not override:
                raise NoMask("has a mask already")
            _write(target, _segmented(picture.path, segment, class_noun, override))
            written.append(target)
        except NoMask as reason:
            left.append((picture.path.name, str(reason)))
        progress(done)
    return MaskReport(written, left)


class NoMask(Exception):
    """A photo gets no mask; the message says why."""


def _segmented(path: Path, segment: Segmenter, class_noun: str, override: bool) -> Image.Image:
    """The mask of a photo file; NoMask where it needs none or no subject is found."""
    try:
        photo = open_upright(path)
        if photo.opacity is not None and not override:
            raise NoMask("has transparency, which is its mask")
        return segment(photo.image)
    except UnreadableImage as fault:
        raise NoMask(str(fault)) from None
    except NoSubject:
        raise NoMask(f"no {class_noun} stands out") from None


def mask_target(picture: Picture, pictures: Sequence[Picture]) -> Path:
    """Where the mask of a picture is written: over the one it has, else at its own name.

    Raises PhotoFolderError where something else is in the way.
    """
    has = picture.mask
    if has is not None and has.suffix.lower() == ".png":
        return has
    target = new_mask_path(picture.path, [each.path for each in pictures])
    if target.parent.exists() and not target.parent.is_dir():
        raise PhotoFolderError(f"{target.parent} is a file: move it, the masks go into a folder.")
    return target


def _write(target: Path, mask: Image.Image) -> None:
    content = BytesIO()
    mask.save(content, "PNG")
    try:
        target.parent.mkdir(exist_ok=True)
        write_output(target, content.getvalue())
    except OSError as error:
        raise PhotoFolderError(f"cannot write {target}: {error.strerror or error}.") from None


def attention_segmenter(backbone: Backbone, class_noun: str) -> Segmenter:
    """A segmenter by the base's cross-attention to the class noun."""
    prompt = f"a {class_noun}"
    positions = backbone.token_positions(prompt, class_noun)
    if not positions:
        raise ConfigError(f"'{class_noun}' has no tokens in {backbone.name}: choose a plain noun")

    def segment(photo: Image.Image) -> Image.Image:
        size = bucket_of(photo.size, bucket_sizes(backbone.resolution, backbone.multiple))
        pixels = to_tensor(photo.resize(size, Image.Resampling.LANCZOS))
        scores = attention_scores(backbone, pixels, prompt, positions)
        return cut_out(scores.cpu().numpy(), photo)

    return segment


@torch.no_grad()
def attention_scores(
    backbone: Backbone, pixels: Tensor, prompt: str, positions: list[int]
) -> Tensor:
    """Attention (h, w) from 0 to 1 of a picture's latent cells to some tokens of a prompt.

    `pixels` are (3, H, W) in [-1, 1]. The mean is over noise levels, layers, heads and tokens; each
    layer's map is scaled to [0, 1] first. Raises NoSubject where all cells are alike.
    """
    latents = backbone.encode_images(pixels[None])
    count, (height, width) = len(LEVELS) * DRAWS, latents.shape[-2:]
    places = torch.tensor([level for level in LEVELS for _ in range(DRAWS)], dtype=torch.float64)
    at = backbone.noise_schedule.levels(places, (height, width))
    noise = torch.randn((count, *latents.shape[1:]), generator=generator(0)).to(latents)
    clean = latents.expand(count, -1, -1, -1)
    noisy = add_noise(clean, noise, at.signal, at.sigma)
    recorder = AttentionRecorder(backbone.cross_attentions)
    try:
        backbone.denoise(noisy, at.times, backbone.encode_captions([prompt] * count))
        maps = recorder.maps(list(range(count)), [positions] * count, *latents.shape[-2:])
    finally:
        recorder.remove()
    scores = torch.zeros(latents.shape[-2:], device=backbone.device)
    for each in maps:
        mean = each.mean((0, 1))[None, None]
        scores += _ranged(F.interpolate(mean, latents.shape[-2:], mode="bicubic")[0, 0])
    return _ranged(scores)


def _ranged(values: Tensor) -> Tensor:
    """The values scaled to [0, 1]; NoSubject where all are equal."""
    low, high = values.min(), values.max()
    if not high > low:
        raise NoSubject
    return (values - low) / (high - low)
