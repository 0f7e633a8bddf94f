"""How the releases of transformers that are supported differ in what they call things.

From 5.24 on the models of transformers and `generate` take their cache as ``cache``, and their outputs hold it under
that name; up to 5.23 all of these said ``past_key_values``.  Later releases still take the old name, with a warning.
"""

import dataclasses
import inspect
import sys
from collections.abc import Mapping

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

_NEW, _OLD = "cache", "past_key_values"
_IS_NEW = _NEW in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}

CACHE_NAMES = (_NEW, _OLD) if _IS_NEW else (_OLD,)
"""What the cache may be called in this release, the right name first."""

CACHE = CACHE_NAMES[0]
"""The name of the cache: as an argument of models and of `generate`, and in their outputs."""


def cache_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names under which the forward of a module takes a cache, the best first; none if it names none."""
    parameters = inspect.signature(module.forward).parameters
    named = next((place for place, name in enumerate(CACHE_NAMES) if name in parameters), len(CACHE_NAMES))
    return CACHE_NAMES[named:]


def is_continuous_batching(arguments: Mapping[str, object]) -> bool:
    """Tell whether a forward is part of continuous batching.

    Its cache is no `Cache`, and was called ``cache`` already when others were not.
    """
    return type(arguments.get(_NEW)).__name__ == "PagedAttentionCache"


@deprecate_kwarg("old", new_name="new", version="9.0.0")  # type: ignore[untyped-decorator]
def _wrapped() -> None:
    """Share its code with every function that is wrapped so."""


def compile_inside_wrappers() -> None:
    """Let `torch.compile` pass over the wrappers that rename arguments, and compile what they wrap.

    From 5.24 on such a wrapper is around the forward of every model, layer and attention, and all wrappers are one code
    object, of which torch makes 8 versions and then none of anything called from it.  A cache that is not compiled has
    the wrappers compiled one by one, which needs more.  A model that is compiled as a whole is compiled as before.

    To be called before each forward, since `torch._dynamo.reset` forgets it.  It imports no compiler.
    """
    if "torch._dynamo" in sys.modules:
        from torch._dynamo.decorators import skip  # noqa: PLC0415 - heavy

        skip(_wrapped)
