"""Errors that the user can fix."""


class RiteError(Exception):
    """An error that the user can fix; the message says what was found and what to do."""


class ConfigError(RiteError):
    """A setting is unknown or out of range."""


class PhotoFolderError(RiteError):
    """A photo folder cannot be trained on."""


class BackboneError(RiteError):
    """A base model cannot be found or opened."""


class AdapterError(RiteError):
    """An adapter file is damaged, of an unknown format, or made for another base model."""


class FusionError(RiteError):
    """Adapters cannot be fused, or not with the given method and settings."""


class EvaluationError(RiteError):
    """Pictures cannot be measured as they are."""


class OptimizerError(RiteError, ValueError):
    """An optimizer's setting is out of range, or it does not support the parameters."""


class RunError(RiteError):
    """A run folder cannot be used, or a run cannot go on."""


class StudioError(RiteError):
    """The studio refuses a request."""


class PathError(RiteError):
    """A path is not valid or cannot be read."""


class OutputError(RiteError):
    """A file cannot be written, or would replace another."""
