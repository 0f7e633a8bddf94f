"""Reading a file: first what it says, then whether that is possible, then the tensors, then whether they are right."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from nexusquant_cache.errors import FormatError, OptionError, UnsupportedError
from nexusquant_cache.files.checks import check_numbers, check_positions, check_tensors
from nexusquant_cache.files.container import FORMAT, VERSION, Entry, read_header, versions_of
from nexusquant_cache.files.contents import DTYPES, FileTensor, tensors_of
from nexusquant_cache.files.fingerprint import content_hash
from nexusquant_cache.files.packing import PACKINGS, decompress, may_expand
from nexusquant_cache.files.schema import CacheMeta, from_json
from nexusquant_cache.files.writer import Progress, check_threads, split_name, stoppable_pool

_TOGETHER = 1 << 20  # bytes of small tensors that are read in one go: handing each to a thread would take longer
_EXACT = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_Tensor = tuple[FileTensor, Entry, str | None]


@dataclass(frozen=True)
class Promise:
    """What the header of a file says; nothing else of the file has been read.

    Attributes:
        meta: The metadata.
        cache: The metadata as it stands in the file.
        sha256: The hash of the content.
        tensors: Every tensor, its place in the file, and its packing (None: it is stored as it is).
        header_bytes: Bytes before the first tensor.
        file_bytes: Bytes of the file.
    """

    meta: CacheMeta
    cache: str
    sha256: str
    tensors: tuple[tuple[FileTensor, Entry, str | None], ...]
    header_bytes: int
    file_bytes: int


def read_promise(path: Path) -> Promise:
    """Return what the header of a file says.

    Raises:
        FormatError: If the file is no saved cache, is of a later version, or contradicts itself.
        OSError: If there is no such file, or it cannot be read.
    """
    with _opened(path) as file:
        return _read_promise(file)


def read_file(
    path: Path, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[Promise, dict[str, Tensor]]:
    """Return what a file holds, with every tensor on the CPU, after all checks.

    Nothing larger is allocated than the file can fill: tensors are refused that would be more than 64 times (and
    4 KiB) larger than what is stored of them.  The file is opened once: if another takes its place meanwhile, or it is
    deleted, it is still this one that is read.

    Args:
        path: The file.
        threads: Threads to read with; by default as many as there are processors, up to eight.
        progress: Called after each tensor.

    Raises:
        FormatError: If anything is wrong with the file.
        OptionError: If ``threads`` is no number of threads.
        UnsupportedError: On a big-endian machine.
        OSError: If there is no such file, or it cannot be read.
    """
    if sys.byteorder != "little":
        msg = "files are little-endian, and this machine is not: saving and loading is not supported here"
        raise UnsupportedError(msg)
    workers = check_threads(threads)
    tensors, digests, done = {}, {}, 0
    with _opened(path) as file:
        promise = _read_promise(file)
        total = sum(spec.nbytes for spec, _, _ in promise.tensors)
        with stoppable_pool(workers) as (pool, is_wanted):
            shared = _Shared(file, is_wanted)
            jobs = [pool.submit(shared.read_tensors, batch) for batch in _batches(promise.tensors)]
            for job in jobs:
                for spec, tensor, digest in job.result():
                    tensors[spec.name], digests[spec.name] = tensor, digest
                    done += spec.nbytes
                    if progress is not None:
                        progress(done, total)
    if content_hash(promise.cache, digests) != promise.sha256:
        msg = "the content of the file does not have the hash that it was written with: it is damaged"
        raise FormatError(msg)
    check_tensors(promise.meta, tensors)
    return promise, tensors


def read_positions(path: Path) -> tuple[Promise, dict[str, Tensor]]:
    """Return what the header of a file says, and the tensors that tell which tokens are kept, after their own checks.

    No other tensor is read, so the hash of the content is not checked.

    Raises:
        FormatError: If the file is no saved cache, is of a later version, or contradicts itself.
        OSError: If there is no such file, or it cannot be read.
    """
    with _opened(path) as file:
        promise = _read_promise(file)
        shared = _Shared(file, lambda: True)
        wanted = [tensor for tensor in promise.tensors if tensor[0].kind == "positions"]
        tensors = {spec.name: tensor for spec, tensor, _ in shared.read_tensors(wanted)}
    check_positions(promise.meta, tensors)
    return promise, tensors


def _read_promise(file: BinaryIO) -> Promise:
    metadata, entries = read_header(file)
    if metadata.get("format") != FORMAT:
        msg = "the file is of another kind: it was not written by NexusQuantCache.save"
        raise FormatError(msg)
    version = metadata.get("version", "")
    if version not in map(str, range(1, VERSION + 1)):
        newer = version.isascii() and version.isdigit() and int(version[:9]) > VERSION
        hint = "it was written by a later release: update nexusquant-cache" if newer else "there is no such version"
        msg = f"the file is of format version {version[:20]!r}, this release reads 1 to {VERSION}; {hint}"
        raise FormatError(msg)
    if set(metadata) != {"format", "version", "cache", "sha256"}:
        msg = "the metadata must be format, version, cache and sha256"
        raise FormatError(msg)
    meta = from_json(metadata["cache"])
    if int(version) not in versions_of(meta):
        msg = f"the metadata are none of format version {version}"
        raise FormatError(msg)
    check_numbers(meta)
    announced = tensors_of(meta)
    tensors = []
    for entry in entries:
        name, packing = split_name(entry.name)
        spec = announced.pop(name, None)
        if spec is None:
            msg = f"the file holds a tensor {entry.name[:60]!r} that its metadata does not announce, or holds it twice"
            raise FormatError(msg)
        _check_entry(spec, entry, packing)
        tensors.append((spec, entry, packing))
    if announced:
        msg = f"the file lacks the tensor {min(announced)}"
        raise FormatError(msg)
    first = min((entry.start for entry in entries), default=file.seek(0, 2))
    return Promise(meta, metadata["cache"], metadata["sha256"], tuple(tensors), first, file.seek(0, 2))


def _check_entry(spec: FileTensor, entry: Entry, packing: str | None) -> None:
    """Check that what is stored of a tensor can be what the metadata announces."""
    if packing is None:
        fits = entry.dtype == DTYPES[spec.dtype][0] and entry.shape == spec.shape
    else:
        fits = packing in PACKINGS and entry.dtype == "U8" and len(entry.shape) == 1
        fits = fits and (entry.nbytes == spec.nbytes if packing == "bytes" else may_expand(entry.nbytes, spec.nbytes))
    if not fits:
        msg = f"what is stored of {spec.name} ({entry.nbytes:,} bytes) cannot be {spec.dtype} {list(spec.shape)}"
        raise FormatError(msg)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise OptionError if tokens in full precision cannot be of this dtype."""
    given: object = dtype  # whatever the annotation says
    if given is not None and given not in _EXACT:
        msg = f"dtype must be one of {', '.join(map(str, _EXACT))}, or None for that of the file, got {dtype!r}"
        raise OptionError(msg)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file, and nothing that could keep its reader waiting, or never end.

    Raises:
        FormatError: If it is a pipe, a device or the like.
        OSError: If it is a folder, is not there, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    # Without O_NONBLOCK, opening a pipe would wait for someone who writes to it.
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    try:
        _check_regular(path, os.fstat(descriptor).st_mode)
        file = os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    with file:
        yield file


def _check_regular(path: Path, mode: int) -> None:
    if S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not S_ISREG(mode):
        msg = f"{path} is no regular file, so it is no saved cache"
        raise FormatError(msg)


def _batches(tensors: tuple[_Tensor, ...]) -> Iterator[list[_Tensor]]:
    """Yield the tensors in their order: large ones one by one, small ones together."""
    batch: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        if batch and size + tensor[0].nbytes > _TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(tensor)
        size += tensor[0].nbytes
    if batch:
        yield batch


class _Shared:
    """An open file, of which several threads read different parts."""

    def __init__(self, file: BinaryIO, is_wanted: Callable[[], bool]) -> None:
        self._file, self._is_wanted = file, is_wanted
        self._lock = Lock()

    def read_at(self, place: int, count: int) -> bytes:
        """Return at most so many bytes from a place on."""
        if not self._is_wanted():
            raise CancelledError
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), count, place)
        with self._lock:
            self._file.seek(place)
            return self._file.read(count)

    def read_tensors(self, batch: list[_Tensor]) -> list[tuple[FileTensor, Tensor, str]]:
        """Return tensors and the hashes of their bytes."""
        return [self._read_tensor(*tensor) for tensor in batch]

    def _read_tensor(self, spec: FileTensor, entry: Entry, packing: str | None) -> tuple[FileTensor, Tensor, str]:
        tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype][1])
        groups, items, width = spec.rows
        flat = tensor.view(-1).view(torch.uint8).view(groups, items, width)
        return spec, tensor, decompress(spec, _Part(self, entry.start), entry.nbytes, packing or "bytes", flat)


class _Part:
    """A shared file from a place on, for one thread."""

    def __init__(self, shared: _Shared, place: int) -> None:
        self._shared, self._place = shared, place

    def read(self, count: int, /) -> bytes:
        data = self._shared.read_at(self._place, count)
        self._place += len(data)
        return data
