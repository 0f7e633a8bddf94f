"""What the values in a file must satisfy besides having the right hash: anyone can compute a hash."""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import NoReturn

import torch
from torch import Tensor

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.registry import MOST_CANDIDATES, make_codec
from nexusquant_cache.errors import FormatError, NexusQuantError
from nexusquant_cache.files.contents import HIDDEN, given_facts, layer_facts
from nexusquant_cache.files.fingerprint import check_fingerprint
from nexusquant_cache.files.schema import BodyMeta, CacheMeta, LayerMeta, TransformMeta
from nexusquant_cache.files.version_1 import sink_positions
from nexusquant_cache.layer.state import (
    SIDES,
    Declared,
    Facts,
    Kind,
    are_places,
    expected,
    finite,
    kept_of,
    transform_tensors,
)
from nexusquant_cache.presets import REMOVED, CacheConfig

_MOST_NUMBER = 1 << 48
_PART = 1 << 20  # bytes of a bitmap that are looked at at once
_WHENS = ("post_prefill", "during_prefill")
# Of means, and of what scales are relative to: decoded, the largest vector of the largest scale is still finite.
_MOST_MAGNITUDE = 2.0**96


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
    if meta.padding is not None:
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


def check_positions(meta: CacheMeta, tensors: Mapping[str, Tensor]) -> None:
    """Check the values of the tensors that tell which tokens are kept; no others are needed.

    Raises:
        FormatError: If one cannot have come from a cache.
    """
    codecs = [make_codec(codec) for codec in meta.codecs]
    for index, layer in enumerate(meta.layers):
        if isinstance(layer, LayerMeta) and layer.shape is not None:
            facts = layer_facts(layer, codecs)
            _check_places(layer, f"layers.{index}", facts, tensors, "positions")


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
    if layer.shape is None:
        return
    facts = layer_facts(layer, codecs)
    _check_places(layer, name, facts, tensors)
    if layer.body is not None:
        for side, meta in zip(SIDES, (layer.body.keys, layer.body.values), strict=True):
            _check_magnitude(f"{name}.{side}", meta, tensors)
    if layer.given is not None:
        given = given_facts(layer.given, layer.shape, codecs)
        for side, meta in zip(SIDES, (layer.given.keys, layer.given.values), strict=True):
            declared = (each for each in transform_tensors(side, "", "given.") if each.shape(given) is not None)
            _check_declared(name, declared, given, tensors)
            _check_magnitude(f"{name}.given.{side}", meta, tensors)


def _check_places(
    layer: LayerMeta, name: str, facts: Facts, tensors: Mapping[str, Tensor], only: Kind | None = None
) -> None:
    """Check the tensors of a layer, or those of one kind, and that they agree on where tokens are."""
    declared = (each for each, _ in expected(facts) if only in {None, each.kind})
    _check_declared(name, declared, facts, tensors)
    if layer.sink_place:
        _in_range(f"{name}.sink_place", tensors[f"{name}.sink_place"], 0, layer.seen)
        wrong = are_places(sink_positions(tensors[f"{name}.sink_place"], layer.sinks or 0), facts)
        if wrong is not None:
            _wrong(f"{name}.sink_place", wrong)
    if layer.body is not None:
        _check_sinks(layer, layer.body, name, tensors)
        _check_kept(name, tensors)


def _check_sinks(layer: LayerMeta, body: BodyMeta, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that no sink is packed too."""
    sinks, kept = layer.sinks or 0, tensors.get(f"{name}.kept")
    if f"{name}.sink_positions" in tensors:
        places = tensors[f"{name}.sink_positions"]
    elif layer.sink_place:
        places = sink_positions(tensors[f"{name}.sink_place"], sinks)
    else:
        places = torch.arange(0 if body.start else sinks, device="cpu" if kept is None else kept.device)[None]
    if not places.numel():
        return
    if kept is None or int(places.max()) >= body.covered:
        _wrong(name, "has sinks among its packed tokens")
    byte, shift = (places[:, None] >> 3).expand(*kept.shape[:2], -1), places[:, None] & 7
    if bool((kept.gather(2, byte) >> shift & 1).any()):
        _wrong(name, "has sinks among its packed tokens")


def _check_kept(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that heads keep as many tokens as is said, and that only what is kept is hidden."""
    counts, kept = tensors.get(f"{name}.counts"), tensors.get(f"{name}.kept")
    if counts is not None and (kept is None or not torch.equal(kept_of(kept), counts)):
        _wrong(f"{name}.counts", "are not the numbers of tokens that are kept")
    hidden = tensors.get(f"{name}.{HIDDEN}")
    if hidden is None or kept is None:
        return
    parts = zip(*(x.flatten().split(_PART) for x in (hidden, kept)), strict=True)
    if any(bool((some & ~others).any()) for some, others in parts):
        _wrong(f"{name}.{HIDDEN}", "hides tokens that are not kept")


def _check_declared(layer: str, declared: Iterable[Declared], facts: Facts, tensors: Mapping[str, Tensor]) -> None:
    for each in declared:
        name = f"{layer}.{each.name}"
        wrong = None if each.check is None else each.check(tensors[name], facts)
        if wrong is not None:
            _wrong(name, wrong)


def _check_magnitude(name: str, meta: TransformMeta, tensors: Mapping[str, Tensor]) -> None:
    """Check that what is decoded is finite."""
    largest = float(tensors[f"{name}.reference"].max())
    if meta.rotation == "principal":
        largest *= float(tensors[f"{name}.step"].max())
    if meta.mean is not None:
        largest = max(largest, float(tensors[f"{name}.mean"].abs().max()))
    if largest > _MOST_MAGNITUDE:
        _wrong(name, "is of vectors too large to be decoded")


def _finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    wrong = finite(tensors[name], {})
    if wrong is not None:
        _wrong(name, wrong)


def _in_range(name: str, tensor: Tensor, least: int, most: int) -> None:
    if tensor.numel() and not least <= int(tensor.min()) <= int(tensor.max()) <= most:
        _wrong(name, f"must hold numbers from {least} to {most}")


def _wrong(name: str, what: str) -> NoReturn:
    msg = f"{name} {what}"
    raise FormatError(msg)
