"""Files of every version of the format keep loading, and hold what they held when they were written."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from files import CONFIGS, take_apart
from golden_content import content_of, load_golden
from integration.tiny import fingerprint, kept_mask, logits, prompt, tiny_llama

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.files import convert_file, verify_file
from nexusquant_cache.files.container import VERSION

FOLDER = Path(__file__).parents[1] / "golden"
FILES = sorted(FOLDER.glob("version-*/*.safetensors"))


def test_every_version_is_there():
    assert {path.parent.name for path in FILES} == {f"version-{number + 1}" for number in range(VERSION)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_golden_files_hold_what_they_held(path):
    expected = json.loads((path.parent / "content.json").read_text(encoding="utf-8"))[path.name]
    found = content_of(path, load_golden(path))
    for layer, held in zip(expected["layers"], found["layers"], strict=True):
        if "hidden" in layer:  # see the next test
            for each in (layer, held):
                for name in ("kept", "positions", "hidden", "counts"):
                    each.pop(name, None)
                for side in ("keys", "values"):
                    del each[side][:2]
    assert found == expected


@pytest.mark.parametrize("name", ["padded", "short"])
def test_hidden_tokens_of_version_2_are_gone(name, tmp_path):
    """Rows that kept fewer tokens than others were filled up; what is left are the others, with their codes."""
    path = FOLDER / "version-2" / f"{name}-19.safetensors"
    convert_file(path, tmp_path / "raw", level=None)
    _, _, entries = take_apart((tmp_path / "raw").read_bytes())
    stored = {
        name: np.frombuffer(data, np.uint8).reshape(shape) for name, dtype, shape, data in entries if dtype == "U8"
    }
    cache = load_golden(path)
    for index, layer in enumerate(cache.layers):
        kept, hidden = (
            np.unpackbits(stored[f"layers.{index}.{each}"], axis=-1, bitorder="little").astype(bool)
            for each in ("kept", "hidden")
        )
        expected = kept & ~hidden
        assert hidden.any()
        covered = 50 - 8  # of the prompt, but for what stays exact; then come generated tokens, as many in each head
        found = kept_mask(cache, index).numpy()[..., :covered]
        sinks = np.zeros_like(found)
        for row, places in enumerate(layer.state.sink_positions.tolist()):
            sinks[row, :, places] = True
        assert (found == (expected[..., :covered] | sinks)).all()
        stays = np.ones(stored[f"layers.{index}.keys.scales"].shape, bool)
        stays[..., : kept[0, 0].sum()] = ~hidden[kept].reshape(*kept.shape[:2], -1)
        for side in ("keys", "values"):
            words = getattr(layer.state.body, side).words.stored().numpy()
            assert (words == stored[f"layers.{index}.{side}.words"][stays]).all()


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


@pytest.mark.parametrize(
    ("name", "pads"), [("padded", [6, 0]), ("short", [44, 6, 0])], ids=["padded", "shorter than what stays exact"]
)
def test_padded_files_of_version_1_are_as_their_masks_were(name, pads):
    """Rows count from their first real token; of 44 pads in 50 tokens the last stand where sinks could be taken."""
    cache = load_golden(FOLDER / "version-1" / f"{name}-19.safetensors")
    for layer in cache.layers:
        state = layer.state
        assert state.origins.tolist() == pads
        assert state.sink_positions.tolist() == [[min(count, 40), min(count, 40) + 1] for count in pads]
        assert state.pads is None
        assert state.shown == (0, state.seen)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_converted_they_stay_of_their_version(path, tmp_path):
    convert_file(path, tmp_path / "raw", level=None)
    assert verify_file(tmp_path / "raw").sha256 == verify_file(path).sha256
    texts = [take_apart(each.read_bytes())[0] for each in (path, tmp_path / "raw")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "path", [path for path in FILES if "mixed" not in path.stem], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_saved_again_they_hold_the_same(path, tmp_path):
    """What version 1 has said of padding, the present one says in its own words."""
    cache = load_golden(path)
    again = tmp_path / path.name
    cache.save(again)
    loaded = NexusQuantCache.load(again, config=CONFIGS[path.name.partition("-")[0]]())
    assert fingerprint(loaded) == fingerprint(cache)


def test_golden_files_are_never_written_again():
    with pytest.raises(SystemExit, match="never change"):
        runpy.run_path(str(FOLDER / "make.py"), run_name="__main__")
