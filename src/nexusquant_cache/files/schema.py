"""The metadata of a saved cache: what it says, and a strict way from JSON to it and back.

Everything about the tensors of a file follows from these classes (`files.contents`), so a file cannot
contradict itself without being noticed.
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any, NewType, Union, get_args, get_origin, get_type_hints

from nexusquant_cache.codec.registry import CodecMeta
from nexusquant_cache.errors import FormatError

Seed = NewType("Seed", int)
"""Of a Hadamard rotation: signs depend on 64 bits."""

_MOST = 1 << 48  # of any count: products of two stay far from the limits of 128-bit sizes, and no prompt is longer
_MOST_SEED = 1 << 64
_MOST_ITEMS = 4096  # of a list: no model has more layers, and no cache more codecs
# Of what has no class of its own (settings, options, fields of a config): of each list, and of lists in lists.
_MOST_PLAIN = 1 << 16
_DEEPEST = 32


@dataclass(frozen=True)
class ModelMeta:
    """Which model a cache belongs to: the fields of its config that decide keys and values, and their hash."""

    fingerprint: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class TensorMeta:
    """A tensor whose shape nothing else tells: those of transformers' own layers."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BeginningMeta:
    """In version 1, how the rows of a batch began while every token might have been a pad."""

    rows: int
    channels: int


@dataclass(frozen=True)
class PaddingMeta:
    """In version 1, what was known about padding; the numbers are rows of a tensor, None where there is none."""

    stated: int | None
    pads: int | None
    certain: bool
    settled_at: int | None
    beginning: BeginningMeta | None


@dataclass(frozen=True)
class PhaseMeta:
    """A rotary phase: how many pairs of channels turn, and which they are."""

    pairs: int
    interleaved: bool


@dataclass(frozen=True)
class TransformMeta:
    """A transform: its rotation (``"hadamard"`` with a seed, or ``"principal"``), and which tensors there are.

    ``rows`` is the batch of its tensors, ``mean`` the dtype of the mean.
    """

    rotation: str
    seed: Seed
    rows: int
    mean: str | None
    plans: bool


@dataclass(frozen=True)
class GivenMeta:
    """Transforms handed over by another cache that this layer has yet to use; codecs count in the file's list."""

    keys: TransformMeta
    values: TransformMeta
    codecs: tuple[int, int]
    asked: tuple[int, int]
    unrotated: bool


@dataclass(frozen=True)
class BodyMeta:
    """The packed tokens of a layer: which positions they have, and their transforms.

    ``kept`` is the most that a head keeps of the covered ones.  ``total`` are the packed tokens of all rows and heads
    together, where heads keep different numbers.
    """

    start: int
    covered: int
    kept: int
    dense: int
    bitmap: bool
    keys: TransformMeta
    values: TransformMeta
    total: int | None = None


@dataclass(frozen=True)
class QueriesMeta:
    """Queries that attention has shown: shape ``[batch, heads, tokens, key_dim]``, and tokens seen by then.

    ``far`` is of how many tokens the far attention is known.
    """

    heads: int
    tokens: int
    dtype: str | None
    end: int
    far: int | None = None


@dataclass(frozen=True)
class ObservedMeta:
    """What is known of a prompt that waits for its compression; no heads or tokens where there is no tensor."""

    now: QueriesMeta
    before: QueriesMeta | None
    reconstruction: int | None


@dataclass(frozen=True)
class ShapeMeta:
    """Shapes and dtypes of the keys and values of a layer."""

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    key_dtype: str
    value_dtype: str


@dataclass(frozen=True)
class LayerMeta:
    """A compressed layer; ``shape`` is None before its first update.

    ``asked`` and ``used`` are codecs of keys and of values, ``phase`` a rotary phase and ``policy`` what a policy is
    called, all as places in the file's lists.  ``more`` are the dtypes of the tensors that nothing else tells of.
    ``shown`` is from which token to which the layer has seen the attention to new ones.  ``updates`` are the tokens of
    the longest update, and how many in a row were shorter (2 stands for more).  ``sink_place`` is of version 1 and says
    whether there is a tensor of that name.
    """

    shape: ShapeMeta | None
    seen: int
    tail: int
    sinks: int | None
    record_past: bool
    expects_prompt: bool
    updated_since_crop: bool
    pending_from: int | None
    code_error: float | str | None
    asked: tuple[int, int] | None
    used: tuple[int, int] | None
    phase: int | None
    body: BodyMeta | None
    observed: ObservedMeta | None
    given: GivenMeta | None
    policy: int | None
    more: dict[str, str] | None = None
    shown: tuple[int, int] | None = None
    updates: tuple[int, int] | None = None
    sink_place: bool | None = None


@dataclass(frozen=True)
class StockMeta:
    """A layer of transformers' own class: its name, plain attributes and tensors."""

    layer_class: str
    numbers: dict[str, Any]
    tensors: tuple[TensorMeta, ...]


@dataclass(frozen=True)
class CacheMeta:
    """All metadata that decides what a file means."""

    preset: str
    settings: dict[str, Any]
    when: str
    model: ModelMeta | None
    tokens_seen: int
    tokens_hash: str | None
    statistics: dict[str, Any]
    user: dict[str, str]
    has_warned: bool
    records_from_start: bool
    policies: tuple[str, ...]
    phases: tuple[PhaseMeta, ...]
    codecs: tuple[CodecMeta, ...]
    layers: tuple[LayerMeta | StockMeta, ...]
    padding: PaddingMeta | None = None


def to_json(meta: CacheMeta) -> str:
    """Return the metadata as JSON, always the same for the same metadata; what is None is left out."""
    plain = dataclasses.asdict(meta, dict_factory=lambda pairs: {name: x for name, x in pairs if x is not None})
    return json.dumps(plain, allow_nan=False, ensure_ascii=True, separators=(",", ":"), sort_keys=True)


def from_json(text: str) -> CacheMeta:
    """Return the metadata that JSON says.

    Raises:
        FormatError: If it says anything that the classes here do not have, or leaves out what they have.
    """
    meta: CacheMeta = _parse_fields(CacheMeta, read_json(text), "cache")
    return meta


def read_json(text: str | bytes) -> Any:  # noqa: ANN401 - JSON
    """Return what strict JSON says: in UTF-8, no NaN, no infinity, no name twice.

    Raises:
        FormatError: If it is anything else.
    """
    try:
        # json.loads alone would take UTF-16, and texts that no UTF-8 can hold and no hash be made of.
        text = text.decode() if isinstance(text, bytes) else text.encode().decode()
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite_number)
    except (ValueError, RecursionError) as error:
        msg = f"the metadata is no JSON: {error}"
        raise FormatError(msg) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        msg = "a name comes twice"
        raise ValueError(msg)
    return made


def _finite_number(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        msg = f"{text[:20]} is too large a number"
        raise ValueError(msg)
    return number


def _refuse_constant(name: str) -> None:
    msg = f"{name} is no number"
    raise ValueError(msg)


def _parse(kind: Any, value: Any, place: str) -> Any:  # noqa: ANN401 - any type of the fields above
    """Return a value of JSON as this type."""
    origin = get_origin(kind)
    if origin in {Union, types.UnionType}:
        return _parse_union(get_args(kind), value, place)
    if origin is tuple:
        return _parse_tuple(get_args(kind), value, place)
    if origin is dict:
        return _parse_dict(get_args(kind)[1], value, place)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _parse_fields(kind, value, place)
    if kind is Any:
        return _parse_plain(value, place, 0)
    if kind is Seed:
        is_right = type(value) is int and 0 <= value < _MOST_SEED
    else:
        is_right = type(value) is kind and (kind is not int or 0 <= value < _MOST)
    if is_right:
        return value
    msg = f"{place} in the metadata must be {getattr(kind, '__name__', kind)}, got {str(value)[:40]!r}"
    raise FormatError(msg)


def _parse_plain(value: Any, place: str, depth: int) -> Any:  # noqa: ANN401
    """Return a value that may be any JSON, if it is of a size that can be worked with."""
    if isinstance(value, (list, dict)):
        if depth == _DEEPEST or len(value) > _MOST_PLAIN:
            msg = f"{place} in the metadata holds too much"
            raise FormatError(msg)
        for inner in value.values() if isinstance(value, dict) else value:
            _parse_plain(inner, place, depth + 1)
    elif isinstance(value, int) and abs(value) >= _MOST_SEED:
        msg = f"{place} in the metadata has a number beyond all reason"
        raise FormatError(msg)
    return value


def _parse_union(kinds: tuple[Any, ...], value: Any, place: str) -> Any:  # noqa: ANN401
    if value is None and type(None) in kinds:
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if isinstance(value, dict):  # of several classes, the one that has these fields
        kinds = tuple(kind for kind in kinds if len(kinds) == 1 or _has_fields(kind, value))
    elif len(kinds) > 1:
        kinds = tuple(kind for kind in kinds if type(value) is kind)
    if len(kinds) != 1:
        msg = f"{place} in the metadata is of no known kind"
        raise FormatError(msg)
    return _parse(kinds[0], value, place)


def _parse_fields(kind: Any, value: Any, place: str) -> Any:  # noqa: ANN401
    if not isinstance(value, dict) or not _has_fields(kind, value):
        msg = f"{place} in the metadata must have the fields {', '.join(sorted(_hints(kind)))}"
        raise FormatError(msg)
    return kind(**{name: _parse(hint, value.get(name), f"{place}.{name}") for name, hint in _hints(kind).items()})


def _has_fields(kind: type, value: Mapping[str, Any]) -> bool:
    """Tell whether an object has all fields of a class that cannot be None, and none that the class has not."""
    return _needed(kind) <= set(value) <= set(_hints(kind))


@cache  # the annotations are texts, and files have thousands of objects
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@cache
def _needed(kind: type) -> set[str]:
    return {name for name, hint in _hints(kind).items() if type(None) not in get_args(hint)}


def _parse_tuple(kinds: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:  # noqa: ANN401
    if isinstance(value, list) and kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if not isinstance(value, list) or len(value) != len(kinds):
        msg = f"{place} in the metadata must be a list of {len(kinds)}"
        raise FormatError(msg)
    if len(value) > _MOST_ITEMS:
        msg = f"{place} in the metadata has {len(value):,} items, {_MOST_ITEMS:,} are allowed"
        raise FormatError(msg)
    return tuple(_parse(kind, x, f"{place}[{i}]") for i, (kind, x) in enumerate(zip(kinds, value, strict=True)))


def _parse_dict(kind: Any, value: Any, place: str) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(value, dict):
        msg = f"{place} in the metadata must be an object"
        raise FormatError(msg)
    return {name: _parse(kind, x, f"{place}.{name}") for name, x in value.items()}
