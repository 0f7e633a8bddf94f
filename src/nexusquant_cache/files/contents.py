"""Which tensors a file must hold, as its metadata says: their names, dtypes and shapes, and limits on them."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.held import Side
from nexusquant_cache.codec.registry import make_codec
from nexusquant_cache.errors import FormatError
from nexusquant_cache.files.schema import (
    BodyMeta,
    CacheMeta,
    GivenMeta,
    LayerMeta,
    PaddingMeta,
    QueriesMeta,
    ShapeMeta,
    StockMeta,
    TensorMeta,
    TransformMeta,
)
from nexusquant_cache.layer.state import LOOP, SIDES, Declared, Facts, expected, listed, transform_tensors

DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "float64": ("F64", torch.float64),
    "float32": ("F32", torch.float32),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "int64": ("I64", torch.int64),
    "int32": ("I32", torch.int32),
    "int16": ("I16", torch.int16),
    "int8": ("I8", torch.int8),
    "uint8": ("U8", torch.uint8),
    "bool": ("BOOL", torch.bool),
}
"""Every dtype that a file may hold: torch's name of it, that of safetensors, and the dtype."""
NAMES = {dtype: name for name, (_, dtype) in DTYPES.items()}

HIDDEN = "hidden"
"""In version 2, a tensor that says which kept tokens nobody shall see: they filled rows that kept fewer than others."""
_FLOATS = ("float64", "float32", "float16", "bfloat16")
_MOST_ROWS = 1 << 20
_MOST_HEADS = 1 << 16
_MOST_CHANNELS = 1 << 16
_MOST_AXES = 8
_MOST_ELEMENTS = 1 << 48
_MOST_TENSORS = 1 << 15
# Of the tensors of transformers' own layers, where it is the same in all: how many axes, and which is the batch.
_STOCK_AXES = {"keys": (4, 0), "values": (4, 0), "indexer_keys": (3, 0), "indexer_position_ids": (3, 1)}
_STOCK_STATES = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class FileTensor:
    """What one tensor of a file is; its values are elsewhere.

    Attributes:
        name: Its name, without the packing that it is stored in.
        dtype: Torch's name of its dtype.
        shape: Its shape.
        kind: What it is, for reports and for the choice of a packing: ``"key words"``, ``"value words"``, ``"scales"``,
            ``"positions"``, ``"exact"``, ``"transforms"`` or ``"other"``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype][1].itemsize

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.itemsize

    @property
    def rows(self) -> tuple[int, int, int]:
        """The tensor as ``[groups, items, bytes]``: heads of all rows of the batch, tokens, and what each token has.

        Words of heads one behind the other are one group of tokens, other tensors with less than three axes one group
        of elements.
        """
        if len(self.shape) == 2 and self.kind.endswith("words"):  # noqa: PLR2004 - tokens, bytes
            return 1, *self.shape
        if len(self.shape) < 3:  # noqa: PLR2004 - batch, heads, tokens
            return 1, prod(self.shape), self.itemsize
        return self.shape[0] * self.shape[1], self.shape[2], prod(self.shape[3:]) * self.itemsize


def tensors_of(meta: CacheMeta) -> dict[str, FileTensor]:
    """Return the tensors that the metadata promises, by name.

    Raises:
        FormatError: If the metadata contradicts itself.
    """
    codecs = [make_codec(codec) for codec in meta.codecs]
    found: dict[str, FileTensor] = {}
    for spec in _all(meta, codecs):
        if spec.name in found:
            msg = f"the tensor {spec.name} is announced twice"
            raise FormatError(msg)
        found[spec.name] = spec
        if len(found) > _MOST_TENSORS:
            msg = f"more than {_MOST_TENSORS:,} tensors are announced"
            raise FormatError(msg)
    _check_together(meta)
    return found


def _all(meta: CacheMeta, codecs: list[VectorCodec]) -> Iterator[FileTensor]:
    if meta.padding is not None:
        yield from _padding(meta.padding)
    for index, phase in enumerate(meta.phases):
        _between("pairs", phase.pairs, 1, _MOST_CHANNELS)
        yield FileTensor(f"phases.{index}", "float32", (phase.pairs,), "other")
    for index, layer in enumerate(meta.layers):
        name = f"layers.{index}"
        yield from _stock(layer, name) if isinstance(layer, StockMeta) else _Layer(layer, name, codecs, meta).tensors()


def _padding(padding: PaddingMeta) -> Iterator[FileTensor]:
    for name, rows in (("stated", padding.stated), ("pads", padding.pads)):
        if rows is not None:
            _between(f"padding.{name}", rows, 1, _MOST_ROWS)
            yield FileTensor(f"padding.{name}", "int64", (rows,), "other")
    if padding.beginning is not None:
        rows, channels = padding.beginning.rows, padding.beginning.channels
        _between("padding.beginning.rows", rows, 1, _MOST_ROWS)
        _between("padding.beginning.channels", channels, 1, _MOST_HEADS * _MOST_CHANNELS)
        yield FileTensor("padding.first", "float32", (rows, channels), "other")
        yield FileTensor("padding.after", "float32", (rows, channels), "other")
        yield FileTensor("padding.run", "int64", (rows,), "other")
        yield FileTensor("padding.open", "bool", (rows,), "other")


def _stock(layer: StockMeta, name: str) -> Iterator[FileTensor]:
    for tensor in layer.tensors:
        _among(f"{name}.{tensor.name}", tensor.dtype, tuple(DTYPES))
        # Lengths count that an empty tensor hides: what is computed with them must fit 64 bits.
        if len(tensor.shape) > _MOST_AXES or prod(max(length, 1) for length in tensor.shape) > _MOST_ELEMENTS:
            msg = f"{name}.{tensor.name} has an impossible shape"
            raise FormatError(msg)
        if not tensor.name.isascii():
            msg = f"{name} has a tensor of an impossible name"
            raise FormatError(msg)
        _stock_batch(tensor, name)
        yield FileTensor(f"{name}.{tensor.name}", tensor.dtype, tensor.shape, "exact")


def _stock_batch(tensor: TensorMeta, name: str) -> int | None:
    """Return the rows of a tensor of transformers' own layers, None where there are none.

    Raises:
        FormatError: If no such layer can hold such a tensor.
    """
    kind, axes = tensor.name.partition(".")[0], len(tensor.shape)
    if kind not in _STOCK_AXES and kind not in _STOCK_STATES:
        return None  # no layer takes it
    if kind != "indexer_position_ids":
        _among(f"{name}.{tensor.name}", tensor.dtype, _FLOATS)
    if tensor.shape == (0,) and kind in _STOCK_AXES:
        return None  # before the first update
    expected, batch = _STOCK_AXES.get(kind, (axes, 0))
    if axes != expected or axes < 2:  # noqa: PLR2004 - a batch, and what each row has
        msg = f"{name}.{tensor.name} has {axes} axes, which no layer gives it"
        raise FormatError(msg)
    _between(f"{name}.{tensor.name}: the batch", tensor.shape[batch], 1, _MOST_ROWS)
    return tensor.shape[batch]


def _check_together(meta: CacheMeta) -> None:
    """Check that all parts tell of one batch, and of as many tokens as the file says have been seen."""
    batches: set[int] = set()
    for index, layer in enumerate(meta.layers):
        if isinstance(layer, StockMeta):
            found = (_stock_batch(tensor, f"layers.{index}") for tensor in layer.tensors)
            batches |= {rows for rows in found if rows is not None}
        elif layer.shape is not None:
            batches.add(layer.shape.batch)
            if layer.seen != meta.tokens_seen:
                msg = f"layers.{index} has seen {layer.seen} tokens, and the file says {meta.tokens_seen}"
                raise FormatError(msg)
    if not batches and meta.tokens_seen:
        msg = f"no layer has seen anything, and the file says {meta.tokens_seen} tokens"
        raise FormatError(msg)
    if len(batches) > 1:
        msg = f"the layers are of batches of {', '.join(map(str, sorted(batches)))} rows"
        raise FormatError(msg)
    if meta.padding is not None:
        _check_padding(meta.padding, batches, meta.tokens_seen)


def _check_padding(padding: PaddingMeta, batches: set[int], seen: int) -> None:
    """Check what a file of version 1 says of padding."""
    for rows in (padding.pads, None if padding.beginning is None else padding.beginning.rows):
        if rows is not None and batches - {rows}:
            msg = "padding is that of another batch"
            raise FormatError(msg)
    if padding.settled_at is not None and padding.settled_at > seen:
        msg = "padding was settled by tokens that have not been seen"
        raise FormatError(msg)


@dataclass(frozen=True)
class _Layer:
    """The promises of a compressed layer."""

    meta: LayerMeta
    name: str
    codecs: list[VectorCodec]
    file: CacheMeta

    def tensors(self) -> Iterator[FileTensor]:
        meta, shape = self.meta, self.meta.shape
        self._check_version()
        if shape is None:
            parts = (meta.sinks, meta.asked, meta.used, meta.phase, meta.body, meta.observed, meta.given, meta.policy)
            known = (meta.shown, meta.updates)
            is_something = any(part is not None for part in (*parts, *known))
            if is_something or meta.seen or meta.tail or meta.sink_place or meta.more:
                self._wrong("holds something before its first update")
            return
        self._check_counts(shape)
        self._check_listed()
        facts = layer_facts(meta, self.codecs)
        listed_only = set(meta.more or {})
        for declared, size in expected(facts):
            listed_only.discard(declared.name)
            yield _file_tensor(self.name, declared, size, facts)
        for spec in self._of_earlier_versions(shape, facts):
            listed_only.discard(spec.name.rpartition(".")[2])
            yield spec
        if listed_only:
            self._wrong(f"lists a tensor that it cannot have: {min(listed_only)}")
        if meta.given is not None:
            self._check_given(shape, meta.given)
            facts = given_facts(meta.given, shape, self.codecs)
            for side in SIDES:
                for declared in transform_tensors(side, "", "given."):
                    given_size = declared.shape(facts)
                    if given_size is not None:
                        yield _file_tensor(self.name, declared, given_size, facts)

    def _of_earlier_versions(self, shape: ShapeMeta, facts: Facts) -> Iterator[FileTensor]:
        if self.meta.sink_place:
            yield FileTensor(f"{self.name}.sink_place", "int64", (shape.batch, 2), "positions")
        if HIDDEN in (self.meta.more or {}) and facts["bitmap_bytes"]:
            size = (shape.batch, shape.heads, facts["bitmap_bytes"])
            yield FileTensor(f"{self.name}.{HIDDEN}", "uint8", size, "positions")

    def _check_version(self) -> None:
        """Check that version 1 says nothing that was not known then, and others nothing that is not known any more."""
        meta, is_first = self.meta, self.file.padding is not None
        is_newer = any(part is not None for part in (meta.more, meta.shown, meta.updates))
        if (meta.sink_place is not None) != is_first or (is_first and is_newer):
            self._wrong("is of another version than the file")

    def _check_listed(self) -> None:
        """Check what the layer lists."""
        more, known = self.meta.more or {}, listed()
        if not set(more) <= {*known, HIDDEN}:
            self._wrong("names a tensor that no layer has")
        for name, dtype in more.items():
            only = "uint8" if name == HIDDEN else known[name].listed_as
            _among(f"{self.name}.{name}", dtype, tuple(DTYPES) if only is None else (only,))
        # Of no sinks there are no positions, and where none is packed none has been turned.
        is_packed = self.meta.body is not None
        if ("sink_positions" in more and not self.meta.sinks) or (not is_packed and {"origins", "counts"} & set(more)):
            self._wrong("says where tokens are that it does not have")

    def _check_counts(self, shape: ShapeMeta) -> None:
        """Check all that can be told without a tensor."""
        meta = self.meta
        self._check_shape(shape)
        if (meta.body is None) != (meta.sinks is None) or (meta.sink_place and meta.body is None):
            self._wrong("must have sinks when tokens are packed, and only then")
        if meta.body is None and (meta.tail != meta.seen or meta.phase is not None):
            self._wrong("has seen tokens that it does not hold")
        if meta.pending_from is not None and meta.pending_from > meta.seen:
            self._wrong("waits for tokens that it has not seen")
        if meta.shown is not None and not meta.shown[0] <= meta.shown[1] <= meta.seen:
            self._wrong("was shown the attention to tokens that it has not seen")
        if meta.updates is not None and (meta.updates[0] < 1 or meta.updates[1] > LOOP):
            self._wrong("counts its updates wrongly")
        padding = self.file.padding
        # In version 1, packed rows with pads had their first tokens in different places.
        if padding is not None and meta.body is not None and meta.sink_place != (padding.pads is not None):
            self._wrong("must say where the first tokens of padded rows are, and of no others")
        self._check_body(shape)
        self._check_observed(shape)

    def _wrong(self, what: str) -> None:
        msg = f"{self.name} {what}"
        raise FormatError(msg)

    def _check_shape(self, shape: ShapeMeta) -> None:
        _between(f"{self.name}.batch", shape.batch, 1, _MOST_ROWS)
        _between(f"{self.name}.heads", shape.heads, 1, _MOST_HEADS)
        for dim in (shape.key_dim, shape.value_dim):
            _between(f"{self.name}.head_dim", dim, 1, _MOST_CHANNELS)
        for dtype in (shape.key_dtype, shape.value_dtype):
            _among(f"{self.name}.dtype", dtype, _FLOATS)
        if self.meta.asked is None or self.meta.used is None or self.meta.observed is None:
            self._wrong("names no codecs")
        else:
            self._check_codecs(shape, self.meta.asked, self.meta.used)
        if self.meta.policy is not None and self.meta.policy >= len(self.file.policies):
            self._wrong("names a policy that the file does not describe")
        if self.meta.phase is not None:
            if self.meta.phase >= len(self.file.phases):
                self._wrong("names a rotary phase that the file does not hold")
            elif 2 * self.file.phases[self.meta.phase].pairs > shape.key_dim:
                self._wrong("has a rotary phase with more channels than its keys")

    @staticmethod
    def _sides(shape: ShapeMeta) -> tuple[tuple[str, int, str], tuple[str, int, str]]:
        return ("keys", shape.key_dim, shape.key_dtype), ("values", shape.value_dim, shape.value_dtype)

    def _check_body(self, shape: ShapeMeta) -> None:
        body = self.meta.body
        if body is None or self.meta.sinks is None:
            return
        if body.start + body.covered + body.dense + self.meta.tail != self.meta.seen or body.kept > body.covered:
            self._wrong("counts its tokens in two ways")
        is_placed = self.meta.sink_place or "sink_positions" in (self.meta.more or {})
        is_elsewhere = body.start not in {0, self.meta.sinks} or (is_placed and body.start)
        if is_elsewhere or (not body.bitmap and body.covered):
            self._wrong("begins its packed tokens in an impossible place")
        more = self.meta.more or {}
        if (body.total is not None) != ("counts" in more) or (body.total is not None and not body.bitmap):
            self._wrong("must say how many tokens each head keeps where these differ, and only there")
        if body.total is not None and body.total > shape.batch * shape.heads * (body.kept + body.dense):
            self._wrong("has more tokens than its heads keep")
        for side, transform in zip(SIDES, (body.keys, body.values), strict=True):
            if transform.rows != shape.batch:
                self._wrong("has transforms for another batch")
            _check_transform(f"{self.name}.{side}", transform)

    def _check_codecs(self, shape: ShapeMeta, *pairs: tuple[int, int]) -> None:
        """Check that there are these codecs of keys and values, and that they are for vectors of these lengths."""
        if not all(index < len(self.codecs) for pair in pairs for index in pair):
            self._wrong("names a codec that the file does not describe")
        for pair in pairs:
            for (_, dim, _), index in zip(self._sides(shape), pair, strict=True):
                layout = getattr(self.codecs[index], "layout", None)
                if layout is not None and getattr(layout, "head_dim", dim) != dim:
                    self._wrong(f"has a codec for vectors of another length than {dim}")

    def _check_observed(self, shape: ShapeMeta) -> None:
        observed = self.meta.observed
        assert observed is not None
        for name, queries in (("queries", observed.now), ("queries_before", observed.before)):
            if queries is not None:
                self._check_queries(name, queries, shape)
        if observed.reconstruction is not None and observed.reconstruction > self.meta.seen:
            self._wrong("knows of attention to tokens that it has not seen")

    def _check_queries(self, name: str, queries: QueriesMeta, shape: ShapeMeta) -> None:
        if queries.end > self.meta.seen:
            self._wrong("has queries of tokens that it has not seen")
        if queries.far is not None and queries.far > _waiting(self.meta):
            self._wrong("knows of attention to tokens that it does not hold")
        if queries.dtype is None:
            if queries.heads or queries.tokens:
                self._wrong("has queries without a dtype")
            return
        _among(f"{self.name}.{name}", queries.dtype, _FLOATS)
        _between(f"{self.name}.{name}.heads", queries.heads, 1, _MOST_HEADS)
        if queries.heads % shape.heads or not 1 <= queries.tokens <= queries.end:
            self._wrong("has queries that do not fit its keys")

    def _check_given(self, shape: ShapeMeta, given: GivenMeta) -> None:
        self._check_codecs(shape, given.codecs, given.asked)
        for side, transform in zip(SIDES, (given.keys, given.values), strict=True):
            if transform.rows not in {1, shape.batch}:
                self._wrong("was given transforms for another batch")
            _check_transform(f"{self.name}.given.{side}", transform)


def _check_transform(name: str, meta: TransformMeta) -> None:
    _among(f"{name}.rotation", meta.rotation, ("hadamard", "principal"))
    _between(f"{name}.rows", meta.rows, 1, _MOST_ROWS)
    if meta.mean is not None:
        _among(f"{name}.mean", meta.mean, _FLOATS)


def _file_tensor(layer: str, declared: Declared, size: tuple[int, ...], facts: Facts) -> FileTensor:
    kind = {"codes": f"{declared.name.partition('.')[0][:-1]} words", "transform": "transforms"}
    dtype = declared.dtype_in(facts)
    assert dtype is not None
    return FileTensor(f"{layer}.{declared.name}", dtype, size, kind.get(declared.kind, declared.kind))


def layer_facts(meta: LayerMeta, codecs: Sequence[VectorCodec]) -> Facts:
    """Return what the metadata of a layer that has been updated say, as `layer.state.TENSORS` asks for it."""
    shape, body, observed = meta.shape, meta.body, meta.observed
    assert shape is not None
    assert observed is not None
    assert meta.used is not None
    facts: dict[str, Any] = dataclasses.asdict(shape) | {"seen": meta.seen, "tail": meta.tail, "sinks": meta.sinks}
    facts["waiting"] = _waiting(meta)
    for name, queries in (("", observed.now), ("_before", observed.before)):
        facts |= {
            f"queries{name}": None if queries is None else queries.tokens,
            f"query_heads{name}": None if queries is None else queries.heads,
            f"query_dtype{name}": None if queries is None else queries.dtype,
            f"far{name}": None if queries is None else queries.far,
        }
    facts |= {
        "reconstruction": observed.reconstruction,
        "packed": None if body is None else _packed(shape, body),
        "dense": None if body is None else body.dense,
        "packed_end": None if body is None else body.start + body.covered + body.dense,
        "kept": None if body is None else body.kept,
        "covered": None if body is None else body.covered,
        "bitmap_bytes": None if body is None or not body.bitmap else -(-body.covered // 8),
    }
    for side, transform, index in zip(SIDES, _transforms(body), meta.used, strict=True):
        facts |= {f"{side[:-1]}_bytes": codecs[index].bytes_per_vector - 1}
        facts |= _transform_facts(side, transform, shape, codecs[index])
    more = meta.more or {}
    return facts | {name: more.get(name) for name in listed()}


def _waiting(meta: LayerMeta) -> int:
    """Return `LayerState.waiting_tokens`."""
    return meta.tail if meta.pending_from is None else max(meta.seen - meta.pending_from, meta.tail)


def _packed(shape: ShapeMeta, body: BodyMeta) -> tuple[int, ...]:
    """Return the leading axes of packed tokens."""
    return (shape.batch, shape.heads, body.kept + body.dense) if body.total is None else (body.total,)


def _transforms(body: BodyMeta | None) -> tuple[TransformMeta | None, TransformMeta | None]:
    return (None, None) if body is None else (body.keys, body.values)


def given_facts(given: GivenMeta, shape: ShapeMeta, codecs: Sequence[VectorCodec]) -> Facts:
    """Return the same of transforms that were handed to a layer."""
    facts: dict[str, Any] = dataclasses.asdict(shape)
    for side, transform, index in zip(SIDES, (given.keys, given.values), given.codecs, strict=True):
        facts |= _transform_facts(side, transform, shape, codecs[index])
    return facts


def _transform_facts(
    side: Side, transform: TransformMeta | None, shape: ShapeMeta, codec: VectorCodec
) -> dict[str, Any]:
    one = side[:-1]
    dim = shape.key_dim if side == "keys" else shape.value_dim
    return {
        f"{one}_rows": None if transform is None else transform.rows,
        f"{one}_axes": dim if transform is not None and transform.rotation == "principal" else None,
        f"{one}_mean": None if transform is None else transform.mean,
        f"{one}_plans": "uint8" if transform is not None and transform.plans else None,
        f"{one}_layouts": len(codec.layouts) or None,  # none: what plans are to a codec of the user's, it alone knows
    }


def _between(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        msg = f"{what} must be from {least} to {most}, the file says {value}"
        raise FormatError(msg)


def _among(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        msg = f"{what} must be one of {', '.join(allowed)}, the file says {value[:40]!r}"
        raise FormatError(msg)
