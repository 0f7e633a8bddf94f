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
from feeding import GROUP, attended, feed
from integration.tiny import (
    SMALL,
    fingerprint,
    kept_mask,
    kept_positions,
    random_states,
    reachable_bytes,
    tiny_config,
)
from oracle_cache import CountingCache, OracleCache, spread
from torch import Tensor

from nexusquant_cache import DEFAULT_POLICY, CacheConfig, EqualBudgets, KeyNormPolicy, NexusQuantCache
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.policy import ScoreInputs

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
CONFIG = tiny_config(num_hidden_layers=LAYERS, num_key_value_heads=HEADS)
ROUNDING = 0.1  # of keys, whose logits are large here, to bfloat16; what is read from codes is not rounded
# However much attention suffers: that would choose more bits for all rows, and the keys for queries are a hard case.
ANY_ERROR: dict[str, Any] = {"most_code_error": 100.0}


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
            outputs = [attended(cache, *(x.clone() for x in states), index) for cache in (self.cache, self.oracle)]
            torch.testing.assert_close(*outputs, atol=ROUNDING, rtol=ROUNDING)
            layer, expected = self.cache.layers[index], self.oracle.layers[index]
            assert_same(spread(part_of(layer, index).held()), expected.visible())

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
    pair = Pair(CacheConfig(keep_ratio=0.4, **SMALL, **ANY_ERROR), torch.bfloat16, with_rope, batch=2)
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
    "min_kept": 0,
}
#                    sinks  candidates           recent
NORMS: list[int] = [9, 9, 5, 1, 8, 2, 7, 3, 6, 9, 9, 9]
both = pytest.mark.parametrize("make", [NexusQuantCache, OracleCache])


def keys_of(cache: Any, norms: Any) -> Tensor:
    """Return keys of these norms; neighbours point elsewhere."""
    axes = torch.arange(len(norms[0])) + cache.get_seq_length()
    return torch.eye(8)[axes % 8] * torch.tensor(norms, dtype=torch.float32)[..., None]  # [rows or heads, n, d]


def feed_rows(cache: Any, *norms: Sequence[int], layers: int = 1, pads: Sequence[int] | None = None) -> None:
    """Give the rows of all layers tokens with keys of these norms; they have one head.

    Nobody attends to the first tokens of each row that are ``pads``.
    """
    keys = keys_of(cache, norms)[:, None]
    mask = None if pads is None else left_padding(pads, keys.shape[2])
    for index in range(layers):
        feed(cache, keys, torch.ones_like(keys), index, mask=mask)


def left_padding(pads: Sequence[int], tokens: int) -> Tensor:
    """Return the causal mask of a prompt whose rows begin with so many pads."""
    order = torch.arange(tokens)
    is_text = order >= torch.tensor(pads)[:, None]
    return is_text[:, None, None] & (order <= order[:, None])


def feed_heads(cache: Any, *norms: Sequence[int], index: int = 0) -> None:
    """Give the heads of one row of a layer tokens with keys of these norms."""
    keys = keys_of(cache, norms)[None]
    feed(cache, keys, torch.ones_like(keys), index)


def positions(cache: Any, layer_idx: int = 0) -> list[list[int]]:
    """Return the positions that are kept, of each head and row."""
    is_model = isinstance(cache, OracleCache)
    kept: Tensor = cache.layers[layer_idx].positions() if is_model else kept_positions(cache, layer_idx)
    return [[at for at in head if at >= 0] for head in kept.flatten(0, 1).tolist()]


def warns_if_real(cache: Any, match: str) -> Any:
    """Expect a warning of the cache; the model takes a note."""
    return contextlib.nullcontext() if isinstance(cache, OracleCache) else pytest.warns(UserWarning, match=match)


@both
def test_by_hand_a_prompt_is_compressed_at_the_first_generation_step(make: Any) -> None:
    """Of 7 candidates 4 stay; of 2 generated tokens beyond the recent ones none is evicted.

    The mask has a column for every token that was seen.
    """
    cache = make(**BY_HAND)
    feed_rows(cache, NORMS)
    assert cache.get_mask_sizes(2, 0) == (14, 0)
    assert cache.get_mask_sizes(1, 0) == (13, 0)
    feed_rows(cache, [9])
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, 9, 10, 11, 12]]
    assert cache.get_mask_sizes(1, 0) == (14, 0)
    for _ in range(4):
        feed_rows(cache, [9])
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *range(9, 17)]]
    assert [cache.layers[0].state.seen, cache.layers[0].state.kept] == [17, 14]


@both
def test_by_hand_nothing_is_evicted_that_attention_was_not_seen_to_leave(make: Any) -> None:
    """A prompt of which nobody sees the attention is coded and kept, also the part of it that comes later."""
    cache, keys = make(**BY_HAND), torch.randn(1, 1, 24, 8)
    feed(cache, keys[:, :, :12], keys[:, :, :12], 0)
    cache.update(keys[:, :, 12:], keys[:, :, 12:], 0)
    with warns_if_real(cache, "the attention of layer 0 was not seen"):
        feed(cache, keys[:, :, :1], keys[:, :, :1], 0)
    assert positions(cache) == [[*range(25)]]
    assert cache.layers[0].state.kept == 25


@both
def test_by_hand_a_short_second_turn_is_not_evicted_from(make: Any) -> None:
    """Behind the 3 recent tokens of the first turn stand 4: with 3 candidates nothing is coded, and nothing waits."""
    cache = make(**BY_HAND)
    feed_rows(cache, NORMS)
    feed_rows(cache, [9])
    feed_rows(cache, [9, 9])
    feed_rows(cache, [9])
    before = positions(cache)
    feed_rows(cache, [9])
    assert positions(cache) == [[*before[0], 16]]
    assert cache.layers[0].state.seen - cache.layers[0].state.kept == 3


@both
def test_by_hand_each_row_keeps_as_many_as_it_would_alone(make: Any) -> None:
    """Rows without pads, with 1, 3, 5 and 8 of 12: they have 7, 6, 4, 2 and 0 candidates, and keep 4, 3, 2, 2 and 0.

    A row's sinks are its first real tokens.  The last row has only one before the recent ones, so that a pad stands
    beside it.
    """
    cache, pads = make(**BY_HAND), [0, 1, 3, 5, 8]
    feed_rows(cache, *[[1] * count + NORMS[: 12 - count] for count in pads], pads=pads)
    feed_rows(cache, *[[9]] * 5)
    recent = [9, 10, 11, 12]
    assert positions(cache) == [
        [0, 1, 2, 3, 5, 7, *recent],
        [1, 2, 4, 6, 8, *recent],  # candidates at 3-8 have norms 5, 1, 8, 2, 7, 3
        [3, 4, 6, 8, *recent],  # at 5-8: 5, 1, 8, 2
        [5, 6, 7, 8, *recent],  # fewer than `min_tokens`
        [7, 8, *recent],
    ]
    assert cache.get_mask_sizes(1, 0) == (14, 0)


@both
def test_by_hand_rows_of_different_length_are_evicted_from_in_later_turns(make: Any) -> None:
    """What the first turn has left of a row is nothing to the second: of 9 candidates each row keeps 5."""
    cache = make(**BY_HAND)
    feed_rows(cache, [1] * 5 + [9, 9, 5, 1, 9, 2, 9], NORMS, pads=[5, 0])
    feed_rows(cache, [9], [9])
    assert positions(cache) == [[*range(5, 13)], [0, 1, 2, 3, 5, 7, *range(9, 13)]]
    feed_rows(cache, NORMS, NORMS)
    feed_rows(cache, [9], [9])
    # What was recent then, and generated, stays.  Norms at 13-21: 9, 9, 5, 1, 8, 2, 7, 3, 6.
    later = [*range(9, 13), 15, 16, 18, 20, 21, *range(22, 26)]
    assert positions(cache) == [[5, 6, 7, 8, *later], [0, 1, 2, 3, 5, 7, *later]]


@both
@pytest.mark.parametrize(("min_kept", "second"), [(9, 5), (20, 7), (99, 9)])
def test_by_hand_a_short_text_is_only_coded(make: Any, min_kept: int, second: int) -> None:
    """Of 7 candidates all stay; of the 9 of the next turn so many that, with the 13 tokens before them, enough do."""
    cache = make(**(BY_HAND | {"min_kept": min_kept}))
    feed_rows(cache, NORMS)
    feed_rows(cache, [9])
    assert positions(cache) == [[*range(13)]]
    feed_rows(cache, NORMS)
    feed_rows(cache, [9])
    kept = positions(cache)[0]
    assert kept[:13] == [*range(13)]
    assert kept[-4:] == [*range(22, 26)]
    assert len(kept) == 13 + second + 4


@both
def test_by_hand_rows_that_are_short_keep_all_beside_a_long_one(make: Any) -> None:
    """Of 7 candidates 5 stay, of 4 all do."""
    cache = make(**(BY_HAND | {"min_kept": 5}))
    feed_rows(cache, NORMS, [1] * 3 + NORMS[:9], pads=[0, 3])
    feed_rows(cache, [9], [9])
    recent = [9, 10, 11, 12]
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, 8, *recent], [*range(3, 9), *recent]]


def test_a_policy_is_not_asked_where_all_stay() -> None:
    """Nor need it be a prompt that could be evicted from: it is coded with all its tokens."""

    class Unasked(KeyNormPolicy):
        def score(self, inputs: ScoreInputs) -> Tensor:
            raise AssertionError(inputs)

    cache = NexusQuantCache("quant", policy=Unasked(), **(SMALL | {"keep_ratio": 0.5, "min_kept": 60}))
    feed(cache, *random_states((1, HEADS, 70, HEAD_DIM), 0), 0)
    cache.compress()
    state = cache.layers[0].state
    assert (state.packed_tokens, state.kept, state.evicted) == (60, 70, 0)
    assert state.body is not None
    assert state.body.positions.bitmap is None  # which costs no bit then
    feed(cache, *random_states((1, HEADS, 70, HEAD_DIM), 1), 0)
    with pytest.raises(AssertionError):
        cache.compress()


@both
def test_by_hand_a_cut_leaves_what_stood_before_it(make: Any) -> None:
    """Heads keep 2, 3, 5, 7 and 2, 6, 7, 8.  Below 6 they have three and one."""
    cache = make(**BY_HAND)
    feed_heads(cache, NORMS, [9, 9, 1, 8, 7, 6, 1, 1, 1, 9, 9, 9])
    feed_heads(cache, [9], [9])
    recent = [9, 10, 11, 12]
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *recent], [0, 1, 2, 6, 7, 8, *recent]]
    cache.crop(-2)
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, 9, 10], [0, 1, 2, 6, 7, 8, 9, 10]]
    cache.crop(-5)
    assert positions(cache) == [[0, 1, 2, 3, 5], [0, 1, 2]]
    assert cache.get_mask_sizes(1, 0) == (7, 0)
    feed_heads(cache, [9], [9])
    assert positions(cache) == [[0, 1, 2, 3, 5, 6], [0, 1, 2, 6]]


class ComparableNorms(KeyNormPolicy):
    """Norms of all heads and layers are compared."""

    @property
    def scores_are_comparable(self) -> bool:
        return True


@both
def test_by_hand_heads_and_layers_share_a_budget(make: Any) -> None:
    """Two layers of two heads have 7 candidates each, at 2-8, and keep 16 of 28 together, the smallest norms.

    Each keeps its best one for certain: a fifth of an equal share of 4.
    """
    cache = make(**(BY_HAND | {"policy": ComparableNorms()}))
    last = [9, 9, 9]
    heads = [
        [[9, 9, 1, 1, 1, 1, 1, 1, 1, *last], [9, 9, 3, 3, 3, 9, 9, 9, 9, *last]],
        [[9, 9, 8, 8, 8, 8, 8, 8, 7, *last], [9, 9, 4, 2, 5, 2, 6, 2, 7, *last]],
    ]
    for index, layer in enumerate(heads):
        feed_heads(cache, *layer, index=index)
    for index in range(2):
        feed_heads(cache, [9], [9], index=index)
    # 7 of norm 1, 3 of norm 3, 3 of norm 2, the best of the third head, and 4 and 5.
    assert positions(cache, 0) == [[*range(13)], [0, 1, 2, 3, 4, *range(9, 13)]]
    assert positions(cache, 1) == [[0, 1, 8, *range(9, 13)], [0, 1, 2, 3, 4, 5, 7, *range(9, 13)]]
    assert [layer.state.kept for layer in cache.layers] == [11, 9]


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
    feed_rows(cache, NORMS)
    feed_rows(cache, [9])
    cache.crop(left - 13)
    assert positions(cache) == [[*range(left)]]
    feed_rows(cache, NORMS[left:])
    feed_rows(fresh, NORMS)
    for each in (cache, fresh):
        feed_rows(each, [9])
    assert positions(cache) == positions(fresh) == [[0, 1, 2, 3, 5, 7, 9, 10, 11, 12]]
    assert_same([cache.layers[0].keys, cache.layers[0].values], [fresh.layers[0].keys, fresh.layers[0].values])


@both
def test_by_hand_the_sinks_of_a_padded_row_cannot_be_cut(make: Any) -> None:
    """They stand at 3 and 4: 5 tokens may be left, 4 may not; none at all is a new beginning."""
    cache = make(**BY_HAND)
    feed_rows(cache, [1] * 3 + NORMS[:9], pads=[3])
    feed_rows(cache, [9])
    assert positions(cache) == [[3, 4, 6, 8, *range(9, 13)]]
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
    feed_rows(cache, [*NORMS, 9, 9, 9])
    assert positions(cache) == [[*range(15)]]
    cache.crop(-2)
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, 10, 11, 12]]
    feed_rows(cache, [9, 9, 9])
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *range(10, 16)]]
    cache.crop(-1)
    assert positions(cache) == [[0, 1, 2, 3, 5, 7, *range(10, 15)]]
    feed_rows(cache, [9] * 6)
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
            feed_rows(cache, [*norms, *[9] * rejected], layers=2)
            cache.crop(-rejected)
    for index in range(2):
        one, other = (cache.layers[index] for cache in caches)
        assert_same([one.keys, one.values], [other.keys, other.values])
        assert positions(caches[0], index) == positions(caches[1], index)
    assert positions(caches[0]) == [[0, 1, 2, 3, 5, 7, *range(9, 16)]]


@both
def test_by_hand_a_layer_is_encoded_when_the_next_one_is_reached(make: Any) -> None:
    """With ``during_prefill`` only the last layer ever waits exact, and all choose at the first step."""
    cache = make(when="during_prefill", **BY_HAND)
    feed_rows(cache, NORMS, layers=3)
    assert [positions(cache, index) for index in range(3)] == [[[*range(12)]]] * 3
    assert {cache.get_mask_sizes(2, index) for index in range(3)} == {(14, 0)}
    if isinstance(cache, NexusQuantCache):
        assert [layer.state.tail_tokens for layer in cache.layers] == [3, 3, 12]
    feed_rows(cache, [9, 9], layers=3)
    assert [positions(cache, index) for index in range(3)] == [[[*range(14)]]] * 3
    feed_rows(cache, [9], layers=3)
    chosen = [0, 1, 2, 3, 5, 7, 8, *range(11, 15)]  # of 2-10, whose norms are 9, 5, 1, 8, 2, 7, 3, 9, 9
    assert [positions(cache, index) for index in range(3)] == [[chosen]] * 3


def test_heads_choose_and_share_out_what_they_keep() -> None:
    pair = Pair(CacheConfig(keep_ratio=0.3, **SMALL, **ANY_ERROR), torch.float32, with_rope=True, batch=2)
    pair.apply("prompt", 101)
    pair.apply("tokens", 1)
    kept = torch.stack([kept_mask(pair.cache, index) for index in range(LAYERS)], 1).flatten(1, 2)
    for row in kept:
        counts = row.sum(-1)
        assert min(len(row.unique(dim=0)), len(counts.unique())) > HEADS
        assert counts.double().mean() == 2 + ceil(0.3 * (101 - 10)) + 8 + 1


def test_chunked_prompt_equals_one_prompt() -> None:
    """With ``post_prefill`` what is stored does not depend on the chunks in which the prompt arrives."""
    keys, values = random_states((1, HEADS, 100, HEAD_DIM), 5)
    whole, chunked = (NexusQuantCache("balanced", config=CONFIG, when="post_prefill", **SMALL) for _ in range(2))
    for cache, chunk in ((whole, 99), (chunked, 33)):
        for start in range(0, 99, chunk):
            part = slice(start, start + chunk)
            feed(cache, keys[:, :, part], values[:, :, part], 0)
        feed(cache, keys[:, :, 99:], values[:, :, 99:], 0)
    assert fingerprint(whole) == fingerprint(chunked)


@pytest.mark.parametrize("transform", ["auto", "principal", "hadamard"])
def test_batch_of_two_is_two_batches_of_one(transform: str) -> None:
    """Channels are alike, so all rows want the same rotation; heads keep equally many, so rows can be joined."""
    keys, values = random_states((2, HEADS, 90, HEAD_DIM), 5, torch.bfloat16)
    options = SMALL | ANY_ERROR | {"transform": transform, "policy": EqualBudgets(DEFAULT_POLICY)}
    caches = [NexusQuantCache("balanced", config=CONFIG, **options) for _ in range(3)]
    for part in [slice(0, 60), *(slice(i, i + 1) for i in range(60, 90))]:
        both = attended(caches[0], keys[:, :, part], values[:, :, part], 0)
        alone = [attended(caches[1 + i], keys[i : i + 1, :, part], values[i : i + 1, :, part], 0) for i in range(2)]
        torch.testing.assert_close(both, torch.cat(alone), atol=ROUNDING, rtol=ROUNDING)
        rows = ([cache.layers[0].keys, cache.layers[0].values] for cache in caches[1:])
        assert_same([caches[0].layers[0].keys, caches[0].layers[0].values], map(torch.cat, zip(*rows, strict=True)))


def test_states_have_the_length_of_all_tokens_seen() -> None:
    """100 tokens: 2 sinks, 8 recent, half of the 90 between them go, and nobody outside notices."""
    cache = NexusQuantCache("quant", policy=KeyNormPolicy(), **(SMALL | {"keep_ratio": 0.5}))
    feed(cache, *random_states((1, HEADS, 100, HEAD_DIM), 0), 0)
    assert cache.get_mask_sizes(5, 0) == (105, 0)
    keys, values = feed(cache, *random_states((1, HEADS, 1, HEAD_DIM), 1), 0)
    assert keys.shape == values.shape == (1, HEADS, 101, HEAD_DIM)
    assert cache.layers[0].keys.shape[2] == cache.layers[0].state.kept == 56
    assert cache.get_mask_sizes(1, 0) == (102, 0)
    assert cache.get_seq_length() == cache.get_query_offset() == 101


def test_the_tail_is_flushed_in_groups() -> None:
    """The residual of 8 grows to 12, then its 4 oldest tokens are encoded together, before the next arrives."""
    cache = CountingCache("quant", **SMALL)
    feed(cache, *random_states((1, HEADS, 60, HEAD_DIM), 0), 0)
    tails = []
    for step in range(12):
        feed(cache, *random_states((1, HEADS, 1, HEAD_DIM), step), 0)
        tails.append(cache.layers[0].state.tail_tokens)
    assert tails == [9, 10, 11, 12, 9, 10, 11, 12, 9, 10, 11, 12]
    assert cache.counter.encoded_vectors == 2 * HEADS * (50 + 8)


def test_a_short_second_turn_is_kept_exact_at_first() -> None:
    """Fewer than `min_tokens` new candidates are never evicted; they are encoded as generated tokens are."""
    cache = NexusQuantCache("quant", **(SMALL | {"keep_ratio": 0.5}))
    feed(cache, *random_states((1, HEADS, 60, HEAD_DIM), 0), 0)
    cache.compress()
    evicted = cache.layers[0].state.seen - cache.layers[0].state.kept
    feed(cache, *random_states((1, HEADS, 10, HEAD_DIM), 1), 0)
    for step in range(8):
        feed(cache, *random_states((1, HEADS, 1, HEAD_DIM), step), 0)
    assert cache.layers[0].state.seen - cache.layers[0].state.kept == evicted
    assert cache.layers[0].state.tail_tokens <= 12


def test_cropping_to_nothing_and_going_on() -> None:
    cache, fresh = (NexusQuantCache("balanced", config=CONFIG, **SMALL) for _ in range(2))
    feed(cache, *random_states((1, HEADS, 30, HEAD_DIM), 0), 0)
    cache.crop(-99)
    assert (cache.get_seq_length(), cache.layers[0].state.kept) == (0, 0)
    for each in (cache, fresh):
        feed(each, *random_states((1, HEADS, 50, HEAD_DIM), 1), 0)
        feed(each, *random_states((1, HEADS, 1, HEAD_DIM), 2), 0)
    assert fingerprint(cache) == fingerprint(fresh)


def test_stored_tokens_share_no_memory_with_what_was_given() -> None:
    cache = NexusQuantCache("quant", **SMALL)
    keys, values = random_states((1, 1, 60, HEAD_DIM), 0)
    feed(cache, keys, values, 0)
    before = cache.layers[0].keys.clone()
    keys.zero_()
    assert torch.equal(cache.layers[0].keys, before)
    cache.compress()
    assert reachable_bytes(cache) == cache.memory_report().held_bytes < 60 * HEAD_DIM * 8


def test_tokens_that_carry_gradients_are_stored_without() -> None:
    """The first update's attention has them, and another one that should have them is refused."""
    cache = NexusQuantCache("quant", **SMALL)
    leaves = [x.requires_grad_() for x in random_states((1, HEADS, 40, HEAD_DIM), 0)]
    keys, values = (x * 1 for x in leaves)
    attended(cache, keys, values, 0).sum().backward()
    assert all(bool(x.grad.any()) for x in leaves)
    copy.deepcopy(cache)
    with pytest.raises(UnsupportedError, match="gradients"):
        feed(cache, keys[:, :, :1].detach(), values[:, :, :1].detach(), 0)
    with torch.no_grad():
        feed(cache, keys[:, :, :1], values[:, :, :1], 0)
        assert not cache.layers[0].keys.requires_grad


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
            feed(each, *random_states((1, HEADS, 60, HEAD_DIM), index), index)
        each.compress()
    assert fingerprint(cache) == fingerprint(fresh)


@pytest.mark.parametrize("with_rope", [False, True])
def test_eviction_and_coding_free_the_memory(with_rope: bool) -> None:
    """The report counts every storage that can be reached from the cache, at every stage of a conversation."""
    pair = Pair(CacheConfig(keep_ratio=0.3, **SMALL, **ANY_ERROR), torch.bfloat16, with_rope, batch=1)
    held, tails = [], []
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
        tails.append(pair.cache.layers[0].state.tail_tokens)
        assert reachable_bytes(pair.cache) == held[-1]
    dense = 2 * 2 * HEADS * HEAD_DIM * LAYERS
    queries = DEFAULT_POLICY.most_queries * 2 * GROUP * HEADS * HEAD_DIM * LAYERS
    far = 4 * HEADS * LAYERS  # of each token that waits
    tables = pair.cache.memory_report().shared_bytes
    # The last of two layers waits exact, and codes of the other.
    assert 400 * (dense / 2 + far) + queries < held[0] < 400 * (0.75 * dense + far) + queries
    assert held[1] - tables < 0.3 * held[0]
    assert held[2] - tables < 0.4 * held[0]
    assert held[3] - held[2] > 200 * (dense / 2 + far) + queries
    assert held[4] < held[3] - queries - 75 * dense
    pair.cache.reset()
    assert reachable_bytes(pair.cache) == pair.cache.memory_report().held_bytes == 0
