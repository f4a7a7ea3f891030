"""Facts about this machine: packages, devices, memory, disk."""

import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from rite_diffusion.backbones.families import POCKET
from rite_diffusion.backbones.source import default_device

NEEDED = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "gradio")
OPTIONAL = {
    "xformers": "xformers",
    "torchao": "memory",
    "bitsandbytes": "nf4",
    "onnxruntime": "masks",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "trackio": "tracking",
}


@dataclass(frozen=True)
class Finding:
    """A fact about the machine; `remedy` says what to do where it is not `good`."""

    name: str
    text: str
    good: bool = True
    remedy: str = ""


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    findings = []
    for package in NEEDED:
        found = _installed(package)
        remedy = "" if found else f"pip install {package}"
        findings.append(Finding(package, found or "missing", bool(found), remedy))
    for package, extra in OPTIONAL.items():
        found = _installed(package)
        remedy = "" if found else f"optional: pip install 'rite-diffusion[{extra}]'"
        findings.append(Finding(package, found or "not installed", bool(found), remedy))
    return findings


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"


def _devices() -> list[Finding]:
    device = default_device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        what = f"cuda: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        bf16 = torch.cuda.is_bf16_supported()
    else:
        what, bf16 = f"{device.type} (no CUDA device)", False
    dtypes = "fp32" + (", fp16" if device.type != "cpu" else "") + (", bf16" if bf16 else "")
    xformers = device.type == "cuda" and _installed("xformers")
    return [
        Finding("device", what),
        Finding("precisions", dtypes + (" (bf16 works on CPUs, more slowly)" if not bf16 else "")),
        Finding("attention", "xformers" if xformers else "torch scaled_dot_product_attention"),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"),
    ]


def examine() -> list[Finding]:
    """All facts about the machine that matter for a training, in the order to show them."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    pocket = (POCKET / "model_index.json").is_file()
    return [
        Finding("rite_diffusion", _installed("rite-diffusion") or "not installed as a package"),
        Finding(
            "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
        ),
        *_packages(),
        *_devices(),
        Finding("memory", _memory()),
        Finding(
            "disk", f"{free:.0f} GiB free here", free > 2, "" if free > 2 else "free some space"
        ),
        Finding(
            "pocket base",
            "present" if pocket else "missing",
            pocket,
            "" if pocket else "reinstall rite-diffusion, or run python train/base.py",
        ),
    ]
