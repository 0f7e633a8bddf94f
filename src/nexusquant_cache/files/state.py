"""A living cache as metadata and tensors, and back: what `NexusQuantCache.save` writes and ``load`` reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.registry import CodecMeta, describe_codec, make_codec
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.rotation import HadamardRotation, PrincipalRotation
from nexusquant_cache.codec.transform import Rotation, VectorTransform
from nexusquant_cache.errors import FormatError, NonFiniteError, UnsupportedError
from nexusquant_cache.files.contents import DTYPES
from nexusquant_cache.files.schema import (
    BeginningMeta,
    BodyMeta,
    CacheMeta,
    GivenMeta,
    LayerMeta,
    ObservedMeta,
    PaddingMeta,
    PhaseMeta,
    QueriesMeta,
    Seed,
    ShapeMeta,
    StockMeta,
    TensorMeta,
    TransformMeta,
)
from nexusquant_cache.layer.host import HOST
from nexusquant_cache.layer.observations import Observations
from nexusquant_cache.layer.padding import BatchPadding, Beginning
from nexusquant_cache.layer.tokens import LayerTransforms, PackedSide, PackedTokens, TokenBuffer
from nexusquant_cache.policy import EvictionPolicy
from nexusquant_cache.presets import CacheConfig

Tensors = dict[str, Tensor]

_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items()}
# Attributes of transformers' own layers, by what is done with them.
_STOCK_TENSORS = ("keys", "values", "indexer_keys", "indexer_position_ids", "conv_states", "recurrent_states")
_STOCK_NUMBERS = (
    "is_initialized",
    "is_indexer_initialized",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "cumulative_length",
    "record_past",
    "conv_kernel_size",
)
_STOCK_DTYPES = ("dtype", "indexer_dtype")
_STOCK_DEVICES = ("device", "indexer_device")
_STOCK_FROM_CONFIG = ("sliding_window", "number_of_states", "_sliding_window_tensor")


@dataclass
class Lists:
    """What several layers share and a file holds once."""

    codecs: list[CodecMeta] = field(default_factory=list)
    phases: list[RotaryPhase] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)

    def codec(self, codec: VectorCodec) -> int:
        """Return the place of a codec."""
        meta = describe_codec(codec)
        if meta not in self.codecs:
            self.codecs.append(meta)
        return self.codecs.index(meta)

    def pair(self, codecs: tuple[VectorCodec, VectorCodec]) -> tuple[int, int]:
        """Return the places of the codecs of keys and of values."""
        return self.codec(codecs[0]), self.codec(codecs[1])

    def policy(self, policy: EvictionPolicy) -> int:
        """Return the place of a policy's name."""
        name = policy_name(policy)
        if name not in self.policies:
            self.policies.append(name)
        return self.policies.index(name)

    def phase(self, phase: RotaryPhase) -> int:
        """Return the place of a rotary phase."""
        for index, known in enumerate(self.phases):
            if known.matches(phase):
                return index
        self.phases.append(phase)
        return len(self.phases) - 1


@dataclass(frozen=True)
class Source:
    """What a file holds, as layers take it.

    Attributes:
        codecs: The codecs that it describes.
        phases: Its rotary phases.
        tensors: Its tensors on the CPU, by name.
        device: Where the layers shall be.
        dtype: What exact keys and values are cast to; None leaves them as they are.
    """

    codecs: tuple[VectorCodec, ...]
    phases: tuple[RotaryPhase, ...]
    tensors: Mapping[str, Tensor]
    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def of(
        cls, meta: CacheMeta, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None
    ) -> "Source":
        """Return what a file holds."""
        codecs = tuple(make_codec(codec) for codec in meta.codecs)
        phases = tuple(RotaryPhase(tensors[f"phases.{i}"], phase.interleaved) for i, phase in enumerate(meta.phases))
        return cls(codecs, phases, tensors, device, dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the device."""
        return self.tensors[name].to(self.device)

    def cast(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that an exact tensor of this one gets."""
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype

    def exact(self, name: str) -> Tensor:
        """Return an exact tensor, cast if that is wanted."""
        return self.tensor(name).to(self.cast(self.tensors[name].dtype))

    def pair(self, name: str, what: str) -> tuple[Tensor, Tensor]:
        """Return exact keys and values."""
        return self.exact(f"{name}.keys.{what}"), self.exact(f"{name}.values.{what}")

    def codec_pair(self, places: tuple[int, int]) -> tuple[VectorCodec, VectorCodec]:
        """Return the codecs of keys and of values."""
        return self.codecs[places[0]], self.codecs[places[1]]


# Compressed layers


def layer_state(layer: Any, lists: Lists) -> tuple[LayerMeta, Tensors]:  # noqa: ANN401 - its module imports this one
    """Return what a layer holds and counts; see `NexusQuantLayer.state`."""
    shape = _shape(layer)
    name = f"layers.{layer.layer_idx}"
    tensors: Tensors = {}
    if shape is not None and layer.tail is not None:
        tensors |= _sides(f"{name}.{{}}.tail", layer.tail)
    if layer.sinks is not None:
        tensors |= _sides(f"{name}.{{}}.sinks", layer.sinks)
    if layer.sink_place is not None:
        tensors[f"{name}.sink_place"] = layer.sink_place
    body = None if layer.body is None else _body_state(layer.body, name, tensors)
    meta = LayerMeta(
        shape=shape,
        seen=layer.seen,
        tail=layer.tail_tokens,
        sinks=None if layer.sinks is None else layer.sinks[0].shape[2],
        sink_place=layer.sink_place is not None,
        record_past=bool(layer.record_past),
        expects_prompt=layer._expects_prompt,  # noqa: SLF001 - this is the layer's own way out
        updated_since_crop=layer._updated_since_crop,  # noqa: SLF001
        pending_from=layer._pending_from,  # noqa: SLF001
        code_error=_number(layer.code_error),
        asked=None if shape is None else lists.pair(layer._asked),  # noqa: SLF001
        used=None if shape is None else lists.pair((layer.key_codec, layer.value_codec)),
        phase=None if layer.phase is None else lists.phase(layer.phase),
        body=body,
        observed=None if shape is None else _observed_state(layer.observed, name, tensors),
        given=_given_state(layer, name, lists, tensors),
        policy=None if shape is None else lists.policy(layer.policy),
    )
    _check_finite(tensors)
    return meta, tensors


def _check_finite(tensors: Tensors) -> None:
    for what, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # Two numbers, which NaN would be, in place of a tensor as large as this one.
        if not all(isfinite(float(x)) for x in tensor.aminmax()):
            msg = f"{what} holds NaN or infinity: a cache that has met with such numbers is of no use, and is not saved"
            raise NonFiniteError(msg)


def restore_layer(layer: Any, meta: LayerMeta, source: Source) -> None:  # noqa: ANN401
    """Put back what `layer_state` returned; see `NexusQuantLayer.restore`."""
    layer.record_past, layer._expects_prompt = meta.record_past, meta.expects_prompt  # noqa: SLF001
    layer._updated_since_crop = meta.updated_since_crop  # noqa: SLF001
    if meta.shape is None or meta.asked is None or meta.used is None or meta.observed is None:
        return
    name = f"layers.{layer.layer_idx}"
    layer.policy = layer._owner.make_policy(layer.layer_idx)  # noqa: SLF001
    layer._asked = source.codec_pair(meta.asked)  # noqa: SLF001
    layer.key_codec, layer.value_codec = source.codec_pair(meta.used)
    layer.seen, layer._pending_from = meta.seen, meta.pending_from  # noqa: SLF001
    layer.code_error = None if meta.code_error is None else float(meta.code_error)
    layer.device = source.device
    # What an offloading cache keeps in host memory never goes to the device as a whole.
    large = replace(source, device=HOST) if layer._owner.offloading else source  # noqa: SLF001
    layer.tail = (source if meta.pending_from is None else large).pair(name, "tail")
    layer.phase = None if meta.phase is None else source.phases[meta.phase]
    if meta.body is not None:
        layer.sinks = source.pair(name, "sinks")
        layer.body = _restore_body(meta.body, meta.shape, name, source, large)
    if meta.sink_place:
        layer.sink_place = source.tensors[f"{name}.sink_place"]
    layer.observed = _restore_observed(meta.observed, name, source)
    layer.is_initialized = True


def _shape(layer: Any) -> ShapeMeta | None:  # noqa: ANN401
    if not layer.is_initialized or layer.tail is None:
        return None
    keys, values = layer.tail
    batch, heads, _, dim = keys.shape
    return ShapeMeta(batch, heads, dim, values.shape[3], _NAMES[keys.dtype], _NAMES[values.dtype])


def _sides(name: str, pair: tuple[Tensor, Tensor]) -> Tensors:
    return {name.format("keys"): pair[0], name.format("values"): pair[1]}


def _number(value: float | None) -> float | str | None:
    """Return a number as JSON can hold it."""
    return value if value is None or isfinite(value) else "inf"


def _body_state(body: PackedTokens, name: str, tensors: Tensors) -> BodyMeta:
    metas = []
    for side, packed in (("keys", body.keys), ("values", body.values)):
        tensors[f"{name}.{side}.words"] = packed.words.view()
        tensors[f"{name}.{side}.scales"] = packed.scales.view()
        metas.append(_transform_state(packed.transform, f"{name}.{side}", tensors))
    positions = body.positions
    if positions.bitmap is not None:
        tensors[f"{name}.kept"] = positions.bitmap
    return BodyMeta(
        start=positions.start,
        covered=positions.covered,
        kept=positions.kept,
        dense=positions.dense,
        bitmap=positions.bitmap is not None,
        keys=metas[0],
        values=metas[1],
    )


def _restore_body(meta: BodyMeta, shape: ShapeMeta, name: str, source: Source, large: Source) -> PackedTokens:
    sides = []
    for side, transform, dim in (("keys", meta.keys, shape.key_dim), ("values", meta.values, shape.value_dim)):
        words, scales = (TokenBuffer.of(large.tensor(f"{name}.{side}.{what}")) for what in ("words", "scales"))
        sides.append(PackedSide(_restore_transform(transform, f"{name}.{side}", dim, source), words, scales))
    bitmap = source.tensor(f"{name}.kept") if meta.bitmap else None
    return PackedTokens(sides[0], sides[1], PositionMap(meta.start, meta.covered, meta.kept, meta.dense, bitmap))


def _transform_state(transform: VectorTransform, name: str, tensors: Tensors) -> TransformMeta:
    rotation, seed = transform.rotation, 0
    if type(rotation) is PrincipalRotation:
        tensors |= {f"{name}.basis": rotation.basis, f"{name}.step": rotation.step}
    elif type(rotation) is HadamardRotation:
        seed = rotation.seed & ((1 << 64) - 1)  # all that the signs depend on
    else:
        msg = f"a file cannot hold a rotation of the class {type(rotation).__name__}, only the package's own"
        raise UnsupportedError(msg)
    for what, tensor in (("mean", transform.mean), ("reference", transform.reference), ("plans", transform.plans)):
        if tensor is not None:
            tensors[f"{name}.{what}"] = tensor
    return TransformMeta(
        rotation="principal" if isinstance(rotation, PrincipalRotation) else "hadamard",
        seed=Seed(seed),
        rows=transform.reference.shape[0],
        mean=None if transform.mean is None else _NAMES[transform.mean.dtype],
        plans=transform.plans is not None,
    )


def _restore_transform(meta: TransformMeta, name: str, dim: int, source: Source) -> VectorTransform:
    rotation: Rotation = HadamardRotation(dim, meta.seed)
    if meta.rotation == "principal":
        rotation = PrincipalRotation(source.tensor(f"{name}.basis"), source.tensor(f"{name}.step"))
    return VectorTransform(
        rotation=rotation,
        mean=None if meta.mean is None else source.tensor(f"{name}.mean"),
        reference=source.tensor(f"{name}.reference"),
        plans=source.tensors[f"{name}.plans"] if meta.plans else None,
    )


def _observed_state(observed: Observations, name: str, tensors: Tensors) -> ObservedMeta:
    now = _queries_state(observed.queries, observed.end, f"{name}.queries", tensors)
    before = None
    if observed.before is not None:
        before = _queries_state(*observed.before, f"{name}.queries_before", tensors)
    reconstruction = observed.reconstruction
    if reconstruction is not None:
        reconstruction = tensors[f"{name}.reconstruction"] = reconstruction.float()
    return ObservedMeta(now, before, None if reconstruction is None else reconstruction.shape[2])


def _queries_state(queries: Tensor | None, end: int, name: str, tensors: Tensors) -> QueriesMeta:
    if queries is None:
        return QueriesMeta(0, 0, None, end)
    tensors[name] = queries
    return QueriesMeta(queries.shape[1], queries.shape[2], _NAMES[queries.dtype], end)


def _restore_observed(meta: ObservedMeta, name: str, source: Source) -> Observations:
    before = meta.before
    return Observations(
        queries=_restore_queries(meta.now, f"{name}.queries", source),
        end=meta.now.end,
        before=None if before is None else (_restore_queries(before, f"{name}.queries_before", source), before.end),
        reconstruction=None if meta.reconstruction is None else source.tensor(f"{name}.reconstruction"),
    )


def _restore_queries(meta: QueriesMeta, name: str, source: Source) -> Tensor | None:
    return None if meta.dtype is None else source.exact(name)


def _given_state(layer: Any, name: str, lists: Lists, tensors: Tensors) -> GivenMeta | None:  # noqa: ANN401
    """Return transforms that were handed to the layer, if it has yet to use them."""
    given = layer._owner.given_transforms(layer.layer_idx)  # noqa: SLF001
    if given is None or layer.body is not None or not layer.is_initialized:
        return None
    return GivenMeta(
        keys=_transform_state(given.keys, f"{name}.given.keys", tensors),
        values=_transform_state(given.values, f"{name}.given.values", tensors),
        codecs=lists.pair(given.codecs),
        asked=lists.pair(given.asked),
        unrotated=given.unrotated,
    )


def restore_given(meta: LayerMeta | StockMeta, index: int, source: Source) -> LayerTransforms | None:
    """Return the transforms that a layer has yet to use, if it was given any."""
    if not isinstance(meta, LayerMeta) or meta.given is None or meta.shape is None:
        return None
    given, name = meta.given, f"layers.{index}.given"
    return LayerTransforms(
        keys=_restore_transform(given.keys, f"{name}.keys", meta.shape.key_dim, source),
        values=_restore_transform(given.values, f"{name}.values", meta.shape.value_dim, source),
        codecs=source.codec_pair(given.codecs),
        asked=source.codec_pair(given.asked),
        unrotated=given.unrotated,
    )


# Layers of transformers


def stock_state(layer: Any, index: int) -> tuple[StockMeta, Tensors]:  # noqa: ANN401 - any class of transformers
    """Return what a layer of transformers' own class holds.

    Raises:
        UnsupportedError: If it has attributes that are not known here.
        NonFiniteError: If it holds NaN or infinity.
    """
    numbers: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        if name in _STOCK_FROM_CONFIG or value is None:
            continue
        if name in _STOCK_TENSORS and isinstance(value, Tensor):
            found[name] = value
        elif name in _STOCK_TENSORS and isinstance(value, dict):
            found |= {f"{name}.{state}": x for state, x in value.items() if x is not None}
        elif name in _STOCK_NUMBERS and isinstance(value, int):
            numbers[name] = value
        elif name in _STOCK_NUMBERS and isinstance(value, dict):
            numbers[name] = {str(state): x for state, x in value.items()}
        elif name in _STOCK_DTYPES and value in _NAMES:
            numbers[name] = _NAMES[value]
        elif name in _STOCK_DEVICES:
            numbers[name] = True
        else:
            msg = f"a file cannot hold layer {index}: nothing is known of {name} in {type(layer).__name__}"
            raise UnsupportedError(msg)
    unknown = {x.dtype for x in found.values()} - set(_NAMES)
    if unknown:
        msg = f"a file cannot hold layer {index}: its dtype {unknown.pop()} is not supported"
        raise UnsupportedError(msg)
    tensors = tuple(TensorMeta(name, _NAMES[x.dtype], tuple(x.shape)) for name, x in found.items())
    named = {f"layers.{index}.{name}": x for name, x in found.items()}
    _check_finite(named)
    return StockMeta(type(layer).__name__, numbers, tensors), named


def restore_stock(layer: Any, index: int, meta: StockMeta, source: Source, seen: int) -> None:  # noqa: ANN401
    """Put back what `stock_state` returned into a new layer of the same class.

    Args:
        layer: The new layer.
        index: Its place in the cache.
        meta: What the file says of it.
        source: The tensors.
        seen: Tokens that the cache has seen.

    Raises:
        FormatError: If that does not fit the layer.
    """
    known = vars(layer)
    for name, value in meta.numbers.items():
        if name in _STOCK_DEVICES:
            setattr(layer, name, source.device)
        elif (
            name in _STOCK_DTYPES and isinstance(value, str) and value in DTYPES and DTYPES[value][1].is_floating_point
        ):
            setattr(layer, name, source.cast(DTYPES[value][1]))
        elif name in _STOCK_NUMBERS and _is_like(value, known.get(name)):
            is_table = isinstance(value, dict)
            setattr(layer, name, {state: value[str(state)] for state in known[name]} if is_table else value)
        else:
            _wrong_stock(index, layer, name)
    for tensor in meta.tensors:
        name, _, state = tensor.name.partition(".")
        x = source.exact(f"layers.{index}.{tensor.name}")
        states = known.get(name)
        if name not in _STOCK_TENSORS or name not in known or (bool(state) != isinstance(states, dict)):
            _wrong_stock(index, layer, tensor.name)
        elif not isinstance(states, dict):
            setattr(layer, name, x)
        elif state in {str(key) for key in states}:
            states[next(key for key in states if str(key) == state)] = x
        else:
            _wrong_stock(index, layer, tensor.name)
    if isinstance(known.get("_sliding_window_tensor"), Tensor):
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(source.device)  # noqa: SLF001 - it has to follow
    _check_stock(layer, index, seen)


def _is_like(value: object, present: object) -> bool:
    """Tell whether a value of a file may take the place of what a new layer has."""
    if isinstance(value, dict) and isinstance(present, dict):
        return set(value) == {str(key) for key in present} and all(_is_count(x) for x in value.values())
    return type(value) is type(present) and _is_count(value)


def _is_count(value: object) -> bool:
    return value is None or (isinstance(value, int) and 0 <= value < 1 << 48)


def _check_stock(layer: Any, index: int, seen: int) -> None:  # noqa: ANN401
    """Check that a restored layer has the tensors that it says it has, and as many tokens as the cache has seen."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    shapes = {None if x is None else x.shape[:-1] for x in (keys, values)}
    if len(shapes) > 1:
        _wrong_stock(index, layer, "keys")
    if isinstance(layer, CacheLayerMixin):
        if layer.is_initialized != (keys is not None) or (keys is not None and not hasattr(layer, "device")):
            _wrong_stock(index, layer, "is_initialized")
        _check_stock_tokens(layer, index, 0 if keys is None or not keys.numel() else seen)
    for name in ("conv_states", "recurrent_states"):
        for state, is_there in _by_state(getattr(layer, f"is_{name}_initialized", {})).items():
            if is_there != (_by_state(getattr(layer, name))[state] is not None):
                _wrong_stock(index, layer, name)


def _check_stock_tokens(layer: Any, index: int, seen: int) -> None:  # noqa: ANN401
    """Check that a layer counts and holds so many tokens, or of a window the newest of them."""
    if layer.get_seq_length() != seen:
        _wrong_stock(index, layer, "cumulative_length" if hasattr(layer, "cumulative_length") else "keys")
    window = getattr(layer, "sliding_window", None)
    held = 0 if layer.keys is None or not layer.keys.numel() else layer.keys.shape[-2]
    # While it records, for a `crop` to come, a layer holds more than its window.
    most = seen if window is None or layer.record_past else min(seen, max(window - 1, 1))
    if held > most:
        _wrong_stock(index, layer, "keys")
    indexer = getattr(layer, "indexer_keys", None)
    if indexer is not None and indexer.numel() and indexer.shape[1] != seen:
        _wrong_stock(index, layer, "indexer_keys")


def _by_state(value: Any) -> dict[Any, Any]:  # noqa: ANN401 - a table, or what stands in it where there is one state
    return value if isinstance(value, dict) else {0: value}


def _wrong_stock(index: int, layer: object, name: str) -> None:
    msg = f"layers.{index}.{name[:60]} in the file does not fit a new {type(layer).__name__}"
    raise FormatError(msg)


# Padding and the rest


def padding_state(padding: BatchPadding) -> tuple[PaddingMeta, Tensors]:
    """Return what is known about padding."""
    tensors: Tensors = {}
    for name, rows in (("stated", padding.stated), ("pads", padding.pads)):
        if rows is not None:
            tensors[f"padding.{name}"] = rows.to(torch.int64)
    beginning = padding.beginning
    if beginning is not None:
        for name in ("first", "after", "run", "open"):
            tensors[f"padding.{name}"] = getattr(beginning, name)
    meta = PaddingMeta(
        stated=None if padding.stated is None else len(padding.stated),
        pads=None if padding.pads is None else len(padding.pads),
        certain=padding.certain,
        settled_at=padding.settled_at,
        beginning=None if beginning is None else BeginningMeta(*beginning.first.shape),
    )
    return meta, tensors


def restore_padding(meta: PaddingMeta, source: Source) -> BatchPadding:
    """Return what `padding_state` was given."""
    beginning = None
    if meta.beginning is not None:
        beginning = Beginning(
            first=source.tensor("padding.first"),
            after=source.tensor("padding.after"),
            run=source.tensors["padding.run"],
            open=source.tensors["padding.open"],
        )
    return BatchPadding(
        stated=source.tensors.get("padding.stated"),
        pads=source.tensors.get("padding.pads"),
        certain=meta.certain,
        settled_at=meta.settled_at,
        beginning=beginning,
    )


def phases_state(lists: Lists) -> tuple[tuple[PhaseMeta, ...], Tensors]:
    """Return the rotary phases that layers have named."""
    metas = tuple(PhaseMeta(phase.inv_freq.shape[0], phase.interleaved) for phase in lists.phases)
    return metas, {f"phases.{index}": phase.inv_freq for index, phase in enumerate(lists.phases)}


def describe_settings(settings: CacheConfig) -> dict[str, Any]:
    """Return settings as JSON can hold them; which implementation computes is the reader's choice."""
    return {f.name: _plain(getattr(settings, f.name)) for f in fields(settings) if f.name != "impl"}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def policy_name(policy: EvictionPolicy) -> str:
    """Return what tells policies apart: their options, or the class where there are none that can be seen."""
    shows_options = type(policy).__repr__ is not object.__repr__
    return repr(policy) if shows_options else f"{type(policy).__module__}.{type(policy).__qualname__}"
