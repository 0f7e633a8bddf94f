"""Errors of nexusquant_cache: a small tree under `NexusQuantError`.

Every message says what was given, what is allowed and what to do.  Where a caller would expect a
builtin error (``ValueError`` for a bad option, ``TypeError`` for a wrong dtype), ours is one too.
"""

import difflib
from collections.abc import Iterable


class NexusQuantError(Exception):
    """Base of every error that this package raises on purpose."""


class OptionError(NexusQuantError, ValueError):
    """An unknown preset or option, or a value outside its range."""


class ShapeError(NexusQuantError, ValueError):
    """A tensor whose shape does not fit the layout, the layer or the earlier updates."""


class DtypeError(NexusQuantError, TypeError):
    """A tensor whose dtype the cache cannot hold, or one that changed between updates."""


class NonFiniteError(NexusQuantError, ValueError):
    """NaN or infinity in keys, values or scores."""


class UnsupportedError(NexusQuantError, NotImplementedError):
    """A valid request that this version cannot serve."""


class CacheStateError(NexusQuantError, RuntimeError):
    """An operation that the present content of the cache does not allow."""


class FormatError(NexusQuantError, ValueError):
    """A file that is no saved cache, is damaged, has been made to mislead, or belongs to another model."""


def no_gradients(what: str) -> UnsupportedError:
    """Return the error for gradients that would be lost; ``what`` says where the tokens stand."""
    return UnsupportedError(
        f"a compressed cache carries no gradients, and {what}. For inference, run the model under torch.no_grad(); for "
        "training, use no cache or transformers' DynamicCache."
    )


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return the tail of a message: the nearest allowed name, if any, and all allowed names."""
    names = sorted(allowed)
    return f"{nearest(given, names)}Allowed: {', '.join(names)}."


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return a question for the nearest allowed name, with a space after it; nothing if no name is near."""
    near = difflib.get_close_matches(given, sorted(allowed), n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}? " if near else ""
