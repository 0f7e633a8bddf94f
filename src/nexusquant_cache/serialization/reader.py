"""Reading a file: first what it says, then whether that is possible, then the tensors, then whether they are right."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from nexusquant_cache.errors import FormatError, UnsupportedError
from nexusquant_cache.serialization.checks import check_numbers, check_tensors
from nexusquant_cache.serialization.container import FORMAT, VERSION, Entry, read_header
from nexusquant_cache.serialization.entropy import CODES, decompress, may_expand
from nexusquant_cache.serialization.fingerprint import content_hash
from nexusquant_cache.serialization.schema import CacheMeta, from_json
from nexusquant_cache.serialization.streams import DTYPES, Stream, streams_of
from nexusquant_cache.serialization.writer import Progress, split_name


@dataclass(frozen=True)
class Promise:
    """What the header of a file says; nothing else of the file has been read.

    Attributes:
        meta: The metadata.
        cache: The metadata as it stands in the file.
        sha256: The hash of the content.
        tensors: Every tensor, its place in the file, and its code (None: it is stored as it is).
        header_bytes: Bytes before the first tensor.
        file_bytes: Bytes of the file.
    """

    meta: CacheMeta
    cache: str
    sha256: str
    tensors: tuple[tuple[Stream, Entry, str | None], ...]
    header_bytes: int
    file_bytes: int


def read_promise(path: Path) -> Promise:
    """Return what the header of a file says.

    Raises:
        FormatError: If the file is no saved cache, is of a later version, or contradicts itself.
        OSError: If there is no such file, or it cannot be read.
    """
    with path.open("rb") as file:
        return _read_promise(file)


def read_file(
    path: Path, *, threads: int | None = None, progress: Progress | None = None
) -> tuple[Promise, dict[str, Tensor]]:
    """Return what a file holds, with every tensor on the CPU, after all checks.

    Nothing larger is allocated than the file can fill: tensors are refused that would be more than 64 times (and
    4 KiB) larger than what is stored of them.

    Args:
        path: The file.
        threads: Threads to read with; by default as many as there are processors, up to eight.
        progress: Called after each tensor.

    Raises:
        FormatError: If anything is wrong with the file.
        UnsupportedError: On a big-endian machine.
        OSError: If there is no such file, or it cannot be read.
    """
    if sys.byteorder != "little":
        msg = "files are little-endian, and this machine is not: saving and loading is not supported here"
        raise UnsupportedError(msg)
    promise = read_promise(path)
    total = sum(stream.nbytes for stream, _, _ in promise.tensors)
    tensors, digests, done = {}, {}, 0
    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 8)) as pool:
        results = pool.map(lambda x: _read_tensor(path, *x), promise.tensors)
        for (stream, _, _), (tensor, digest) in zip(promise.tensors, results, strict=True):
            tensors[stream.name], digests[stream.name] = tensor, digest
            done += stream.nbytes
            if progress is not None:
                progress(done, total)
    if content_hash(promise.cache, digests) != promise.sha256:
        msg = "the content of the file does not have the hash that it was written with: it is damaged"
        raise FormatError(msg)
    check_tensors(promise.meta, tensors)
    return promise, tensors


def _read_promise(file: BinaryIO) -> Promise:
    metadata, entries = read_header(file)
    if metadata.get("format") != FORMAT:
        msg = "the file is of another kind: it was not written by NexusQuantCache.save"
        raise FormatError(msg)
    version = metadata.get("version", "")
    if version != str(VERSION):
        newer = version.isascii() and version.isdigit() and int(version[:9]) > VERSION
        hint = "it was written by a later release: update nexusquant-cache" if newer else "there is no such version"
        msg = f"the file is of format version {version[:20]!r}, this release reads {VERSION}; {hint}"
        raise FormatError(msg)
    if set(metadata) != {"format", "version", "cache", "sha256"}:
        msg = "the metadata must be format, version, cache and sha256"
        raise FormatError(msg)
    meta = from_json(metadata["cache"])
    check_numbers(meta)
    streams = streams_of(meta)
    tensors = []
    for entry in entries:
        name, code = split_name(entry.name)
        stream = streams.pop(name, None)
        if stream is None:
            msg = f"the file holds a tensor {entry.name[:60]!r} that its metadata does not announce, or holds it twice"
            raise FormatError(msg)
        _check_entry(stream, entry, code)
        tensors.append((stream, entry, code))
    if streams:
        msg = f"the file lacks the tensor {min(streams)}"
        raise FormatError(msg)
    first = min((entry.start for entry in entries), default=file.seek(0, 2))
    return Promise(meta, metadata["cache"], metadata["sha256"], tuple(tensors), first, file.seek(0, 2))


def _check_entry(stream: Stream, entry: Entry, code: str | None) -> None:
    """Check that what is stored of a tensor can be what the metadata announces."""
    if code is None:
        fits = entry.dtype == DTYPES[stream.dtype][0] and entry.shape == stream.shape
    else:
        fits = code in CODES and entry.dtype == "U8" and len(entry.shape) == 1
        fits = fits and (entry.nbytes == stream.nbytes if code == "bytes" else may_expand(entry.nbytes, stream.nbytes))
    if not fits:
        msg = f"what is stored of {stream.name} ({entry.nbytes:,} bytes) cannot be {stream.dtype} {list(stream.shape)}"
        raise FormatError(msg)


def _read_tensor(path: Path, stream: Stream, entry: Entry, code: str | None) -> tuple[Tensor, str]:
    """Return a tensor and the hash of its bytes."""
    tensor = torch.empty(stream.shape, dtype=DTYPES[stream.dtype][1])
    groups, items, width = stream.rows
    flat = tensor.view(-1).view(torch.uint8).view(groups, items, width)
    with path.open("rb") as file:
        file.seek(entry.start)
        return tensor, decompress(stream, file, entry.nbytes, code or "bytes", flat)
