"""How the bytes of a tensor are arranged and compressed, in pieces, so that memory stays bounded.

A packing is a name such as ``"delta+columns+zstd"``, whose steps are made from left to right.  The tensor is seen as
``[groups, items, bytes]`` (`FileTensor.rows`): heads, tokens, bytes of a token.

- ``delta``: from the second item of a group on, each byte minus the same byte of the item before, modulo 256.
- ``columns``: within each group, all first bytes of the items, then all second bytes, and so on.
- ``planes``: within each group, all first bytes of the elements of the dtype, then all second bytes, and so on.
- ``zstd``: one Zstandard frame that says how many bytes it holds.
- ``bytes``: nothing at all, where the others do not help.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import UInt8
from torch import Tensor

from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.files.contents import FileTensor

LEVELS = range(1, 23)
"""Levels of zstd."""

PACKINGS = (
    "bytes",
    "zstd",
    "planes+zstd",
    "columns+zstd",
    "delta+zstd",
    "delta+planes+zstd",
    "delta+columns+zstd",
)
"""Every packing that a file may use."""

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
_SLICE = (
    1 << 17
)  # bytes between two looks at whether the work is still wanted: zstd may need a second for a few of them
_MOST_EXPANSION = 64
_SPARE = 4096  # bytes that a small tensor may expand to, whatever its length
_MAGIC = b"\x28\xb5\x2f\xfd"  # of a zstd frame that is not to be skipped
_LONGEST_FRAME_HEADER = 18
_BLOCK_HEADER = 3
_REPEATED = 1  # kind of a block that is one byte, many times
_CHECKSUM = 4


@runtime_checkable
class Source(Protocol):
    """Anything that bytes are read from."""

    def read(self, count: int, /) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        ...


def check_level(level: int | None) -> None:
    """Raise OptionError if this is no level: from 1 (fast) to 22 (small), or None for no compression."""
    given: object = level  # whatever the annotation says
    if given is not None and (type(given) is not int or given not in LEVELS):
        msg = f"level must be a whole number from {LEVELS[0]} (fast) to {LEVELS[-1]} (small), or None, got {level!r}"
        raise OptionError(msg)


def may_expand(stored: int, nbytes: int) -> bool:
    """Tell whether so many stored bytes may stand for so many: no honest cache shrinks more, but bombs do."""
    return nbytes <= _MOST_EXPANSION * stored + _SPARE


def pieces(spec: FileTensor, tensor: Tensor) -> Iterator[UInt8[Tensor, "groups items bytes"]]:
    """Yield the bytes of a tensor on the CPU, some whole groups at a time."""
    groups, items, width = spec.rows
    if spec.nbytes == 0:
        return
    elements = tensor.detach().reshape(groups, -1)
    step = max(_PIECE // (items * width), 1)
    for start in range(0, groups, step):
        part = elements[start : start + step].to("cpu").contiguous()
        yield part.view(torch.uint8).view(len(part), items, width)


def arrange(part: UInt8[Tensor, "groups items bytes"], packing: str, itemsize: int) -> bytes:
    """Return the bytes of some groups as the steps of a packing before its compression leave them."""
    steps = packing.split("+")
    if "delta" in steps:
        part = torch.cat([part[:, :1], part[:, 1:] - part[:, :-1]], 1)
    if "planes" in steps:
        part = part.reshape(len(part), -1, itemsize)
    if "planes" in steps or "columns" in steps:
        part = part.mT
    return part.contiguous().numpy().tobytes()


def restore(
    data: bytes, shape: tuple[int, int, int], packing: str, itemsize: int
) -> UInt8[Tensor, "groups items bytes"]:
    """Invert `arrange` for groups of this shape."""
    groups, items, width = shape
    steps = packing.split("+")
    part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if "planes" in steps:
        part = part.view(groups, itemsize, -1).mT
    elif "columns" in steps:
        part = part.view(groups, width, items).mT
    part = part.reshape(shape)
    if "delta" in steps:
        part = part.cumsum(1, dtype=torch.uint8)
    return part


def choose_packing(spec: FileTensor, tensor: Tensor, level: int | None) -> str | None:
    """Return the packing that makes the first 256 KiB of a tensor smallest; None if it is best left as it is."""
    if level is None or spec.nbytes < _SMALL:
        return None
    groups, items, width = spec.rows
    elements = tensor.detach().reshape(groups, items, -1)
    most = max(_SAMPLE // width, 1)
    few = elements[: max(most // items, 1), :most].to("cpu").contiguous()
    sample = few.view(torch.uint8).view(*few.shape[:2], width)
    compressor = _zstandard().ZstdCompressor(level=min(level, _TRIAL_LEVEL))
    sizes = {
        packing: len(compressor.compress(arrange(sample, packing, spec.itemsize))) for packing in _CANDIDATES[spec.kind]
    }
    best = min(sizes, key=sizes.__getitem__)
    return best if sizes[best] < _LEAST_GAIN * sample.numel() else None


def encode(  # noqa: PLR0913, PLR0917 - see `compress`
    spec: FileTensor,
    tensor: Tensor,
    packing: str,
    level: int,
    threads: int,
    digest: Any,  # noqa: ANN401 - hashlib has no public type
    is_wanted: Callable[[], bool] | None = None,
) -> Iterator[bytes]:
    """Yield the stored bytes of a tensor as they come, and feed its own bytes to a hash; see `compress`."""
    work = (
        _zstandard().ZstdCompressor(level=level, write_content_size=True, threads=threads).compressobj(size=spec.nbytes)
    )
    for part in pieces(spec, tensor):
        digest.update(part.numpy())
        data = memoryview(arrange(part, packing, spec.itemsize))
        for start in range(0, len(data), _SLICE):
            _check_wanted(is_wanted)
            yield work.compress(data[start : start + _SLICE])
    yield work.flush()


def is_worth(stored: int, nbytes: int) -> bool:
    """Tell whether a tensor that has become so many bytes should be stored like that."""
    return stored < nbytes and may_expand(stored, nbytes)


def compress(  # noqa: PLR0913, PLR0917 - what to do, and how
    spec: FileTensor,
    tensor: Tensor,
    packing: str,
    level: int,
    threads: int,
    is_wanted: Callable[[], bool] | None = None,
) -> tuple[list[bytes], str, str]:
    """Return the stored bytes of a tensor, the packing that they are really in, and the hash of the tensor's bytes.

    Args:
        spec: What it is.
        tensor: The tensor.
        packing: The packing to use; ``"bytes"`` takes its place where it does not help after all.
        level: Of zstd.
        threads: Of zstd; 0 for the calling thread alone.  The result is the same for 1 and more, and another for 0.
        is_wanted: Asked often; the work ends when it says no.

    Raises:
        concurrent.futures.CancelledError: If it is not wanted any more.
    """
    digest = hashlib.sha256()
    out = [data for data in encode(spec, tensor, packing, level, threads, digest, is_wanted) if data]
    if is_worth(sum(map(len, out)), spec.nbytes):
        return out, packing, digest.hexdigest()
    return [part.numpy().tobytes() for part in pieces(spec, tensor)], "bytes", digest.hexdigest()


def hash_bytes(spec: FileTensor, tensor: Tensor, is_wanted: Callable[[], bool] | None = None) -> str:
    """Return the hash of a tensor's bytes.

    Raises:
        concurrent.futures.CancelledError: If it is not wanted any more.
    """
    digest = hashlib.sha256()
    for part in pieces(spec, tensor):
        _check_wanted(is_wanted)
        digest.update(part.numpy())  # type: ignore[arg-type]  # has a buffer
    return digest.hexdigest()


def working_memory(spec: FileTensor, level: int) -> int:
    """Return about how many bytes zstd needs for its tables while one thread compresses a tensor."""
    parameters = _zstandard().ZstdCompressionParameters.from_level(level, source_size=max(spec.nbytes, 1))
    return int(parameters.estimated_compression_context_size())


def decompress(
    spec: FileTensor, file: Source, stored: int, packing: str, out: UInt8[Tensor, "groups items bytes"]
) -> str:
    """Read the stored bytes of a tensor from the present place of a file into ``out``; return the hash of the result.

    Raises:
        FormatError: If they stand for more or fewer bytes, or are damaged.
    """
    section = _Section(file, stored)
    frame = _Frame(section, stored, spec) if packing.endswith("zstd") else None
    source: Any = section if frame is None else frame.content()
    groups, items, width = spec.rows
    step = max(_PIECE // max(items * width, 1), 1)
    digest = hashlib.sha256()
    for start in range(0, groups if spec.nbytes else 0, step):
        part = out[start : start + step]
        data = _read_exactly(source, part.numel(), spec.name)
        part.copy_(restore(data, (len(part), items, width), packing, spec.itemsize))
        digest.update(part.numpy())  # type: ignore[arg-type]  # has a buffer
    if _read(source, 1, spec.name):
        msg = f"the tensor {spec.name} is longer than its shape allows"
        raise FormatError(msg)
    if frame is not None:
        frame.check_end()
    return digest.hexdigest()


def _check_wanted(is_wanted: Callable[[], bool] | None) -> None:
    if is_wanted is not None and not is_wanted():
        raise CancelledError


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

    def __init__(self, file: Source, length: int) -> None:
        self._file = file
        self._left = length
        self._ahead = b""

    def read(self, count: int = -1) -> bytes:
        if self._ahead:
            most = len(self._ahead) if count < 0 else count
            data, self._ahead = self._ahead[:most], self._ahead[most:]
            return data
        data = self._file.read(self._left if count < 0 else min(count, self._left))
        self._left -= len(data)
        return data

    def peek(self, count: int) -> bytes:
        """Return the next bytes, before anything else is read, without moving on."""
        data = b""
        while len(data) < count and (more := self.read(count - len(data))):
            data += more
        self._ahead = data
        return data


class _Frame:
    """One zstd frame, which says that it holds as many bytes as the tensor has, and nothing behind it.

    The decoder would pass over frames that are to be skipped, and go on with the next frame where one ends.  So what it
    reads is followed from block to block here.
    """

    def __init__(self, section: _Section, stored: int, spec: FileTensor) -> None:
        self._section, self._spec = section, spec
        zstandard = _zstandard()
        begin = section.peek(_LONGEST_FRAME_HEADER)
        try:
            header = zstandard.get_frame_parameters(begin)
            self._to_next = zstandard.frame_header_size(begin)
        except zstandard.ZstdError as error:
            msg = f"the tensor {spec.name} is no zstd frame"
            raise FormatError(msg) from error
        if not begin.startswith(_MAGIC):
            msg = f"the tensor {spec.name} is no zstd frame with content"
            raise FormatError(msg)
        if header.content_size != spec.nbytes or header.dict_id or not may_expand(stored, spec.nbytes):
            msg = f"the tensor {spec.name} says that it holds {header.content_size:,} bytes, it must be {spec.nbytes:,}"
            raise FormatError(msg)
        self._checksum = _CHECKSUM if header.has_checksum else 0
        self._block = b""  # what is known of the next block's header
        self._is_last = False

    def content(self) -> Any:  # noqa: ANN401 - zstandard has no public type
        """Return a reader of what the frame holds."""
        most = 1 << max(self._spec.nbytes - 1, 1 << 17).bit_length()
        decoder = _zstandard().ZstdDecompressor(max_window_size=most)
        return decoder.stream_reader(self, read_size=_READ, read_across_frames=True, closefd=False)

    def read(self, count: int = -1) -> bytes:
        """Return the next stored bytes, for the decoder."""
        data = self._section.read(count)
        place = 0
        while place < len(data):
            if self._to_next:
                step = min(self._to_next, len(data) - place)
                self._to_next -= step
            elif self._is_last:
                msg = f"the tensor {self._spec.name} is longer than its shape allows: its zstd frame ends before it"
                raise FormatError(msg)
            else:
                step = min(_BLOCK_HEADER - len(self._block), len(data) - place)
                self._block += data[place : place + step]
                if len(self._block) == _BLOCK_HEADER:
                    self._begin_block(int.from_bytes(self._block, "little"))
            place += step
        return data

    def _begin_block(self, header: int) -> None:
        self._block = b""
        self._is_last = bool(header & 1)
        self._to_next = 1 if header >> 1 & 3 == _REPEATED else header >> 3
        if self._is_last:
            self._to_next += self._checksum

    def check_end(self) -> None:
        """Check that nothing of the frame is missing, when all of its content has been read."""
        if self._to_next or not self._is_last:
            msg = f"the tensor {self._spec.name} is a damaged zstd frame: its end is missing"
            raise FormatError(msg)


def _zstandard() -> Any:  # noqa: ANN401 - a module
    """Return the package, which importing nexusquant_cache does not load."""
    import zstandard  # noqa: PLC0415 - see above

    return zstandard
