"""Descriptive aliases of presets: accepted wherever a name is, true at all lengths, and never in what is written."""

import dataclasses
import re
from itertools import pairwise

import pytest
import torch
from feeding import feed
from integration.tiny import prompt, random_states, tiny_llama
from typer.testing import CliRunner
from unit.evaluation_tiny import tiny
from unit.serving_tiny import ascii_tiny

from nexusquant_cache import CacheConfig, NexusQuantCache, OptionError, PrefixStore, compressed_generation
from nexusquant_cache.cli.app import app
from nexusquant_cache.cli.chat import HELP
from nexusquant_cache.evaluation import preset_candidates
from nexusquant_cache.evaluation.bench import BenchOptions
from nexusquant_cache.evaluation.demo import DemoOptions
from nexusquant_cache.evaluation.fit import Shape, fit
from nexusquant_cache.files import inspect_file
from nexusquant_cache.presets import ALIASES, PRESETS, all_presets, preset_name, preset_names, resolve_preset
from nexusquant_cache.serving.chat_model import ChatModel, Wish
from nexusquant_cache.serving.session import ChatSession

BOTH = ", ".join(f"{alias} ({name})" for alias, name in ALIASES.items())


def test_every_preset_has_one_alias_and_they_stand_in_one_order():
    assert list(ALIASES.values()) == list(PRESETS)
    assert not ALIASES.keys() & PRESETS.keys()


@pytest.mark.parametrize("tokens", [1, 100, 127, 128, 384, 385, 768, 769, 1000, 1500, 4096, 32_768, 131_072])
def test_what_they_say_is_true_at_every_length(tokens):
    """All, most, at least half, fewer, and fewest; short texts keep more, and never does the order turn."""
    kept = {alias: PRESETS[name].budget(tokens) for alias, name in ALIASES.items()}
    assert kept["keep-all"] == tokens
    assert kept["keep-most"] > tokens / 2
    assert kept["keep-half"] >= tokens / 2
    assert all(more >= fewer for more, fewer in pairwise(kept.values()))
    if tokens >= 2000:
        assert kept["keep-half"] < 0.55 * tokens
        assert kept["keep-some"] < tokens / 2
        assert kept["keep-few"] < tokens / 4


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_its_preset(alias):
    assert resolve_preset(alias) is PRESETS[ALIASES[alias]]
    assert preset_name(alias) == ALIASES[alias]
    cache = NexusQuantCache(alias)
    assert (cache.preset, cache.cache_config) == (ALIASES[alias], PRESETS[ALIASES[alias]])
    assert cache.memory_report().preset == ALIASES[alias]


def test_names_come_once_and_settings_have_none():
    assert preset_names(["max", "keep-few", "keep-all", "quant"]) == ("max", "quant")
    assert preset_name(CacheConfig()) == "custom"
    assert NexusQuantCache("keep-all", residual_length=64).preset == "custom"


def test_a_preset_of_your_own_comes_before_an_alias(monkeypatch):
    monkeypatch.setitem(PRESETS, "keep-half", CacheConfig(keep_ratio=0.5))
    assert resolve_preset("keep-half").keep_ratio == 0.5
    assert NexusQuantCache("keep-half").preset == "keep-half"


def test_a_preset_of_your_own_needs_no_alias(monkeypatch):
    monkeypatch.setitem(PRESETS, "careful", CacheConfig())
    assert all_presets() == f"{BOTH}, careful"


@pytest.mark.parametrize(("given", "meant"), [("keep-al", "keep-all"), ("keep_half", "keep-half"), ("few", "keep-few")])
def test_a_mistyped_alias_gets_the_nearest(given, meant):
    message = f"unknown preset '{given}'. Did you mean '{meant}'? Allowed: {BOTH}. A CacheConfig is also accepted."
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        NexusQuantCache(given)


def test_inside_a_block():
    model = tiny_llama()
    with compressed_generation(model, "keep-few") as compressed:
        model.generate(prompt(40), max_new_tokens=2, do_sample=False)
    assert compressed.cache.preset == "max"


def test_files_have_the_name(tmp_path):
    cache = NexusQuantCache("keep-some", config=tiny_llama().config)
    for layer_idx in range(len(cache.layers)):
        feed(cache, *random_states((1, 2, 40, 16), layer_idx), layer_idx)
    cache.save(tmp_path / "cache")
    assert inspect_file(tmp_path / "cache").meta.preset == "balanced"
    assert NexusQuantCache.load(tmp_path / "cache", config=tiny_llama().config).preset == "balanced"


def test_a_store_finds_what_was_put_under_the_name(tmp_path):
    config, store = tiny_llama().config, PrefixStore(tmp_path)
    cache = NexusQuantCache("balanced", config=config)
    for layer_idx in range(len(cache.layers)):
        feed(cache, *random_states((1, 2, 40, 16), layer_idx), layer_idx)
    ids = torch.arange(41)
    store.put(cache, ids[:40])
    assert store.get(ids, config=config, preset="keep-some") is not None
    assert store.get(ids, config=config, preset="keep-all") is None


def test_rows_of_results_have_the_name():
    wanted = ("keep-few", "max", "keep-all")
    assert [row.name for row in preset_candidates(tiny(), wanted, read_again=True)] == ["max", "quant", "again@max"]
    assert [row.name for row in fit(Shape(2, (), 2, 64), 500, wanted)] == ["plain", "max", "quant"]
    assert BenchOptions(presets=wanted).presets == DemoOptions(presets=wanted).presets == ("max", "quant")
    assert dataclasses.replace(BenchOptions(presets=wanted), steps=2).presets == ("max", "quant")


def test_in_a_chat():
    session = ChatSession(ChatModel(ascii_tiny(), "keep-all"), Wish(4))
    assert (session.report().preset, session.model.preset) == ("quant", "quant")
    session.use_preset("keep-few")
    assert (session.report().preset, session.model.preset) == ("max", "max")
    with pytest.raises(OptionError, match=r"Allowed: keep-all \(quant\)"):
        session.use_preset("keep")
    assert BOTH in HELP


@pytest.mark.parametrize("command", ["demo", "evaluate", "bench", "fit", "chat", "serve"])
def test_help_has_alias_and_name(command):
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    words = " ".join(shown.replace("│", " ").split())
    assert BOTH in words


def test_a_command_takes_an_alias(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    arguments = ["fit", str(tmp_path), "--tokens", "500", "--presets", "keep-all,keep-few"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert re.findall(r"\b(quant|max|balanced|keep-\w+)\b", outcome.stdout) == ["quant", "max"]
