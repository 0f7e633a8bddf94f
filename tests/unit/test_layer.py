"""`NexusQuantLayer` against a slow model of the cache that keeps every exact token for ever.

The oracle below never packs anything into a buffer: it remembers, for each token, what attention shall see
of it, and which head has evicted it.  Both must agree bit for bit after any sequence of updates and
operations.
"""

import copy
import pickle
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from integration.tiny import (
    SMALL,
    fingerprint,
    kept_positions,
    random_states,
    reachable_bytes,
    tiny_config,
)
from torch import Tensor

from nexusquant_cache import CacheConfig, KeyKeyPolicy, NexusQuantCache
from nexusquant_cache.cache.layer import NexusQuantLayer
from nexusquant_cache.cache.rotary import rotary_phase
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.policy import ScoreInputs

LAYERS, HEADS, HEAD_DIM = 2, 2, 16
CONFIG = tiny_config(num_hidden_layers=LAYERS, num_key_value_heads=HEADS)
Map = Callable[[Tensor], Tensor]


class CountingCodec(VectorCodec):
    """Counts the tokens given to the codec it wraps."""

    def __init__(self, inner: VectorCodec) -> None:
        self.inner = inner
        self.fitted = self.encoded = 0

    def fit(self, vectors: Tensor) -> VectorTransform:
        self.fitted += 1
        return self.inner.fit(vectors)

    def encode(self, vectors: Tensor, transform: VectorTransform) -> PackedVectors:
        self.encoded += vectors.shape[2]
        return self.inner.encode(vectors, transform)

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Tensor:
        return self.inner.decode(packed, transform)

    @property
    def bytes_per_vector(self) -> int:
        return self.inner.bytes_per_vector


class CountingCache(NexusQuantCache):
    def make_codec(self, side: str, head_dim: int, layer_idx: int) -> VectorCodec:
        return CountingCodec(super().make_codec(side, head_dim, layer_idx))


class OracleLayer:
    """One layer of the slow model: exact tokens, visible tokens, and who is alive, all ``[b, h, seen, ...]``."""

    def __init__(self, config: CacheConfig, layer_idx: int, with_rope: bool) -> None:
        self.config, self.layer_idx, self.with_rope = config, layer_idx, with_rope
        maker = NexusQuantCache(config)
        self.codecs = [maker.make_codec(side, HEAD_DIM, layer_idx) for side in ("keys", "values")]
        self.reset()

    def reset(self) -> None:
        self.exact: list[Tensor] = []
        self.shown: list[Tensor] = []
        self.alive: Tensor | None = None
        self.transforms: list[VectorTransform] = []
        self.exact_from = self.encoded = 0
        self.pending = False

    @property
    def seen(self) -> int:
        return self.exact[0].shape[2] if self.exact else 0

    def visible(self) -> list[Tensor]:
        return [x[self.alive].view(*x.shape[:2], -1, x.shape[-1]) for x in self.shown]

    def positions(self) -> Tensor:
        return torch.arange(self.seen).expand(self.alive.shape)[self.alive].view(*self.alive.shape[:2], -1)

    def kept(self) -> int:
        return 0 if self.alive is None else int(self.alive[0, 0].sum())

    def update(self, keys: Tensor, values: Tensor) -> list[Tensor]:
        tokens = keys.shape[2]
        if tokens > 1:
            self.pending = True
        elif self.seen:
            self.make_room()
        new = [keys, values]
        self.exact = [torch.cat(pair, 2) for pair in zip(self.exact, new, strict=True)] if self.exact else new
        self.shown = [torch.cat(pair, 2) for pair in zip(self.shown, new, strict=True)] if self.shown else new
        born = torch.ones(keys.shape[:3], dtype=torch.bool)
        self.alive = born if self.alive is None else torch.cat([self.alive, born], 2)
        return self.visible()

    def plan(self) -> tuple[int, int, int]:
        """Return the range of tokens to encode now, and how many of them to keep."""
        first = not self.transforms
        start = self.config.sink_tokens if first else self.exact_from
        stop = self.seen - self.config.residual_length
        if self.pending and stop - start >= self.config.min_tokens:
            return start, stop, ceil(self.config.keep_ratio * (stop - start))
        if not self.pending and stop - start >= (self.config.min_tokens if first else self.config.flush_length):
            return start, stop, stop - start
        return start, start, 0

    def compress(self) -> None:
        if self.pending:
            self.make_room()

    def make_room(self) -> None:
        start, stop, count = self.plan()
        self.pending = False
        if start == stop:
            return
        chosen = self.choose(start, stop, count)  # [b, h, count]
        index = chosen[..., None].expand(*chosen.shape, HEAD_DIM)
        keys, values = (x.gather(2, index) for x in self.exact)
        dtype = keys.dtype
        phase = rotary_phase(CONFIG, self.layer_idx, self.seen) if self.with_rope else None
        if phase is not None:
            keys = phase.rotate(keys.float(), chosen, inverse=True)
        if not self.transforms:
            self.transforms = [codec.fit(x) for codec, x in zip(self.codecs, (keys, values), strict=True)]
        decoded = []
        for codec, transform, x in zip(self.codecs, self.transforms, (keys, values), strict=True):
            decoded.append(codec.decode(codec.encode(x, transform), transform))
        if phase is not None:
            decoded[0] = phase.rotate(decoded[0], chosen)
        self.shown = [old.scatter(2, index, new.to(dtype)) for old, new in zip(self.shown, decoded, strict=True)]
        self.alive = self.alive.clone()
        self.alive[:, :, start:stop] = False
        self.alive.scatter_(2, chosen, value=True)
        self.exact_from = stop
        self.encoded += count

    def choose(self, start: int, stop: int, count: int) -> Tensor:
        shape = self.alive.shape[:2]
        if count == stop - start:
            return torch.arange(start, stop).expand(*shape, -1)
        first = 0 if not self.transforms else self.exact_from
        order = torch.arange(first, self.seen)
        protected = (order < start) | (order >= stop)
        inputs = ScoreInputs(*(x[:, :, first:] for x in self.exact), order, protected, self.layer_idx)
        scores = KeyKeyPolicy().score(inputs)
        chosen = [
            sorted(sorted(range(start, stop), key=lambda i: (-float(scores[b, h, i - first]), i))[:count])
            for b in range(shape[0])
            for h in range(shape[1])
        ]
        return torch.tensor(chosen).view(*shape, count)

    def can_crop(self, tokens: int) -> bool:
        return not self.transforms or tokens <= self.seen - self.exact_from

    def crop(self, tokens: int) -> None:
        stop = max(self.seen - tokens, 0)
        self.exact, self.shown = ([x[:, :, :stop] for x in each] for each in (self.exact, self.shown))
        self.alive = self.alive[:, :, :stop]

    def map(self, function: Map) -> None:
        self.exact, self.shown = ([function(x) for x in each] for each in (self.exact, self.shown))
        self.alive = function(self.alive)
        self.transforms = [transform.map_batch(function) for transform in self.transforms]


class Pair:
    """The cache and its oracle, moved along together."""

    def __init__(self, config: CacheConfig, dtype: torch.dtype, with_rope: bool, batch: int) -> None:
        self.cache = CountingCache(config, config=CONFIG if with_rope else None)
        self.oracle = [OracleLayer(config, index, with_rope) for index in range(LAYERS)]
        self.dtype, self.batch, self.seed = dtype, batch, 0
        self.words: list[Tensor] = [torch.empty(0)] * LAYERS

    def update(self, tokens: int) -> None:
        for index, oracle in enumerate(self.oracle):
            self.seed += 1
            keys, values = random_states((self.batch, HEADS, tokens, HEAD_DIM), self.seed, self.dtype)
            announced = self.cache.get_mask_sizes(tokens, index)
            returned = self.cache.update(keys.clone(), values.clone(), index)
            expected = oracle.update(keys, values)
            assert_same(returned, expected)
            assert announced == (oracle.kept(), oracle.seen - oracle.kept())

    def map(self, function: Map) -> None:
        for oracle in self.oracle:
            if oracle.seen:
                oracle.map(function)
        self.words = [function(words) if words.numel() else words for words in self.words]

    def apply(self, name: str, number: int) -> None:
        """Do one step with both; the number means something else for each kind of step."""
        steps = {"prompt": lambda: self.update(number + 1), "tokens": lambda: [self.update(1) for _ in range(number)]}
        steps |= {"compress": self.compress, "reset": self.reset, "crop": lambda: self.crop(number % 12)}
        if name in steps:
            steps[name]()
        elif name in ("copy", "pickle"):
            clone = copy.deepcopy if name == "copy" else lambda x: pickle.loads(pickle.dumps(x))  # noqa: S301 - our own
            self.cache = clone(self.cache)
        elif self.oracle[0].seen:
            self.change_batch(name, number)

    def compress(self) -> None:
        self.cache.compress()
        for oracle in self.oracle:
            oracle.compress()

    def reset(self) -> None:
        self.cache.reset()
        for oracle in self.oracle:
            oracle.reset()
        self.words = [torch.empty(0)] * LAYERS

    def crop(self, tokens: int) -> None:
        if not self.oracle[0].seen:
            self.cache.crop(-tokens)
        elif self.oracle[0].can_crop(tokens):
            self.cache.crop(-tokens)
            for oracle in self.oracle:
                oracle.crop(tokens)
        else:
            before = fingerprint(self.cache)
            with pytest.raises(UnsupportedError, match="cannot remove the newest"):
                self.cache.crop(-tokens)
            assert fingerprint(self.cache) == before

    def change_batch(self, name: str, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        if name == "reorder":
            rows = torch.randint(0, self.batch, (self.batch,), generator=generator)
            self.cache.reorder_cache(rows)
            self.map(lambda x: x[rows])
        elif name == "select":
            rows = torch.randperm(self.batch, generator=generator)[: 1 + number % self.batch]
            self.cache.batch_select_indices(rows)
            self.map(lambda x: x[rows])
            self.batch = len(rows)
        elif name == "repeat" and self.batch < 3:
            self.cache.batch_repeat_interleave(2)
            self.map(lambda x: torch.stack([x, x], 1).flatten(0, 1))
            self.batch *= 2

    def check(self) -> None:
        if not self.oracle[0].seen and not self.cache.layers:
            return
        for index, (layer, oracle) in enumerate(zip(self.cache.layers, self.oracle, strict=True)):
            assert (layer.seen, layer.kept, layer.pending) == (oracle.seen, oracle.kept(), oracle.pending)
            assert layer.get_seq_length() == oracle.seen
            if oracle.seen:
                assert_same([layer.keys, layer.values], oracle.visible())
                assert torch.equal(kept_positions(self.cache, index), oracle.positions())
                self.check_codes(index, layer, oracle)

    def check_codes(self, index: int, layer: NexusQuantLayer, oracle: OracleLayer) -> None:
        """Each token is encoded once, with statistics fitted once; stored codes never change."""
        for codec in (layer.key_codec, layer.value_codec):
            assert codec.fitted == len(oracle.transforms) // 2
            assert codec.encoded == oracle.encoded
        if layer.body is None:
            return
        assert layer.body.positions.tokens == oracle.encoded
        words = torch.cat([layer.body.keys.words.view(), layer.body.values.words.view()], -1)
        known = self.words[index]
        if known.numel():
            assert torch.equal(words[:, :, : known.shape[2]], known)
        self.words[index] = words.clone()


def assert_same(given: Any, expected: Any) -> None:
    for x, y in zip(given, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), st.integers(1, 40)),
        st.tuples(st.just("tokens"), st.integers(1, 9)),
        st.tuples(
            st.sampled_from(["compress", "crop", "reorder", "select", "repeat", "copy", "pickle", "reset"]),
            st.integers(0, 999),
        ),
    ),
    min_size=1,
    max_size=7,
)
# As dictionaries: the checks of types at run time, which a CacheConfig goes through, draw random numbers.
options = st.fixed_dictionaries(
    {
        "key_bits": st.integers(1, 4),
        "value_bits": st.integers(1, 4),
        "keep_ratio": st.sampled_from([1.0, 0.9, 0.5, 0.2]),
        "sink_tokens": st.sampled_from([0, 1, 4]),
        "residual_length": st.sampled_from([1, 2, 7]),
        "flush_length": st.sampled_from([1, 3, 8]),
        "min_tokens": st.sampled_from([1, 5, 12]),
        "center_keys": st.booleans(),
    }
)
situations = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "with_rope": st.booleans(),
        "batch": st.integers(1, 3),
    }
)


@given(options, situations, st.integers(2, 60), operations)
def test_equals_the_slow_model_bit_for_bit(
    options: dict[str, Any], situation: dict[str, Any], prompt: int, steps: list[tuple[str, int]]
) -> None:
    """Keys, values, positions, lengths, mask sizes and codes, after every step."""
    pair = Pair(CacheConfig(**options), **situation)
    for name, number in [("prompt", prompt), ("tokens", 1), *steps, ("tokens", 3)]:
        pair.apply(name, number)
        pair.check()


@pytest.mark.parametrize("with_rope", [False, True])
def test_equals_the_slow_model_over_a_long_conversation(with_rope: bool) -> None:
    """Several turns and enough tokens for every buffer to be replaced, at the rotary tables' first boundary."""
    pair = Pair(CacheConfig(keep_ratio=0.4, **SMALL), torch.bfloat16, with_rope, batch=2)
    turns = [
        ("prompt", 120),
        ("tokens", 60),
        ("prompt", 6),
        ("prompt", 70),
        ("tokens", 50),
        ("prompt", 3),
        ("tokens", 9),
    ]
    for name, number in turns:
        pair.apply(name, number)
        pair.check()
    assert pair.cache.get_seq_length() > 256
    assert 0 < pair.oracle[0].kept() < pair.oracle[0].seen


def test_per_head_choice_differs_and_counts_agree() -> None:
    pair = Pair(CacheConfig(keep_ratio=0.3, **SMALL), torch.float32, with_rope=True, batch=2)
    pair.apply("prompt", 100)
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
        tails.append(cache.layers[0].tail_tokens)
    assert tails == [9, 10, 11, 12, 9, 10, 11, 12, 9, 10, 11, 12]
    assert cache.layers[0].key_codec.encoded == 50 + 8


def test_a_short_second_turn_is_kept_exact_at_first() -> None:
    """Fewer than `min_tokens` new candidates are never evicted; they are encoded as generated tokens are."""
    cache = NexusQuantCache("quant", **(SMALL | {"keep_ratio": 0.5}))
    cache.update(*random_states((1, HEADS, 60, HEAD_DIM), 0), 0)
    cache.compress()
    evicted = cache.layers[0].seen - cache.layers[0].kept
    cache.update(*random_states((1, HEADS, 10, HEAD_DIM), 1), 0)
    for step in range(8):
        cache.update(*random_states((1, HEADS, 1, HEAD_DIM), step), 0)
    assert cache.layers[0].seen - cache.layers[0].kept == evicted
    assert cache.layers[0].tail_tokens <= 12


def test_cropping_to_nothing_and_going_on() -> None:
    cache, fresh = (NexusQuantCache("balanced", config=CONFIG, **SMALL) for _ in range(2))
    cache.update(*random_states((1, HEADS, 30, HEAD_DIM), 0), 0)
    cache.crop(-99)
    assert (cache.get_seq_length(), cache.layers[0].kept) == (0, 0)
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
        ("prompt", 399),
        ("compress", 0),
        ("tokens", 40),
        ("prompt", 199),
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
