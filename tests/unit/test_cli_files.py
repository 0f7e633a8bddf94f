"""The commands that look at saved caches."""

import pytest
from files import MAKERS, file_bytes, forged
from integration.tiny import tiny_config
from typer.testing import CliRunner

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.cli.app import app
from nexusquant_cache.serialization import inspect_file


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
        shown += {"mixed": ["DynamicSlidingWindowLayer", "qwen2"], "padded": ["llama", "e8, hadamard"]}.get(
            name, ["71 seen", "e8, principal", "1.75 / 2.25 bits", "41.1 % kept"]
        )
        for text in shown:
            if name == "mixed" and text == "key words":
                continue  # its prompt waits
            assert text in outcome.stdout
        assert max(map(len, outcome.stdout.splitlines())) <= 100

    def test_shows_what_was_said_when_it_was_saved(self, tmp_path):
        path = tmp_path / "cache"
        NexusQuantCache("quant").save(path, token_ids=[1, 2], metadata={"tokenizer": "[bold]T[/bold]"})
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
            content["model"]["fields"] = {"model_type": {}}
            content["settings"] = {}

        path = tmp_path / "cache"
        path.write_bytes(forged(file_bytes("compressed", None), change))
        outcome = run("inspect", path)
        assert outcome.exit_code == 0
        assert "71 seen, - kept" in outcome.stdout


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
