"""Checks of every annotation of the package, shapes included, that cost little.

jaxtyping's own decorator binds the arguments of each call twice and checks them twice, which took half of the time of
all tests.  Those of a function without shapes need no more than beartype; those with shapes need a context for the
names of their axes, in which beartype checks them once.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

whole = jaxtyping.jaxtyped
with_types_of = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def has_shapes(function: Callable[..., Any]) -> bool:
    """Tell whether an annotation is a shape, or text that may hold one."""
    texts = (note if isinstance(note, str) else repr(note) for note in function.__annotations__.values())
    return any("jaxtyping" in text or '"' in text or "'" in text for text in texts)


def checked(function: Any, *, typechecker: Any = None) -> Any:
    """Stand for `jaxtyping.jaxtyped`, which the import hook puts before each function and class."""
    del typechecker
    if not inspect.isclass(function) and function.__code__.co_filename.endswith("uncompiled.py"):
        return function  # its wrappers have one code object, which torch.compile is told to pass over
    if not inspect.isclass(function) and not function.__annotations__:
        return function  # one that numba compiles, or triton
    if not inspect.isclass(function) and any("constexpr" in repr(note) for note in function.__annotations__.values()):
        return function  # one that triton compiles; releases of jaxtyping for Python 3.10 do not see its @no_type_check
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = checked(function.__init__)
        return function
    with_types = with_types_of(function)
    shapes = has_shapes(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if not shapes:
            return with_types(*args, **kwargs)
        with whole("context"):
            return with_types(*args, **kwargs)

    return call


def install() -> None:
    """Check whatever of the package is imported from now on."""
    jaxtyping.jaxtyped = partial_or_whole
    jaxtyping.install_import_hook("nexusquant_cache", "beartype.beartype")


def partial_or_whole(*args: Any, typechecker: Any = None) -> Any:
    """Return the decorator, or the context, as `jaxtyping.jaxtyped` does."""
    if args:
        return whole(*args, typechecker=typechecker)
    return functools.partial(checked, typechecker=typechecker)
