"""What can be done with a file without the model that it belongs to."""

from dataclasses import dataclass
from pathlib import Path

from nexusquant_cache.files.packing import check_level
from nexusquant_cache.files.reader import Promise, read_file, read_promise
from nexusquant_cache.files.schema import CacheMeta
from nexusquant_cache.files.writer import AtRest, Progress, Stored, write_file


@dataclass(frozen=True)
class KindSummary:
    """All tensors of one kind: their bytes in a cache, their bytes in the file, and their packings there."""

    kind: str
    packed_bytes: int
    stored_bytes: int
    packings: tuple[str, ...]


@dataclass(frozen=True)
class FileSummary:
    """What a file says of itself.

    Attributes:
        meta: Its metadata.
        sha256: The hash of its content, which stays the same when it is packed otherwise.
        kinds: A row per kind of tensor.
        header_bytes: Bytes of the header.
        file_bytes: Bytes of the file.
    """

    meta: CacheMeta
    sha256: str
    kinds: tuple[KindSummary, ...]
    header_bytes: int
    file_bytes: int


def inspect_file(path: str | Path) -> FileSummary:
    """Return what the header of a file says; the tensors are not read, and may be damaged.

    Raises:
        FormatError: If the file is no saved cache, is of a later version, or contradicts itself.
        OSError: If it cannot be read.
    """
    return summary_of(read_promise(Path(path)))


def verify_file(path: str | Path, *, progress: Progress | None = None) -> FileSummary:
    """Read a file completely and check everything that `NexusQuantCache.load` would check without a model.

    Raises:
        FormatError: If anything is wrong with the file.
        OSError: If it cannot be read.
    """
    return summary_of(read_file(Path(path), progress=progress)[0])


def convert_file(
    path: str | Path, output: str | Path, *, level: int | None = 3, progress: Progress | None = None
) -> AtRest:
    """Write the content of a file anew, with another level; its hash stays the same.

    Args:
        path: The file.
        output: The new file, which may be the same.
        level: Of zstd, 1 (fast) to 22 (small); None stores tensors as they are, for any reader of safetensors.
        progress: Called after each tensor that is written.

    Raises:
        FormatError: If anything is wrong with the file.
        OptionError: If the level is out of its range.
        OSError: If a file cannot be read or written.
    """
    check_level(level)
    promise, tensors = read_file(Path(path))
    return write_file(Path(output), promise.meta, tensors, level=level, progress=progress)


def summary_of(promise: Promise) -> FileSummary:
    """Return what the header of a file says, with its tensors by kind."""
    stored = AtRest(
        tuple(Stored(spec, packing, entry.nbytes) for spec, entry, packing in promise.tensors), promise.header_bytes
    )
    rows = tuple(KindSummary(kind, *sizes, stored.packings(kind)) for kind, sizes in stored.kinds.items())
    return FileSummary(promise.meta, promise.sha256, rows, promise.header_bytes, promise.file_bytes)
