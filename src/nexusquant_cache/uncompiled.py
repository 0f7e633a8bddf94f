"""Keep `torch.compile` out of the cache: its state changes at every call, and each change would compile anew."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function as it stands when the model around it is compiled.

    The compiler is not imported for that, which would take seconds: where it has not been, nothing is compiled.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    _WRAPPERS[:] = [run]
    return run


_WRAPPERS: list[Callable[..., object]] = []  # one of them


def pass_over_wrappers() -> None:
    """Let `torch.compile` not make versions of the wrappers of `uncompiled` themselves, which are one code object.

    To be called before each forward, since `torch._dynamo.reset` forgets it.  It imports no compiler.
    """
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.decorators import skip  # noqa: PLC0415 - heavy

        skip(_WRAPPERS[-1])
