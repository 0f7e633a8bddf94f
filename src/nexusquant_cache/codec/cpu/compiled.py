"""How functions are compiled: once for a machine, kept on disk, with the interpreter's lock released.

numba takes what it has on disk as long as the file of the function that is called has not changed.  So a function, all
that it calls and all constants of it stand in one file.  Two things do not: what is here, and the levels of
`codec.layout`.  Those cannot change without a new version of all files, and code for others would be found out at its
first use (`codec.impl.is_right`).
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

from numba import njit, types

_LOG = logging.getLogger("nexusquant_cache")
_PATIENCE = 3.0  # seconds; what comes from the disk takes less
# What may be done to sums besides: another order, fused products.  NaN and infinity stay what they are.
_LOOSE = {"contract", "nsz", "reassoc"}

Function = Callable[..., Any]


def array(kind: Any, axes: int, *, strided: bool = False) -> Any:  # noqa: ANN401 - numba has no types for its types
    """Return the type of an array; strided ones are only read and may have any strides, others lie in C's order."""
    return types.Array(kind, axes, "A", readonly=True) if strided else types.Array(kind, axes, "C")


def entry(*arguments: Any) -> Callable[[Function], Function]:  # noqa: ANN401 - as above
    """Compile a function for arguments of these types, at once, and keep the result on disk where that is possible."""

    def compiled(function: Function) -> Function:
        signature = types.void(*arguments)
        with _announced():
            try:
                return cast("Function", njit(signature, nogil=True, cache=True, error_model="numpy")(function))
            except (OSError, RuntimeError):  # no folder that can be written to, or no room in it
                return cast("Function", njit(signature, nogil=True, error_model="numpy")(function))

    return compiled


def part(function: Function) -> Function:
    """Compile a function that others here call, with sums in any order."""
    return cast("Function", njit(nogil=True, error_model="numpy", fastmath=_LOOSE)(function))


def exact_part(function: Function) -> Function:
    """Compile a function that others here call, operation by operation as it is written."""
    return cast("Function", njit(nogil=True, error_model="numpy")(function))


def inlined(function: Function) -> Function:
    """Compile a function for one number, as `exact_part`, that becomes a piece of the loop that calls it."""
    return cast("Function", njit(nogil=True, error_model="numpy", forceinline=True)(function))


@lru_cache(maxsize=1)
def _announce() -> None:
    """Say what takes so long; for all functions of a process once."""
    _LOG.warning("compiling the codec for this machine, once; that can take minutes")


@contextmanager
def _announced() -> Iterator[None]:
    """Say that something is compiled, if that takes long."""
    told = threading.Timer(_PATIENCE, _announce)
    told.daemon = True
    told.start()
    try:
        yield
    finally:
        told.cancel()
