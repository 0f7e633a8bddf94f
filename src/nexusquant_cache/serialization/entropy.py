"""How the bytes of a tensor are arranged and compressed, in pieces, so that memory stays bounded.

A code is a name such as ``"delta+columns+zstd"``, whose steps are made from left to right.  The tensor is seen as
``[groups, items, bytes]`` (`streams.Stream.rows`): heads, tokens, bytes of a token.

- ``delta``: from the second item of a group on, each byte minus the same byte of the item before, modulo 256.
- ``columns``: within each group, all first bytes of the items, then all second bytes, and so on.
- ``planes``: within each group, all first bytes of the elements of the dtype, then all second bytes, and so on.
- ``zstd``: one Zstandard frame that says how many bytes it holds.
- ``bytes``: nothing at all, where the others do not help.
"""

import hashlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any, BinaryIO

import torch
from jaxtyping import UInt8
from torch import Tensor

from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.serialization.streams import Stream

LEVELS = range(1, 23)
"""Levels of zstd."""

CODES = (
    "bytes",
    "zstd",
    "planes+zstd",
    "columns+zstd",
    "delta+zstd",
    "delta+planes+zstd",
    "delta+columns+zstd",
)
"""Every code that a file may use."""

_CANDIDATES = {
    "key words": ("zstd", "columns+zstd", "delta+columns+zstd"),
    "value words": ("zstd", "columns+zstd", "delta+columns+zstd"),
    "scales": ("zstd", "delta+zstd"),
    "positions": ("zstd",),
    "exact": ("zstd", "planes+zstd", "columns+zstd", "delta+columns+zstd"),
    "transforms": ("zstd", "planes+zstd", "columns+zstd"),
    "other": ("zstd",),
}
_PIECE = 1 << 20  # bytes arranged at once, or one group if that is more
_SAMPLE = 1 << 18
_TRIAL_LEVEL = 3
_LEAST_GAIN = 0.99  # of the size: less is not worth the time that reading takes
_SMALL = 64  # bytes: a frame alone takes some twenty
_READ = 1 << 17
_THREADED = 8 << 20  # bytes from which on zstd itself uses several threads
_MOST_EXPANSION = 64
_SPARE = 4096  # bytes that a short stream may expand to, whatever its length


def check_level(level: int | None) -> None:
    """Raise OptionError if this is no level: from 1 (fast) to 22 (small), or None for no compression."""
    given: object = level  # whatever the annotation says
    if given is not None and (type(given) is not int or given not in LEVELS):
        msg = f"level must be a whole number from {LEVELS[0]} (fast) to {LEVELS[-1]} (small), or None, got {level!r}"
        raise OptionError(msg)


def may_expand(stored: int, nbytes: int) -> bool:
    """Tell whether so many stored bytes may stand for so many: no honest cache shrinks more, but bombs do."""
    return nbytes <= _MOST_EXPANSION * stored + _SPARE


def pieces(stream: Stream, tensor: Tensor) -> Iterator[UInt8[Tensor, "groups items bytes"]]:
    """Yield the bytes of a tensor on the CPU, some whole groups at a time."""
    groups, items, width = stream.rows
    if stream.nbytes == 0:
        return
    elements = tensor.detach().reshape(groups, -1)
    step = max(_PIECE // (items * width), 1)
    for start in range(0, groups, step):
        part = elements[start : start + step].to("cpu").contiguous()
        yield part.view(torch.uint8).view(len(part), items, width)


def arrange(part: UInt8[Tensor, "groups items bytes"], code: str, itemsize: int) -> bytes:
    """Return the bytes of some groups as the steps of a code before its compression leave them."""
    steps = code.split("+")
    if "delta" in steps:
        part = torch.cat([part[:, :1], part[:, 1:] - part[:, :-1]], 1)
    if "planes" in steps:
        part = part.reshape(len(part), -1, itemsize)
    if "planes" in steps or "columns" in steps:
        part = part.mT
    return part.contiguous().numpy().tobytes()


def restore(data: bytes, shape: tuple[int, int, int], code: str, itemsize: int) -> UInt8[Tensor, "groups items bytes"]:
    """Invert `arrange` for groups of this shape."""
    groups, items, width = shape
    steps = code.split("+")
    part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if "planes" in steps:
        part = part.view(groups, itemsize, -1).mT
    elif "columns" in steps:
        part = part.view(groups, width, items).mT
    part = part.reshape(shape)
    if "delta" in steps:
        part = part.cumsum(1, dtype=torch.uint8)
    return part


def choose_code(stream: Stream, tensor: Tensor, level: int | None) -> str | None:
    """Return the code that makes the first 256 KiB of a tensor smallest; None if it is best left as it is."""
    if level is None or stream.nbytes < _SMALL:
        return None
    groups, items, width = stream.rows
    elements = tensor.detach().reshape(groups, items, -1)
    most = max(_SAMPLE // width, 1)
    few = elements[: max(most // items, 1), :most].to("cpu").contiguous()
    sample = few.view(torch.uint8).view(*few.shape[:2], width)
    compressor = _zstandard().ZstdCompressor(level=min(level, _TRIAL_LEVEL))
    sizes = {
        code: len(compressor.compress(arrange(sample, code, stream.itemsize))) for code in _CANDIDATES[stream.kind]
    }
    best = min(sizes, key=sizes.__getitem__)
    return best if sizes[best] < _LEAST_GAIN * sample.numel() else None


def compress(stream: Stream, tensor: Tensor, code: str, level: int, threads: int) -> tuple[list[bytes], str, str]:
    """Return the stored bytes of a tensor, the code they are really in, and the hash of the tensor's bytes.

    Args:
        stream: What it is.
        tensor: The tensor.
        code: The code to use; ``"bytes"`` takes its place where it does not help after all.
        level: Of zstd.
        threads: For long tensors; the result does not depend on it.
    """
    compressor = _zstandard().ZstdCompressor(
        level=level, write_content_size=True, threads=threads if stream.nbytes >= _THREADED else 0
    )
    work = compressor.compressobj(size=stream.nbytes)
    digest, out = hashlib.sha256(), []
    for part in pieces(stream, tensor):
        digest.update(part.numpy())  # type: ignore[arg-type]  # has a buffer
        out.append(work.compress(arrange(part, code, stream.itemsize)))
    out.append(work.flush())
    size = sum(map(len, out))
    if size >= stream.nbytes or not may_expand(size, stream.nbytes):
        return [part.numpy().tobytes() for part in pieces(stream, tensor)], "bytes", digest.hexdigest()
    return out, code, digest.hexdigest()


def hash_bytes(stream: Stream, tensor: Tensor) -> str:
    """Return the hash of a tensor's bytes."""
    digest = hashlib.sha256()
    for part in pieces(stream, tensor):
        digest.update(part.numpy())  # type: ignore[arg-type]  # has a buffer
    return digest.hexdigest()


def decompress(
    stream: Stream, file: BinaryIO | BytesIO, stored: int, code: str, out: UInt8[Tensor, "groups items bytes"]
) -> str:
    """Read the stored bytes of a tensor from the present place of a file into ``out``; return the hash of the result.

    Raises:
        FormatError: If they stand for more or fewer bytes, or are damaged.
    """
    source: Any = _Section(file, stored)
    if code.endswith("zstd"):
        source = _open_frame(source, stored, stream)
    groups, items, width = stream.rows
    step = max(_PIECE // max(items * width, 1), 1)
    digest = hashlib.sha256()
    for start in range(0, groups if stream.nbytes else 0, step):
        part = out[start : start + step]
        data = _read_exactly(source, part.numel(), stream.name)
        part.copy_(restore(data, (len(part), items, width), code, stream.itemsize))
        digest.update(part.numpy())  # type: ignore[arg-type]  # has a buffer
    if _read(source, 1, stream.name):
        msg = f"the tensor {stream.name} is longer than its shape allows"
        raise FormatError(msg)
    return digest.hexdigest()


def _open_frame(source: "_Section", stored: int, stream: Stream) -> Any:  # noqa: ANN401 - zstandard has no public type
    """Return a reader of a zstd frame, if it says that it holds as many bytes as the tensor has."""
    zstandard = _zstandard()
    try:
        frame = zstandard.get_frame_parameters(source.peek(18))  # the longest header
    except zstandard.ZstdError as error:
        msg = f"the tensor {stream.name} is no zstd frame"
        raise FormatError(msg) from error
    if frame.content_size != stream.nbytes or frame.dict_id or not may_expand(stored, stream.nbytes):
        msg = f"the tensor {stream.name} says that it holds {frame.content_size:,} bytes, it must be {stream.nbytes:,}"
        raise FormatError(msg)
    most = 1 << max(stream.nbytes - 1, 1 << 17).bit_length()
    return zstandard.ZstdDecompressor(max_window_size=most).stream_reader(
        source, read_size=_READ, read_across_frames=True, closefd=False
    )


def _read_exactly(source: Any, count: int, name: str) -> bytes:  # noqa: ANN401 - anything with `read`
    parts, missing = [], count
    while missing:
        part = _read(source, missing, name)
        if not part:
            msg = f"the tensor {name} is shorter than its shape demands"
            raise FormatError(msg)
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _read(source: Any, count: int, name: str) -> bytes:  # noqa: ANN401 - anything with `read`
    try:
        data: bytes = source.read(count)
    except _zstandard().ZstdError as error:
        msg = f"the tensor {name} is a damaged zstd frame: {error}"
        raise FormatError(msg) from error
    return data


class _Section:
    """A part of a file that can be read and no more."""

    def __init__(self, file: BinaryIO | BytesIO, length: int) -> None:
        self._file = file
        self._left = length

    def read(self, count: int = -1) -> bytes:
        data = self._file.read(self._left if count < 0 else min(count, self._left))
        self._left -= len(data)
        return data

    def peek(self, count: int) -> bytes:
        """Return the next bytes without moving on."""
        place = self._file.tell()
        data = self._file.read(min(count, self._left))
        self._file.seek(place)
        return data


def _zstandard() -> Any:  # noqa: ANN401 - a module
    """Return the package, which importing nexusquant_cache does not load."""
    import zstandard  # noqa: PLC0415 - see above

    return zstandard
