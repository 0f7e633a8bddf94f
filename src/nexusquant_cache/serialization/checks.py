"""What the values in a file must satisfy besides having the right hash: anyone can compute a hash."""

from collections.abc import Mapping
from math import isfinite

import torch
from torch import Tensor

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.errors import FormatError, NexusQuantError
from nexusquant_cache.presets import CacheConfig
from nexusquant_cache.serialization.registry import make_codec
from nexusquant_cache.serialization.schema import BodyMeta, CacheMeta, LayerMeta, TransformMeta

_MOST_NUMBER = 1 << 48
_WHENS = ("post_prefill", "during_prefill")


def settings_of(meta: CacheMeta) -> CacheConfig:
    """Return the settings that a file names.

    Raises:
        FormatError: If there are no such.
    """
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in meta.settings.items()}
    if any(isinstance(x, int) and x > _MOST_NUMBER for x in given.values()):
        _wrong("settings", "has a number beyond all reason")
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
    """Check the values of all tensors of ours.

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
        if isinstance(layer, LayerMeta):
            _check_layer(layer, f"layers.{index}", codecs, tensors)


def _check_padding(meta: CacheMeta, tensors: Mapping[str, Tensor]) -> None:
    for name in ("padding.stated", "padding.pads", "padding.run"):
        if name in tensors:
            _in_range(name, tensors[name], 0, _MOST_NUMBER)
    rows = {x.shape.batch for x in meta.layers if isinstance(x, LayerMeta) and x.shape is not None}
    for count in (meta.padding.pads, None if meta.padding.beginning is None else meta.padding.beginning.rows):
        if count is not None and rows - {count}:
            _wrong("padding", "is that of another batch")
    for name in ("padding.first", "padding.after"):
        if name in tensors:
            _finite(name, tensors)


def _check_layer(layer: LayerMeta, name: str, codecs: list[VectorCodec], tensors: Mapping[str, Tensor]) -> None:
    exact = [f"{name}.{side}.{what}" for side in ("keys", "values") for what in ("sinks", "tail")]
    for what in (*exact, f"{name}.queries", f"{name}.queries_before", f"{name}.reconstruction"):
        if what in tensors:
            _finite(what, tensors)
    if f"{name}.sink_place" in tensors:
        _in_range(f"{name}.sink_place", tensors[f"{name}.sink_place"], 0, layer.seen)
        assert layer.body is not None, "streams_of allows it nowhere else"
        last = int(tensors[f"{name}.sink_place"][:, 1].max())
        if last > layer.body.kept + layer.body.dense:
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
    if not body.bitmap:
        return
    shifts = torch.arange(8, dtype=torch.uint8)
    bits = (tensors[f"{name}.kept"][..., None] >> shifts & 1).flatten(-2)
    if bool(bits[..., body.covered :].any()) or bool((bits.sum(-1, dtype=torch.int64) != body.kept).any()):
        _wrong(f"{name}.kept", f"does not keep {body.kept} tokens in every head")


def _check_transform(name: str, meta: TransformMeta, codec: VectorCodec, tensors: Mapping[str, Tensor]) -> None:
    _positive(f"{name}.reference", tensors)
    if meta.mean is not None:
        _finite(f"{name}.mean", tensors)
    if meta.rotation == "principal":
        _positive(f"{name}.step", tensors)
    layouts = getattr(codec, "layouts", None)  # what plans are to a codec of the user's, it alone knows
    if meta.plans and layouts is not None and int(tensors[f"{name}.plans"].max()) >= len(layouts):
        _wrong(f"{name}.plans", "names a plan of bits that the codec does not have")


def _finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    if not bool(torch.isfinite(tensors[name]).all()):
        _wrong(name, "holds NaN or infinity")


def _positive(name: str, tensors: Mapping[str, Tensor]) -> None:
    _finite(name, tensors)
    if not bool((tensors[name] > 0).all()):
        _wrong(name, "holds a scale that is not positive")


def _in_range(name: str, tensor: Tensor, least: int, most: int) -> None:
    if tensor.numel() and not least <= int(tensor.min()) <= int(tensor.max()) <= most:
        _wrong(name, f"must hold numbers from {least} to {most}")


def _wrong(name: str, what: str) -> None:
    msg = f"{name} {what}"
    raise FormatError(msg)
