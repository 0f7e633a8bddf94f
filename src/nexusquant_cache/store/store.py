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
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PretrainedConfig

from nexusquant_cache.cache.cache import NexusQuantCache, placeholder_ids, text_config
from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.files import inspect_file, verify_file
from nexusquant_cache.files.container import VERSION
from nexusquant_cache.files.fingerprint import Besides, TokenIds, describe_model, first_placeholder, hash_besides
from nexusquant_cache.files.state import describe_settings, policy_name
from nexusquant_cache.files.writer import Progress
from nexusquant_cache.layer.checks import are_integers
from nexusquant_cache.policy import EvictionPolicy
from nexusquant_cache.presets import CacheConfig, resolve_preset
from nexusquant_cache.store.index import ID_BYTES, StoreEntry, StoreIndex, describe_ids, id_bytes

GRACE_SECONDS = 3600.0
"""How old a file without a row must be before it is removed: it may belong to a `PrefixStore.put` under way."""

_INDEX = "index.sqlite3"
_OURS = re.compile(r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{32}\.safetensors\.[0-9a-f]{16}\.tmp")
_ATTEMPTS = 5
_OTHER = "it is not the file that was stored"
_HASHED_AT_ONCE = 1 << 20  # bytes


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
    memory, which network file systems do not have.  Once `put` has returned, a kill at any moment leaves the entry in
    place, until it is evicted, removed or replaced.  A store holds no open files; it may be pickled and forked.

    A prefix belongs to a model, by the fingerprint of its config.  The fingerprint does not see weights: give a base
    model and each of its fine-tunings a namespace.  The same goes for classes of caches that choose policies or codecs
    of their own.

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
        self._index = StoreIndex(self.folder / _INDEX, create=create)

    # Writing

    def put(
        self,
        cache: NexusQuantCache,
        token_ids: TokenIds,
        *,
        level: int | None = 3,
        besides: Besides | None = None,
        read_again: nn.Module | None = None,
    ) -> StoreEntry:
        """Store what a cache holds, in place of an older entry of the same tokens, model, policy and settings.

        When this returns, the entry is on the disk.  The cache is compressed, as it would be at its next generation
        step, and otherwise left as it is.

        Args:
            cache: A cache of one row.
            token_ids: The ids of all tokens that it has seen, ``[tokens]`` or ``[1, tokens]``.
            level: See `NexusQuantCache.save`.
            besides: What the prompt is made of besides token ids, by name: pixel values, sounds, embeddings, the name
                of an adapter.  Only who names the same finds the entry.
            read_again: The model that has read the prompt, to read it a second time before it is compressed: see
                `NexusQuantCache.read_again`.  Worth its time for what many questions will be asked about.

        Raises:
            OptionError: If the ids do not fit the cache, or the file alone is larger than the store may be.
            OSError: If the file or the index cannot be written.
            NexusQuantError: If the cache cannot be saved, see `NexusQuantCache.save`.
        """
        ids = _checked_ids(token_ids)
        _check_cache(cache, len(ids))
        key = self._key(cache.model_config, cache.placeholder_ids, cache.policy, cache.cache_config, besides)
        key |= describe_ids(ids)
        if read_again is not None:
            cache.read_again(read_again, ids[None].to(next(read_again.parameters()).device))
        cache.compress()
        if besides is None and first_placeholder(ids, cache.placeholder_ids) is not None:
            warnings.warn(
                "some of these token ids stand for images or sounds, which the ids do not tell apart, so the entry "
                "will not be found. Name them: put(..., besides={'pixel_values': pixel_values}), and likewise for get.",
                stacklevel=2,
            )
        self._collect()
        for _ in range(_ATTEMPTS):
            path = self.folder / f"{token_hex(16)}.safetensors"
            # Stopped for longer than the grace, this process may find its file collected: once more then.
            with contextlib.suppress(FileNotFoundError):
                cache.save(path, level=level, token_ids=ids, besides={})  # their hash is in the index
                return self._enter(path, key, id_bytes(ids))
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
            gone = self._index.enter(row, self.max_bytes, path.stat)  # files are collected under the same lock
        except BaseException:
            self._withdraw(path)
            raise
        self._discard_all(gone)
        return StoreEntry(**{name: row[name] for name in StoreEntry.__dataclass_fields__})

    def _withdraw(self, path: Path) -> None:
        """Delete the file of a `put` that has failed, unless its row is there.  If that is unknown, `_collect` will."""
        with contextlib.suppress(FormatError, OSError):
            if self._index.ids_of(path.name) is None:
                _discard(path)

    def _check_size(self, nbytes: int) -> None:
        if self.max_bytes is not None and nbytes > self.max_bytes:
            msg = f"the entry takes {nbytes:,} bytes, the whole store may take {self.max_bytes:,} (max_bytes)"
            raise OptionError(msg)

    def _collect(self) -> None:
        """Remove files of ours that have no row and are old enough."""
        known = self._index.files()
        found = [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.name not in known]
        strays = [path for path in found if _age(path) > GRACE_SECONDS]
        if not strays:
            return
        # Under the lock of a `put` that may be about to enter one of them, and in a transaction that deletes no rows:
        # otherwise files would go before their rows are gone.
        with self._index.strays(path.name for path in strays) as files:
            self._discard_all(files)

    def remove(
        self,
        token_ids: TokenIds,
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        preset: str | CacheConfig | None = None,
        besides: Besides | None = None,
    ) -> int:
        """Remove the entries of exactly these tokens; return how many there were.  Arguments as in `longest_prefix`."""
        key = self._key(config, placeholder_ids(config), policy, preset, besides)
        gone = self._index.delete_same(key | describe_ids(_checked_ids(token_ids)))
        self._discard_all(gone)
        return len(gone)

    def clear(self) -> None:
        """Remove every entry, of all models and namespaces."""
        self._discard_all(self._index.delete_all())

    def _discard_all(self, files: list[str]) -> None:
        for file in files:
            _discard(self.folder / file)

    # Reading

    def longest_prefix(  # noqa: PLR0913 - all but the ids have defaults
        self,
        token_ids: TokenIds,
        *,
        config: PretrainedConfig | None = None,
        policy: EvictionPolicy | None = None,
        preset: str | CacheConfig | None = None,
        leave: int = 1,
        besides: Besides | None = None,
    ) -> PrefixMatch | None:
        """Return the longest stored prefix of a prompt, or None.

        Args:
            token_ids: The prompt, ``[tokens]`` or ``[1, tokens]``.
            config: The model's config, whole: the text part of that of a vision-language model does not name what
                stands for images.  None finds caches that were made without one.
            policy: The policy that caches were given; None finds those of the default policy.
            preset: The preset or settings that caches must have.  None takes any; of several, the one used last.
            leave: How many tokens of the prompt the prefix must leave over, at least.  The model has to read one to say
                anything; 0 also finds the whole prompt.
            besides: What the prompt is made of besides token ids, as given to `put`.  Without it nothing is found that
                reaches an id which stands for an image or a sound.

        Raises:
            OptionError: If the ids are not one row of integers, ``leave`` is negative, or there is no such preset.
            FormatError: If the index is damaged.
            OSError: If the index cannot be read.
        """
        ids = _checked_ids(token_ids)
        if leave < 0:
            msg = f"leave must be 0 or more tokens, got {leave}"
            raise OptionError(msg)
        places = placeholder_ids(config)
        key = self._key(config, places, policy, preset, besides)
        first = None if besides else first_placeholder(ids, places)
        most = len(ids) - leave if first is None else min(len(ids) - leave, first)
        entry = self._index.longest(key, id_bytes(ids), most)
        return None if entry is None else PrefixMatch(entry, ids[: entry.tokens], config, policy)

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
        self._index.touch(entry.file)
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
        self._index.delete(file)
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
        besides: Besides | None = None,
    ) -> tuple[NexusQuantCache, int] | None:
        """Return a cache that has seen the longest stored prefix of a prompt, and its length; None if there is none.

        ``model.generate`` takes it with the whole prompt and reads the rest.  Arguments and errors are those of
        `longest_prefix` and `load`.
        """
        while (
            match := self.longest_prefix(
                token_ids, config=config, policy=policy, preset=preset, leave=leave, besides=besides
            )
        ) is not None:
            cache = self.load(match, device=device, dtype=dtype, offloading=offloading)
            if cache is not None:
                return cache, match.n_tokens
        return None

    # Looking inside

    def entries(self) -> tuple[StoreEntry, ...]:
        """Return every entry, of all models and namespaces; that which was used longest ago comes first."""
        return self._index.entries()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def total_bytes(self) -> int:
        """Bytes of all entries."""
        return self._index.total_bytes()

    def verify(self, *, progress: Progress | None = None) -> dict[str, str]:
        """Read everything and return what is wrong, by name of the file; nothing is changed.

        Args:
            progress: Called after each entry with the bytes done and the bytes in all.

        Raises:
            FormatError: If the index is too damaged to be read.
            OSError: If something cannot be read.
        """
        wrong: dict[str, str] = {}
        if faults := self._index.faults():
            wrong[_INDEX] = "; ".join(faults)
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
        if (ids := self._index.ids_of(entry.file)) is None:
            return ""  # evicted meanwhile
        if hashlib.sha256(ids[1]).hexdigest() != ids[0] or len(ids[1]) != entry.tokens * ID_BYTES:
            return "its token ids are damaged"
        if self._is_as_written(entry):
            return ""
        try:
            found = verify_file(self.folder / entry.file)
        except FileNotFoundError:
            return "it is gone" if self._index.ids_of(entry.file) else ""
        except FormatError as error:
            return str(error)
        return "" if found.sha256 == entry.sha256 else _OTHER  # `convert_file` keeps the content

    def _key(
        self,
        config: PretrainedConfig | None,
        places: frozenset[int],
        policy: EvictionPolicy | None,
        preset: str | CacheConfig | None,
        besides: Besides | None,
    ) -> dict[str, Any]:
        """Return the columns that decide whose caches are found."""
        decoder, more = text_config(config), hash_besides(besides)
        settings = None if preset is None else describe_settings(resolve_preset(preset))
        model = "" if decoder is None else describe_model(decoder.to_dict()).fingerprint
        return {
            "namespace": f"{self.namespace}\n{more}" if more else self.namespace,
            "model": " ".join((model, *map(str, sorted(places)))),  # a config that names none finds no others
            "policy": "" if policy is None else policy_name(policy),
            "settings": None if settings is None else json.dumps(settings, sort_keys=True),
            "format": VERSION,
        }


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
    rows = max((part.rows for part in cache.parts()), default=1)
    if rows != 1:
        msg = f"a stored cache must have one row, this one has {rows}: take them apart with batch_select_indices"
        raise OptionError(msg)
    seen = cache.get_seq_length() if cache.layers else 0
    if seen != tokens:
        msg = (
            f"token_ids are {tokens}, the cache has seen {seen}: give the ids of all that it has seen. The last token "
            "that generate returns is not among them"
        )
        raise OptionError(msg)


def _checked_ids(token_ids: TokenIds) -> Int[Tensor, " n"]:
    """Return the ids as ``[tokens]``.

    Raises:
        OptionError: If they are anything but one row of integers.
    """
    ids = torch.as_tensor(token_ids)
    if not are_integers(ids) or ids.ndim not in {1, 2} or (ids.ndim == 2 and len(ids) != 1) or ids.numel() == 0:  # noqa: PLR2004
        msg = f"token_ids must be integers [tokens] or [1, tokens], got {ids.dtype} of shape {list(ids.shape)}"
        raise OptionError(msg)
    return ids.detach().to("cpu", torch.int64).flatten()
