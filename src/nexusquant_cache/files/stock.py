"""A layer of transformers' own class as metadata and tensors, and back."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nexusquant_cache.errors import FormatError, UnsupportedError
from nexusquant_cache.files.contents import DTYPES, NAMES
from nexusquant_cache.files.schema import StockMeta, TensorMeta
from nexusquant_cache.files.state import Source, Tensors, check_finite

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
        elif name in _STOCK_DTYPES and value in NAMES:
            numbers[name] = NAMES[value]
        elif name in _STOCK_DEVICES:
            numbers[name] = True
        else:
            msg = f"a file cannot hold layer {index}: nothing is known of {name} in {type(layer).__name__}"
            raise UnsupportedError(msg)
    unknown = {x.dtype for x in found.values()} - set(NAMES)
    if unknown:
        msg = f"a file cannot hold layer {index}: its dtype {unknown.pop()} is not supported"
        raise UnsupportedError(msg)
    tensors = tuple(TensorMeta(name, NAMES[x.dtype], tuple(x.shape)) for name, x in found.items())
    named = {f"layers.{index}.{name}": x for name, x in found.items()}
    check_finite(named)
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
