"""Writing a file in one go: tensors are compressed in parallel and written in order, the header is filled in last."""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO, TypeAlias

from torch import Tensor

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.serialization.container import FORMAT, VERSION, header_bytes, padded_header
from nexusquant_cache.serialization.entropy import check_level, choose_code, compress, hash_bytes, pieces
from nexusquant_cache.serialization.fingerprint import content_hash
from nexusquant_cache.serialization.schema import CacheMeta, to_json
from nexusquant_cache.serialization.streams import DTYPES, Stream, streams_of

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many bytes of how many, before compression, are done."""

_AT_ONCE = 64 << 20  # bytes being compressed at once, or one tensor if that is more
_NO_HASH = "0" * 64
_SEPARATOR = ":"


@dataclass(frozen=True)
class Stored:
    """What has become of one tensor: the code that it is stored in (None: as it is) and its bytes."""

    stream: Stream
    code: str | None
    nbytes: int


@dataclass(frozen=True)
class AtRest:
    """What a cache takes in a file, by kind of tensor.

    Attributes:
        tensors: Every tensor with its code and stored bytes.
        header_bytes: Bytes of the header, metadata included.
    """

    tensors: tuple[Stored, ...]
    header_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of the file."""
        return self.header_bytes + sum(tensor.nbytes for tensor in self.tensors)

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """For each kind of tensor, the bytes of its packed form and the bytes at rest."""
        sums: dict[str, tuple[int, int]] = {}
        for tensor in self.tensors:
            packed, stored = sums.get(tensor.stream.kind, (0, 0))
            sums[tensor.stream.kind] = packed + tensor.stream.nbytes, stored + tensor.nbytes
        return sums

    def codes(self, kind: str) -> tuple[str, ...]:
        """Return the codes that tensors of a kind are stored in, without repeats."""
        used = (tensor.code or "raw" for tensor in self.tensors if tensor.stream.kind == kind and tensor.stream.nbytes)
        return tuple(dict.fromkeys(used))


def write_file(  # noqa: PLR0913 - what a file is made of, and how
    path: Path,
    meta: CacheMeta,
    tensors: Mapping[str, Tensor],
    *,
    level: int | None = 3,
    threads: int | None = None,
    progress: Progress | None = None,
) -> AtRest:
    """Write a file, or leave everything as it was.

    The bytes go to a new file beside ``path``, which takes its name when all of them are on the disk.

    Args:
        path: Where to.
        meta: The metadata, which decides names, dtypes and shapes.
        tensors: The tensors by name, on any device.
        level: Of zstd, 1 to 22; None stores every tensor as it is, for any reader of safetensors.
        threads: Threads to compress with; by default as many as there are processors, up to eight.
        progress: Called after each tensor.

    Raises:
        OptionError: If the level is none.
        UnsupportedError: On a big-endian machine.
        OSError: If the file cannot be written.
    """
    check_level(level)
    temporary = path.with_name(f".{path.name}.{token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            report = _write(file, meta, tensors, _Plan(level, threads, progress))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)
    return report


def measure(
    meta: CacheMeta, tensors: Mapping[str, Tensor], *, level: int | None = 3, threads: int | None = None
) -> AtRest:
    """Return what `write_file` would write, without writing it."""
    check_level(level)
    return _write(_Nowhere(), meta, tensors, _Plan(level, threads, None))


def split_name(name: str) -> tuple[str, str | None]:
    """Return the name of a tensor and its code, from its name in a file."""
    plain, found, code = name.partition(_SEPARATOR)
    return plain, code if found else None


@dataclass(frozen=True)
class _Plan:
    """How to write."""

    level: int | None
    threads: int | None
    progress: Progress | None

    @property
    def workers(self) -> int:
        return self.threads or min(os.cpu_count() or 1, 8)


class _Nowhere:
    """Takes bytes and forgets them."""

    def __init__(self) -> None:
        self._place = 0

    def write(self, data: bytes) -> int:
        self._place += len(data)
        return len(data)

    def seek(self, place: int) -> int:
        self._place = place
        return place


def _write(file: BinaryIO | _Nowhere, meta: CacheMeta, tensors: Mapping[str, Tensor], plan: _Plan) -> AtRest:
    if sys.byteorder != "little":
        msg = "files are little-endian, and this machine is not: saving and loading is not supported here"
        raise UnsupportedError(msg)
    streams = streams_of(meta)
    assert set(streams) == set(tensors), set(streams) ^ set(tensors)
    codes = {name: choose_code(stream, tensors[name], plan.level) for name, stream in streams.items()}
    # Those that keep their dtype come first, wide ones before narrow ones, so that readers find them aligned.
    order = sorted(streams.values(), key=lambda x: (codes[x.name] is not None, -x.itemsize))
    cache = to_json(meta)
    metadata = {"format": FORMAT, "version": str(VERSION), "cache": cache, "sha256": _NO_HASH}
    # With every tensor as long as it can get, and no name longer than this, the header cannot outgrow its place.
    room = len(header_bytes(metadata, [_entry(Stored(x, _longer(codes[x.name]), x.nbytes)) for x in order]))
    file.seek(room)
    stored, digests, done = [], {}, 0
    for part, chunks, digest in _encoded(order, tensors, codes, plan):
        for chunk in chunks:
            file.write(chunk)
        stored.append(part)
        digests[part.stream.name] = digest
        done += part.stream.nbytes
        if plan.progress is not None:
            plan.progress(done, sum(stream.nbytes for stream in order))
    metadata["sha256"] = content_hash(cache, digests)
    file.seek(0)
    file.write(padded_header(header_bytes(metadata, [_entry(part) for part in stored]), room))
    return AtRest(tuple(stored), room)


def _entry(part: Stored) -> tuple[str, str, tuple[int, ...], int]:
    """Return the container's entry of a tensor."""
    stream = part.stream
    if part.code is None:
        return stream.name, DTYPES[stream.dtype][0], stream.shape, part.nbytes
    return f"{stream.name}{_SEPARATOR}{part.code}", "U8", (part.nbytes,), part.nbytes


def _longer(code: str | None) -> str | None:
    """Return the code, or the one that may take its place if that has a longer name."""
    return None if code is None else max(code, "bytes", key=len)


def _encoded(
    order: list[Stream], tensors: Mapping[str, Tensor], codes: Mapping[str, str | None], plan: _Plan
) -> Iterator[tuple[Stored, Iterator[bytes] | list[bytes], str]]:
    """Yield every tensor in this order with its stored bytes and the hash of its own."""

    def work(stream: Stream) -> tuple[Stored, Iterator[bytes] | list[bytes], str]:
        tensor, code = tensors[stream.name], codes[stream.name]
        if code is None or plan.level is None:
            plain = (part.numpy().tobytes() for part in pieces(stream, tensor))
            return Stored(stream, None, stream.nbytes), plain, hash_bytes(stream, tensor)
        chunks, used, digest = compress(stream, tensor, code, plan.level, plan.workers)
        return Stored(stream, used, sum(map(len, chunks))), chunks, digest

    with ThreadPoolExecutor(plan.workers) as pool:
        waiting: deque[tuple[Stream, Future[tuple[Stored, Iterator[bytes] | list[bytes], str]]]] = deque()
        for stream in order:
            while waiting and sum(x.nbytes for x, _ in waiting) + stream.nbytes > _AT_ONCE:
                yield waiting.popleft()[1].result()
            waiting.append((stream, pool.submit(work, stream)))
        while waiting:
            yield waiting.popleft()[1].result()


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk too, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
