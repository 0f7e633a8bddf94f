"""Compressed prefixes on disk, found again by their token ids and shared by processes (docs/prefix_store.md).

A folder holds one file per prefix, as `NexusQuantCache.save` writes it, and an SQLite database that knows them.  The
database is the truth: a file counts from the moment that its row is committed until the row is deleted.  So files are
written and made durable before their row, and deleted after it; what a killed process leaves is a file without a row,
which nobody reads and a later `put` removes.
"""

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PretrainedConfig

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.files import inspect_file, verify_file
from nexusquant_cache.files.container import VERSION
from nexusquant_cache.files.fingerprint import TokenIds, describe_model
from nexusquant_cache.files.state import describe_settings, policy_name
from nexusquant_cache.files.writer import Progress
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.policy import EvictionPolicy
from nexusquant_cache.presets import CacheConfig, resolve_preset

GRACE_SECONDS = 3600.0
"""How old a file without a row must be before it is removed: it may belong to a `PrefixStore.put` under way."""

_INDEX = "index.sqlite3"
_INDEX_VERSION = 1
_OURS = re.compile(r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{32}\.safetensors\.[0-9a-f]{16}\.tmp")
_ID_BYTES = 8
_PATIENCE = 60.0  # seconds to wait for other processes
_PAUSE = 0.005  # seconds
_ATTEMPTS = 5
_OTHER = "it is not the file that was stored"
_HASHED_AT_ONCE = 1 << 20  # bytes

# Ids stand last: what scans the other columns does not read them.
_SCHEMA = (
    """CREATE TABLE entries (
        file TEXT PRIMARY KEY,
        format INTEGER NOT NULL,
        namespace TEXT NOT NULL,
        model TEXT NOT NULL,
        policy TEXT NOT NULL,
        settings TEXT NOT NULL,
        tokens INTEGER NOT NULL,
        ids_sha256 TEXT NOT NULL,
        sha256 TEXT NOT NULL,
        file_sha256 TEXT NOT NULL,
        nbytes INTEGER NOT NULL,
        used INTEGER NOT NULL,
        ids BLOB NOT NULL,
        UNIQUE (namespace, model, policy, tokens, ids_sha256, settings)
    )""",
    "CREATE INDEX by_use ON entries (used)",
    f"PRAGMA user_version = {_INDEX_VERSION}",
)
_COLUMNS = "file, namespace, model, policy, settings, tokens, sha256, file_sha256, nbytes"
_OF_THE_KIND = """
    namespace = :namespace AND model = :model AND policy = :policy AND (:settings IS NULL OR settings = :settings)"""
_ENTRIES = f"SELECT {_COLUMNS} FROM entries ORDER BY used"  # noqa: S608 - constants, here and below
_LENGTHS = f"""
    SELECT DISTINCT tokens FROM entries
    WHERE {_OF_THE_KIND} AND format <= :format AND tokens BETWEEN 1 AND :most
    ORDER BY tokens"""  # noqa: S608
_CANDIDATES = f"""
    SELECT {_COLUMNS}, ids FROM entries
    WHERE {_OF_THE_KIND} AND format <= :format AND tokens = :tokens AND ids_sha256 = :ids_sha256
    ORDER BY used DESC"""  # noqa: S608
_SAME = f"SELECT file FROM entries WHERE {_OF_THE_KIND} AND tokens = :tokens AND ids_sha256 = :ids_sha256"  # noqa: S608
_INSERT = """
    INSERT INTO entries VALUES (:file, :format, :namespace, :model, :policy, :settings, :tokens, :ids_sha256, :sha256,
        :file_sha256, :nbytes, (SELECT coalesce(max(used), 0) + 1 FROM entries), :ids)"""
_TOUCH = "UPDATE entries SET used = (SELECT max(used) + 1 FROM entries) WHERE file = ?"
_DELETE = "DELETE FROM entries WHERE file = ?"
_IDS = "SELECT ids_sha256, ids FROM entries WHERE file = ?"


@dataclass(frozen=True)
class StoreEntry:
    """A stored prefix.

    Attributes:
        file: Name of its file in the folder.
        namespace: See `PrefixStore`.
        model: Fingerprint of the model's config; empty if the cache had none.
        policy: The policy that the cache was given; empty for the default.
        settings: Every field of the cache's `CacheConfig`, as JSON.
        tokens: How many tokens the cache has seen.
        sha256: Hash of the file's content (docs/file_format.md).
        file_sha256: Hash of the bytes of the file.
        nbytes: Bytes of the file and of the token ids in the index.
    """

    file: str
    namespace: str
    model: str
    policy: str
    settings: str
    tokens: int
    sha256: str
    file_sha256: str
    nbytes: int


@dataclass(frozen=True)
class PrefixMatch:
    """A stored prefix of a prompt, and what `PrefixStore.load` needs besides.

    Attributes:
        entry: The prefix.
        token_ids: Its ids.
        config: The config that it was looked up with.
        policy: The policy that it was looked up with.
    """

    entry: StoreEntry
    token_ids: Int[Tensor, " n"] = field(repr=False, compare=False)
    config: PretrainedConfig | None = field(repr=False, compare=False)
    policy: EvictionPolicy | None = field(repr=False, compare=False)

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt that need not be read again."""
        return self.entry.tokens


class PrefixStore:
    """Keeps compressed prefixes in a folder and finds the longest one of a new prompt.

    Any number of processes and threads may use a folder at the same time, on one machine: the index relies on shared
    memory, which network file systems do not have.  What `put` has returned for survives a kill at any moment, and is
    there until it is evicted, removed or replaced.  An object holds no open files; it may be pickled and forked.

    A prefix belongs to a model, by the fingerprint of its config.  What it does not tell apart needs a namespace for
    each: models that differ in their weights alone, such as a base model and what was tuned from it, and classes of
    caches that choose policies or codecs of their own.

    Args:
        folder: Where the store is.  Files in it that are not the store's own are left alone.
        max_bytes: Bytes that files and ids may take in all; a `put` that exceeds it evicts what was used longest ago.
            Every process goes by its own limit.  None: no limit.
        namespace: Only prefixes of this namespace are found, for instance those of a model's name and revision.
        cache_class: What `load` and `get` return: a class of your own, if caches of it are put.
        create: Make the folder and the index if they are not there.

    Raises:
        OptionError: If the limit is not a positive number.
        FormatError: If the index is damaged, or was written by a later release.
        FileNotFoundError: If there is no store in the folder, and none is to be made.
        OSError: If the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        max_bytes: int | None = None,
        *,
        namespace: str = "",
        cache_class: type[NexusQuantCache] = NexusQuantCache,
        create: bool = True,
    ) -> None:
        """Open a store, or make an empty one."""
        limit: object = max_bytes  # whatever the annotation says
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            msg = f"max_bytes must be a whole number, at least 1, or None for no limit; got {max_bytes!r}"
            raise OptionError(msg)
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.namespace = namespace
        self.cache_class = cache_class
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._index = _Index(self.folder / _INDEX, create=create)
        with self._index.transaction():
            pass  # what is wrong with the index is said now

    # Writing

    def put(self, cache: NexusQuantCache, token_ids: TokenIds, *, level: int | None = 3) -> StoreEntry:
        """Store what a cache holds, in place of an older entry of the same tokens, model, policy and settings.

        When this returns, the entry is on the disk.  The cache is compressed, as it would be at its next generation
        step, and otherwise left as it is.

        Args:
            cache: A cache of one row.
            token_ids: The ids of all tokens that it has seen, ``[tokens]`` or ``[1, tokens]``.
            level: See `NexusQuantCache.save`.

        Raises:
            OptionError: If the ids do not fit the cache, or the file alone is larger than the store may be.
            OSError: If the file or the index cannot be written.
            NexusQuantError: If the cache cannot be saved, see `NexusQuantCache.save`.
        """
        ids = _checked_ids(token_ids)
        _check_cache(cache, len(ids))
        cache.compress()
        key = {**self._key(cache.model_config, cache.policy, cache.cache_config), **_describe_ids(ids)}
        self._collect()
        for _ in range(_ATTEMPTS):
            path = self.folder / f"{token_hex(16)}.safetensors"
            # Stopped for longer than the grace, this process may find its file collected: once more then.
            with contextlib.suppress(FileNotFoundError):
                cache.save(path, level=level, token_ids=ids)
                return self._enter(path, key, _id_bytes(ids))
        msg = f"new files keep disappearing from {self.folder}"
        raise OSError(msg)

    def _enter(self, path: Path, key: Mapping[str, Any], ids: bytes) -> StoreEntry:
        """Commit the row of a new file, then delete the files of those that it has replaced and driven out.

        Raises:
            FileNotFoundError: If the file is gone.
        """
        try:
            summary = inspect_file(path)
            hashes = {"sha256": summary.sha256, "file_sha256": _hash_file(path)}
            row = {**key, **hashes, "file": path.name, "nbytes": summary.file_bytes + len(ids), "ids": ids}
            self._check_size(row["nbytes"])
            with self._index.transaction(write=True) as db:
                path.stat()  # files are collected under the same lock
                gone = [file for (file,) in db.execute(_SAME, row)]
                db.executemany(_DELETE, [(file,) for file in gone])
                db.execute(_INSERT, row)
                gone += self._evict(db)
        except BaseException:
            self._withdraw(path)
            raise
        for file in gone:
            _discard(self.folder / file)
        return StoreEntry(**{name: row[name] for name in StoreEntry.__dataclass_fields__})

    def _withdraw(self, path: Path) -> None:
        """Delete the file of a `put` that has failed, unless its row was committed; in doubt, `_collect` will."""
        with contextlib.suppress(FormatError, OSError):
            with self._index.transaction() as db:
                is_known = db.execute(_IDS, (path.name,)).fetchone() is not None
            if not is_known:
                _discard(path)

    def _check_size(self, nbytes: int) -> None:
        if self.max_bytes is not None and nbytes > self.max_bytes:
            msg = f"the entry takes {nbytes:,} bytes, the whole store may take {self.max_bytes:,} (max_bytes)"
            raise OptionError(msg)

    def _evict(self, db: sqlite3.Connection) -> list[str]:
        """Delete rows until the store is small enough; return their files.  The newest is never among them."""
        if self.max_bytes is None:
            return []
        excess = _total_bytes(db) - self.max_bytes
        oldest_first = iter(db.execute("SELECT file, nbytes FROM entries ORDER BY used").fetchall())
        evicted: list[str] = []
        while excess > 0:
            file, nbytes = next(oldest_first)
            db.execute(_DELETE, (file,))
            evicted.append(file)
            excess -= nbytes
        return evicted

    def _collect(self) -> None:
        """Remove files of ours that have no row and are old enough."""
        with self._index.transaction() as db:
            known = {file for (file,) in db.execute("SELECT file FROM entries")}
        found = [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.name not in known]
        strays = [path for path in found if _age(path) > GRACE_SECONDS]
        if not strays:
            return
        # Under the lock of a `put` that may be about to enter one of them, and in a transaction that deletes no rows:
        # otherwise files would go before their rows are gone.
        with self._index.transaction(write=True) as db:
            for path in strays:
                if db.execute(_IDS, (path.name,)).fetchone() is None:
                    _discard(path)

    def remove(
        self,
        token_ids: TokenIds,
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        preset: str | CacheConfig | None = None,
    ) -> int:
        """Remove the entries of exactly these tokens; return how many there were.  Arguments as in `longest_prefix`."""
        return self._remove(_SAME, {**self._key(config, policy, preset), **_describe_ids(_checked_ids(token_ids))})

    def clear(self) -> None:
        """Remove every entry, of all models and namespaces."""
        self._remove("SELECT file FROM entries", {})

    def _remove(self, which: str, key: Mapping[str, Any]) -> int:
        """Delete the rows that a query names, then their files; return how many there were."""
        with self._index.transaction(write=True) as db:
            gone = [file for (file,) in db.execute(which, key)]
            db.executemany(_DELETE, [(file,) for file in gone])
        for file in gone:
            _discard(self.folder / file)
        return len(gone)

    # Reading

    def longest_prefix(
        self,
        token_ids: TokenIds,
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        preset: str | CacheConfig | None = None,
        leave: int = 1,
    ) -> PrefixMatch | None:
        """Return the longest stored prefix of a prompt, or None.

        Args:
            token_ids: The prompt, ``[tokens]`` or ``[1, tokens]``.
            config: The model's config; None finds caches that were made without one.
            policy: The policy that caches were given; None finds those of the default policy.
            preset: The preset or settings that caches must have; None takes any, of several the one used last.
            leave: How many tokens at the end the prefix must leave over.  The model reads at least one, for its
                logits; 0 also finds the whole prompt.

        Raises:
            OptionError: If an argument is of no use.
            FormatError: If the index is damaged.
            OSError: If the index cannot be read.
        """
        ids = _checked_ids(token_ids)
        if leave < 0:
            msg = f"leave must be 0 or more tokens, got {leave}"
            raise OptionError(msg)
        key = {**self._key(config, policy, preset), "most": len(ids) - leave}
        data = _id_bytes(ids)
        with self._index.transaction() as db:
            lengths = [length for (length,) in db.execute(_LENGTHS, key)]
            for length, digest in reversed(list(_prefix_hashes(data, lengths))):
                for *row, stored in db.execute(_CANDIDATES, {**key, "tokens": length, "ids_sha256": digest}):
                    if stored == data[: length * _ID_BYTES]:
                        return PrefixMatch(StoreEntry(*row), ids[:length], config, policy)
        return None

    def load(
        self,
        match: PrefixMatch,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offloading: bool = False,
        threads: int | None = None,
    ) -> NexusQuantCache | None:
        """Return a new cache with what a match holds, or None if it is not there any more.

        It may have been evicted since it was found.  An entry whose file is damaged is removed, with a warning.

        Args:
            match: What `longest_prefix` returned.
            device: See `NexusQuantCache.load`.
            dtype: Likewise.
            offloading: Likewise.
            threads: Likewise.

        Raises:
            FormatError: If the file is as it was written, and this process cannot read it: a codec is not registered.
            OSError: If the file is there and cannot be read, or the index cannot be written.
        """
        entry = match.entry
        try:
            cache = self._read(match, device=device, dtype=dtype, offloading=offloading, threads=threads)
        except FileNotFoundError:
            self._drop(entry.file)
            return None
        except FormatError as error:
            if self._is_as_written(entry):
                raise
            self._drop(entry.file)
            warnings.warn(f"removed a damaged entry from {self.folder}, {entry.file}: {error}", stacklevel=2)
            return None
        with self._index.transaction(write=True) as db:
            db.execute(_TOUCH, (entry.file,))
        return cache

    def _read(self, match: PrefixMatch, **options: Any) -> NexusQuantCache:  # noqa: ANN401 - those of `load`
        path = self.folder / match.entry.file
        # Names are random and files never change: nobody puts another one in this place between the two readings.
        if inspect_file(path).sha256 != match.entry.sha256:
            raise FormatError(_OTHER)
        return self.cache_class.load(
            path, config=match.config, policy=match.policy, token_ids=match.token_ids, **options
        )

    def _is_as_written(self, entry: StoreEntry) -> bool:
        """Tell whether a file has the bytes that it was stored with."""
        try:
            return _hash_file(self.folder / entry.file) == entry.file_sha256
        except FileNotFoundError:
            return False

    def _drop(self, file: str) -> None:
        with self._index.transaction(write=True) as db:
            db.execute(_DELETE, (file,))
        _discard(self.folder / file)

    def get(  # noqa: PLR0913 - all but the ids have defaults
        self,
        token_ids: TokenIds,
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        preset: str | CacheConfig | None = None,
        leave: int = 1,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        offloading: bool = False,
    ) -> tuple[NexusQuantCache, int] | None:
        """Return a cache that has seen the longest stored prefix of a prompt, and its length; None if there is none.

        ``model.generate`` takes it with the whole prompt and reads the rest.  Arguments and errors are those of
        `longest_prefix` and `load`.
        """
        while (
            match := self.longest_prefix(token_ids, config=config, policy=policy, preset=preset, leave=leave)
        ) is not None:
            cache = self.load(match, device=device, dtype=dtype, offloading=offloading)
            if cache is not None:
                return cache, match.n_tokens
        return None

    # Looking inside

    def entries(self) -> tuple[StoreEntry, ...]:
        """Return every entry, of all models and namespaces; that which was used longest ago comes first."""
        with self._index.transaction() as db:
            return tuple(StoreEntry(*row) for row in db.execute(_ENTRIES))

    def __len__(self) -> int:
        with self._index.transaction() as db:
            return int(db.execute("SELECT count(*) FROM entries").fetchone()[0])

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries."""
        with self._index.transaction() as db:
            return _total_bytes(db)

    def verify(self, *, progress: Progress | None = None) -> dict[str, str]:
        """Read everything and return what is wrong, by name of the file; nothing is changed.

        Args:
            progress: Called after each entry with the bytes done and the bytes in all.

        Raises:
            FormatError: If the index is too damaged to be read.
            OSError: If something cannot be read.
        """
        wrong: dict[str, str] = {}
        with self._index.transaction() as db:
            found = [text for (text,) in db.execute("PRAGMA integrity_check")]
        if found != ["ok"]:
            wrong[_INDEX] = "; ".join(found)
        entries = self.entries()
        done, total = 0, sum(entry.nbytes for entry in entries)
        for entry in entries:
            if fault := self._fault(entry):
                wrong[entry.file] = fault
            done += entry.nbytes
            if progress is not None:
                progress(done, total)
        return wrong

    def _fault(self, entry: StoreEntry) -> str:
        """Return what is wrong with an entry, or nothing."""
        if (ids := self._stored_ids(entry)) is None:
            return ""  # evicted meanwhile
        if hashlib.sha256(ids[1]).hexdigest() != ids[0] or len(ids[1]) != entry.tokens * _ID_BYTES:
            return "its token ids are damaged"
        if self._is_as_written(entry):
            return ""
        try:
            found = verify_file(self.folder / entry.file)
        except FileNotFoundError:
            return "it is gone" if self._stored_ids(entry) else ""
        except FormatError as error:
            return str(error)
        return "" if found.sha256 == entry.sha256 else _OTHER  # `convert_file` keeps the content

    def _stored_ids(self, entry: StoreEntry) -> tuple[str, bytes] | None:
        """Return the hash of an entry's ids and the ids, as they stand in the index; None without a row."""
        with self._index.transaction() as db:
            row: tuple[str, bytes] | None = db.execute(_IDS, (entry.file,)).fetchone()
        return row

    def _key(
        self, config: PretrainedConfig | None, policy: EvictionPolicy | None, preset: str | CacheConfig | None
    ) -> dict[str, Any]:
        """Return the columns that decide whose caches are found."""
        decoder = None if config is None else config.get_text_config(decoder=True)
        settings = None if preset is None else describe_settings(resolve_preset(preset))
        return {
            "namespace": self.namespace,
            "model": "" if decoder is None else describe_model(decoder.to_dict()).fingerprint,
            "policy": "" if policy is None else policy_name(policy),
            "settings": None if settings is None else json.dumps(settings, sort_keys=True),
            "format": VERSION,
        }


class _Index:
    """The database.  Every transaction has a connection of its own, so that forks and threads need no care."""

    def __init__(self, path: Path, *, create: bool) -> None:
        self._path = path
        self._create = create

    @contextlib.contextmanager
    def transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
        """Enter a transaction, which is committed at the end of the block, or rolled back on an error."""
        try:
            with contextlib.closing(self._begin(write=write)) as db:
                yield db
                db.execute("COMMIT")  # on an error, closing rolls back
        except sqlite3.OperationalError as error:
            kind = TimeoutError if _is_busy(error) else OSError
            msg = f"the index {self._path} cannot be used: {error}"
            raise kind(msg) from error
        except sqlite3.DatabaseError as error:
            msg = f"the index {self._path} is damaged ({error}): remove the folder, its caches can be made anew"
            raise FormatError(msg) from error

    def _begin(self, *, write: bool) -> sqlite3.Connection:
        """Return a connection inside a transaction; a first one makes the tables."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            db = self._connect()
            try:
                if not self._has_tables(db):
                    db.execute("PRAGMA auto_vacuum = FULL")  # deleted rows give their bytes back
                    db.execute("PRAGMA journal_mode = WAL")  # the database remembers both
                db.execute("PRAGMA synchronous = FULL")  # commits outlive the machine, not only the process
                db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                if self._has_tables(db):
                    return db
                if write:
                    for statement in _SCHEMA:
                        db.execute(statement)
                    return db
            except sqlite3.OperationalError as error:
                # Around the first and the last connection of all, SQLite does not wait by itself.
                if not _is_busy(error) or time.monotonic() > deadline:
                    db.close()
                    raise
                time.sleep(_PAUSE)
            except BaseException:
                db.close()
                raise
            else:
                write = True  # to make the tables
            db.close()

    def _connect(self) -> sqlite3.Connection:
        if not self._create and not self._path.is_file():
            raise FileNotFoundError(self._is_missing())
        # "rw" would do for reading too, but "ro" would not: SQLite then leaves files of its own behind.
        mode = "rwc" if self._create else "rw"
        uri = f"{self._path.absolute().as_uri()}?mode={mode}"
        return sqlite3.connect(uri, timeout=_PATIENCE, isolation_level=None, uri=True)

    def _has_tables(self, db: sqlite3.Connection) -> bool:
        """Tell whether the database is one of ours; if not, it is empty and may be made one.

        Raises:
            FormatError: If it is of a later version, or of something else.
            FileNotFoundError: If it is empty and must stay so.
        """
        # In this order: tables come together with the version, perhaps between these two statements.
        is_used = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in {0, _INDEX_VERSION}:
            msg = f"the index {self._path} is of version {version}, this release knows {_INDEX_VERSION}"
            raise FormatError(msg)
        if version == 0 and is_used:
            msg = f"{self._path} is a database of something else: choose another folder"
            raise FormatError(msg)
        if version == 0 and not self._create:
            raise FileNotFoundError(self._is_missing())
        return bool(version == _INDEX_VERSION)

    def _is_missing(self) -> str:
        return f"there is no prefix store in {self._path.parent}: it has no {self._path.name} with tables"


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return "locked" in str(error) or "locking protocol" in str(error)


def _total_bytes(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(sum(nbytes), 0) FROM entries").fetchone()[0])


def _discard(path: Path) -> None:
    """Delete a file without a row; where that fails (an open file on Windows), `_collect` tries again."""
    with contextlib.suppress(OSError):
        path.unlink()


def _age(path: Path) -> float:
    """Return the seconds since a file was last written; 0 if it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_HASHED_AT_ONCE):
            digest.update(data)
    return digest.hexdigest()


def _check_cache(cache: NexusQuantCache, tokens: int) -> None:
    rows = max((_rows(layer) for layer in cache.layers), default=1)
    if rows != 1:
        msg = f"a stored cache must have one row, this one has {rows}: take them apart with batch_select_indices"
        raise OptionError(msg)
    seen = cache.get_seq_length() if cache.layers else 0
    if seen != tokens:
        msg = f"the cache has seen {seen} tokens, token_ids are {tokens}: give the ids of all that it has seen"
        raise OptionError(msg)


def _rows(layer: object) -> int:
    """Return the rows of the batch that a layer has seen; 1 before the first."""
    states = layer.tail if isinstance(layer, NexusQuantLayer) else (getattr(layer, "keys", None),)
    return 1 if states is None or states[0] is None else len(states[0])


def _checked_ids(token_ids: TokenIds) -> Int[Tensor, " n"]:
    """Return the ids as ``[tokens]``.

    Raises:
        OptionError: If they are anything but one row of integers.
    """
    ids = torch.as_tensor(token_ids)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or ids.ndim not in {1, 2} or (ids.ndim == 2 and len(ids) != 1) or ids.numel() == 0:  # noqa: PLR2004
        msg = f"token_ids must be integers [tokens] or [1, tokens], got {ids.dtype} of shape {list(ids.shape)}"
        raise OptionError(msg)
    return ids.detach().to("cpu", torch.int64).flatten()


def _id_bytes(ids: Int[Tensor, " n"]) -> bytes:
    data: bytes = ids.numpy().astype("<i8").tobytes()
    return data


def _describe_ids(ids: Int[Tensor, " n"]) -> dict[str, Any]:
    return {"tokens": len(ids), "ids_sha256": hashlib.sha256(_id_bytes(ids)).hexdigest()}


def _prefix_hashes(data: bytes, lengths: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield the hashes of prefixes of these lengths, which ascend; every id is hashed once."""
    running, done = hashlib.sha256(), 0
    for length in lengths:
        running.update(data[done * _ID_BYTES : length * _ID_BYTES])
        done = length
        yield length, running.copy().hexdigest()
