"""Errors of what users say to a model."""

from nexusquant_cache.errors import NexusQuantError


class ServingError(NexusQuantError, ValueError):
    """A request that cannot be served: of a user, or of somebody's program."""


class TemplateError(ServingError):
    """Messages that the model's chat template refuses."""


class LengthError(ServingError):
    """More tokens than the model, or the server, takes."""


class BusyError(ServingError):
    """More prompts than may wait."""
