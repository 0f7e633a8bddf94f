"""The one place that knows the implementations of the codec, and chooses between them.

An implementation is a folder beside this file and its name in `Impl`.  The folder has

- ``support.py``: ``is_wanted(device)``, ``why_not(layouts, transform)`` and ``specialisation(layouts, transform)``;
- ``encode.py``, ``decode.py`` and ``attend.py``, each with the function of that name and the signature of the one in
  `codec.torch`; the last with ``specialisation(queries, held)`` too.  ``attend`` may return None for a mask that it
  does not know, and raise `UnsupportedError` where the device cannot do the work after all.

`codec.cpu` and `codec.triton` are the examples.  Besides the codec, Triton has a kernel for `greatest_attention`.
Nothing of a folder is imported before it is chosen, or asked why not.
"""

import logging
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.torch import attend as plain_attend
from nexusquant_cache.codec.torch import decode as plain_decode
from nexusquant_cache.codec.torch import encode as plain_encode
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import UnsupportedError

Impl = Literal["auto", "torch", "cpu", "triton"]
"""``"torch"``, or the name of another folder, insists on that implementation.  ``"auto"`` goes through those after
``"torch"`` and takes the first that is wanted on the device and can do the work; plain torch if there is none."""

_LOG = logging.getLogger("nexusquant_cache")
_OTHERS: tuple[str, ...] = get_args(Impl)[2:]
# The largest errors that rounding explains, relative to plain torch.
_MOST_ERROR = 2e-3
_MOST_ATTENTION_ERROR = 0.03  # products may have float16 operands, and outputs be bfloat16
_MOST_TIES = 0.05  # vectors of which rounding may have decided
_COMPARED = 256  # tokens of each head that are encoded or decoded in plain torch too


@lru_cache(maxsize=32)
def _module(name: str, what: str) -> Any:  # noqa: ANN401 - see the top of this file
    return import_module(f"{__package__}.{name}.{what}")


def choose(codec: VectorCodec, transform: VectorTransform) -> str:
    """Return the name of the implementation that computes with this codec and this transform.

    Raises:
        UnsupportedError: If the codec insists on one that cannot.
    """
    if not codec.layouts:
        return "torch"
    for name in _OTHERS:
        if codec.impl != name and not (codec.impl == "auto" and _module(name, "support").is_wanted(_device(transform))):
            continue
        reason = _module(name, "support").why_not(codec.layouts, transform)
        if reason is None:
            return name
        refuse(codec.impl, reason)
    return "torch"


def _device(transform: VectorTransform) -> torch.device:
    return transform.reference.device


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Let kernels be launched on this device, which need not be the current one where a model spans several."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def encode(
    codec: VectorCodec,
    vectors: Float[Tensor, "b h n d"],
    transform: VectorTransform,
    candidates: tuple[float, ...],
) -> PackedVectors:
    """Return finite vectors, encoded; see `codec.torch.encode.encode`."""
    name, layouts = choose(codec, transform), codec.layouts
    if name != "torch":
        with _on(vectors.device):
            packed: PackedVectors = _module(name, "encode").encode(vectors, transform, layouts, candidates)

        def error() -> float:
            some = vectors[:, :, :_COMPARED]
            plain = plain_encode.encode(some, transform, layouts, candidates)
            return _code_error(some, packed.map(_compared), plain, transform, layouts)

        key = (name, "encode", vectors.device, vectors.dtype, _specialisation(name, layouts, transform))
        if not vectors.numel() or is_right(codec.impl, key, error, _MOST_ERROR):
            return packed
    return plain_encode.encode(vectors, transform, layouts, candidates)


def _compared(x: Shaped[Tensor, "b h n *rest"]) -> Shaped[Tensor, "b h some *rest"]:
    return x[:, :, :_COMPARED]


def decode(codec: VectorCodec, packed: PackedVectors, transform: VectorTransform) -> Float[Tensor, "b h n d"]:
    """Return the vectors as a new float32 tensor."""
    name, layouts = choose(codec, transform), codec.layouts
    if name != "torch":
        with _on(_device(transform)):
            vectors: Tensor = _module(name, "decode").decode(packed, transform, layouts)

        def error() -> float:
            return distance(_compared(vectors), plain_decode.decode(packed.map(_compared), transform, layouts))

        key = (name, "decode", vectors.device, vectors.dtype, _specialisation(name, layouts, transform))
        if not vectors.numel() or is_right(codec.impl, key, error, _MOST_ERROR):
            return vectors
    return plain_decode.decode(packed, transform, layouts)


def attend(
    queries: Float[Tensor, "b q m d"],
    held: HeldTokens,
    mask: Bool[Tensor, "#b #q #m seen"] | Float[Tensor, "#b #q #m seen"] | None,
    softmax: Softmax,
    *,
    weights: bool = False,
) -> tuple[Float[Tensor, "b q m dv"], Float[Tensor, "b heads group m n"] | None]:
    """Return the attention output and perhaps its weights, in any floating dtype.

    Args:
        queries: Queries of the newest tokens.
        held: What they attend to; some of it is packed.
        mask: True for what may be seen, or numbers to add to the logits, of all tokens seen; None if all may be seen.
        softmax: What varies between models.
        weights: Whether the weights are needed, which only plain torch has.

    Raises:
        UnsupportedError: If a codec insists on an implementation that cannot run here.
    """
    name = _choose_for_attention(held)
    if name != "torch":
        if weights:
            _say_once("attention weights are asked for")
        else:
            found = _attend_by(name, queries, held, mask, softmax)
            if found is not None:
                return found, None
    return plain_attend.attend(queries, held, mask, softmax)


Greatest = Callable[[Tensor, Tensor, range, int], Tensor]
"""A function of queries, keys, the places of the queries, and the least distance that counts; see
`layer.observations.greatest_attention`."""


def greatest_attention(  # noqa: PLR0913, PLR0917 - those of the function, and who may compute it
    asked: Impl,
    queries: Float[Tensor, "b q m d"],
    keys: Float[Tensor, "b h n d"],
    places: range,
    least_distance: int,
    plain: Greatest,
) -> Float[Tensor, "b h n"]:
    """Return the greatest attention weight of each token, by a Triton kernel where there is one for it.

    Args:
        asked: Which implementation may compute; ``"cpu"`` has none, and plain torch does it.
        queries: See `layer.observations.greatest_attention`, like all that follow.
        keys: Likewise.
        places: Where the queries are.
        least_distance: Likewise.
        plain: The same in plain torch.

    Raises:
        UnsupportedError: If the kernel was insisted on and cannot run.
    """
    is_wanted = asked == "triton" or (asked == "auto" and keys.device.type != "cpu")
    if not is_wanted or not len(places):
        return plain(queries, keys, places, least_distance)
    support = _module("triton", "support")
    reason = support.why_not_on(keys.device)
    if keys.shape[-1] > support.MOST_CHANNELS:
        reason = f"Triton kernels cover head dimensions up to {support.MOST_CHANNELS}, not {keys.shape[-1]}"
    if reason is not None:
        refuse(asked, reason)
        return plain(queries, keys, places, least_distance)
    kernel: Greatest = _module("triton", "kernels_greatest").greatest_attention

    def error() -> float:
        # At any distance: of a short text nothing is far.
        some, at = queries[:, :, -_COMPARED:], places[-_COMPARED:]
        return distance(kernel(some, keys, at, 0), plain(some.float(), keys.float(), at, 0))

    group = queries.shape[1] // keys.shape[1]
    key = ("triton", "greatest_attention", keys.device, keys.dtype, keys.shape[-1], group, places.step)
    with _on(keys.device):
        try:
            found = kernel(queries, keys, places, least_distance)
        except UnsupportedError as why:  # the card is too small
            refuse(asked, str(why))
            return plain(queries, keys, places, least_distance)
        if is_right(asked, key, error, _MOST_ATTENTION_ERROR):
            return found
    return plain(queries, keys, places, least_distance)


def _choose_for_attention(held: HeldTokens) -> str:
    """Return the one implementation that computes for both codecs, plain torch if they differ."""
    assert held.keys is not None
    assert held.values is not None
    names = {
        choose(side.codec, side.transform) if side.codec.has_channels else "torch" for side in (held.keys, held.values)
    }
    return names.pop() if len(names) == 1 else "torch"


def _attend_by(name: str, queries: Tensor, held: HeldTokens, mask: Tensor | None, softmax: Softmax) -> Tensor | None:
    """Return the output of another implementation; None if plain torch has to compute it."""
    assert held.keys is not None
    asked, module = held.keys.codec.impl, _module(name, "attend")
    try:
        with _on(queries.device):
            found: tuple[Tensor, Tensor | None] | None = module.attend(queries, held, mask, softmax)
    except UnsupportedError as reason:
        refuse(asked, str(reason))
        return None
    if found is None:
        _say_once("a mask adds to logits, or hides packed tokens from some queries or heads only")
        return None
    out = found[0]

    def error() -> float:
        # With a phase of its own, so that the cache does not keep the tables of plain torch.
        apart = replace(held, phase=None if held.phase is None else replace(held.phase))
        return distance(out, plain_attend.attend(queries, apart, mask, softmax)[0])

    key = (name, "attend", out.device, out.dtype, module.specialisation(queries, held))
    return out if is_right(asked, key, error, _MOST_ATTENTION_ERROR) else None


def refuse(asked: str, reason: str) -> None:
    """Say, once for each reason, why plain torch computes in place of another implementation; results are the same.

    Args:
        asked: The codec's choice, see `Impl`.
        reason: Why the other implementation cannot be used.

    Raises:
        UnsupportedError: If it was insisted on.
    """
    if asked != "auto":
        msg = f"impl={asked!r} was asked for, but {reason}. impl='auto' computes the same in plain torch."
        raise UnsupportedError(msg)
    _say_once(reason)


@lru_cache(maxsize=64)
def _say_once(reason: str) -> None:
    _LOG.warning("compressed caches are computed in plain torch, which is slower: %s", reason)


def is_right(asked: str, key: Hashable, error: Callable[[], float], most: float) -> bool:
    """Tell whether an implementation computes what plain torch computes; they are compared at the first use of a key.

    On a card, or with a compiler, on which it is wrong, plain torch goes on: that costs time, and no answer is wrong.

    Args:
        asked: The codec's choice, see `Impl`.
        key: What the implementation is compiled for, and the device.
        error: Compares the two.
        most: The largest error that rounding explains.

    Raises:
        UnsupportedError: If the implementation is wrong and was insisted on.
    """
    if key not in _ERRORS:
        _ERRORS[key] = error()
    if _ERRORS[key] <= most:  # not so for NaN
        return True
    what = f"a kernel differs from plain torch on this device, by {_ERRORS[key]:.2g} for {key}; please report it"
    refuse(asked, what)
    return False


_ERRORS: dict[Hashable, float] = {}


def _specialisation(name: str, layouts: tuple[CodeLayout, ...], transform: VectorTransform) -> Hashable:
    found: Hashable = _module(name, "support").specialisation(layouts, transform)
    return found


def _code_error(
    vectors: Tensor,
    found: PackedVectors,
    plain: PackedVectors,
    transform: VectorTransform,
    layouts: tuple[CodeLayout, ...],
) -> float:
    """Return by how much encoded vectors are worse than those of plain torch, or differ from them beyond ties."""
    errors = [distance(plain_decode.decode(packed, transform, layouts), vectors.float()) for packed in (found, plain)]
    # Where two codes are equally near, rounding decides: a few vectors may differ, and then as a whole.
    differ = (found.words != plain.words).any(-1).float().mean()
    return max(errors[0] - errors[1], float(differ) - _MOST_TIES)


def distance(found: Float[Tensor, "*shape"], expected: Float[Tensor, "*shape"]) -> float:
    """Return the distance between two results, relative to the length of the second."""
    length = expected.double().norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((found.double() - expected.double()).norm() / length)
