"""Settings: strict models, reading and writing TOML, presets.

A default is written once, here or in a preset. An unknown key is an error that names the nearest
known one.
"""

from rite_diffusion.config.schema import (
    AugmentSection,
    CaptionSection,
    LoraSection,
    MemorySection,
    ObjectiveSection,
    OptimSection,
    PhotoSource,
    TrainConfig,
)
from rite_diffusion.config.templates import fill, unknown_placeholder, words_of
from rite_diffusion.config.tree import (
    explain,
    flatten,
    from_toml,
    known_keys,
    load_preset,
    memory_settings,
    merge,
    nest,
    parse_assignments,
    preset_folder,
    preset_names,
    read_toml,
    resolve,
    to_toml,
    without_paths,
)

__all__ = [
    "AugmentSection",
    "CaptionSection",
    "LoraSection",
    "MemorySection",
    "ObjectiveSection",
    "OptimSection",
    "PhotoSource",
    "TrainConfig",
    "fill",
    "explain",
    "flatten",
    "from_toml",
    "known_keys",
    "load_preset",
    "memory_settings",
    "merge",
    "nest",
    "parse_assignments",
    "preset_folder",
    "preset_names",
    "read_toml",
    "resolve",
    "to_toml",
    "unknown_placeholder",
    "without_paths",
    "words_of",
]
