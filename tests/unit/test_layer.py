"""`NexusQuantLayer`: what is compressed when, in examples by hand, and what may not depend on anything else.

Whether the cache as a whole does what it says is tested in `property/test_state_machine.py`, against the slow model
in `oracle_cache`.  The examples here are computed by hand from the documentation; both must agree with them.
"""

import contextlib
import copy
from collections.abc import Sequence
from math import ceil
from typing import Any

import pytest
import torch
from integration.tiny import (
    SMALL,
    fingerprint,
    kept_positions,
    random_states,
    reachable_bytes,
    tiny_config,
)
from oracle_cache import CountingCache, OracleCache
from torch import Tensor

from nexusquant_cache import CacheConfig, KeyNormPolicy, NexusQuantCache
from nexusquant_cache.errors import UnsupportedError

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
CONFIG = tiny_config(num_hidden_layers=LAYERS, num_key_value_heads=HEADS)


def assert_same(given: Any, expected: Any) -> None:
    for x, y in zip(given, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


class Pair:
    """The cache and its slow model, moved along together."""

    def __init__(self, config: CacheConfig, dtype: torch.dtype, with_rope: bool, batch: int) -> None:
        model = CONFIG if with_rope else None
        self.cache, self.oracle = CountingCache(config, config=model), OracleCache(config, config=model)
        self.dtype, self.batch, self.seed = dtype, batch, 0

    def update(self, tokens: int) -> None:
        for index in range(LAYERS):
            self.seed += 1
            states = random_states((self.batch, HEADS, tokens, HEAD_DIM), self.seed, self.dtype)
            returned = [cache.update(*(x.clone() for x in states), index) for cache in (self.cache, self.oracle)]
            assert_same(*returned)

    def apply(self, name: str, number: int) -> None:
        """Let a prompt, generated tokens or an explicit compression happen to both."""
        if name == "prompt":
            self.update(number)
        elif name == "tokens":
            for _ in range(number):
                self.update(1)
        else:
            self.cache.compress()
            self.oracle.compress()


@pytest.mark.parametrize("with_rope", [False, True])
def test_equals_the_slow_model_over_a_long_conversation(with_rope: bool) -> None:
    """Several turns and enough tokens for every buffer to be replaced, at the rotary tables' first boundary."""
    pair = Pair(CacheConfig(keep_ratio=0.4, **SMALL), torch.bfloat16, with_rope, batch=2)
    turns = [
        ("prompt", 121),
        ("tokens", 60),
        ("prompt", 7),
        ("prompt", 71),
        ("tokens", 50),
        ("prompt", 4),
        ("tokens", 9),
    ]
    for name, number in turns:
        pair.apply(name, number)
        for index, expected in enumerate(pair.oracle.layers):
            assert torch.equal(kept_positions(pair.cache, index), expected.positions())
    assert pair.cache.counter.encoded_vectors == pair.oracle.encoded_vectors
    assert pair.cache.get_seq_length() > 256
    assert 0 < pair.cache.layers[0].state.kept < pair.cache.get_seq_length()


# By hand: 2 sinks, 3 recent tokens, half of the others.  Keys of small norm stay.

BY_HAND: dict[str, Any] = {
    "policy": KeyNormPolicy(),
    "keep_ratio": 0.5,
    "sink_tokens": 2,
    "residual_length": 3,
    "flush_length": 2,
    "min_tokens": 4,
}
#                    sinks  candidates           recent
NORMS: list[int] = [9, 9, 5, 1, 8, 2, 7, 3, 6, 9, 9, 9]
both = pytest.mark.parametrize("make", [NexusQuantCache, OracleCache])


def keys_of(cache: Any, norms: Any) -> Tensor:
    """Return keys of these norms; neighbours point elsewhere, or they would look like padding."""
    axes = torch.arange(len(norms[0])) + cache.get_seq_length()
    return torch.eye(8)[axes % 8] * torch.tensor(norms, dtype=torch.float32)[..., None]  # [rows or heads, n, d]


def feed(cache: Any, *norms: Sequence[int], layers: int = 1) -> None:
    """Give the rows of all layers tokens with keys of these norms; they have one head."""
    keys = keys_of(cache, norms)[:, None]
    for index in range(layers):
        cache.update(keys, torch.ones_like(keys), index)


def feed_heads(cache: Any, *norms: Sequence[int]) -> None:
    """Give the heads of one row tokens with keys of these norms."""
    keys = keys_of(cache, norms)[None]
    cache.update(keys, torch.ones_like(keys), 0)


def positions(cache: Any, layer_idx: int = 0) -> list[list[int]]:
    """Return the positions that are kept, of each head and row."""
    is_model = isinstance(cache, OracleCache)
    kept: Tensor = cache.layers[layer_idx].positions() if is_model else kept_positions(cache, layer_idx)
    return kept.flatten(0, 1).tolist()


def warns_if_real(cache: Any, match: str) -> Any:
    """Expect a warning of the cache; the model takes a note."""
    return contextlib.nullcontext() if isinstance(cache, OracleCache) else pytest.warns(UserWarning, match=match)


@both
def test_by_hand_a_prompt_is_compressed_at_the_first_generation_step(make: Any) -> None:
    """Of 7 candidates 4 stay; of 2 generated tokens beyond the recent ones none is evicted."""
    cache = make(**BY_HAND)
    feed(cache, NORMS)
    assert cache.get_mask_sizes(2, 0) == (14, 0)
    assert cache.get_mask_sizes(1, 0) == (10, 3)
    feed(cache, [9])
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, 9, 10, 11, 12]]
    for _ in range(4):
        feed(cache, [9])
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *range(9, 17)]]
    assert [cache.layers[0].state.seen, cache.layers[0].state.kept] == [17, 14]


@both
def test_by_hand_a_short_second_turn_is_not_evicted_from(make: Any) -> None:
    """Behind the 3 recent tokens of the first turn stand 4: with 3 candidates nothing is coded, and nothing waits."""
    cache = make(**BY_HAND)
    feed(cache, NORMS)
    feed(cache, [9])
    feed(cache, [9, 9])
    feed(cache, [9])
    before = positions(cache)
    feed(cache, [9])
    assert positions(cache) == [[*before[0], 16]]
    assert cache.layers[0].state.seen - cache.layers[0].state.kept == 3


@both
def test_by_hand_pads_are_evicted_before_text(make: Any) -> None:
    """Of the 3 evictions, pads are the first; a row's sinks are its first real tokens, and text gives the rest.

    Rows without pads, with 1, 3, 5 and 8 of 12.  The last has its sinks at 7, the first place behind 7 candidates.
    """
    pads = [0, 1, 3, 5, 8]
    cache = make(attention_mask=torch.tensor([[0] * count + [1] * (12 - count) for count in pads]), **BY_HAND)
    feed(cache, *[[1] * count + NORMS[: 12 - count] for count in pads])
    feed(cache, *[[9]] * 5)
    recent = [9, 10, 11, 12]
    assert positions(cache) == [
        [0, 1, 2, 3, 5, 7, *recent],
        [1, 2, 3, 4, 6, 8, *recent],  # candidates at 3-8 have norms 5, 1, 8, 2, 7, 3
        [3, 4, 5, 6, 7, 8, *recent],
        [3, 4, 5, 6, 7, 8, *recent],
        [3, 4, 5, 6, 7, 8, *recent],
    ]


@both
def test_by_hand_no_text_goes_while_a_row_keeps_pads(make: Any) -> None:
    """3 of 5 pads went: a second turn may not evict, since in that row pads would have to go."""
    mask = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])
    cache = make(attention_mask=mask, **BY_HAND)
    feed(cache, [1] * 5 + NORMS[:7], NORMS)
    feed(cache, [9], [9])
    feed(cache, NORMS, NORMS)
    feed(cache, [9], [9])
    assert positions(cache) == [[*range(3, 26)], [0, 1, 2, 3, 5, 7, *range(9, 26)]]
    assert cache.layers[0].state.seen - cache.layers[0].state.kept == 3


@both
def test_by_hand_heads_are_left_with_equally_many_codes(make: Any) -> None:
    """Heads keep 2, 3, 5, 7 and 2, 6, 7, 8.  Below 6 they have three and one, so the first gives up its older two."""
    cache = make(**BY_HAND)
    feed_heads(cache, NORMS, [9, 9, 1, 8, 7, 6, 1, 1, 1, 9, 9, 9])
    feed_heads(cache, [9], [9])
    recent = [9, 10, 11, 12]
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *recent], [0, 1, 2, 6, 7, 8, *recent]]
    cache.crop(-2)
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, 9, 10], [0, 1, 2, 6, 7, 8, 9, 10]]
    with warns_if_real(cache, "heads keep their newest 1 packed tokens and lose up to 2 others"):
        cache.crop(-5)
    assert positions(cache) == [[0, 1, 5], [0, 1, 2]]
    assert cache.get_mask_sizes(1, 0) == (4, 3)
    feed_heads(cache, [9], [9])
    assert positions(cache) == [[0, 1, 5, 6], [0, 1, 2, 6]]


@both
def test_by_hand_heads_that_agree_lose_nothing(make: Any) -> None:
    """The same cut where both heads have three below it: no head loses more than what stands behind it."""
    cache = make(**BY_HAND)
    feed_heads(cache, NORMS, NORMS)
    feed_heads(cache, [9], [9])
    cache.crop(-7)
    assert positions(cache) == [[0, 1, 2, 3, 5]] * 2


@both
@pytest.mark.parametrize("left", [0, 1, 2])
def test_by_hand_without_codes_nothing_was_ever_compressed(make: Any, left: int) -> None:
    """What is left of the sinks is the beginning of a prompt; a new one is compressed like the first."""
    cache, fresh = make(**BY_HAND), make(**BY_HAND)
    feed(cache, NORMS)
    feed(cache, [9])
    cache.crop(left - 13)
    assert positions(cache) == [[*range(left)]]
    feed(cache, NORMS[left:])
    feed(fresh, NORMS)
    for each in (cache, fresh):
        feed(each, [9])
    assert positions(cache) == positions(fresh) == [[0, 1, 2, 3, 5, 7, 9, 10, 11, 12]]
    assert_same([cache.layers[0].keys, cache.layers[0].values], [fresh.layers[0].keys, fresh.layers[0].values])


@both
def test_by_hand_the_sinks_of_a_padded_row_cannot_be_cut(make: Any) -> None:
    """They stand at 3 and 4: 5 tokens may be left, 4 may not; none at all is a new beginning."""
    cache = make(attention_mask=torch.tensor([[0] * 3 + [1] * 9]), **BY_HAND)
    feed(cache, [1] * 3 + NORMS[:9])
    feed(cache, [9])
    before = copy.deepcopy(cache)
    for left in (1, 2, 3, 4):
        with pytest.raises(UnsupportedError):
            cache.crop(left - 13)
        assert positions(cache) == positions(before)
    cache.crop(5 - 13)
    assert positions(cache) == [[3, 4]]
    cache.crop(-5)
    assert [cache.layers[0].state.seen, cache.layers[0].state.kept] == [0, 0]


@both
def test_by_hand_candidates_are_never_coded_before_they_are_accepted(make: Any) -> None:
    """A prompt of 12 with 3 candidates, of which 1 is accepted: of 8 between sinks and recent ones 4 stay.

    Later candidates are no prompt: what is coded of them is kept whole.
    """
    cache = make(config=tiny_config(num_hidden_layers=1, head_dim=8), **BY_HAND)
    cache.activate_past_recording()
    feed(cache, [*NORMS, 9, 9, 9])
    assert positions(cache) == [[*range(15)]]
    cache.crop(-2)
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, 10, 11, 12]]
    feed(cache, [9, 9, 9])
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *range(10, 16)]]
    cache.crop(-1)
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *range(10, 15)]]
    assert cache.get_mask_sizes(1, 0) == (12, 4)
    feed(cache, [9] * 6)
    cache.crop(0)
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *range(10, 21)]]


@both
@pytest.mark.parametrize("with_model", [False, True])
def test_a_rejected_candidate_leaves_no_trace(make: Any, with_model: bool) -> None:
    """A prompt with candidates that are rejected is the prompt alone, and so are the steps after it."""
    model = tiny_config(num_hidden_layers=2, num_key_value_heads=1, num_attention_heads=1, head_dim=8)
    options = BY_HAND | {"config": model if with_model else None}
    caches = make(**options), make(**options)
    for cache, rejected in zip(caches, (0, 3), strict=True):
        cache.activate_past_recording()
        for norms in (NORMS, [9], [9, 9], [9]):
            feed(cache, [*norms, *[9] * rejected], layers=2)
            cache.crop(-rejected)
    for index in range(2):
        one, other = (cache.layers[index] for cache in caches)
        assert_same([one.keys, one.values], [other.keys, other.values])
        assert positions(caches[0], index) == positions(caches[1], index)
    assert positions(caches[0]) == [[0, 1, 2, 3, 5, 7, *range(9, 16)]]


@both
def test_by_hand_a_layer_is_compressed_when_the_next_one_is_reached(make: Any) -> None:
    """With ``during_prefill`` only the last layer ever waits, and all announce the same sizes."""
    cache = make(when="during_prefill", **BY_HAND)
    feed(cache, NORMS, layers=3)
    chosen = [0, 1, 2, 3, 5, 7, 9, 10, 11]
    assert [positions(cache, index) for index in range(3)] == [[chosen], [chosen], [[*range(12)]]]
    for tokens in (1, 2):
        assert {cache.get_mask_sizes(tokens, index) for index in range(3)} == {(9 + tokens, 3)}
    feed(cache, [9, 9], layers=3)
    assert [positions(cache, index) for index in range(3)] == [[[*chosen, 12, 13]]] * 3


def test_per_head_choice_differs_and_counts_agree() -> None:
    pair = Pair(CacheConfig(keep_ratio=0.3, **SMALL), torch.float32, with_rope=True, batch=2)
    pair.apply("prompt", 101)
    pair.apply("tokens", 1)
    choices = {
        tuple(row.tolist()) for index in range(LAYERS) for row in kept_positions(pair.cache, index).flatten(0, 1)
    }
    assert len(choices) > HEADS * LAYERS
    assert {len(choice) for choice in choices} == {2 + ceil(0.3 * (101 - 10)) + 8 + 1}


def test_chunked_prompt_equals_one_prompt() -> None:
    """What is stored does not depend on the chunks in which the prompt arrives."""
    keys, values = random_states((1, HEADS, 100, HEAD_DIM), 5)
    whole, chunked = (NexusQuantCache("balanced", config=CONFIG, **SMALL) for _ in range(2))
    for cache, chunk in ((whole, 99), (chunked, 33)):
        for start in range(0, 99, chunk):
            part = slice(start, start + chunk)
            cache.update(keys[:, :, part], values[:, :, part], 0)
        cache.update(keys[:, :, 99:], values[:, :, 99:], 0)
    assert fingerprint(whole) == fingerprint(chunked)


def test_batch_of_two_is_two_batches_of_one() -> None:
    keys, values = random_states((2, HEADS, 90, HEAD_DIM), 5, torch.bfloat16)
    caches = [NexusQuantCache("balanced", config=CONFIG, **SMALL) for _ in range(3)]
    for part in [slice(0, 60), *(slice(i, i + 1) for i in range(60, 90))]:
        both = caches[0].update(keys[:, :, part], values[:, :, part], 0)
        alone = [caches[1 + i].update(keys[i : i + 1, :, part], values[i : i + 1, :, part], 0) for i in range(2)]
        assert_same(both, [torch.cat(pair) for pair in zip(*alone, strict=True)])


def test_mask_sizes_announce_the_coming_eviction() -> None:
    """100 tokens: 2 sinks, 8 recent, half of the 90 between them will go."""
    cache = NexusQuantCache("quant", **(SMALL | {"keep_ratio": 0.5}))
    cache.update(*random_states((1, HEADS, 100, HEAD_DIM), 0), 0)
    assert cache.get_mask_sizes(5, 0) == (105, 0)
    assert cache.get_mask_sizes(1, 0) == (56, 45)
    keys, _ = cache.update(*random_states((1, HEADS, 1, HEAD_DIM), 1), 0)
    assert keys.shape[2] == 56
    assert cache.get_mask_sizes(1, 0) == (57, 45)
    assert cache.get_mask_sizes(5, 0) == (61, 45)
    assert cache.get_seq_length() == cache.get_query_offset() == 101


def test_the_tail_is_flushed_in_groups() -> None:
    """The residual of 8 grows to 12, then its 4 oldest tokens are encoded together, before the next arrives."""
    cache = CountingCache("quant", **SMALL)
    cache.update(*random_states((1, HEADS, 60, HEAD_DIM), 0), 0)
    tails = []
    for step in range(12):
        cache.update(*random_states((1, HEADS, 1, HEAD_DIM), step), 0)
        tails.append(cache.layers[0].state.tail_tokens)
    assert tails == [9, 10, 11, 12, 9, 10, 11, 12, 9, 10, 11, 12]
    assert cache.counter.encoded_vectors == 2 * HEADS * (50 + 8)


def test_a_short_second_turn_is_kept_exact_at_first() -> None:
    """Fewer than `min_tokens` new candidates are never evicted; they are encoded as generated tokens are."""
    cache = NexusQuantCache("quant", **(SMALL | {"keep_ratio": 0.5}))
    cache.update(*random_states((1, HEADS, 60, HEAD_DIM), 0), 0)
    cache.compress()
    evicted = cache.layers[0].state.seen - cache.layers[0].state.kept
    cache.update(*random_states((1, HEADS, 10, HEAD_DIM), 1), 0)
    for step in range(8):
        cache.update(*random_states((1, HEADS, 1, HEAD_DIM), step), 0)
    assert cache.layers[0].state.seen - cache.layers[0].state.kept == evicted
    assert cache.layers[0].state.tail_tokens <= 12


def test_cropping_to_nothing_and_going_on() -> None:
    cache, fresh = (NexusQuantCache("balanced", config=CONFIG, **SMALL) for _ in range(2))
    cache.update(*random_states((1, HEADS, 30, HEAD_DIM), 0), 0)
    cache.crop(-99)
    assert (cache.get_seq_length(), cache.layers[0].state.kept) == (0, 0)
    for each in (cache, fresh):
        each.update(*random_states((1, HEADS, 50, HEAD_DIM), 1), 0)
        each.update(*random_states((1, HEADS, 1, HEAD_DIM), 2), 0)
    assert fingerprint(cache) == fingerprint(fresh)


def test_stored_tokens_share_no_memory_with_what_was_given() -> None:
    cache = NexusQuantCache("quant", **SMALL)
    keys, values = random_states((1, 1, 60, HEAD_DIM), 0)
    cache.update(keys, values, 0)
    before = cache.layers[0].keys.clone()
    keys.zero_()
    assert torch.equal(cache.layers[0].keys, before)
    cache.compress()
    assert reachable_bytes(cache) == cache.memory_report().held_bytes < 60 * HEAD_DIM * 8


def test_tokens_that_carry_gradients_are_stored_without() -> None:
    cache = NexusQuantCache("quant", **SMALL)
    keys, values = (x.requires_grad_() * 1 for x in random_states((1, HEADS, 40, HEAD_DIM), 0))
    cache.update(keys, values, 0)
    cache.update(keys[:, :, :1], values[:, :, :1], 0)
    assert not cache.layers[0].keys.requires_grad
    copy.deepcopy(cache)


def test_keys_and_values_of_different_dtype_and_width() -> None:
    """Under autocast keys arrive as float32 and values as bfloat16."""
    cache = NexusQuantCache("quant", **SMALL)
    keys, values = torch.randn(1, HEADS, 40, 16), torch.randn(1, HEADS, 40, 24).bfloat16()
    cache.update(keys, values, 0)
    held = cache.update(keys[:, :, :1], values[:, :, :1], 0)
    assert [(x.dtype, tuple(x.shape)) for x in held] == [
        (torch.float32, (1, HEADS, 41, 16)),
        (torch.bfloat16, (1, HEADS, 41, 24)),
    ]
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_same(held, [cache.layers[0].keys, cache.layers[0].values])


def test_initialised_early_with_empty_tensors() -> None:
    """`early_initialization` gives the layers empty tensors before the first forward."""
    cache = NexusQuantCache("quant", config=CONFIG, **SMALL)
    cache.early_initialization(batch_size=1, num_heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32, device="cpu")
    assert cache.is_initialized
    assert (cache.get_seq_length(), cache.get_mask_sizes(5, 0)) == (0, (5, 0))
    fresh = NexusQuantCache("quant", config=CONFIG, **SMALL)
    for each in (cache, fresh):
        for index in range(LAYERS):
            each.update(*random_states((1, HEADS, 60, HEAD_DIM), index), index)
        each.compress()
    assert fingerprint(cache) == fingerprint(fresh)


@pytest.mark.parametrize("with_rope", [False, True])
def test_eviction_and_coding_free_the_memory(with_rope: bool) -> None:
    """The report counts every storage that can be reached from the cache, at every stage of a conversation."""
    pair = Pair(CacheConfig(keep_ratio=0.3, **SMALL), torch.bfloat16, with_rope, batch=1)
    held = []
    for name, number in [
        ("prompt", 400),
        ("compress", 0),
        ("tokens", 40),
        ("prompt", 200),
        ("tokens", 1),
        ("tokens", 20),
    ]:
        pair.apply(name, number)
        held.append(pair.cache.memory_report().held_bytes)
        assert reachable_bytes(pair.cache) == held[-1]
    dense = 2 * 2 * HEADS * HEAD_DIM * LAYERS
    assert held[0] == 400 * dense
    tables = pair.cache.memory_report().shared_bytes
    assert held[1] - tables < 0.15 * held[0]
    assert held[2] - tables < 0.25 * held[0]
    assert held[3] - held[2] == 200 * dense
    assert held[4] < held[3] - 150 * dense
    pair.cache.reset()
    assert reachable_bytes(pair.cache) == pair.cache.memory_report().held_bytes == 0
