"""A layer's tensors are declared once, and everything that is done with all of them goes by that."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from feeding import feed
from torch import Tensor

from nexusquant_cache import FormatError, NexusQuantCache
from nexusquant_cache.layer import state as state_module
from nexusquant_cache.layer.state import TENSORS, Declared, LayerState

BATCH, HEADS, DIM = 2, 2, 16


def filled(tokens: int = 200, **options: Any) -> NexusQuantCache:
    """Return a compressed cache of one layer."""
    mask = torch.ones(BATCH, tokens)
    settings = {"residual_length": 16, "flush_length": 4, "min_tokens": 16, "min_kept": 0} | options
    cache = NexusQuantCache("balanced", attention_mask=mask, **settings)
    for count in (tokens, 1):
        feed(cache, torch.randn(BATCH, HEADS, count, DIM), torch.randn(BATCH, HEADS, count, DIM), 0)
    return cache


def names(state: LayerState) -> set[str]:
    return {declared.name for declared, _ in state.tensors()}


def tensors_under(thing: Any, seen: set[int]) -> list[Tensor]:
    """Find every tensor that an object holds, by looking at attributes only."""
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [thing]
    inner = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    inner = [*inner, *(getattr(thing, "__dict__", {}) or {}).values()] if not callable(thing) else inner
    return [x for each in inner for x in tensors_under(each, seen)]


def test_no_tensor_of_a_layer_is_undeclared():
    layer = filled().layers[0]
    declared = {
        tensor.untyped_storage().data_ptr()
        for holder in layer.state.holders("exact", "codes", "scales", "positions", "transform")
        for tensor in getattr(holder, "on_the_way", None) or tensors_under(holder, set())
    }
    found = {tensor.untyped_storage().data_ptr() for tensor in tensors_under(layer.state, set())}
    assert found == declared


def test_names_and_paths_are_unique():
    assert len({each.name for each in TENSORS}) == len({each.path for each in TENSORS}) == len(TENSORS)


class TestANewTensor:
    """One line in `TENSORS` and one attribute: nothing else has to know of it."""

    @pytest.fixture
    def cache(self, monkeypatch):
        votes = Declared("votes", "votes", ("batch", "heads", "sinks"), "votes", "positions")
        monkeypatch.setattr(state_module, "TENSORS", (*TENSORS, votes))
        monkeypatch.setattr(LayerState, "votes", None, raising=False)
        cache = filled()
        cache.layers[0].state.votes = torch.arange(BATCH * HEADS * 4.0).view(BATCH, HEADS, 4)
        return cache

    def test_follows_the_batch(self, cache):
        before = cache.layers[0].state.votes
        cache.batch_repeat_interleave(2)
        assert torch.equal(cache.layers[0].state.votes, before.repeat_interleave(2, 0))
        cache.batch_select_indices(torch.tensor([3]))
        assert torch.equal(cache.layers[0].state.votes, before[1:])

    def test_is_counted(self, cache):
        with_it = cache.memory_report().layers[0].other_bytes
        votes, cache.layers[0].state.votes = cache.layers[0].state.votes, None
        assert with_it - cache.memory_report().layers[0].other_bytes == votes.nbytes

    def test_is_copied(self, cache):
        again = copy.deepcopy(cache)
        cache.layers[0].state.votes.zero_()
        assert again.layers[0].state.votes.sum() > 0

    def test_is_moved(self, cache):
        moved = []
        cache.layers[0].state.move(lambda x: (moved.append(x), x)[1], "positions")
        assert any(x is cache.layers[0].state.votes for x in moved)

    def test_is_saved_and_loaded(self, cache, tmp_path):
        cache.save(tmp_path / "cache")
        loaded = NexusQuantCache.load(tmp_path / "cache")
        assert torch.equal(loaded.layers[0].state.votes, cache.layers[0].state.votes)
        assert names(loaded.layers[0].state) == names(cache.layers[0].state)

    def test_is_missing_where_a_layer_has_none(self, cache, tmp_path):
        cache.layers[0].state.votes = None
        cache.save(tmp_path / "cache")
        assert NexusQuantCache.load(tmp_path / "cache").layers[0].state.votes is None

    def test_is_checked(self, cache, tmp_path, monkeypatch):
        cache.save(tmp_path / "cache")
        refuses = replace(state_module.TENSORS[-1], check=lambda *_: "is refused")
        monkeypatch.setattr(state_module, "TENSORS", (*TENSORS, refuses))
        with pytest.raises(FormatError, match=r"layers\.0\.votes is refused"):
            NexusQuantCache.load(tmp_path / "cache")

    def test_is_unknown_to_who_does_not_declare_it(self, cache, tmp_path, monkeypatch):
        cache.save(tmp_path / "cache")
        monkeypatch.setattr(state_module, "TENSORS", TENSORS)
        with pytest.raises(FormatError, match="names a tensor that no layer has"):
            NexusQuantCache.load(tmp_path / "cache")
