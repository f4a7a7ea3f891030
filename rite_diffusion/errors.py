"""What can go wrong in a way that the user can mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


class RiteError(Exception):
    """A fault that the user can mend; the message says what was found and what to do."""


class ConfigError(RiteError):
    """A setting is unknown or out of range."""


class PhotoFolderError(RiteError):
    """The photo folder cannot be trained on."""


class BackboneError(RiteError):
    """The base model cannot be found or opened."""


class AdapterError(RiteError):
    """An adapter file is damaged, foreign, or made for another base model."""


class FusionError(RiteError):
    """Adapters cannot be fused with each other or in the wanted way."""


class EvaluationError(RiteError):
    """Pictures cannot be measured as they are."""


class OptimizerError(RiteError, ValueError):
    """An optimizer's setting is out of range, or parameters or gradients do not suit it."""


class RunError(RiteError):
    """The run folder cannot be used."""


class StudioError(RiteError):
    """The studio was asked for something that it refuses."""


class PathError(RiteError):
    """What stands for a path can be none, or cannot be read."""


class OutputError(RiteError):
    """A file cannot be written where it was asked for, or another would be lost."""
