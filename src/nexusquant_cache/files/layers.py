"""A compressed layer as metadata and tensors, and back: tensors go by `layer.state.TENSORS`."""

from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from nexusquant_cache.codec.held import Side
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.rotation import HadamardRotation, PrincipalRotation
from nexusquant_cache.codec.transform import Rotation, VectorTransform
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.files.contents import HIDDEN, NAMES, given_facts, layer_facts
from nexusquant_cache.files.schema import (
    BodyMeta,
    GivenMeta,
    LayerMeta,
    ObservedMeta,
    QueriesMeta,
    Seed,
    ShapeMeta,
    StockMeta,
    TransformMeta,
)
from nexusquant_cache.files.state import Lists, Source, Tensors, check_finite
from nexusquant_cache.files.version_2 import drop_hidden
from nexusquant_cache.layer.host import HOST
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.observations import Observations
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import (
    SIDES,
    Facts,
    LayerState,
    Turn,
    expected,
    find,
    put,
    transform_tensors,
)
from nexusquant_cache.layer.tokens import Buffer, LayerTransforms, PackedSide, PackedTokens, RaggedBuffer, TokenBuffer

_UNFILLED = torch.empty(0, device="cpu")  # in the place of a tensor that is put there next


def layer_state(state: LayerState, shared: Shared, lists: Lists) -> tuple[LayerMeta, Tensors]:
    """Return all that a layer holds and counts, as metadata and tensors that share memory with it.

    Args:
        state: What the layer holds; all of it has arrived.
        shared: What the layers share.
        lists: What files hold once; codecs and phases of this layer are added.

    Raises:
        UnsupportedError: If a codec or a rotation is of a class that a file cannot name.
        NonFiniteError: If an exact token holds NaN or infinity.
    """
    turn, name = state.turn, f"layers.{state.layer_idx}"
    shape = _shape(state)
    given = shared.given_to(state.layer_idx) if shape is not None and state.body is None else None
    meta = LayerMeta(
        shape=shape,
        seen=state.seen,
        tail=state.tail_tokens,
        sinks=None if state.sinks is None else state.sink_tokens,
        record_past=bool(turn.record_past),
        expects_prompt=turn.expects_prompt,
        updated_since_crop=turn.updated_since_crop,
        pending_from=turn.pending_from,
        code_error=_number(state.code_error),
        asked=None if shape is None or state.asked is None else lists.pair(state.asked),
        used=None if shape is None or state.codecs is None else lists.pair(state.codecs),
        phase=None if state.phase is None else lists.phase(state.phase),
        body=None if state.body is None else _body_meta(state.body),
        observed=None if shape is None else _observed_meta(state.observed),
        given=None if given is None else _given_meta(given, lists),
        policy=None if shape is None or state.policy is None else lists.policy(state.policy),
        more={declared.name: NAMES[x.dtype] for declared, x in state.tensors() if declared.is_listed} or None,
        shown=None if state.shown == (0, 0) else state.shown,
        updates=(turn.longest, turn.short_updates) if turn.longest else None,
    )
    tensors = {f"{name}.{declared.name}": tensor for declared, tensor in state.tensors()}
    if given is not None:
        for side in SIDES:
            found = ((each.name, find(given, each.path)) for each in transform_tensors(side, side, "given."))
            tensors |= {f"{name}.{what}": tensor for what, tensor in found if tensor is not None}
    check_finite(tensors)
    return meta, tensors


def restore_layer(layer: NexusQuantLayer, meta: LayerMeta, source: Source) -> None:
    """Put what `layer_state` of another layer returned in place of everything that this one holds."""
    layer.reset()
    state, shared = layer.state, layer.shared
    flags = (meta.record_past, meta.expects_prompt, meta.updated_since_crop)
    start = 0 if meta.body is None and meta.pending_from is not None else meta.pending_from  # of earlier releases
    state.turn = Turn(start, *flags, *(meta.updates or ()))
    if meta.shape is None or meta.asked is None or meta.used is None or meta.observed is None:
        return
    facts = layer_facts(meta, source.codecs)
    # What an offloading cache keeps in host memory never goes to the device as a whole.
    large = replace(source, device=HOST) if shared.offloading else source
    state.policy = shared.make_policy(state.layer_idx)
    state.asked, state.codecs = source.codec_pair(meta.asked), source.codec_pair(meta.used)
    state.seen, state.device = meta.seen, source.device
    state.code_error = None if meta.code_error is None else float(meta.code_error)
    state.phase = None if meta.phase is None else source.phases[meta.phase]
    state.tail = (_UNFILLED, _UNFILLED)
    state.sinks = None if meta.sinks is None else (_UNFILLED, _UNFILLED)
    if meta.body is not None:
        state.body = _body(meta.body, f"layers.{state.layer_idx}", facts, source)
    state.observed = _observed(meta.observed)
    state.shown = meta.shown or state.shown
    for declared, _ in expected(facts):
        if declared.kind == "transform":
            continue
        name = f"layers.{state.layer_idx}.{declared.name}"
        waits = "tail" in declared.axes and meta.pending_from is not None
        tensor = (large if waits or "packed" in declared.axes else source).take(declared, name)
        put(
            state,
            declared.path,
            _buffer(tensor, meta, state.layer_idx, source) if "packed" in declared.axes else tensor,
        )
    if HIDDEN in (meta.more or {}):
        drop_hidden(state, source)
    if state.turn.pending_from is not None:
        state.observed.begin_at(state.turn.pending_from, state.seen)
    layer.is_initialized = True


def _buffer(tensor: Tensor, meta: LayerMeta, layer_idx: int, source: Source) -> Buffer:
    """Return stored tokens in a buffer as the layer had it."""
    if meta.body is None or meta.body.total is None:
        return TokenBuffer.of(tensor)
    return RaggedBuffer.of(tensor, source.tensors[f"layers.{layer_idx}.counts"], meta.body.dense)


def restore_given(meta: LayerMeta | StockMeta, index: int, source: Source) -> LayerTransforms | None:
    """Return the transforms that a layer has yet to use, if it was given any."""
    if not isinstance(meta, LayerMeta) or meta.given is None or meta.shape is None:
        return None
    given, name = meta.given, f"layers.{index}.given"
    facts = given_facts(given, meta.shape, source.codecs)
    return LayerTransforms(
        keys=_transform(given.keys, name, "keys", facts, source),
        values=_transform(given.values, name, "values", facts, source),
        codecs=source.codec_pair(given.codecs),
        asked=source.codec_pair(given.asked),
        unrotated=given.unrotated,
    )


def _shape(state: LayerState) -> ShapeMeta | None:
    if state.tail is None:
        return None
    keys, values = state.tail
    batch, heads, _, dim = keys.shape
    return ShapeMeta(batch, heads, dim, values.shape[3], NAMES[keys.dtype], NAMES[values.dtype])


def _number(value: float | None) -> float | str | None:
    """Return a number as JSON can hold it."""
    return value if value is None or isfinite(value) else "inf"


def _body_meta(body: PackedTokens) -> BodyMeta:
    positions = body.positions
    return BodyMeta(
        start=positions.start,
        covered=positions.covered,
        kept=positions.kept,
        dense=positions.dense,
        bitmap=positions.bitmap is not None,
        total=None if positions.counts is None else len(body.keys.scales.stored()),
        keys=_transform_meta(body.keys.transform),
        values=_transform_meta(body.values.transform),
    )


def _body(meta: BodyMeta, name: str, facts: Facts, source: Source) -> PackedTokens:
    """Return packed tokens whose buffers and bitmap are still to be put there."""
    keys = _transform(meta.keys, name, "keys", facts, source)
    values = _transform(meta.values, name, "values", facts, source)
    return PackedTokens(
        PackedSide(keys, *(TokenBuffer(_UNFILLED, 0) for _ in range(2))),
        PackedSide(values, *(TokenBuffer(_UNFILLED, 0) for _ in range(2))),
        PositionMap(meta.start, meta.covered, meta.kept, meta.dense),
    )


def _transform_meta(transform: VectorTransform) -> TransformMeta:
    rotation, seed = transform.rotation, 0
    if type(rotation) is HadamardRotation:
        seed = rotation.seed & ((1 << 64) - 1)  # all that the signs depend on
    elif type(rotation) is not PrincipalRotation:
        msg = f"a file cannot hold a rotation of the class {type(rotation).__name__}, only the package's own"
        raise UnsupportedError(msg)
    return TransformMeta(
        rotation="principal" if isinstance(rotation, PrincipalRotation) else "hadamard",
        seed=Seed(seed),
        rows=transform.reference.shape[0],
        mean=None if transform.mean is None else NAMES[transform.mean.dtype],
        plans=transform.plans is not None,
    )


def _transform(meta: TransformMeta, name: str, side: Side, facts: Facts, source: Source) -> VectorTransform:
    found: dict[str, Tensor] = {}
    for declared in transform_tensors(side, ""):
        if declared.shape(facts) is not None:
            found[declared.name.partition(".")[2]] = source.take(declared, f"{name}.{declared.name}")
    rotation: Rotation = HadamardRotation(facts[f"{side[:-1]}_dim"], meta.seed)
    if meta.rotation == "principal":
        rotation = PrincipalRotation(found["basis"], found["step"])
    return VectorTransform(rotation, found.get("mean"), found["reference"], found.get("plans"))


def _observed_meta(observed: Observations) -> ObservedMeta:
    before = None if observed.before is None else _queries_meta(*observed.before)
    attended = None if observed.reconstruction is None else observed.reconstruction.shape[2]
    return ObservedMeta(_queries_meta(observed.queries, observed.end, observed.far), before, attended)


def _queries_meta(queries: Tensor | None, end: int, far: Tensor | None) -> QueriesMeta:
    known = None if far is None else far.shape[2]
    if queries is None:
        return QueriesMeta(0, 0, None, end, known)
    return QueriesMeta(queries.shape[1], queries.shape[2], NAMES[queries.dtype], end, known)


def _observed(meta: ObservedMeta) -> Observations:
    """Return observations whose tensors are still to be put there."""
    return Observations(end=meta.now.end, before=None if meta.before is None else (None, meta.before.end, None))


def _given_meta(given: LayerTransforms, lists: Lists) -> GivenMeta:
    return GivenMeta(
        keys=_transform_meta(given.keys),
        values=_transform_meta(given.values),
        codecs=lists.pair(given.codecs),
        asked=lists.pair(given.asked),
        unrotated=given.unrotated,
    )
