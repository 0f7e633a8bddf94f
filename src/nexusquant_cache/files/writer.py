"""Writing a file in one go: tensors are compressed in parallel and written in order, the header is filled in last."""

import contextlib
import errno
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from stat import S_IMODE, S_ISDIR, S_ISREG
from threading import Event
from typing import BinaryIO, TypeAlias

from torch import Tensor

from nexusquant_cache.errors import OptionError, UnsupportedError
from nexusquant_cache.files.container import FORMAT, header_bytes, padded_header, versions_of
from nexusquant_cache.files.contents import DTYPES, FileTensor, tensors_of
from nexusquant_cache.files.fingerprint import content_hash
from nexusquant_cache.files.packing import (
    check_level,
    choose_packing,
    compress,
    encode,
    hash_bytes,
    is_worth,
    pieces,
    working_memory,
)
from nexusquant_cache.files.schema import CacheMeta, to_json

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many bytes of how many, before compression, are done."""

_AT_ONCE = 64 << 20  # bytes of the tensors that are compressed ahead of the one that is being written
_TABLES = 512 << 20  # bytes that zstd may take for that
_LARGE = 32 << 20  # bytes of a tensor that is not held, but written as it is compressed
_MOST_THREADS = 256
_LARGE_THREADS = 4  # of zstd, for a large tensor: each holds 16 MiB and more, and one thread arranges the bytes for all
_LONG_NAME = 100  # bytes of a file's name, of the 255 or fewer that most systems allow
_NO_HASH = "0" * 64
_SEPARATOR = ":"


@dataclass(frozen=True)
class Stored:
    """What has become of one tensor: the packing that it is stored in (None: as it is) and its bytes."""

    spec: FileTensor
    packing: str | None
    nbytes: int


@dataclass(frozen=True)
class AtRest:
    """What a cache takes in a file, by kind of tensor.

    Attributes:
        tensors: Every tensor with its packing and stored bytes.
        header_bytes: Bytes of the header, metadata included.
    """

    tensors: tuple[Stored, ...] = field(repr=False)
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
            packed, stored = sums.get(tensor.spec.kind, (0, 0))
            sums[tensor.spec.kind] = packed + tensor.spec.nbytes, stored + tensor.nbytes
        return sums

    def packings(self, kind: str) -> tuple[str, ...]:
        """Return the packings that tensors of a kind are stored in, without repeats."""
        used = (tensor.packing or "raw" for tensor in self.tensors if tensor.spec.kind == kind and tensor.spec.nbytes)
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

    The bytes go to a new file beside ``path``, which takes its name when all of them are on the disk.  It has the
    permissions of the file that it replaces.

    Args:
        path: Where to; of a symbolic link, to what it points to.
        meta: The metadata, which decides names, dtypes and shapes.
        tensors: The tensors by name, on any device.
        level: Of zstd, 1 to 22; None stores every tensor as it is, for any reader of safetensors.
        threads: Threads to compress with; by default as many as there are processors, up to eight.
        progress: Called after each tensor.

    Raises:
        OptionError: If ``level`` or ``threads`` is out of its range, or the header would be too long to be read again.
        FormatError: If the metadata contradicts itself.
        UnsupportedError: On a big-endian machine.
        OSError: If the file cannot be written, or something else than a file has its name.
    """
    check_level(level)
    plan = _Plan(level, check_threads(threads), progress)
    target, mode = _target(path)
    temporary = _beside(target)
    try:
        with _created(temporary, mode) as file:
            report = _write(file, meta, tensors, plan)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(target.parent)
    return report


def measure(
    meta: CacheMeta, tensors: Mapping[str, Tensor], *, level: int | None = 3, threads: int | None = None
) -> AtRest:
    """Return what `write_file` would write, without writing it; errors are the same, but for those of the disk."""
    check_level(level)
    return _write(_Nowhere(), meta, tensors, _Plan(level, check_threads(threads), None))


def check_threads(threads: int | None) -> int:
    """Return a number of threads, by default that of the processors, up to eight.

    Raises:
        OptionError: If it is no whole number from 1 to 256.
    """
    given: object = threads  # whatever the annotation says
    if given is None:
        return min(os.cpu_count() or 1, 8)
    if type(given) is not int or not 1 <= given <= _MOST_THREADS:
        msg = f"threads must be a whole number from 1 to {_MOST_THREADS}, or None for a good one, got {threads!r}"
        raise OptionError(msg)
    return given


@contextlib.contextmanager
def stoppable_pool(workers: int) -> Iterator[tuple[ThreadPoolExecutor, Callable[[], bool]]]:
    """Yield a pool of threads, and what tells its work whether it is still wanted.

    Leaving the block by an error or an interrupt drops what has not begun, and waits only for work that does not ask.
    """
    is_over = Event()
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool, lambda: not is_over.is_set()
    finally:
        is_over.set()
        pool.shutdown(cancel_futures=True)


def split_name(name: str) -> tuple[str, str | None]:
    """Return the name of a tensor and its packing, from its name in a file."""
    plain, found, packing = name.partition(_SEPARATOR)
    return plain, packing if found else None


@dataclass(frozen=True)
class _Plan:
    """How to write."""

    level: int | None
    workers: int
    progress: Progress | None


class _Nowhere:
    """Takes bytes and forgets them."""

    def write(self, data: bytes) -> int:
        return len(data)

    def seek(self, place: int) -> int:
        return place

    def tell(self) -> int:
        return 0

    def truncate(self) -> int:
        return 0


def _write(file: BinaryIO | _Nowhere, meta: CacheMeta, tensors: Mapping[str, Tensor], plan: _Plan) -> AtRest:
    if sys.byteorder != "little":
        msg = "files are little-endian, and this machine is not: saving and loading is not supported here"
        raise UnsupportedError(msg)
    specs = tensors_of(meta)
    assert set(specs) == set(tensors), set(specs) ^ set(tensors)
    packings = {name: choose_packing(spec, tensors[name], plan.level) for name, spec in specs.items()}
    # Those that keep their dtype come first, wide ones before narrow ones, so that readers find them aligned.
    order = sorted(specs.values(), key=lambda x: (packings[x.name] is not None, -x.itemsize))
    cache = to_json(meta)
    metadata = {"format": FORMAT, "version": str(versions_of(meta)[0]), "cache": cache, "sha256": _NO_HASH}
    # With every tensor as long as it can get, and no name longer than this, the header cannot outgrow its place.
    room = len(header_bytes(metadata, [_entry(Stored(x, _longer(packings[x.name]), x.nbytes)) for x in order]))
    file.seek(room)
    stored, digests, done, total = [], {}, 0, sum(spec.nbytes for spec in order)
    with contextlib.closing(_Tensors(file, tensors, packings, plan).written(order)) as written:
        for part, digest in written:
            stored.append(part)
            digests[part.spec.name] = digest
            done += part.spec.nbytes
            if plan.progress is not None:
                plan.progress(done, total)
    file.truncate()  # a tensor that did not shrink after all may have left something behind it
    metadata["sha256"] = content_hash(cache, digests)
    file.seek(0)
    file.write(padded_header(header_bytes(metadata, [_entry(part) for part in stored]), room))
    return AtRest(tuple(stored), room)


def _entry(part: Stored) -> tuple[str, str, tuple[int, ...], int]:
    """Return the container's entry of a tensor."""
    spec = part.spec
    if part.packing is None:
        return spec.name, DTYPES[spec.dtype][0], spec.shape, part.nbytes
    return f"{spec.name}{_SEPARATOR}{part.packing}", "U8", (part.nbytes,), part.nbytes


def _longer(packing: str | None) -> str | None:
    """Return the packing, or the one that may take its place if that has a longer name."""
    return None if packing is None else max(packing, "bytes", key=len)


@dataclass(frozen=True)
class _Made:
    """A tensor that is ready to be written: its stored bytes, and the hash of its own."""

    part: Stored
    chunks: Iterator[bytes] | list[bytes]
    digest: str


@dataclass(frozen=True)
class _Tensors:
    """Tensors on their way into a file: many are compressed at once, and written in order."""

    file: BinaryIO | _Nowhere
    tensors: Mapping[str, Tensor]
    packings: Mapping[str, str | None]
    plan: _Plan

    def written(self, order: list[FileTensor]) -> Generator[tuple[Stored, str], None, None]:
        """Write the tensors in this order, and yield for each what it has become and the hash of its own bytes."""
        waiting: deque[tuple[FileTensor, Future[_Made]]] = deque()
        ahead = tables = 0
        with stoppable_pool(self.plan.workers) as (pool, is_wanted):
            for spec in order:
                is_large, needs = spec.nbytes > _LARGE, self._tables(spec)
                while waiting and (is_large or ahead + spec.nbytes > _AT_ONCE or tables + needs > _TABLES):
                    first, future = waiting.popleft()
                    ahead, tables = ahead - first.nbytes, tables - self._tables(first)
                    yield self._put(future.result())
                    del future  # it holds what has been written
                if is_large:
                    yield self._put_large(spec)
                else:
                    waiting.append((spec, pool.submit(self._make, spec, is_wanted)))
                    ahead, tables = ahead + spec.nbytes, tables + needs
            while waiting:
                yield self._put(waiting.popleft()[1].result())

    def _tables(self, spec: FileTensor) -> int:
        level = self.plan.level
        return 0 if level is None or self.packings[spec.name] is None else working_memory(spec, level)

    def _make(self, spec: FileTensor, is_wanted: Callable[[], bool]) -> _Made:
        tensor, packing, level = self.tensors[spec.name], self.packings[spec.name], self.plan.level
        if packing is None or level is None:
            plain = (part.numpy().tobytes() for part in pieces(spec, tensor))
            return _Made(Stored(spec, None, spec.nbytes), plain, hash_bytes(spec, tensor, is_wanted))
        chunks, used, digest = compress(spec, tensor, packing, level, 0, is_wanted)
        return _Made(Stored(spec, used, sum(map(len, chunks))), chunks, digest)

    def _put(self, made: _Made) -> tuple[Stored, str]:
        for chunk in made.chunks:
            self.file.write(chunk)
        return made.part, made.digest

    def _put_large(self, spec: FileTensor) -> tuple[Stored, str]:
        """Write a tensor as it is compressed, by several threads of zstd; no other is compressed meanwhile."""
        tensor, packing, level = self.tensors[spec.name], self.packings[spec.name], self.plan.level
        start = self.file.tell()
        if packing is not None and level is not None:
            digest = hashlib.sha256()
            threads = max(min(self.plan.workers, _LARGE_THREADS, _TABLES // working_memory(spec, level)), 1)
            size = sum(map(self.file.write, encode(spec, tensor, packing, level, threads, digest)))
            if is_worth(size, spec.nbytes):
                return Stored(spec, packing, size), digest.hexdigest()
            self.file.seek(start)
        digest = hashlib.sha256()
        for part in pieces(spec, tensor):
            digest.update(part.numpy())  # type: ignore[arg-type]  # has a buffer
            self.file.write(part.numpy().tobytes())
        return Stored(spec, None if packing is None else "bytes", spec.nbytes), digest.hexdigest()


def _target(path: Path) -> tuple[Path, int | None]:
    """Return where a file is to be, behind all symbolic links, and the permissions of the one that is there.

    Raises:
        OSError: If a folder, a device or the like is there: it would be lost, or could not be replaced.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target, None
    if S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "What has this name is no regular file, and is not replaced", str(path))
    return target, S_IMODE(mode) & 0o777


def _beside(path: Path) -> Path:
    """Return a new name for a file in the same folder, which must not be too long where that of the file is not."""
    own = f".{path.name}" if len(os.fsencode(path.name)) <= _LONG_NAME else ""
    return path.with_name(f"{own}.{token_hex(8)}.tmp")


def _created(path: Path, mode: int | None) -> BinaryIO:
    """Open a new file with these permissions, or the usual ones, and at no time with more."""
    file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else 0o600))  # noqa: SIM115
    if mode is not None and hasattr(os, "fchmod"):
        with contextlib.suppress(OSError):  # not every file system has permissions
            os.fchmod(file.fileno(), mode)
    return file


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk too, where the system can; where it cannot, the file is there all the same."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
