"""The index of a prefix store: an SQLite database with a row for each entry, and the order in which they were used."""

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.errors import FormatError

ID_BYTES = 8
"""Bytes of a token id in the index."""

_VERSION = 1
_PATIENCE = 60.0  # seconds to wait for other processes
_PAUSE = 0.005  # seconds

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
    f"PRAGMA user_version = {_VERSION}",
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
_FILES = "SELECT file FROM entries"
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


class StoreIndex:
    """The index.  Every transaction has a connection of its own, so that forks and threads need no care.

    A key names the columns that decide whose entries are found: ``namespace``, ``model``, ``policy``, ``settings``
    (None: any) and ``format``.  Together with `describe_ids` it names an entry.

    Args:
        path: The database.
        create: Make it if it is not there.

    Raises:
        FormatError: From here and every method, if the database is damaged, of a later version, or of something else.
        FileNotFoundError: Likewise, if there is none and none is to be made.
        OSError: Likewise, if it cannot be used.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        """Check the database, or make an empty one."""
        self._path = path
        self._create = create
        with self._transaction():
            pass  # what is wrong is said now

    # Writing

    def enter(self, row: Mapping[str, Any], limit: int | None, check: Callable[[], object]) -> list[str]:
        """Commit the row of a new file; return the files of those that it has replaced and driven out.

        Args:
            row: All columns but the use.
            limit: Bytes that all entries may take; None: no limit.
            check: Called while nobody else can write; what it raises leaves everything as it was.
        """
        with self._transaction(write=True) as db:
            check()
            gone = _delete_found(db, _SAME, row)
            db.execute(_INSERT, row)
            return gone + _evict(db, limit)

    def touch(self, file: str) -> None:
        """Note that an entry has been used."""
        with self._transaction(write=True) as db:
            db.execute(_TOUCH, (file,))

    def delete(self, file: str) -> None:
        """Delete the row of a file, if there is one."""
        with self._transaction(write=True) as db:
            db.execute(_DELETE, (file,))

    def delete_same(self, key: Mapping[str, Any]) -> list[str]:
        """Delete the entries of exactly these tokens; return their files."""
        with self._transaction(write=True) as db:
            return _delete_found(db, _SAME, key)

    def delete_all(self) -> list[str]:
        """Delete every entry; return their files."""
        with self._transaction(write=True) as db:
            return _delete_found(db, _FILES, {})

    @contextlib.contextmanager
    def strays(self, files: Iterable[str]) -> Iterator[list[str]]:
        """Yield those of these files that have no row; nobody can enter one before the block is over."""
        with self._transaction(write=True) as db:
            yield [file for file in files if db.execute(_IDS, (file,)).fetchone() is None]

    # Reading

    def files(self) -> set[str]:
        """Return the files of all entries."""
        with self._transaction() as db:
            return {file for (file,) in db.execute(_FILES)}

    def entries(self) -> tuple[StoreEntry, ...]:
        """Return all entries; that which was used longest ago comes first."""
        with self._transaction() as db:
            return tuple(StoreEntry(*row) for row in db.execute(_ENTRIES))

    def __len__(self) -> int:
        """Return the number of entries."""
        with self._transaction() as db:
            return int(db.execute("SELECT count(*) FROM entries").fetchone()[0])

    def total_bytes(self) -> int:
        """Return the bytes of all entries."""
        with self._transaction() as db:
            return _total_bytes(db)

    def ids_of(self, file: str) -> tuple[str, bytes] | None:
        """Return the hash of an entry's ids and the ids, as they stand here; None without a row."""
        with self._transaction() as db:
            row: tuple[str, bytes] | None = db.execute(_IDS, (file,)).fetchone()
        return row

    def longest(self, key: Mapping[str, Any], ids: bytes, most: int) -> StoreEntry | None:
        """Return the entry with the longest prefix of these ids, of at most so many tokens; None if there is none."""
        with self._transaction() as db:
            lengths = [length for (length,) in db.execute(_LENGTHS, {**key, "most": most})]
            for length, digest in reversed(list(_prefix_hashes(ids, lengths))):
                for *row, stored in db.execute(_CANDIDATES, {**key, "tokens": length, "ids_sha256": digest}):
                    if stored == ids[: length * ID_BYTES]:
                        return StoreEntry(*row)
        return None

    def faults(self) -> list[str]:
        """Return what SQLite finds wrong with the database; nothing if it is sound."""
        with self._transaction() as db:
            found = [text for (text,) in db.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    # Transactions

    @contextlib.contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[sqlite3.Connection]:
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
        if version not in {0, _VERSION}:
            msg = f"the index {self._path} is of version {version}, this release knows {_VERSION}"
            raise FormatError(msg)
        if version == 0 and is_used:
            msg = f"{self._path} is a database of something else: choose another folder"
            raise FormatError(msg)
        if version == 0 and not self._create:
            raise FileNotFoundError(self._is_missing())
        return bool(version == _VERSION)

    def _is_missing(self) -> str:
        return f"there is no prefix store in {self._path.parent}: it has no {self._path.name} with tables"


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return "locked" in str(error) or "locking protocol" in str(error)


def _total_bytes(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT coalesce(sum(nbytes), 0) FROM entries").fetchone()[0])


def _delete_found(db: sqlite3.Connection, which: str, key: Mapping[str, Any]) -> list[str]:
    """Delete the rows that a query names; return their files."""
    gone = [file for (file,) in db.execute(which, key)]
    db.executemany(_DELETE, [(file,) for file in gone])
    return gone


def _evict(db: sqlite3.Connection, limit: int | None) -> list[str]:
    """Delete rows until the store is small enough; return their files.  The newest is never among them."""
    if limit is None:
        return []
    excess = _total_bytes(db) - limit
    oldest_first = iter(db.execute("SELECT file, nbytes FROM entries ORDER BY used").fetchall())
    evicted: list[str] = []
    while excess > 0:
        file, nbytes = next(oldest_first)
        db.execute(_DELETE, (file,))
        evicted.append(file)
        excess -= nbytes
    return evicted


def id_bytes(ids: Int[Tensor, " n"]) -> bytes:
    """Return token ids as they stand in the index."""
    data: bytes = ids.numpy().astype("<i8").tobytes()
    return data


def describe_ids(ids: Int[Tensor, " n"]) -> dict[str, Any]:
    """Return the columns that tell the ids of an entry."""
    return {"tokens": len(ids), "ids_sha256": hashlib.sha256(id_bytes(ids)).hexdigest()}


def _prefix_hashes(data: bytes, lengths: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield the hashes of prefixes of these lengths, which ascend; every id is hashed once."""
    running, done = hashlib.sha256(), 0
    for length in lengths:
        running.update(data[done * ID_BYTES : length * ID_BYTES])
        done = length
        yield length, running.copy().hexdigest()
