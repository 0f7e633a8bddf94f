"""Compiling before anything waits for it, while a model is loaded and reads."""

import contextlib
import threading
from collections.abc import Callable
from importlib import import_module

import torch

from nexusquant_cache.codec.cpu.support import why_not_on

_MODULES = ("kernels_encode", "kernels_read")


def compile_ahead() -> Callable[[], None]:
    """Begin to compile, in a thread, what is not on disk yet and a CPU will need; return what waits for the end.

    Whoever needs a part before waits for that part, by the lock of its import.  An error in the thread is theirs, too:
    they import again.
    """
    if torch.cuda.is_available() or why_not_on(torch.device("cpu")) is not None:
        return lambda: None
    thread = threading.Thread(target=_import_all, name="nexusquant_cache_compile", daemon=True)
    thread.start()
    return thread.join


def _import_all() -> None:
    with contextlib.suppress(Exception):  # who needs it, imports it again
        for module in _MODULES:
            import_module(f"{__package__}.{module}")
