"""Models that go on without their cache."""

from types import FrameType
from typing import Any

_CUTS = "original_max_position_embeddings"
_PREPARES = "prepare_inputs_for_generation"
_DEEPEST = 12  # wrappers between a model and its cache


def left_by(frame: FrameType | None, seen: int) -> Any:  # noqa: ANN401 - a model of transformers
    """Return the model that asks for the length of its cache, and will drop it for its length; None if it keeps it.

    Phi-3 and its relatives have other frequencies for a text beyond ``original_max_position_embeddings``, so they read
    all of it again, into a new cache, when it grows beyond.  Nothing of that reaches the cache but the question for its
    length, from a `prepare_inputs_for_generation` that looks at that field of the config.

    Args:
        frame: Who asks.
        seen: Tokens that the cache has seen.
    """
    for _ in range(_DEEPEST):
        if frame is None:
            return None
        code = frame.f_code
        if code.co_name == _PREPARES and (_CUTS in code.co_names or _CUTS in code.co_consts):
            return _leaves(frame.f_locals, seen)
        frame = frame.f_back
    return None


def _leaves(local: dict[str, Any], seen: int) -> Any:  # noqa: ANN401
    model, ids = local.get("self"), local.get("input_ids")
    limit = getattr(getattr(model, "config", None), _CUTS, None)
    if limit is None or ids is None or not seen <= limit < ids.shape[1] or _is_served(model):
        return None
    return model


def _is_served(model: Any) -> bool:  # noqa: ANN401
    """Tell whether a hook gives the model another cache of ours."""
    return any(getattr(hook, "serves_caches", False) for hook in model._forward_pre_hooks.values())  # noqa: SLF001
