"""Files of every version of the format keep loading, and hold what they held when they were written."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from golden_content import content_of, load_golden
from integration.tiny import logits, prompt, tiny_llama

from nexusquant_cache.files.container import VERSION

FOLDER = Path(__file__).parents[1] / "golden"
FILES = sorted(FOLDER.glob("version-*/*.safetensors"))


def test_every_version_is_there():
    assert {path.parent.name for path in FILES} == {f"version-{number + 1}" for number in range(VERSION)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_files_hold_what_they_held(path):
    expected = json.loads((path.parent / "content.json").read_text(encoding="utf-8"))[path.name]
    assert content_of(path, load_golden(path)) == expected


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name.startswith("compressed")], ids=lambda path: path.stem
)
def test_golden_files_go_on(path):
    model = tiny_llama()
    results = []
    for _ in range(2):
        cache = load_golden(path)
        results.append(torch.cat([logits(model, prompt(1, seed=seed), cache) for seed in range(9)]))
    assert torch.equal(*results)
    assert bool(results[0].isfinite().all())


def test_golden_files_are_never_written_again():
    with pytest.raises(SystemExit, match="never change"):
        runpy.run_path(str(FOLDER / "make.py"), run_name="__main__")
