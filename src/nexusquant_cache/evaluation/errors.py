"""What can be missing when something is to be measured."""

from __future__ import annotations

from nexusquant_cache.errors import NexusQuantError


class EvaluationError(NexusQuantError):
    """A model, text or package that an evaluation needs is missing or unusable."""
