"""The mechanics of `benchmarks/gpu.py`, without a GPU: what it measures there is right if they are."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is for Linux")

from nexusquant_cache import PRESETS
from nexusquant_cache.codec.held import CodedSide
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.torch.attend import attend

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("numerics", "attention", "encode", "end_to_end", "capacity")


interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton must be chosen before torch is imported",
)


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """All parts, in the interpreter."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--smoke", "--output", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(path=path, said=done.stderr, content=json.loads(path.read_text()))


class TestSmoke:
    def test_all_comparisons_passed(self, smoke):
        rows = smoke.content["numerics"]
        assert {row["check"].partition(":")[0] for row in rows} == {"half-words", "attention", "decode", "encode"}
        assert all(row["passed"] and row["error"] <= row["allowed"] for row in rows)

    def test_attention_stands_beside_sdpa(self, smoke):
        plain, *codes = smoke.content["attention"]
        assert (plain["what"], plain["preset"]) == ("sdpa", None)
        assert [(row["preset"], row["keys"]) for row in codes] == [
            ("balanced", "pre-RoPE, evicted"),
            ("quant", "post-RoPE"),
        ]
        for row in codes:
            assert row["unit"] == plain["unit"]
            assert row["ratio"] == pytest.approx(plain["milliseconds"] / row["milliseconds"])
            assert row["kernel_ratio"] == pytest.approx(plain["milliseconds"] / row["kernel_ms"])
            assert row["not_captured"] == "no GPU"
        # 32 packed tokens of one head, 16 + 18 bytes and two scales each, at balanced's rates.
        assert codes[0]["bytes"] == 32 * (16 + 18 + 2)
        assert plain["bytes"] == 4 * 100 * 64

    def test_encoding(self, smoke):
        (row,) = smoke.content["encode"]
        assert row["vectors_per_s"] == pytest.approx(1000 * 32 / row["milliseconds"])
        assert row["bytes"] == 32 * (2 * 64 + 16 + 1)

    def test_caches_of_a_model(self, smoke):
        rows = smoke.content["end_to_end"]
        steps = [row for row in rows if row["what"] == "steps"]
        assert [(row["cache"], row["on_codes"]) for row in steps] == [
            ("DynamicCache", False),
            ("max", True),
            ("max", False),
            ("StaticCache", False),
        ]
        assert steps[0]["ratio"] == 1
        assert steps[1]["held_bytes"] == steps[2]["held_bytes"] > 0
        plain, ours = (row for row in rows if row["what"] == "prefill")
        assert ours["cache_peak_share"] == ours["cache_peak_bytes"] / plain["cache_peak_bytes"]
        assert ours["peak_share"] is None  # there is no GPU to ask
        assert {row["what"] for row in smoke.content["skipped"]} <= {
            "QuantizedCache on optimum.quanto",
            "QuantizedCache on hqq",
        }

    def test_capacity_is_computed(self, smoke):
        plain, ours = smoke.content["capacity"]
        assert plain["how"] == ours["how"] == "computed"
        left = plain["card_bytes"] - plain["weight_bytes"]
        assert plain["tokens"] == left // (2 * 2 * 2 * 64)
        assert ours["tokens"] * ours["bytes_per_token"] + ours["fixed_bytes"] == pytest.approx(left)
        assert ours["tokens"] > 4 * plain["tokens"]  # prompts so short are only coded

    def test_the_file_says_what_it_is_about(self, smoke):
        content = smoke.content
        assert content["settings"]["smoke"]
        assert {"device", "torch", "triton", "transformers", "cuda", "code"} <= content["environment"].keys()
        assert {row["verdict"] for row in content["targets"]} == {"not measured"}
        assert {part for part, _ in content["complete"]} == set(PARTS)
        assert {path.name for path in smoke.path.parent.glob("*.png")} == {
            "gpu_attention.png",
            "gpu_end_to_end.png",
            "gpu_capacity.png",
        }


@pytest.fixture
def main(load, monkeypatch, tmp_path):
    """The script in this process; returns with what code it ended."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def ended(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments, "--output", str(tmp_path / "gpu.json")])
        try:
            load("gpu").main()
        except SystemExit as end:
            return end.code
        return 0

    return ended


class TestScript:
    def test_without_a_gpu_it_says_what_is_needed(self, main, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main() == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "compute capability 8.0" in said
        assert "--smoke" in said
        assert not (tmp_path / "gpu.json").exists()

    def test_smoke_is_not_written_to_the_results(self, load, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke"])
        with pytest.raises(SystemExit):
            load("gpu").main()
        assert "--output" in capsys.readouterr().err

    @interpreted
    def test_a_later_run_goes_on_where_an_earlier_one_ended(self, main, smoke, tmp_path):
        path = tmp_path / "gpu.json"
        rest = [each for each in smoke.content["complete"] if each[0] != "encode"]
        path.write_text(json.dumps(smoke.content | {"complete": rest, "encode": [{"unit": "balanced, keys"}]}))
        assert main("--smoke", "--only", "encode", "attention") == 0
        content = json.loads(path.read_text())
        assert content["numerics"] == smoke.content["numerics"]
        assert content["attention"] == smoke.content["attention"]
        assert content["end_to_end"] == smoke.content["end_to_end"]
        assert [row["vectors"] for row in content["encode"]] == [32]

    @interpreted
    def test_wrong_kernels_are_named_and_nothing_is_timed(self, main, load, monkeypatch, capsys, tmp_path):
        numerics = load("_gpu_numerics")
        whole = numerics.decoded
        monkeypatch.setattr(numerics, "decoded", lambda side: whole(side) * 1.001)
        check = numerics.Check("decode", numerics.Shape(1, 100, 1, 2, 64), "post-RoPE", torch.float32)
        monkeypatch.setattr(numerics, "checks", lambda **_: [check])
        assert main("--smoke") == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "decode: 1 x 100 x 64, post-RoPE, float32" in said
        content = json.loads((tmp_path / "gpu.json").read_text())
        assert [row["passed"] for row in content["numerics"]] == [False, False]
        assert [content[part] for part in PARTS[1:]] == [[]] * 4
        assert content["complete"] == []

    def test_pictures_of_nothing(self, main, capsys):
        assert main("--plot") == 0
        assert "no results" in capsys.readouterr().err


class TestNumerics:
    @pytest.fixture
    def numerics(self, load):
        return load("_gpu_numerics")

    def test_every_head_dimension_group_and_dtype_is_checked(self, numerics):
        checks = numerics.checks(smoke=False)
        found = {
            (check.shape.head_dim, check.keys, group, check.dtype)
            for check in checks
            if check.kind == "attention"
            for group in check.groups
        }
        for head_dim in (64, 96, 128, 256):
            for keys in numerics.KEYS:
                for group in (1, 4, 8):
                    assert {(head_dim, keys, group, dtype) for dtype in (torch.float16, torch.bfloat16)} <= found
        assert {check.kind for check in checks} == set(numerics._KINDS)
        assert {check.shape.head_dim for check in checks if check.kind == "encode"} == {64, 96, 128, 256}

    def test_an_error_is_a_failure_that_is_told(self, numerics, monkeypatch):
        def broken(*_):
            yield numerics.Finding("so far", 0.0, 0.0)
            raise RuntimeError("out of registers")

        monkeypatch.setitem(numerics._KINDS, "decode", broken)
        (row,) = numerics.run_all([numerics.Check("decode")], torch.device("cpu"), 1, lambda: None)
        assert not row["passed"]
        assert row["error"] == "inf"
        assert "RuntimeError: out of registers" in row["what"]

    def test_no_number_is_no_agreement(self, numerics):
        found = torch.ones(1, 2, 3)
        found[0, 1, 2] = torch.nan
        finding = numerics._distance("x", found, torch.ones(1, 2, 3, dtype=torch.float64), 0.1)
        assert not finding.passed
        assert finding.where == "worst at [0, 1] of [1, 2]"
        assert numerics._distance("x", found[:, :1], torch.ones(1, 1, 3, dtype=torch.float64), 0.0).passed

    def test_a_row_counts_as_much_as_the_others(self, numerics):
        """A short row is measured by the mean length, so that it need not be right to the last bit."""
        expected = torch.tensor([[[2.0, 0.0], [0.001, 0.0]]], dtype=torch.float64)
        finding = numerics._distance("x", expected + torch.tensor([0.0, 0.01]), expected, 0.1)
        assert finding.error == pytest.approx(0.01 / 1.0005)


class TestTokens:
    @pytest.fixture
    def tokens(self, load):
        return load("_gpu_tokens")

    @pytest.mark.parametrize("keys", ["post-RoPE", "pre-RoPE", "pre-RoPE, evicted"])
    def test_the_oracle_is_attention_on_codes(self, tokens, keys):
        """Written from the definition, it agrees with the torch implementation, which has tests of its own."""
        shape = tokens.Shape(2, 130, 2, 6, 64)
        held = tokens.random_held(shape, keys, "balanced", torch.float32, torch.device("cpu"))
        plain = held.__class__(
            **{
                **vars(held),
                "keys": tokens.on_cpu(held.keys),
                "values": tokens.on_cpu(held.values),
            }
        )
        assert held.tokens == 130
        query = torch.randn(2, 6, 1, 64)
        out, _ = attend(query, plain, None, Softmax(0.125))
        torch.testing.assert_close(out.double(), tokens.attended(query, held, 0.125), rtol=1e-4, atol=1e-4)

    def test_heads_have_plans_of_their_own_and_all_rates(self, tokens):
        codec, transform = tokens.fitted("balanced", "keys", 8, 128)
        assert len(transform.heads_by_plan) > 1
        assert transform.side_plan(codec.layouts).rates & 0b11100 == 0b11100

    def test_values_have_what_those_of_the_preset_have(self, tokens):
        codec, transform = tokens.fitted("balanced", "values", 8, 128)
        assert isinstance(transform.rotation, HadamardRotation)
        assert codec.layouts == (CodeLayout.flat(128, PRESETS["balanced"].value_bits),)

    def test_all_heads_keep_as_many(self, tokens):
        held = tokens.random_held(
            tokens.Shape(1, 100, 2, 2, 64), "pre-RoPE, evicted", "max", torch.float16, torch.device("cpu")
        )
        positions = held.positions.positions(torch.device("cpu"))
        assert positions.shape == (1, 2, 32)
        assert positions.min() >= tokens.SINKS
        assert (positions.diff() > 0).all()
        assert held.positions.covered == 78  # 32 / 0.411

    def test_copies_share_nothing(self, tokens):
        shape, device = tokens.Shape(1, 100, 1, 1, 64), torch.device("cpu")
        first, second = (tokens.random_side("balanced", "keys", shape, 32, device) for _ in range(2))
        assert isinstance(first, CodedSide)
        basis = [side.transform.rotation.basis for side in (first, second)]
        assert torch.equal(*basis)
        assert basis[0].data_ptr() != basis[1].data_ptr()
        assert not torch.equal(first.packed.words, second.packed.words)


class FakeEvent:
    """An event on a clock that the calls move."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.clock

    def elapsed_time(self, other):
        return other.at - self.at


class FakeGraph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        FakeEvent.clock += 2.0


@pytest.fixture
def cuda(load, monkeypatch):
    """Just as much of a GPU as the clock uses."""

    @contextlib.contextmanager
    def nothing(*_):
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    fakes = {
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": nothing,
        "graph": nothing,
        "synchronize": lambda: None,
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=50 << 20),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return load("_gpu_clock")


class TestClock:
    def test_calls_are_timed_in_a_graph_and_beside_it(self, cuda):
        made = []

        def call(name):
            def do():
                made.append(name)
                FakeEvent.clock += 5.0

            return do

        timing = cuda.time_calls([call("a"), call("b")], torch.device("cuda"))
        assert timing.milliseconds == timing.tenth == timing.ninetieth == 1.0  # 2 for both
        assert timing.launched_milliseconds == 5.0
        assert timing.not_captured is None
        assert timing.repeats == 125  # a quarter of a second
        assert made == ["a", "b"] * (len(made) // 2)

    def test_what_cannot_be_captured_is_timed_and_says_why(self, cuda, monkeypatch):
        @contextlib.contextmanager
        def refuse(_):
            yield
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(torch.cuda, "graph", refuse)

        def call():
            FakeEvent.clock += 100.0

        timing = cuda.time_calls([call], torch.device("cuda"))
        assert timing.milliseconds == 100.0
        assert timing.repeats == 15
        assert timing.not_captured == "operation not permitted when stream is capturing"

    def test_copies_fill_more_than_the_cache(self, cuda):
        device = torch.device("cuda")
        assert cuda.copies_for(10 << 20, device) == 16
        assert cuda.copies_for(1 << 30, device) == 1
        assert cuda.copies_for(1, torch.device("cpu")) == 1


class TestRecord:
    @pytest.fixture
    def record(self, load, tmp_path):
        module = load("_gpu_record")

        def make(settings, *, fresh=False):
            return module.Record(tmp_path / "r.json", PARTS, settings, lambda _: None, fresh=fresh)

        return make

    def test_units_that_are_complete_stay(self, record):
        first = record({"size": (1, 2)})
        first.add("numerics", "a", {"x": 1})
        first.finish("numerics", "a")
        first.add("numerics", "b", {"x": 2})
        second = record({"size": (1, 2)})
        assert second.is_done("numerics", "a")
        assert not second.is_done("numerics", "b")
        assert [row["x"] for row in second.content["numerics"]] == [1, 2]
        second.begin("numerics", "b")
        assert second.content["numerics"] == [{"unit": "a", "x": 1}]
        for other in (record({"size": (1, 3)}), record({"size": (1, 2)}, fresh=True)):
            assert other.content["numerics"] == other.content["complete"] == []

    def test_what_is_left_out_is_in_the_file(self, record, tmp_path):
        record({}).skip("attention", "1 x 1M", "no room [for it]")
        (left_out,) = json.loads((tmp_path / "r.json").read_text())["skipped"]
        assert left_out == {"part": "attention", "what": "1 x 1M", "why": "no room [for it]"}

    def test_time_runs_out(self, load, monkeypatch):
        budget = load("_gpu_record").Budget(2)
        assert budget.why_not(100) is None
        end = time.monotonic() + 115
        monkeypatch.setattr(time, "monotonic", lambda: end)
        assert budget.why_not(100) == "about 100 s needed, 5 s left"

    def test_targets_are_judged_by_the_worst(self, load):
        targets = {target.what: target for target in load("_gpu_record").TARGETS}
        content = {part: [] for part in PARTS}
        assert {target.judged(content)["verdict"] for target in targets.values()} == {"not measured"}
        codes = {"batch": 1, "context": 32_768, "head_dim": 128, "preset": "balanced", "keys": "post-RoPE"}
        content["attention"] = [codes | {"ratio": 2.4}, codes | {"keys": "pre-RoPE", "ratio": 1.0}]
        content["encode"] = [{"head_dim": 128, "vectors_per_s": speed} for speed in (2e9, 9e8)]
        step = {"what": "steps", "context": 32_768, "on_codes": True}
        content["end_to_end"] = [
            step | {"batch": 1, "ratio": 1.2},
            step | {"batch": 8, "ratio": 1.6},
            step | {"batch": 1, "on_codes": False, "ratio": 0.1},
            {"what": "prefill", "context": 131_072},
            {"what": "prefill", "context": 131_072, "peak_share": 0.2, "cache_peak_share": 0.1},
        ]
        found = {what: target.judged(content) for what, target in targets.items()}
        verdicts = [(row["found"], row["verdict"]) for row in found.values()]
        assert verdicts == [
            (2.4, "met"),
            *[(None, "not measured")] * 4,
            (9e8, "missed"),
            (1.2, "met"),
            (1.6, "met"),
            (0.2, "missed"),
            (0.1, "met"),
        ]

    def test_the_card_is_asked_and_may_not_answer(self, load, monkeypatch, tmp_path):
        module = load("_gpu_record")
        assert module.smi(["power.limit"]) == {}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        program = tmp_path / "nvidia-smi"
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        for answer, told in (("700.00 W, [N/A]", {"power.limit": "700.00 W"}), ("no devices", {})):
            program.write_text(f"#!/bin/sh\necho '{answer}'\n")
            program.chmod(0o755)
            assert module.smi(["power.limit", "clocks.sm"]) == told
