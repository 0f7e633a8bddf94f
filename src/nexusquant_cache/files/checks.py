"""What the values in a file must satisfy besides having the right hash: anyone can compute a hash."""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.registry import MOST_CANDIDATES, make_codec
from nexusquant_cache.errors import FormatError, NexusQuantError
from nexusquant_cache.files.fingerprint import check_fingerprint
from nexusquant_cache.files.schema import BodyMeta, CacheMeta, LayerMeta, TransformMeta
from nexusquant_cache.presets import REMOVED, CacheConfig

_MOST_NUMBER = 1 << 48
_WHENS = ("post_prefill", "during_prefill")
# Of means, and of what scales are relative to: decoded, the largest code of the largest scale is still finite.
_MOST_MAGNITUDE = 2.0**96
_PART = 1 << 20  # bytes of a bitmap counted at once


def settings_of(meta: CacheMeta) -> CacheConfig:
    """Return the settings that a file names.

    Raises:
        FormatError: If there are no such.
    """
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in meta.settings.items()}
    if any(isinstance(x, int) and x > _MOST_NUMBER for x in given.values()):
        _wrong("settings", "has a number beyond all reason")
    if any(isinstance(x, tuple) and len(x) > MOST_CANDIDATES for x in given.values()):
        _wrong("settings", f"has more than {MOST_CANDIDATES} scale candidates")
    if "impl" in given:
        _wrong("settings", "says which implementation computes, which is the reader's choice")
    # What was removed is still named by files of earlier releases, which may say what every cache now does.
    given = {name: x for name, x in given.items() if name not in REMOVED or not REMOVED[name].is_what_remains(x)}
    try:
        return CacheConfig().override(given)
    except (NexusQuantError, ValueError, TypeError) as error:
        msg = f"the file's settings are none of this version: {error}"
        raise FormatError(msg) from error


def check_numbers(meta: CacheMeta) -> None:
    """Check what can be told before any tensor is read.

    Raises:
        FormatError: If a number is out of its range.
    """
    settings_of(meta)
    check_fingerprint(meta.model)
    if meta.when not in _WHENS:
        msg = f"when must be one of {', '.join(_WHENS)}, the file says {meta.when[:40]!r}"
        raise FormatError(msg)
    for index, layer in enumerate(meta.layers):
        error = layer.code_error if isinstance(layer, LayerMeta) else None
        if isinstance(error, str) and error != "inf":
            _wrong(f"layers.{index}.code_error", "is no number")
        if isinstance(error, float) and not (error >= 0 and isfinite(error)):
            _wrong(f"layers.{index}.code_error", "is negative")


def check_tensors(meta: CacheMeta, tensors: Mapping[str, Tensor]) -> None:
    """Check the values of all tensors.

    Raises:
        FormatError: If one cannot have come from a cache.
    """
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            _wrong(name, "holds a truth value that is neither")
    _check_padding(meta, tensors)
    for index in range(len(meta.phases)):
        _finite(f"phases.{index}", tensors)
    codecs = [make_codec(codec) for codec in meta.codecs]
    for index, layer in enumerate(meta.layers):
        name = f"layers.{index}"
        if isinstance(layer, LayerMeta):
            _check_layer(layer, name, codecs, tensors)
        else:
            for known in layer.tensors:
                _finite(f"{name}.{known.name}", tensors)


def _check_padding(meta: CacheMeta, tensors: Mapping[str, Tensor]) -> None:
    # Before the first tokens are packed, a mask may state more pads than have been seen.
    is_packed = any(isinstance(layer, LayerMeta) and layer.body is not None for layer in meta.layers)
    limits = {"stated": _MOST_NUMBER, "pads": meta.tokens_seen if is_packed else _MOST_NUMBER, "run": meta.tokens_seen}
    for name, most in limits.items():
        if f"padding.{name}" in tensors:
            _in_range(f"padding.{name}", tensors[f"padding.{name}"], 0, most)
    for name in ("padding.first", "padding.after"):
        if name in tensors:
            _finite(name, tensors)


def _check_layer(layer: LayerMeta, name: str, codecs: list[VectorCodec], tensors: Mapping[str, Tensor]) -> None:
    exact = [f"{name}.{side}.{what}" for side in ("keys", "values") for what in ("sinks", "tail")]
    for what in (*exact, f"{name}.queries", f"{name}.queries_before", f"{name}.reconstruction"):
        if what in tensors:
            _finite(what, tensors)
    if f"{name}.sink_place" in tensors:
        place, body = tensors[f"{name}.sink_place"], layer.body
        _in_range(f"{name}.sink_place", place, 0, layer.seen)
        assert body is not None, "streams_of allows it nowhere else"
        assert layer.sinks is not None
        last, before = place.amax(0).tolist()
        if last + layer.sinks > body.start + body.covered + body.dense or before > body.kept + body.dense:
            _wrong(f"{name}.sink_place", "lies behind the packed tokens")
    if layer.body is not None and layer.used is not None:
        _check_bitmap(layer.body, name, tensors)
        for side, meta, index in zip(("keys", "values"), (layer.body.keys, layer.body.values), layer.used, strict=True):
            _check_transform(f"{name}.{side}", meta, codecs[index], tensors)
    if layer.given is not None:
        for side, meta, index in zip(
            ("keys", "values"), (layer.given.keys, layer.given.values), layer.given.codecs, strict=True
        ):
            _check_transform(f"{name}.given.{side}", meta, codecs[index], tensors)


def _check_bitmap(body: BodyMeta, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that every head keeps as many tokens as the metadata says, all of them covered."""
    if not body.bitmap or not body.covered:
        return
    bitmap = tensors[f"{name}.kept"].flatten(0, 1)
    used = (body.covered - 1) % 8 + 1  # bits of the last byte
    is_right = not bool((bitmap[:, -1].int() >> used).any())
    # In parts: a bitmap that says little is small in a file, and what is made of it here must not be large.
    for heads in bitmap.split(max(_PART // bitmap.shape[1], 1)):
        counts = torch.stack([_count_bits(part).sum(1, dtype=torch.int64) for part in heads.split(_PART, 1)])
        is_right = is_right and not bool((counts.sum(0) != body.kept).any())
    if not is_right:
        _wrong(f"{name}.kept", f"does not keep {body.kept} tokens in every head")


def _count_bits(x: Tensor) -> Tensor:
    """Return the number of ones in each byte: of pairs of bits, then of four, then of all."""
    x = x - (x >> 1 & 0x55)
    x = (x & 0x33) + (x >> 2 & 0x33)
    return x + (x >> 4) & 0x0F


def _check_transform(name: str, meta: TransformMeta, codec: VectorCodec, tensors: Mapping[str, Tensor]) -> None:
    largest = _positive(f"{name}.reference", tensors)
    if meta.rotation == "principal":
        largest *= _positive(f"{name}.step", tensors)
    if meta.mean is not None:
        largest = max(largest, *map(abs, _finite(f"{name}.mean", tensors)))
    if largest > _MOST_MAGNITUDE:
        _wrong(name, "is of vectors too large to be decoded")
    layouts = getattr(codec, "layouts", None)  # what plans are to a codec of the user's, it alone knows
    if meta.plans and layouts is not None and int(tensors[f"{name}.plans"].max()) >= len(layouts):
        _wrong(f"{name}.plans", "names a plan of bits that the codec does not have")


def _finite(name: str, tensors: Mapping[str, Tensor]) -> tuple[float, float]:
    """Return the least and the largest number of a tensor, which NaN would both be."""
    if not tensors[name].numel():
        return 0.0, 0.0
    least, most = (float(x) for x in tensors[name].aminmax())
    if not isfinite(least) or not isfinite(most):
        _wrong(name, "holds NaN or infinity")
    return least, most


def _positive(name: str, tensors: Mapping[str, Tensor]) -> float:
    """Return the largest number of a tensor."""
    least, most = _finite(name, tensors)
    if least <= 0:
        _wrong(name, "holds a scale that is not positive")
    return most


def _in_range(name: str, tensor: Tensor, least: int, most: int) -> None:
    if tensor.numel() and not least <= int(tensor.min()) <= int(tensor.max()) <= most:
        _wrong(name, f"must hold numbers from {least} to {most}")


def _wrong(name: str, what: str) -> None:
    msg = f"{name} {what}"
    raise FormatError(msg)
