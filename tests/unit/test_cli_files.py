"""The commands that look at saved caches."""

import os
from dataclasses import replace

import pytest
import torch
from feeding import feed
from files import MAKERS, file_bytes, forged
from integration.tiny import random_states, tiny_config
from typer.testing import CliRunner

from nexusquant_cache import KeyNormPolicy, NexusQuantCache, PrefixStore
from nexusquant_cache.cli import app as app_module
from nexusquant_cache.cli.app import app
from nexusquant_cache.files import inspect_file
from nexusquant_cache.files.schema import StockMeta
from nexusquant_cache.store import store


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cache.safetensors"
    path.write_bytes(file_bytes("compressed"))
    return path


class TestInspect:
    @pytest.mark.parametrize("name", list(MAKERS))
    def test_shows_what_is_inside(self, name, tmp_path):
        path = tmp_path / "cache.safetensors"
        path.write_bytes(file_bytes(name))
        outcome = run("inspect", path)
        assert outcome.exit_code == 0, outcome.output
        shown = ["key words", "exact", "header", "preset", inspect_file(path).sha256, "compressed"]
        shown += {
            "mixed": ["DynamicSlidingWindowLayer", "qwen2"],
            "padded": ["llama", "e8, hadamard"],
            "short": ["llama", "positions"],
            "waiting": ["llama"],
            "reading": ["llama", "e8, hadamard"],
        }.get(name, ["71 seen", "e8, principal", "2 / 2.25 bits", "40.3 % kept"])
        for text in shown:
            if name in {"mixed", "waiting"} and text == "key words":
                continue  # their prompts wait
            assert text in outcome.stdout
        assert max(map(len, outcome.stdout.splitlines())) <= 100

    def test_shows_what_was_said_when_it_was_saved(self, tmp_path):
        path = tmp_path / "cache"
        cache = NexusQuantCache("quant")
        cache.update(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8), 0)
        cache.save(path, token_ids=[1, 2], metadata={"tokenizer": "[bold]T[/bold]"})
        outcome = run("inspect", path)
        assert "(tokenizer)  [bold]T[/bold]" in outcome.stdout
        assert inspect_file(path).meta.tokens_hash in outcome.stdout

    def test_an_empty_cache(self, tmp_path):
        NexusQuantCache("quant", config=tiny_config()).save(tmp_path / "cache")
        outcome = run("inspect", tmp_path / "cache")
        assert outcome.exit_code == 0
        assert "0-1      compressed" in outcome.stdout

    def test_what_only_informs_may_be_anything(self, tmp_path):
        def change(content, _named):
            content["statistics"] = {"dense_bytes": [], "kept_tokens": None}

        path = tmp_path / "cache"
        path.write_bytes(forged(file_bytes("compressed", None), change))
        outcome = run("inspect", path)
        assert outcome.exit_code == 0
        assert "71 seen, - kept" in outcome.stdout

    def test_nothing_that_a_file_says_is_markup_or_reaches_the_terminal(self, file, monkeypatch):
        summary = inspect_file(file)
        meta = replace(
            summary.meta,
            user={"[/x]": "\x1b[31mred\u202e", "[red]": "two\nlines\ud800"},
            preset="[/b]\x07",
            model=replace(summary.meta.model, fields={"model_type": "[/c]"}),
            statistics={"dense_bytes": 10**400, "kept_tokens": -5, "held_bytes": 1 << 100},
            layers=(StockMeta(layer_class="[/d]\x1b", numbers={}, tensors=()), *summary.meta.layers),
        )
        lying = replace(summary, meta=meta, sha256="[/e]\x1b")
        monkeypatch.setattr(app_module, "inspect_file", lambda _: lying)
        file = file.rename(file.parent / "[f]")
        outcome = run("inspect", file)
        assert outcome.exit_code == 0, outcome.exception
        for text in (
            "([/x])",
            r"\x1b[31mred\u202e",
            "([red])",
            r"two\nlines\ud800",
            r"[/b]\x07",
            "[/c]",
            r"[/d]\x1b",
            r"[/e]\x1b",
            "[f]",
            "- kept",
            "- bytes in memory, -",
        ):
            assert text in outcome.stdout
        assert outcome.stdout.replace("\n", "").isprintable()

    def test_what_was_saved_with_markup_can_be_looked_at(self, tmp_path):
        NexusQuantCache("quant").save(tmp_path / "a", metadata={"[/x]": "[/y]"})
        assert "([/x])" in run("inspect", tmp_path / "a").stdout

    def test_what_the_terminal_cannot_show(self, tmp_path):
        NexusQuantCache("quant").save(tmp_path / "a", metadata={"name": "日本"})
        outcome = CliRunner(charset="latin-1").invoke(app, ["inspect", str(tmp_path / "a")])
        assert outcome.exit_code == 0, outcome.exception
        assert r"\u65e5\u672c" in outcome.stdout

    def test_a_name_that_is_no_text(self, tmp_path):
        path = tmp_path / os.fsdecode(b"\xff\x1b")
        path.write_bytes(file_bytes("compressed"))
        for command in ("inspect", "verify"):
            outcome = run(command, path)
            assert outcome.exit_code == 0, outcome.exception
            assert r"\udcff\x1b" in outcome.stdout
        path.write_bytes(b"")
        path.unlink()
        assert r"\x1b" in run("verify", path).stderr

    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        for command, code in (("inspect", 2), ("verify", 1)):
            outcome = run(command, tmp_path / "pipe")
            assert outcome.exit_code == code
            assert "is no regular file" in outcome.stderr


class TestVerify:
    def test_a_sound_file(self, file):
        outcome = run("verify", file)
        assert outcome.exit_code == 0
        assert f"sound, {file.stat().st_size:,} bytes" in outcome.stdout
        assert outcome.stderr == "checking ...\n"

    def test_a_damaged_file(self, file):
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
        outcome = run("verify", file)
        assert outcome.exit_code == 1
        assert "error: " in outcome.stderr
        assert run("inspect", file).exit_code == 0  # which does not read that far

    def test_no_file(self, tmp_path):
        outcome = run("verify", tmp_path / "none")
        assert outcome.exit_code == 2
        assert "No such file" in outcome.stderr


@pytest.fixture
def folder(tmp_path):
    """The folder of a store with three entries, of two namespaces."""
    folder = tmp_path / "store"
    for tokens, namespace, options in (
        (40, "", {}),
        (50, "[bold]tuned[/bold]", {}),
        (42, "", {"policy": KeyNormPolicy(), "keep_ratio": 0.5}),
    ):
        cache = NexusQuantCache("balanced", config=tiny_config(), **options)
        for layer in range(2):
            feed(cache, *random_states((1, 2, tokens, 16), layer), layer)
        PrefixStore(folder, namespace=namespace).put(cache, list(range(tokens)))
    PrefixStore(folder).get(list(range(41)), config=tiny_config())
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*")}


class TestStores:
    def test_inspect_shows_the_entries_in_the_order_of_use(self, folder):
        outcome = run("inspect", folder)
        assert outcome.exit_code == 0, outcome.output
        first, _, _, _, *rows = outcome.stdout.splitlines()
        entries = PrefixStore(folder).entries()
        assert first == f"store: 3 entries, {sum(entry.nbytes for entry in entries):,} bytes"
        shown = [row.split() for row in rows if "..." in row]  # each entry's first line
        assert [row[:4] for row in shown] == [
            [str(place), f"{entry.file[:8]}...", str(entry.tokens), f"{entry.nbytes:,}"]
            for place, entry in enumerate(reversed(entries), 1)
        ]
        assert [row[2] for row in shown] == ["40", "42", "50"]
        for text in (
            entries[0].model[:8],
            "[bold]tuned[/bold]",
            "balanced, 2 / 2.25 bits, 40.3 % kept",
            "custom, 2 / 2.25 bits, 50 % kept, KeyNormPolicy()",
        ):
            assert text in " ".join(outcome.stdout.split())
        assert max(map(len, outcome.stdout.splitlines())) <= 100

    def test_verify(self, folder):
        outcome = run("verify", folder)
        assert outcome.exit_code == 0, outcome.output
        assert outcome.stdout == f"{folder}: sound, 3 entries, {PrefixStore(folder).total_bytes:,} bytes\n"

    def test_what_is_damaged_is_named(self, folder):
        first, second, _ = PrefixStore(folder).entries()
        (folder / first.file).unlink()
        (folder / second.file).write_bytes(b"123")
        outcome = run("verify", folder)
        assert (outcome.exit_code, outcome.stdout) == (1, "")
        errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
        assert errors == [
            f"error: {folder / first.file}: it is gone",
            f"error: {folder / second.file}: this is no safetensors file, or it has been cut off",
        ]
        assert run("inspect", folder).exit_code == 0  # which reads no file

    def test_a_damaged_index(self, folder):
        (folder / "index.sqlite3").write_bytes(b"no database" * 1000)
        assert run("inspect", folder).exit_code == 2
        outcome = run("verify", folder)
        assert outcome.exit_code == 1
        assert "is damaged" in outcome.stderr

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_looking_changes_nothing(self, command, folder, monkeypatch):
        (folder / f"{'ab' * 16}.safetensors").write_bytes(b"of a process that was killed")
        monkeypatch.setattr(store, "GRACE_SECONDS", -1.0)
        before = content(folder)
        assert run(command, folder).exit_code == 0
        assert content(folder) == before

    @pytest.mark.parametrize("command", ["inspect", "verify"])
    def test_a_folder_that_is_no_store_does_not_become_one(self, command, tmp_path):
        (tmp_path / "notes").touch()
        outcome = run(command, tmp_path)
        assert outcome.exit_code == 2
        assert f"error: there is no prefix store in {tmp_path}" in outcome.stderr
        assert content(tmp_path) == {"notes": b""}

    def test_an_empty_store(self, tmp_path):
        folder = PrefixStore(tmp_path / "store").folder
        assert run("inspect", folder).stdout.startswith("store: 0 entries, 0 bytes\n")
        assert run("verify", folder).stdout == f"{folder}: sound, 0 entries, 0 bytes\n"


class TestConvert:
    def test_levels(self, file, tmp_path):
        for options, level in (((), 3), (("--raw",), None), (("--level", 19), 19)):
            outcome = run("convert", file, tmp_path / "new", *options)
            assert outcome.exit_code == 0, outcome.output
            assert (tmp_path / "new").read_bytes() == file_bytes("compressed", level)
            size = (tmp_path / "new").stat().st_size
            assert f"{file.stat().st_size:,} bytes before, {size:,} now" in outcome.stdout

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--level", 40), "level must be a whole number from 1"),
            (("--level", 0), "level must be a whole number from 1"),
            (("--level", 3, "--raw"), "give one of them"),
        ],
    )
    def test_wrong_options(self, file, tmp_path, options, message):
        outcome = run("convert", file, tmp_path / "new", *options)
        assert outcome.exit_code == 2
        assert message in outcome.stderr
        assert not (tmp_path / "new").exists()

    def test_what_is_no_cache(self, tmp_path):
        (tmp_path / "a").write_bytes(b"123")
        outcome = run("convert", tmp_path / "a", tmp_path / "new")
        assert outcome.exit_code == 2
        assert outcome.stderr == "error: this is no safetensors file, or it has been cut off\n"
