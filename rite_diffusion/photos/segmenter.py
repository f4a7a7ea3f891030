"""Segmenters in ONNX files, such as U2-Net (Qin et al. 2020), that find a photo's subject."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from rite_diffusion.errors import ConfigError

Segmenter = Callable[[Image.Image], Image.Image]  # photo -> mask of its size, white: the subject

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
SIDE = 320  # pixels, for models without a fixed input size
MIN_RANGE = 1e-6  # of a map that shows a subject


class NoSubject(Exception):
    """No subject was found in the photo."""


def load_segmenter(model: Path) -> Segmenter:
    """The segmenter of an `.onnx` file that takes a picture (1, 3, h, w) and returns a map.

    ConfigError where it cannot be opened or takes other inputs, or onnxruntime is missing.
    """
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports] (an extra)
        from onnxruntime.capi import (  # pyright: ignore[reportMissingImports]
            onnxruntime_pybind11_state as faults,
        )
    except ImportError:
        raise ConfigError(
            "--model needs onnxruntime: pip install 'rite-diffusion[masks]', or leave --model out "
            "to use the base model's own attention."
        ) from None
    if not model.is_file():
        raise ConfigError(f"no model {model}: pass the path of an .onnx file, such as u2net.onnx")
    broken = (faults.Fail, faults.InvalidProtobuf, faults.InvalidGraph, faults.NotImplemented)
    try:
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    except broken as error:
        raise ConfigError(f"{model} is no ONNX model that runs here: {error}") from None
    [inlet, *others] = session.get_inputs()
    if others or len(inlet.shape) != 4 or inlet.shape[1] != 3 or inlet.type != "tensor(float)":
        raise ConfigError(f"{model} takes {inlet.type} {inlet.shape}, not one picture (1, 3, h, w)")
    height, width = (n if isinstance(n, int) else SIDE for n in inlet.shape[2:])

    def segment(photo: Image.Image) -> Image.Image:
        values = session.run(None, {inlet.name: _pixels(photo, width, height)})[0]
        return _mask(np.asarray(values, np.float32), photo.size)

    return segment


def _pixels(photo: Image.Image, width: int, height: int) -> np.ndarray:
    """Pixels (1, 3, height, width), normalised by ImageNet's mean and deviation."""
    small = photo.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    pixels = (np.asarray(small, np.float32) / 255 - MEAN) / DEVIATION
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def _mask(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The mask of a map (1, 1, h, w), scaled from its least to its largest value."""
    plane = values.reshape(values.shape[-2:]) if values.size else values
    low, high = plane.min(), plane.max()
    if not high - low > MIN_RANGE:
        raise NoSubject
    greys = ((plane - low) / (high - low) * 255).astype(np.uint8)
    return Image.fromarray(greys).resize(size, Image.Resampling.BILINEAR)
