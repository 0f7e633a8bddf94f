"""The prefix store.

**The law.**  What `put` has returned for is found, whole, until it is evicted, removed or replaced, whatever other
processes do and whenever they are killed; and nothing is returned that was not put.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from feeding import feed
from integration import store_worker
from integration.store_worker import LENGTHS, build, same, token_ids
from integration.tiny import SMALL, TINY, balanced, fingerprint, generate, logits, prompt, random_states, tiny_config
from transformers import MistralConfig
from unit.evaluation_tiny import PROSE, tiny

from nexusquant_cache import FormatError, KeyNormPolicy, NexusQuantCache, OptionError
from nexusquant_cache.codec import registry
from nexusquant_cache.files import convert_file
from nexusquant_cache.store import index as index_module
from nexusquant_cache.store import store
from nexusquant_cache.store.index import StoreEntry
from nexusquant_cache.store.store import PrefixStore

OTHER = {"hidden_size": 32, "num_attention_heads": 2}  # another model
CHANCE = random.SystemRandom()  # when to kill: no run is like the other anyway


@pytest.fixture
def kept(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store")


def fill(kept: PrefixStore, *lengths: int) -> list[StoreEntry]:
    return [kept.put(build(tokens), token_ids(tokens)) for tokens in lengths]


def stored_lengths(kept: PrefixStore) -> list[int]:
    """Return the stored lengths; that which was used longest ago comes first."""
    return [entry.tokens for entry in kept.entries()]


def files(kept: PrefixStore) -> set[str]:
    return {path.name for path in kept.folder.iterdir() if not path.name.startswith("index.sqlite3")}


def found_length(kept: PrefixStore, ids: Any, **options: Any) -> int:
    match = kept.longest_prefix(ids, **options)
    return 0 if match is None else match.n_tokens


class TestPrefixes:
    def test_a_loaded_prefix_goes_on_bit_for_bit(self, sdpa, kept):
        book, question = prompt(60), prompt(9, seed=3)
        cache = balanced(sdpa)
        logits(sdpa, book, cache)
        kept.put(cache, book)
        loaded, tokens = kept.get(torch.cat([book, question], 1), config=sdpa.config)
        assert tokens == 60
        assert fingerprint(loaded) == fingerprint(cache)
        for ids in (question, prompt(1, seed=4)):
            assert torch.equal(logits(sdpa, ids, loaded), logits(sdpa, ids, cache))

    def test_a_text_can_be_read_again_before_it_is_stored(self, sdpa, kept):
        """That chooses other tokens than a put without it, and the same as who reads again and then puts."""
        book, held = prompt(60), []
        for reads_again, reads_in_put in ((False, False), (False, True), (True, False)):
            cache = balanced(sdpa)
            logits(sdpa, book, cache)
            if reads_again:
                cache.read_again(sdpa, book)
            kept.put(cache, book, read_again=sdpa if reads_in_put else None)
            held.append(fingerprint(kept.get(book, config=sdpa.config, leave=0)[0]))
        assert held[0] != held[1] == held[2]

    def test_generate_takes_it_with_the_whole_prompt(self, sdpa, kept):
        book = prompt(60)
        cache = balanced(sdpa)
        logits(sdpa, book, cache)
        kept.put(cache, book[0].tolist())
        whole = torch.cat([book, prompt(5, seed=3)], 1)
        answers = [
            generate(sdpa, whole, kept.get(whole, config=sdpa.config)[0] if stored else cache)
            for stored in (True, True, False)
        ]
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])

    def test_the_longest_is_found(self, kept):
        fill(kept, 44, 40, 50)
        ids = token_ids(60)
        assert [found_length(kept, ids[:n]) for n in (39, 40, 41, 44, 45, 50, 51, 60)] == [0, 0, 40, 40, 44, 44, 50, 50]
        assert [found_length(kept, ids[:n], leave=0) for n in (40, 49, 50)] == [40, 44, 50]
        assert found_length(kept, ids[:50], leave=20) == 0
        assert found_length(kept, ids[:3], leave=20) == 0

    def test_one_other_token_is_another_text(self, kept):
        fill(kept, 40, 50)
        for place, expected in ((0, 0), (39, 0), (40, 40), (49, 40), (50, 50)):
            ids = token_ids(60)
            ids[place] += 1
            assert found_length(kept, ids) == expected

    def test_ids_are_compared_and_not_only_their_hashes(self, kept):
        fill(kept, 40)
        with sqlite3.connect(kept.folder / "index.sqlite3") as db:
            db.execute("UPDATE entries SET ids = zeroblob(320)")
        db.close()
        assert found_length(kept, token_ids(60)) == 0

    def test_other_models_find_nothing(self, sdpa, kept):
        book = prompt(60)
        cache = balanced(sdpa)
        logits(sdpa, book, cache)
        kept.put(cache, book)
        assert found_length(kept, book, leave=0, config=sdpa.config) == 60
        assert found_length(kept, book, leave=0, config=tiny_config(**OTHER)) == 0
        assert found_length(kept, book, leave=0) == 0
        assert kept.get(book, leave=0) is None
        assert found_length(PrefixStore(kept.folder, namespace="tuned"), book, leave=0, config=sdpa.config) == 0

    def test_namespaces_hold_the_same_tokens_apart(self, kept):
        other = PrefixStore(kept.folder, namespace="tuned")
        fill(kept, 40)
        fill(other, 40, 42)
        assert len(kept) == len(other) == 3
        assert found_length(kept, token_ids(60)) == 40
        assert other.remove(token_ids(40)) == 1
        assert found_length(kept, token_ids(60)) == 40

    def test_settings_and_policies_are_told_apart(self, kept):
        caches = {
            "balanced": NexusQuantCache("balanced", **SMALL),
            "quant": NexusQuantCache("quant", **SMALL),
            "policy": NexusQuantCache("balanced", policy=KeyNormPolicy(), **SMALL),
        }
        entries = {}
        for name, cache in caches.items():
            feed(cache, *random_states((1, 2, 40, 16), 0), 0)
            entries[name] = kept.put(cache, token_ids(40))
        ids = token_ids(41)
        assert kept.longest_prefix(ids).entry == entries["quant"]  # the one used last
        assert kept.longest_prefix(ids, preset=caches["balanced"].cache_config).entry == entries["balanced"]
        assert kept.longest_prefix(ids, policy=KeyNormPolicy()).entry == entries["policy"]
        assert kept.longest_prefix(ids, preset="max") is None
        kept.get(ids, preset=caches["balanced"].cache_config)
        assert kept.longest_prefix(ids).entry == entries["balanced"]
        loaded, _ = kept.get(ids, policy=KeyNormPolicy())
        assert loaded.policy == KeyNormPolicy()

    def test_a_waiting_prompt_is_compressed_first(self, sdpa, kept):
        cache, book = balanced(sdpa), prompt(60)
        logits(sdpa, book, cache)
        assert cache.layers[0].state.turn.is_pending
        kept.put(cache, book)
        assert not cache.layers[0].state.turn.is_pending
        assert not kept.get(book, config=sdpa.config, leave=0)[0].layers[0].state.turn.is_pending

    def test_dtype_and_device(self, kept):
        fill(kept, 40)
        loaded, _ = kept.get(token_ids(41), device="cpu", dtype=torch.bfloat16, offloading=True)
        assert loaded.offloading
        assert loaded.layers[0].state.tail[0].dtype == torch.bfloat16

    def test_a_class_of_your_own_comes_back(self, kept):
        class Mine(NexusQuantCache):
            pass

        fill(kept, 40)
        assert type(kept.get(token_ids(41))[0]) is NexusQuantCache
        loaded, _ = PrefixStore(kept.folder, cache_class=Mine).get(token_ids(41))
        assert type(loaded) is Mine
        assert same(loaded, build(40))

    def test_a_later_format_is_left_alone(self, kept, monkeypatch):
        fill(kept, 40)
        with monkeypatch.context() as patch:
            patch.setattr(store, "VERSION", 0)
            assert kept.get(token_ids(41)) is None
        assert kept.get(token_ids(41)) is not None


class TestBytes:
    def test_total_bytes_are_those_of_files_and_ids(self, kept):
        entries = fill(kept, 40, 50)
        sizes = [(kept.folder / entry.file).stat().st_size for entry in entries]
        assert [entry.nbytes for entry in entries] == [sizes[0] + 320, sizes[1] + 400]
        assert kept.total_bytes == sum(sizes) + 720

    def test_the_least_recently_used_goes_first(self, tmp_path):
        most = 3 * max(entry.nbytes for entry in fill(PrefixStore(tmp_path / "all"), 40, 42, 44, 46, 48))
        kept = PrefixStore(tmp_path / "few", most)
        fill(kept, 40, 42, 44)
        assert kept.get(token_ids(41))[1] == 40
        assert stored_lengths(kept) == [42, 44, 40]
        fill(kept, 46)
        assert stored_lengths(kept) == [44, 40, 46]
        fill(kept, 44)  # put again
        fill(kept, 48)
        assert stored_lengths(kept) == [46, 44, 48]
        assert kept.total_bytes <= most
        assert files(kept) == {entry.file for entry in kept.entries()}

    def test_finding_alone_is_no_use(self, kept):
        fill(kept, 40, 42)
        assert found_length(kept, token_ids(41)) == 40
        assert stored_lengths(kept) == [40, 42]

    def test_a_smaller_limit_evicts_at_the_next_put(self, kept):
        fill(kept, 40, 42, 44)
        few = PrefixStore(kept.folder, kept.entries()[-1].nbytes)
        assert len(few) == 3
        fill(few, 40)
        assert stored_lengths(few) == [40]

    def test_what_is_larger_than_the_store_is_refused(self, tmp_path):
        kept = PrefixStore(tmp_path, 4000)
        with pytest.raises(OptionError, match=r"the whole store may take 4,000"):
            fill(kept, 60)
        assert (len(kept), files(kept), kept.total_bytes) == (0, set(), 0)

    def test_the_same_again_replaces(self, kept):
        (old,), (new,) = fill(kept, 40), fill(kept, 40)
        assert kept.entries() == (new,)
        assert old.sha256 == new.sha256
        assert files(kept) == {new.file}

    def test_remove_and_clear(self, kept):
        fill(kept, 40, 42, 44)
        assert kept.remove(token_ids(42)) == 1
        assert kept.remove(token_ids(42)) == kept.remove(token_ids(41)) == 0
        assert stored_lengths(kept) == [40, 44]
        assert len(files(kept)) == 2
        kept.clear()
        assert (len(kept), kept.total_bytes, files(kept)) == (0, 0, set())
        assert kept.get(token_ids(60)) is None

    def test_a_put_that_fails_leaves_no_file(self, kept, monkeypatch):
        fill(kept, 40)
        (entry,) = kept.entries()
        monkeypatch.setattr(index_module, "_INSERT", "INSERT INTO elsewhere VALUES (1)")
        with pytest.raises(OSError, match="cannot be used: no such table"):
            fill(kept, 40)
        assert kept.entries() == (entry,)
        assert files(kept) == {entry.file}

    def test_a_put_that_fails_late_keeps_its_file(self, kept):
        (entry,) = fill(kept, 40)
        kept._withdraw(kept.folder / entry.file)  # its row was committed before the error
        assert kept.verify() == {}

    def test_in_doubt_a_file_stays(self, kept):
        (entry,) = fill(kept, 40)
        (kept.folder / "index.sqlite3").write_bytes(b"no database" * 1000)
        kept._withdraw(kept.folder / entry.file)
        assert files(kept) == {entry.file}


class TestOpening:
    def test_only_what_is_there(self, tmp_path):
        for folder in (tmp_path / "none", tmp_path):
            with pytest.raises(FileNotFoundError, match="there is no prefix store in"):
                PrefixStore(folder, create=False)
        assert list(tmp_path.iterdir()) == []

    def test_an_empty_file_is_no_store_and_stays_empty(self, tmp_path):
        (tmp_path / "index.sqlite3").touch()
        with pytest.raises(FileNotFoundError, match="there is no prefix store in"):
            PrefixStore(tmp_path, create=False)
        assert (tmp_path / "index.sqlite3").stat().st_size == 0
        assert len(PrefixStore(tmp_path)) == 0

    @pytest.mark.parametrize("name", ["a b", "what?", "100%", "#1", "\u00fc", "mode=ro"])
    def test_a_folder_of_any_name(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        fill(PrefixStore(name), 40)
        assert stored_lengths(PrefixStore(tmp_path / name, create=False)) == [40]
        assert {path.name for path in tmp_path.iterdir()} == {name}

    def test_looking_changes_nothing(self, kept, monkeypatch):
        fill(kept, 40, 42)
        (kept.folder / f"{'ab' * 16}.safetensors").write_bytes(b"?")
        monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)
        before = {path.name: path.read_bytes() for path in kept.folder.iterdir()}
        looked = PrefixStore(kept.folder, create=False)
        assert looked.entries() == kept.entries()
        assert looked.verify() == {}
        assert found_length(looked, token_ids(60)) == 42
        assert {path.name: path.read_bytes() for path in kept.folder.iterdir()} == before

    @pytest.mark.parametrize("statement", range(9))
    def test_another_process_makes_it_first(self, statement, tmp_path, monkeypatch):
        """Whenever that is, both come to the same tables."""
        count = 0

        class Slow(sqlite3.Connection):
            def execute(self, *arguments: Any) -> sqlite3.Cursor:
                nonlocal count
                count += 1
                if count == statement + 1:
                    with monkeypatch.context() as patch, contextlib.suppress(TimeoutError):
                        patch.setattr(index_module, "_PATIENCE", 0.0)  # it may find the index locked, by us
                        patch.setattr(sqlite3, "connect", connect)
                        fill(PrefixStore(tmp_path), 40)
                return super().execute(*arguments)

        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Slow, **options))
        kept = PrefixStore(tmp_path)
        fill(kept, 42)
        assert count > statement
        assert stored_lengths(kept) in ([42], [40, 42])


class TestDamage:
    @pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
    def test_a_damaged_file_is_a_miss_with_a_warning(self, damage, kept):
        short, long = fill(kept, 40, 50)
        path = kept.folder / long.file
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes({"flip": data, "cut": data[:-9], "swap": (kept.folder / short.file).read_bytes()}[damage])
        assert list(kept.verify()) == [long.file]
        assert len(kept) == 2  # nothing has changed yet
        with pytest.warns(UserWarning, match=rf"removed a damaged entry from .*{long.file}"):
            cache, tokens = kept.get(token_ids(60))
        assert tokens == 40
        assert same(cache, build(40))
        assert kept.verify() == {}
        assert files(kept) == {short.file}

    def test_a_file_of_the_same_tokens_in_its_place(self, kept):
        (mine,) = fill(kept, 40)
        tuned = PrefixStore(kept.folder, namespace="tuned")  # other weights, other keys
        cache = NexusQuantCache("balanced", **SMALL)
        feed(cache, *random_states((1, 2, 40, 16), 1), 0)
        theirs = tuned.put(cache, token_ids(40))
        shutil.copy(kept.folder / theirs.file, kept.folder / mine.file)
        assert kept.verify() == {mine.file: "it is not the file that was stored"}
        with pytest.warns(UserWarning, match="it is not the file that was stored"):
            assert kept.get(token_ids(41)) is None
        assert kept.entries() == (theirs,)

    def test_what_only_this_process_cannot_read_stays(self, kept, monkeypatch):
        (entry,) = fill(kept, 40)
        with monkeypatch.context() as patch:
            patch.delitem(registry._CODECS, "e8")
            with pytest.raises(FormatError, match="no codec is registered as 'e8'"):
                kept.get(token_ids(41))
            assert kept.verify() == {}
        assert kept.entries() == (entry,)
        assert kept.get(token_ids(41))[1] == 40

    def test_a_file_that_was_converted_is_as_good(self, kept):
        (entry,) = fill(kept, 40)
        convert_file(kept.folder / entry.file, kept.folder / entry.file, level=None)
        assert kept.verify() == {}
        assert same(kept.get(token_ids(41))[0], build(40))

    @pytest.mark.parametrize("ids", ["zeroblob(320)", "substr(ids, 9)"])
    def test_damaged_ids_are_reported(self, ids, kept):
        (entry,) = fill(kept, 40)
        with contextlib.closing(sqlite3.connect(kept.folder / "index.sqlite3", isolation_level=None)) as db:
            db.execute(f"UPDATE entries SET ids = {ids}")  # noqa: S608 - one of ours
        assert kept.verify() == {entry.file: "its token ids are damaged"}

    def test_progress(self, kept):
        entries, seen = fill(kept, 40, 50), []
        kept.verify(progress=lambda done, total: seen.append((done, total)))
        assert seen == [(entries[0].nbytes, kept.total_bytes), (kept.total_bytes, kept.total_bytes)]

    def test_a_file_that_is_gone_is_a_miss(self, kept):
        _, long = fill(kept, 40, 50)
        (kept.folder / long.file).unlink()
        assert kept.verify() == {long.file: "it is gone"}
        assert kept.get(token_ids(60))[1] == 40
        assert kept.verify() == {}

    def test_what_is_evicted_between_finding_and_loading_is_a_miss(self, kept):
        fill(kept, 40)
        match = kept.longest_prefix(token_ids(60))
        fill(kept, 40)  # in another file now
        assert kept.load(match) is None
        assert stored_lengths(kept) == [40]

    def test_what_is_evicted_while_it_is_verified_is_not_missed(self, kept, monkeypatch):
        fill(kept, 40, 50)
        hashed, seen = store._hash_file, []

        def evicting(path: Path) -> str:
            kept.clear()
            seen.append(path)
            return hashed(path)

        monkeypatch.setattr(store, "_hash_file", evicting)
        assert kept.verify() == {}
        assert len(seen) == 1  # the other one has no row any more when its turn comes

    def test_foreign_files_are_left_alone(self, kept, monkeypatch):
        monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)
        ours = ["ab" * 16 + ".safetensors", "." + "ab" * 16 + ".safetensors." + "cd" * 8 + ".tmp"]
        foreign = ["notes.txt", "cache.safetensors", "ab" * 16 + ".safetensors.bak", "AB" * 16 + ".safetensors", ".tmp"]
        for name in (*ours, *foreign):
            (kept.folder / name).write_bytes(b"?")
        (entry,) = fill(kept, 40)
        assert files(kept) == {entry.file, *foreign}
        kept.clear()
        assert files(kept) == set(foreign)

    def test_files_without_a_row_get_time(self, kept):
        young, old = (kept.folder / f"{digit * 32}.safetensors" for digit in "ab")
        for path in (young, old):
            path.write_bytes(b"?")
        os.utime(old, (time.time() - 2 * store.GRACE_SECONDS,) * 2)
        kept._collect()
        assert files(kept) == {young.name}

    def test_what_is_gone_has_no_age(self, kept):
        assert store._age(kept.folder / "none") == 0

    def test_a_file_that_gets_its_row_meanwhile_stays(self, kept, monkeypatch):
        (entry,) = fill(kept, 40)
        path = kept.folder / f"{'ab' * 16}.safetensors"
        shutil.copy(kept.folder / entry.file, path)

        def age(_: Path) -> float:
            with contextlib.closing(sqlite3.connect(kept.folder / "index.sqlite3", isolation_level=None)) as db:
                db.execute("UPDATE entries SET file = ?", (path.name,))  # as a `put` that was stopped for long
            return 2 * store.GRACE_SECONDS

        monkeypatch.setattr(store, "_age", age)
        kept._collect()
        assert kept.verify() == {}
        assert path.name in files(kept)

    @pytest.mark.parametrize("after", ["inspect_file", "_hash_file"])
    def test_a_file_collected_before_its_row_is_written_again(self, after, kept, monkeypatch):
        done, paths = getattr(store, after), []

        def collecting(path: Path) -> Any:
            found = done(path)
            paths.append(path)
            if len(paths) == 1:
                path.unlink()  # as another process does when this one has slept for too long
            return found

        monkeypatch.setattr(store, after, collecting)
        fill(kept, 40)
        assert files(kept) == {paths[1].name}
        assert kept.verify() == {}

    def test_one_that_always_is_collected_raises(self, kept, monkeypatch):
        monkeypatch.setattr(NexusQuantCache, "save", lambda *_, **__: None)
        with pytest.raises(OSError, match="new files keep disappearing"):
            fill(kept, 40)
        assert len(kept) == 0

    def test_an_index_of_something_else(self, tmp_path):
        with sqlite3.connect(tmp_path / "index.sqlite3") as db:
            db.execute("CREATE TABLE mine (x)")
        db.close()
        with pytest.raises(FormatError, match="a database of something else"):
            PrefixStore(tmp_path)

    def test_an_index_of_a_later_release(self, kept):
        with sqlite3.connect(kept.folder / "index.sqlite3") as db:
            db.execute("PRAGMA user_version = 2")
        db.close()
        with pytest.raises(FormatError, match="version 2, this release knows 1"):
            PrefixStore(kept.folder)

    def test_a_damaged_index(self, kept):
        (kept.folder / "index.sqlite3").write_bytes(b"no database" * 1000)
        with pytest.raises(FormatError, match="is damaged"):
            len(kept)

    def test_damage_that_only_a_check_finds(self, kept):
        fill(kept, 40, 50)
        with contextlib.closing(sqlite3.connect(kept.folder / "index.sqlite3", isolation_level=None)) as db:
            db.execute("PRAGMA writable_schema = ON")
            db.execute("UPDATE sqlite_master SET sql = replace(sql, '(used)', '(nbytes)') WHERE name = 'by_use'")
        assert "by_use" in kept.verify()["index.sqlite3"]

    def test_an_index_that_was_removed_is_made_anew(self, kept):
        fill(kept, 40)
        for path in kept.folder.glob("index.sqlite3*"):
            path.unlink()
        assert len(kept) == 0
        fill(kept, 42)
        assert stored_lengths(kept) == [42]


class TestErrors:
    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("most", [0, -1, True, 1.5, "1 GB"])
    def test_the_limit(self, most, tmp_path):
        with pytest.raises(OptionError, match="max_bytes must be a whole number"):
            PrefixStore(tmp_path, most)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("ids", [[], [0.5], [[1, 2], [3, 4]], [True], [[[1]]]])
    def test_the_ids(self, ids, kept):
        with pytest.raises(OptionError, match="token_ids must be integers"):
            kept.longest_prefix(ids)

    def test_the_tokens_to_leave(self, kept):
        with pytest.raises(OptionError, match="leave must be 0 or more"):
            kept.get(token_ids(40), leave=-1)

    def test_ids_that_are_not_those_of_the_cache(self, kept):
        with pytest.raises(OptionError, match="token_ids are 41, the cache has seen 40"):
            kept.put(build(40), token_ids(41))
        with pytest.raises(OptionError, match="token_ids are 1, the cache has seen 0"):
            kept.put(NexusQuantCache("balanced"), token_ids(1))

    def test_several_rows(self, kept):
        cache = NexusQuantCache("balanced", **SMALL)
        feed(cache, *random_states((2, 2, 40, 16), 0), 0)
        with pytest.raises(OptionError, match="must have one row, this one has 2"):
            kept.put(cache, token_ids(40))
        sliding = NexusQuantCache(config=MistralConfig(**TINY | {"sliding_window": 12}))
        feed(sliding, *random_states((2, 2, 40, 16), 0), 0)
        with pytest.raises(OptionError, match="must have one row, this one has 2"):
            kept.put(sliding, token_ids(40))

    def test_an_unknown_preset(self, kept):
        with pytest.raises(OptionError, match="unknown preset"):
            kept.longest_prefix(token_ids(40), preset="best")

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            PrefixStore(tmp_path / "file")

    def test_an_index_that_cannot_be_opened(self, tmp_path):
        (tmp_path / "index.sqlite3").mkdir()
        with pytest.raises(OSError, match="cannot be used: unable to open"):
            PrefixStore(tmp_path)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="everything is writable here")
    def test_a_folder_that_is_read_only(self, kept):
        kept.folder.chmod(0o500)
        try:
            with pytest.raises(OSError, match=r"cannot be used|denied"):
                fill(kept, 40)
        finally:
            kept.folder.chmod(0o700)

    def test_a_database_that_is_read_only(self, kept, monkeypatch):
        fill(kept, 40)
        connect = sqlite3.connect

        def read_only(name: str, **options: Any) -> sqlite3.Connection:
            return connect(name.replace("mode=rwc", "mode=ro"), **options)

        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", read_only)
            with pytest.raises(OSError, match="cannot be used: attempt to write a readonly database"):
                fill(kept, 42)
        assert stored_lengths(kept) == [40]
        assert kept.verify() == {}

    def test_a_lock_that_is_never_released(self, kept, monkeypatch):
        monkeypatch.setattr(index_module, "_PATIENCE", 0.02)
        with contextlib.closing(sqlite3.connect(kept.folder / "index.sqlite3", isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            with pytest.raises(TimeoutError, match="database is locked"):
                fill(kept, 40)
            assert len(kept) == 0  # readers need not wait
        assert files(kept) == set()
        fill(kept, 40)

    def test_what_sqlite_does_not_wait_for_is_tried_again(self, kept, monkeypatch):
        fill(kept, 40)
        busy = ["database is locked", "locking protocol"]

        class Busy(sqlite3.Connection):
            def execute(self, *arguments: Any) -> sqlite3.Cursor:
                if busy:
                    raise sqlite3.OperationalError(busy.pop())
                return super().execute(*arguments)

        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Busy, **options))
        assert len(kept) == 1
        assert not busy

    def test_an_error_inside_a_transaction_leaves_everything(self, kept, monkeypatch):
        fill(kept, 40)

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(index_module, "_evict", fail)
            with pytest.raises(KeyboardInterrupt):
                fill(kept, 42)
        assert stored_lengths(kept) == [40]
        fill(kept, 42)
        assert stored_lengths(kept) == [40, 42]

    def test_it_can_be_pickled(self, kept):
        fill(kept, 40)
        assert stored_lengths(pickle.loads(pickle.dumps(kept))) == [40]  # noqa: S301 - our own


class Workers:
    """`store_worker.py` and its children."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.errors = folder / "errors"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.errors.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own code
                [sys.executable, store_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(self, folder: Path, kinds: Sequence[str], **options: Any) -> tuple[int, Path]:
        """Start a child on a store; return its process id and its log."""
        self.count += 1
        log = self.folder / f"log-{self.count}"
        log.touch()
        job = {"folder": str(folder), "log": str(log), "kinds": kinds, "seed": self.count}
        return self._ask({"max_bytes": None, "grace": 2.0, "steps": None} | job | options), log

    def wait(self, child: int) -> int:
        return self._ask({"wait": child})

    def check(self) -> None:
        """No child has met an error of its own."""
        assert self.errors.read_text() == ""

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def forge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


@pytest.fixture
def workers(forge: Workers) -> Iterator[Workers]:
    yield forge
    forge.check()


@pytest.fixture
def kills() -> int:
    """How many processes each of the three tests kills, at least."""
    return 300 if hypothesis.settings.default.max_examples >= 1000 else 24


def whole(kept: PrefixStore) -> None:
    """Assert that everything in the index is there and right."""
    assert kept.verify() == {}
    for entry in kept.entries():
        match = kept.longest_prefix(token_ids(entry.tokens), leave=0)
        assert match.entry == entry
        with contextlib.closing(sqlite3.connect(kept.folder / "index.sqlite3")) as db:
            (data,) = db.execute("SELECT ids FROM entries WHERE file = ?", (entry.file,)).fetchone()
        assert len(data) == 8 * entry.tokens
        loaded = NexusQuantCache.load(kept.folder / entry.file, token_ids=token_ids(entry.tokens))  # no touch
        assert same(loaded, build(entry.tokens))


def no_orphans(kept: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that what killed processes have left can be collected, and nothing else is."""
    with monkeypatch.context() as patch:
        patch.setattr(store, "GRACE_SECONDS", -1.0)
        kept._collect()
    assert files(kept) == {entry.file for entry in kept.entries()}
    whole(kept)


def after(least: float, most: float) -> None:
    """Wait for a random time, another one in every run."""
    time.sleep(CHANCE.uniform(least, most))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Model:
    """What a store with one writer must hold: lengths from the one used longest ago, with their bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held: dict[int, int] = {}

    def after(self, kind: str, tokens: int, sizes: dict[int, int]) -> dict[int, int]:
        held = dict(self.held)
        if kind == "put":
            held.pop(tokens, None)
            held[tokens] = sizes[tokens]
            while sum(held.values()) > self.most:
                held.pop(next(iter(held)))
        else:
            found = max((length for length in held if length <= tokens), default=None)
            if found is not None:
                held[found] = held.pop(found)
        return held


@pytest.mark.slow
def test_kills_of_a_writer_that_evicts(workers, kills, tmp_path, monkeypatch):
    """The store is exactly what the acknowledged operations make of it, with or without the one that was cut off."""
    scratch = PrefixStore(tmp_path / "sizes")
    sizes = {entry.tokens: entry.nbytes for entry in fill(scratch, *LENGTHS)}
    model = Model(sum(sizes.values()) // 3)
    kept = PrefixStore(tmp_path / "store", model.most)
    fill(kept, *LENGTHS)
    model.held = {entry.tokens: entry.nbytes for entry in kept.entries()}
    evicted = 0
    for index in range(kills):
        child, log = workers.start(kept.folder, ["put", "put", "get"], max_bytes=model.most)
        if index % 5:  # else while it opens the store
            until(lambda log=log: log.stat().st_size > 0)
        if index % 5 == 1:  # so that something is evicted, on a busy machine too
            until(lambda log=log: log.read_text().count("\nput ") > 2)
        after(0, 0.1)
        os.kill(child, signal.SIGKILL)
        assert workers.wait(child) == -signal.SIGKILL
        lines = [line.split() for line in log.read_text().splitlines()]
        cut_off = lines.pop() if lines and lines[-1][0] == "start" else None
        for kind, tokens, *found in (line for line in lines if line[0] != "start"):
            before, model.held = model.held, model.after(kind, int(tokens), sizes)
            evicted += len(before.keys() - model.held.keys())
            if kind == "get":
                assert int(found[0]) == max((length for length in before if length <= int(tokens)), default=0)
        expected = [model.held] + ([model.after(cut_off[1], int(cut_off[2]), sizes)] if cut_off else [])
        held = {entry.tokens: entry.nbytes for entry in kept.entries()}
        assert list(held.items()) in [list(x.items()) for x in expected]
        model.held = held
        whole(kept)
    assert evicted
    no_orphans(kept, monkeypatch)


@pytest.mark.slow
def test_kills_of_two_writers_beside_a_reader(workers, kills, tmp_path, monkeypatch):
    """Without a limit, every acknowledged entry is there."""
    kept = PrefixStore(tmp_path / "store")
    acknowledged: set[int] = set()
    for _ in range(-(-kills // 3)):
        started = [workers.start(kept.folder, kinds) for kinds in (["put"], ["put", "get"], ["get"])]
        until(lambda started=started: any(log.stat().st_size for _, log in started))
        for child, _ in CHANCE.sample(started, 3):
            after(0, 0.1)
            os.kill(child, signal.SIGKILL)
        for child, log in started:
            assert workers.wait(child) == -signal.SIGKILL
            acknowledged |= {int(tokens) for tokens in re.findall(r"^put (\d+)$", log.read_text(), re.MULTILINE)}
        assert acknowledged <= set(stored_lengths(kept)) <= set(LENGTHS)
        whole(kept)
        if len(acknowledged) > len(LENGTHS) // 2 and CHANCE.random() < 0.3:
            kept.clear()
            acknowledged.clear()
    no_orphans(kept, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("old", [[], [40, 42, 44]])
def test_kills_at_chosen_lines(old, workers, kills, tmp_path, monkeypatch):
    """What makes a store, and what evicts two, is done or not done, wherever it stops."""
    before, most, new = tmp_path / "before", None, [62]
    if old:
        fill(PrefixStore(before), *old)
        most, new = PrefixStore(before).total_bytes, [44, 62]

    def put(line: int) -> tuple[Path, int, str]:
        folder = tmp_path / f"store-{line}"
        if old:
            shutil.copytree(before, folder)
        child, log = workers.start(folder, ["put"], max_bytes=most, lengths=[62], steps=1, line=line)
        return folder, workers.wait(child), log.read_text()

    folder, code, log = put(1 << 40)
    assert (code, stored_lengths(PrefixStore(folder))) == (0, new)
    lines = int(log.split()[-1])
    last = lines - 5  # a few lines more or less are run each time
    for line in range(1, last, max(1, 2 * last // kills)):
        folder, code, log = put(line)
        assert code == -signal.SIGKILL
        kept = PrefixStore(folder, most)
        assert stored_lengths(kept) in ([new] if "\nput" in log else [old, new])
        whole(kept)
        no_orphans(kept, monkeypatch)
        fill(kept, 62)
        assert stored_lengths(kept) == new
        shutil.rmtree(folder)


@pytest.mark.parametrize("limited", [False, True])
def test_writers_and_readers_at_the_same_time(limited, workers, tmp_path):
    sizes = {entry.tokens: entry.nbytes for entry in fill(PrefixStore(tmp_path / "sizes"), *LENGTHS)}
    kept = PrefixStore(tmp_path / "store", sum(sizes.values()) // 3 if limited else None)
    jobs = (["put"], ["put"], ["get"], ["get", "put"])
    started = [workers.start(kept.folder, kinds, max_bytes=kept.max_bytes, steps=30) for kinds in jobs]
    assert [workers.wait(child) for child, _ in started] == [0] * 4
    put = {int(tokens) for _, log in started for tokens in re.findall(r"^put (\d+)$", log.read_text(), re.MULTILINE)}
    if limited:
        assert set(stored_lengths(kept)) < put
        assert kept.max_bytes - max(sizes.values()) < kept.total_bytes <= kept.max_bytes
    else:
        assert set(stored_lengths(kept)) == put
    whole(kept)
    assert files(kept) == {entry.file for entry in kept.entries()}


class TestExample:
    @pytest.fixture
    def run(self, monkeypatch, tmp_path, capsys):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
        book = tmp_path / "book.txt"
        book.write_text(PROSE)
        options = ["--book", str(book), "--store", str(tmp_path / "store"), "--new-tokens", "3"]

        def run(*arguments: str) -> str:
            importlib.import_module("ask_a_book").main([*options, *arguments], tiny())
            return capsys.readouterr().out

        return run

    def test_the_second_run_finds_the_book(self, run):
        first, second = (run("--tokens", "600", "Who?", "Where?") for _ in range(2))
        read = int(re.search(r"read (\d+) tokens", first)[1])
        assert 600 <= read < 700
        assert f"found {read} tokens in the store" in second
        assert first.count(f"({read} tokens from the store)") == second.count(f"({read} tokens from the store)") == 2

        def said(text: str) -> list[str]:
            return re.findall(r"^ {10}(.*)  \([\d.]+ s\)$", text, re.MULTILINE)

        assert len(said(first)) == 2
        assert said(first) == said(second)

    def test_a_longer_part_goes_on_from_a_shorter_one(self, run):
        assert "read" in run("--tokens", "400", "Who?")
        longer = run("--tokens", "600", "Who?")
        assert "read 200 tokens" in longer
        assert "tokens from the store" in longer

    def test_there_are_ten_questions(self, run):
        assert run("--tokens", "300").count("tokens from the store)") == 10

    def test_a_book_that_is_missing(self, run):
        with pytest.raises(SystemExit, match="no such text file"):
            run("--book", "missing.txt")
