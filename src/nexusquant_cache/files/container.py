"""The safetensors container: its header, made in advance for a file that is written in one go, and read with suspicion.

https://github.com/huggingface/safetensors#format: eight bytes with the length of a JSON header, the header (padded with
spaces), and the tensors' bytes, without gaps.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.files.contents import DTYPES, HIDDEN
from nexusquant_cache.files.schema import CacheMeta, LayerMeta, read_json

FORMAT = "nexusquant-cache"
VERSION = 3
"""The newest version; all from 1 on are read.  A file is written in the oldest one that can say what it holds."""
ALIGNMENT = 8
MOST_HEADER = 8 << 20
"""Bytes of the longest header: far more than a cache needs, and read in a moment."""
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_MOST_AXES = 8
_BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.values()}


@dataclass(frozen=True)
class Entry:
    """A tensor of the container.

    Attributes:
        name: Its name in the header.
        dtype: Safetensors' name of its dtype.
        shape: Its shape.
        start: Where its bytes begin, from the beginning of the file.
        nbytes: How many there are.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def versions_of(meta: CacheMeta) -> range:
    """Return the versions of the format in which metadata may say what these do: files of older ones are converted."""
    if meta.padding is not None:
        return range(1, 2)
    layers = [layer for layer in meta.layers if isinstance(layer, LayerMeta)]
    least = 3 if any(_is_of_version_3(layer) for layer in layers) else 2
    most = 2 if any(HIDDEN in (layer.more or {}) for layer in layers) else VERSION
    return range(least, most + 1)


def _is_of_version_3(layer: LayerMeta) -> bool:
    observed = layer.observed
    parts = () if observed is None else (observed.now, observed.before)
    knows_far = any(part is not None and part.far is not None for part in parts)
    return knows_far or (layer.body is not None and layer.body.total is not None)


def header_bytes(metadata: Mapping[str, str], entries: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Return the beginning of a file: length and header of tensors that follow each other in this order.

    Args:
        metadata: Texts.
        entries: Name, dtype, shape and bytes of each tensor.

    Raises:
        OptionError: If `read_header` would refuse it for its length.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    start = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + nbytes]}
        start += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    if len(text) > MOST_HEADER:
        msg = (
            f"the header of the file would take {len(text):,} bytes, and none of more than {MOST_HEADER:,} would be "
            f"read again: the cache has {len(entries):,} tensors, or too much is said about them"
        )
        raise OptionError(msg)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def padded_header(made: bytes, length: int) -> bytes:
    """Return a header of exactly this many bytes, length field included; the rest is filled with spaces."""
    assert len(made) <= length
    text = made[_LENGTH_BYTES:] + b" " * (length - len(made))
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_header(file: BinaryIO) -> tuple[dict[str, str], list[Entry]]:
    """Return the metadata and the tensors of a file; only the header is read.

    Raises:
        FormatError: If the header is longer than the file or 8 MiB, is no safetensors header, or its tensors do not
            fill the rest of the file exactly, one after the other.
    """
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(_LENGTH_BYTES)
    length = int.from_bytes(start, "little")
    begin = _LENGTH_BYTES + length
    if len(start) < _LENGTH_BYTES or begin > size or length > MOST_HEADER:
        msg = "this is no safetensors file, or it has been cut off"
        raise FormatError(msg)
    header = read_json(file.read(length))
    if not isinstance(header, dict):
        msg = "the header is no JSON object"
        raise FormatError(msg)
    metadata = header.pop(_METADATA, None)
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        msg = "the file has no metadata, so it is no saved cache"
        raise FormatError(msg)
    entries = sorted((_entry(name, value, begin) for name, value in header.items()), key=lambda x: (x.start, x.nbytes))
    end = begin
    for entry in entries:
        if entry.start != end:
            msg = f"the tensor {entry.name[:60]!r} overlaps another, or there is a gap before it"
            raise FormatError(msg)
        end += entry.nbytes
    if end != size:
        msg = f"the header describes a file of {end:,} bytes, this one has {size:,}"
        raise FormatError(msg)
    return metadata, entries


def _entry(name: str, value: Any, begin: int) -> Entry:  # noqa: ANN401 - JSON
    if isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if isinstance(dtype, str) and dtype in _BITS and _are_counts(shape) and _are_counts(offsets):
            nbytes = prod(shape) * _BITS[dtype] // 8
            if len(offsets) == 2 and offsets[1] - offsets[0] == nbytes:  # noqa: PLR2004 - begin and end
                return Entry(name, dtype, tuple(shape), begin + offsets[0], nbytes)
    msg = f"the header says nonsense about the tensor {name[:60]!r}"
    raise FormatError(msg)


def _are_counts(value: Any) -> bool:  # noqa: ANN401 - JSON
    if not isinstance(value, list) or len(value) > _MOST_AXES:
        return False
    return all(type(x) is int and 0 <= x < 1 << 48 for x in value)
