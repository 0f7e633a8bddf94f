"""The cache against its slow model, over random sequences of everything that may happen to a cache.

**The law.**  After any sequence of updates and operations, attention to what the cache returns gives what attention to
all tokens gives under the model's mask, restricted to the tokens that `OracleCache` keeps.  The cache holds the keys
and values of the model, bit for bit (but for rounding with principal axes, whose products are summed in any order); it
keeps the same positions in each head; it holds the codes that were first written for them; and it has given each token
to a codec once.  What the model refuses, it refuses too, and changes nothing.

Attention is simulated: queries are drawn, and masks with padding anywhere or with holes of any kind.  Sometimes it
is of a kind that cannot be seen.

The model is in `oracle_cache`, written from the text of the documentation and not from the code.
"""

import copy
import dataclasses
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from integration.tiny import (
    SMALL,
    TINY,
    fingerprint,
    generate,
    kept_mask,
    kept_positions,
    prompt,
    tiny_config,
    tiny_llama,
)
from oracle_cache import Counter, CountingCache, CountingCodec, MarkedKeys, OracleCache, OracleLayer, spread
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from nexusquant_cache import CacheConfig, CacheStateError, FarAttentionPolicy, KeyNormPolicy, register_codec
from nexusquant_cache.codec.registry import CodecMeta, describe_codec, make_codec
from nexusquant_cache.errors import ShapeError, UnsupportedError
from nexusquant_cache.layer import observations
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.policy import EvictionPolicy

register_codec(
    "tests.counting",
    CountingCodec,
    lambda codec: dataclasses.asdict(describe_codec(codec.inner)),
    lambda options: CountingCodec(make_codec(CodecMeta(**options)), Counter()),
)

MAX_BATCH, MAX_LAYERS = 4, 3
WINDOW = 30

# As dictionaries: the checks of types at run time, which a CacheConfig goes through, draw random numbers.
lengths = st.fixed_dictionaries(
    {
        "keep_ratio": st.sampled_from([0.5, 0.2, 0.9, 1.0]),
        "sink_tokens": st.sampled_from([0, 1, 4]),
        "residual_length": st.sampled_from([1, 2, 7]),
        "flush_length": st.sampled_from([1, 3, 8]),
        "min_tokens": st.sampled_from([1, 5, 12]),
        "min_kept": st.sampled_from([0, 0, 10, 25]),
    }
)
coding = st.fixed_dictionaries(
    {
        "key_bits": st.sampled_from([1, 2, 2.5, 3, 4]),
        "value_bits": st.sampled_from([1, 1.75, 2, 3, 4]),
        "short_text_bits": st.sampled_from([0.0, 0.0, 0.5, 2.0]),
        "center_keys": st.booleans(),
        "remove_rope": st.sampled_from([True, True, False]),
        "transform": st.sampled_from(["auto", "hadamard", "principal"]),
        "scale_candidates": st.sampled_from([(1.0,), (0.92, 1.1)]),
    }
)
presets = st.one_of(coding, st.sampled_from(["quant", "high", "asym", "balanced", "max"]))
models = st.fixed_dictionaries(
    {
        "layers": st.integers(1, MAX_LAYERS),
        "heads": st.integers(1, 3),
        "group": st.integers(1, 2),  # query heads for each KV head
        "head_dims": st.sampled_from([(8, 8), (16, 16), (24, 24), (32, 32), (16, 24), (24, 8)]),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        "with_config": st.booleans(),
        "sliding": st.sampled_from([(), (), (), (0,), (1,), (0, 2)]),  # layers with a window, where there is a config
    }
)
forwards = st.fixed_dictionaries(
    {
        # How each layer computes attention.
        "attention": st.lists(
            st.sampled_from(["sdpa", "sdpa", "repeated", "regrouped", "eager", "unseen"]),
            min_size=MAX_LAYERS,
            max_size=MAX_LAYERS,
        ),
        # Which of the new tokens are padding, of each row.
        "padding": st.lists(
            st.sampled_from(["none", "none", "left", "right", "inner", "any", "all"]),
            min_size=MAX_BATCH,
            max_size=MAX_BATCH,
        ),
        # Holes in the mask besides, the same for all heads or not.
        "holes": st.sampled_from(["none", "none", "none", "shared", "by_head"]),
        "mask": st.sampled_from(["bool", "additive", "left out"]),
    }
)
PLAIN: dict[str, Any] = {
    "attention": ["sdpa"] * MAX_LAYERS,
    "padding": ["none"] * MAX_BATCH,
    "holes": "none",
    "mask": "additive",
}
steps = st.one_of(st.just(PLAIN), forwards)


def config_of(model: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a model of which some layers may have a sliding window."""
    shape = {
        "num_hidden_layers": model["layers"],
        "num_key_value_heads": model["heads"],
        "num_attention_heads": model["heads"] * model["group"],
        "hidden_size": model["heads"] * model["group"] * model["head_dims"][0],
        "head_dim": model["head_dims"][0],
    }
    kinds = ["sliding_attention" if index in model["sliding"] else "full_attention" for index in range(model["layers"])]
    if set(kinds) == {"sliding_attention", "full_attention"}:
        return Qwen2Config(**(TINY | shape), use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds)
    return tiny_config(**shape)


def state_of(cache: Any) -> list[object]:
    """Return all that the compressed layers of a cache hold, count and wait for."""
    layers = [layer for layer in cache.layers if isinstance(layer, NexusQuantLayer)]
    waiting = []
    for layer in layers:
        observed = layer.state.observed
        queries = [None if x is None else x.tolist() for x in (observed.queries, (observed.before or (None,))[0])]
        waiting.append((dataclasses.astuple(layer.state.turn)[:-1], observed.end, queries))
    # What was said is of the process, and not in files.
    return [*fingerprint(SimpleNamespace(shared=SimpleNamespace(has_warned=0, mask_shape=0), layers=layers)), waiting]


# Attention, as models compute it


def attend(form: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention output ``[b, q, n, dv]``; without a mask, all tokens are new and see those before them."""
    heads, group, rows = k.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    is_causal = mask is None and rows > 1
    if form == "regrouped":
        out = F.scaled_dot_product_attention(q.reshape(len(q), heads, group, q.shape[3]), k, v, mask)
        return out.view(len(q), heads * group, 1, -1)
    if form == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)
    k, v = repeated(k, group), repeated(v, group)
    if form == "repeated":
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
    weights = torch.matmul(q, k.transpose(2, 3)) * q.shape[3] ** -0.5
    weights = weights if mask is None else weights + mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v)


def repeated(x: Tensor, group: int) -> Tensor:
    """Return one copy for each query head, as transformers makes them."""
    batch, heads, tokens, width = x.shape
    if group == 1:
        return x
    return x[:, :, None, :, :].expand(batch, heads, group, tokens, width).reshape(batch, heads * group, tokens, width)


def causal(rows: int, seen: int) -> Tensor:
    return torch.arange(seen) <= torch.arange(seen - rows, seen)[:, None]


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def padding(kinds: list[str], tokens: int, generator: torch.Generator) -> Tensor:
    """Return which of so many tokens are no padding, ``[rows, tokens]``."""
    real = torch.ones(len(kinds), tokens, dtype=torch.bool)
    for row, kind in enumerate(kinds):
        count = int(torch.randint(tokens + 1, (), generator=generator))
        start = {"left": 0, "right": tokens - count, "inner": (tokens - count) // 2}.get(kind)
        if start is not None:
            real[row, start : start + count] = False
        elif kind != "none":
            real[row] = torch.rand(tokens, generator=generator) < 0.6 if kind == "any" else False
    return real


def tolerance(q: Tensor, k: Tensor, v: Tensor) -> float:
    """Return by how much outputs may differ: logits, weights and sums each by some roundings.

    A logit is a product of vectors that are rotated on the way, so that a rounding is one of their lengths.  It changes
    weights by a factor, and them together by at most twice that.
    """
    rounding = 16 * torch.finfo(q.dtype).eps
    lengths = [float(x.float().nan_to_num(0).norm(dim=-1).max()) for x in (q, k, v)]
    logit = rounding * (1 + lengths[0] * lengths[1] * q.shape[-1] ** -0.5)
    return min(2 * logit + rounding, 2.0) * lengths[2]


@pytest.fixture(autouse=True, scope="module")
def near_is_far():
    """Let far attention begin where short prompts have some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observations, "FAR", 5)
        yield


class ComparableNorms(KeyNormPolicy):
    """Key norms of all heads and layers are compared: they share one budget."""

    @property
    def scores_are_comparable(self) -> bool:
        return True


class CacheMachine(RuleBasedStateMachine):
    """The cache and its slow model, moved along together."""

    @initialize(
        preset=presets,
        lengths=lengths,
        model=models,
        rows=st.integers(1, 3),
        when=st.sampled_from(["post_prefill", "during_prefill"]),
        policy=st.sampled_from([None, KeyNormPolicy(), ComparableNorms(), FarAttentionPolicy(pool=3)]),
        prompt=st.one_of(st.integers(20, 60), st.integers(0, 60)),
        forward=forwards,
    )
    def start(  # noqa: PLR0917 - hypothesis gives them by name
        self,
        preset: Any,
        lengths: dict[str, Any],
        model: dict[str, Any],
        rows: int,
        when: str,
        policy: EvictionPolicy | None,
        prompt: int,
        forward: dict[str, Any],
    ) -> None:
        """Make both from the same arguments; some begin with a prompt."""
        self.model, self.seed = model, 0
        # Bits are never raised here: random vectors would have the most everywhere.
        options: dict[str, Any] = {"when": when, "most_code_error": 1e9, **lengths}
        options["policy"] = policy
        if model["with_config"]:
            options["config"] = config_of(model)
        settings = preset if isinstance(preset, str) else CacheConfig(**preset)
        self.cache: CountingCache = CountingCache(settings, **options)
        self.oracle = OracleCache(settings, **options)
        self.originals: list[tuple[CountingCache, list[object]]] = []
        self.is_sent_away = False
        self.begin(rows)
        if prompt:
            self.update(prompt, forward)

    def begin(self, rows: int) -> None:
        """Fix the rows of the next prompt."""
        self.real = torch.ones(rows, 0, dtype=torch.bool)  # which tokens are no padding, as the model is told

    @property
    def seen(self) -> int:
        return self.oracle.get_seq_length()

    @property
    def coded(self) -> bool:
        return any(not layer.first for layer in self.oracle.used)

    # Both at once

    def generator(self) -> torch.Generator:
        self.seed += 1
        return torch.Generator().manual_seed(self.seed)

    def states(self, layer_idx: int, side: int, tokens: int) -> Tensor:
        """Draw new keys or values, with a common component, as real keys have; padding may be anything."""
        fixed = torch.Generator().manual_seed(100 * layer_idx + side)
        shape = (len(self.real), self.model["heads"], tokens, self.model["head_dims"][side])
        states = torch.randn(shape, generator=self.generator()) + 3 * torch.randn(shape[-1], generator=fixed)
        pads = ~self.real[:, None, self.real.shape[1] - tokens :, None]
        return torch.where(pads, 30 * states, states).to(self.model["dtype"])

    def queries(self, tokens: int) -> Tensor:
        shape = (len(self.real), self.model["heads"] * self.model["group"], tokens, self.model["head_dims"][0])
        return torch.randn(shape, generator=self.generator()).to(self.model["dtype"])

    def visible(self, tokens: int, forward: dict[str, Any]) -> Tensor:
        """Return which of all tokens each new one sees, ``[rows, 1 or query heads, tokens, seen]``."""
        seen = self.real.shape[1]
        visible = (self.real[:, None] & causal(tokens, seen))[:, None]
        if forward["holes"] == "none":
            return visible
        heads = 1 if forward["holes"] == "shared" else self.model["heads"] * self.model["group"]
        dense = torch.rand(len(self.real), heads, tokens, seen, generator=self.generator()) < 0.8
        return visible & (dense | torch.eye(seen, dtype=torch.bool)[-tokens:])

    def update(self, tokens: int, forward: dict[str, Any] = PLAIN, layers: int = MAX_LAYERS) -> None:
        """Let a forward bring these tokens to all layers, or the first ones, each of which attends to all so far."""
        assert len({self.cache.get_mask_sizes(tokens, index) for index in self.full_layers}) <= 1
        real = padding(forward["padding"][: len(self.real)], tokens, self.generator())
        self.real = torch.cat([self.real, real], 1)
        for index in range(min(self.model["layers"], layers)):
            self.update_layer(index, tokens, forward)

    @property
    def full_layers(self) -> list[int]:
        return [index for index, layer in enumerate(self.oracle.layers) if isinstance(layer, OracleLayer)]

    def update_layer(self, index: int, tokens: int, forward: dict[str, Any]) -> None:
        keys, values = (self.states(index, side, tokens) for side in (0, 1))
        expected = self.both(lambda cache: cache.update(keys.clone(), values.clone(), index))
        if isinstance(expected[0], MarkedKeys):
            assert self.cache.layers[index].get_mask_sizes(3) == (self.real.shape[1] + 3, 0)
            self.attend(index, expected, self.queries(tokens), forward)
        else:  # a layer of transformers
            assert_same(self.returned, expected)

    def attend(self, index: int, expected: Any, queries: Tensor, forward: dict[str, Any]) -> None:
        """Compute attention over what both have returned."""
        given, layer = self.returned, self.oracle.layers[index]
        form, rows, seen = forward["attention"][index], queries.shape[2], self.real.shape[1]
        assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(given, expected, strict=True))
        if form == "unseen":
            try:
                found = [x + 0 for x in given]
            except UnsupportedError:  # there is nothing to look at where tokens are gone
                assert not layer.is_whole
                form = "sdpa"
            else:
                right = [expected[0].as_subclass(Tensor), expected[1]]
                assert_same(found, right, exact=layer.is_exact())
                return
        visible = self.visible(rows, forward)
        alive = layer.alive().repeat_interleave(self.model["group"], 1)[:, :, None]
        mask: Tensor | None = visible
        is_trivial = bool(visible.eq(causal(rows, seen)).all()) and rows in {1, seen}
        if forward["mask"] == "left out" and is_trivial and (form != "eager" or rows == 1):
            mask = None
        elif forward["mask"] != "bool" or form == "eager":
            mask = additive(visible, queries.dtype)
        if form == "regrouped" and (rows > 1 or visible.shape[1] > 1):
            form = "repeated"
        found, right = (attend(form, queries, *states, mask) for states in (given, expected))
        sees_something = (visible & alive).any(-1)
        assert type(found) is Tensor
        assert found.dtype == queries.dtype
        assert bool(found[sees_something].isfinite().all())
        # A query that sees nothing is a pad's, of which nobody reads the output.  It is a number where torch's is one.
        assert bool((found.isfinite() | ~right.isfinite()).all())
        most = tolerance(queries, expected[0].as_subclass(Tensor), expected[1])
        assert bool(((found - right)[sees_something].float().abs() <= most).all())

    def both(self, act: Callable[[Any], Any]) -> Any:
        """Do the same to both, the model first, and return what the model returns."""
        known = len(self.oracle.warned)
        expected = act(self.oracle)
        self.follow(act, known)
        return expected

    def follow(self, act: Callable[[Any], Any], known: int) -> None:
        """Let the cache do what the model has done; it warns where the model took a note behind the known ones."""
        if self.is_sent_away:
            self.cache.offload()
            self.is_sent_away = False
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.returned = act(self.cache)
        assert [warning.category for warning in caught] == [UserWarning] * len(self.oracle.warned[known:])

    # What may happen

    @rule(tokens=st.integers(2, 60), forward=forwards)
    def prefill(self, tokens: int, forward: dict[str, Any]) -> None:
        """A prompt, a chunk of it, or a later turn."""
        self.update(tokens, forward)

    @rule(tokens=st.integers(10, 40), count=st.integers(1, 3), forward=forwards)
    def turn(self, tokens: int, count: int, forward: dict[str, Any]) -> None:
        """A prompt and its answer."""
        self.update(tokens, forward)
        self.generation_steps(count, PLAIN)

    @rule(tokens=st.integers(2, 6), forward=forwards)
    def several_tokens(self, tokens: int, forward: dict[str, Any]) -> None:
        self.update(tokens, forward)

    @rule(tokens=st.integers(2, 6), count=st.integers(2, 5), forward=steps)
    def loop(self, tokens: int, count: int, forward: dict[str, Any]) -> None:
        """Forwards of equally many tokens, as in a speculative loop of one's own."""
        for _ in range(count):
            self.update(tokens, forward)

    @rule(count=st.integers(1, 9), forward=steps)
    def generation_steps(self, count: int, forward: dict[str, Any]) -> None:
        for _ in range(count):
            self.update(1, forward)

    @rule(tokens=st.one_of(st.integers(0, 9), st.integers(0, 90)))
    def crop(self, tokens: int) -> None:
        """Take back the newest tokens, or refuse and change nothing."""
        if any(self.oracle.is_sliding):
            tokens = min(tokens, self.seen)  # transformers' sliding windows count below zero,
            if not self.seen:
                return  # and fail before the first token
        before, known = state_of(self.cache), len(self.oracle.warned)
        try:
            self.oracle.crop(-tokens)
        except (UnsupportedError, RuntimeError) as refusal:  # the latter is that of a sliding window without a past
            with pytest.raises(type(refusal)):
                self.cache.crop(-tokens)
            assert state_of(self.cache) == before
        else:
            self.follow(lambda cache: cache.crop(-tokens), known)
            self.real = self.real[:, : max(self.real.shape[1] - tokens, 0)]

    @precondition(lambda self: self.coded)
    @rule(data=st.data())
    def crop_into_codes(self, data: st.DataObject) -> None:
        first = next(layer for layer in self.oracle.used if not layer.first)
        self.crop(first.seen - first.tail_from + data.draw(st.integers(1, first.tail_from)))

    @rule()
    def activate_past_recording(self) -> None:
        self.both(lambda cache: cache.activate_past_recording())

    @rule(candidates=st.lists(st.integers(0, 5), min_size=1, max_size=4), rejected=st.integers(0, 5), forward=steps)
    def assisted_steps(self, candidates: list[int], rejected: int, forward: dict[str, Any]) -> None:
        """Forwards over candidates, each followed by a crop of those that were rejected."""
        for count in candidates:
            self.update(1 + count, forward)
            self.crop(min(count, rejected))

    @precondition(lambda self: self.may_fail)
    @rule(tokens=st.sampled_from([1, 1, 2, 20]), forward=forwards, data=st.data())
    def failing_forward(self, tokens: int, forward: dict[str, Any], data: st.DataObject) -> None:
        """A layer refuses its tokens; those before it give theirs back, and what they have compressed stays."""
        self.fail_at(data.draw(st.integers(0, self.model["layers"] - 1)), tokens, forward)

    def fail_at(self, failing: int, tokens: int = 1, forward: dict[str, Any] = PLAIN) -> None:
        seen = self.seen
        self.update(tokens, forward, layers=failing)
        keys, values = (self.states(failing, side, tokens) for side in (0, 1))
        with pytest.raises(ShapeError):
            self.cache.update(keys[..., :4], values, failing)
        self.take_back(seen, failing)

    @precondition(lambda self: self.may_fail and self.model["layers"] > 1)
    @rule(tokens=st.sampled_from([1, 1, 2, 20]), forward=forwards, data=st.data())
    def forgotten_forward(self, tokens: int, forward: dict[str, Any], data: st.DataObject) -> None:
        """The model fails between two layers; the next forward finds that, and a crop takes the tokens back."""
        failing, seen = data.draw(st.integers(1, self.model["layers"] - 1)), self.seen
        self.update(tokens, forward, layers=failing)
        keys, values = (self.states(0, side, tokens) for side in (0, 1))
        before = state_of(self.cache)
        with pytest.raises(CacheStateError):
            self.cache.update(keys, values, 0)
        assert state_of(self.cache) == before
        self.take_back(seen, failing)
        known = len(self.oracle.warned)
        self.oracle.crop(0)
        self.follow(lambda cache: cache.crop(-tokens), known)

    @property
    def may_fail(self) -> bool:
        """Whether a failure leaves a cache that can go on, with layers that can give their tokens back."""
        return self.seen > 0 and self.oracle.when == "post_prefill" and not any(self.oracle.is_sliding)

    def take_back(self, seen: int, layers: int) -> None:
        for layer in self.oracle.layers[:layers]:
            layer.take_back(seen)
        self.real = self.real[:, :seen]

    @rule()
    def compress(self) -> None:
        self.both(lambda cache: cache.compress())

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        count = len(self.real)
        rows = data.draw(st.lists(st.integers(0, count - 1), min_size=count, max_size=count))
        self.both(lambda cache: cache.reorder_cache(torch.tensor(rows)))
        self.real = self.real[rows]

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        self.take(data.draw(st.lists(st.integers(0, len(self.real) - 1), min_size=1, max_size=MAX_BATCH)))

    def take(self, rows: list[int]) -> None:
        self.both(lambda cache: cache.batch_select_indices(torch.tensor(rows)))
        self.real = self.real[rows]

    @precondition(lambda self: self.seen and 2 * len(self.real) <= MAX_BATCH)
    @rule()
    def repeat_interleave(self) -> None:
        self.both(lambda cache: cache.batch_repeat_interleave(2))
        self.real = self.real.repeat_interleave(2, 0)

    @rule(rows=st.integers(1, 3))
    def reset(self, rows: int) -> None:
        self.both(lambda cache: cache.reset())
        self.begin(rows)

    @rule()
    def copy(self) -> None:
        """Go on with a copy; the original must not notice."""
        self.originals.append((self.cache, state_of(self.cache)))
        self.cache = copy.deepcopy(self.cache)

    @rule()
    def pickle_round_trip(self) -> None:
        self.cache = pickle.loads(pickle.dumps(self.cache))  # noqa: S301 - our own

    @rule()
    def offload(self) -> None:
        """Whatever comes next finds the cache sent to host memory."""
        self.is_sent_away = True

    @rule(level=st.sampled_from([None, 3]))
    def file_round_trip(self, level: int | None) -> None:
        """Go on with what was saved and loaded again."""
        cache = self.cache
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache"
            cache.save(path, level=level, threads=1)
            self.cache = CountingCache.load(path, config=cache.model_config, policy=cache.policy, threads=1)
        assert state_of(self.cache) == state_of(cache)
        self.cache.counter, self.cache.shared.has_warned = cache.counter, cache.shared.has_warned
        for layer in self.cache.layers:
            if isinstance(layer, NexusQuantLayer) and layer.is_initialized:
                for codec in (*layer.state.asked, layer.state.codecs[0], layer.state.codecs[1]):
                    codec.counter = cache.counter

    # What must be true

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        """Lengths, keys, values, positions and codes are those of the model."""
        for layer, expected in zip(self.cache.layers, self.oracle.layers, strict=True):
            if not isinstance(expected, OracleLayer):
                assert type(layer) is type(expected)
                continue
            state = layer.state
            assert (state.seen, state.kept, state.turn.is_pending, state.is_shown, state.may_evict) == (
                expected.seen,
                expected.kept,
                expected.pending_from is not None,
                0 < expected.seen == expected.seen_attention[1],
                expected.may_evict,
            )
            assert layer.get_seq_length() == expected.seen
            assert state.tail_tokens == expected.seen - expected.tail_from
            if expected.seen:
                assert_same(spread(part_of(layer, 0).held()), expected.visible(), exact=expected.is_exact())
                self.check_positions(layer, expected)
                self.check_codes(layer, expected)

    def check_positions(self, layer: Any, expected: OracleLayer) -> None:
        """Each head keeps what the model says, and nothing else lies in memory."""
        assert torch.equal(kept_mask(self.cache, expected.layer_idx), expected.alive())
        body = layer.state.body
        if body is not None:
            assert len(body.keys.scales.stored().flatten()) == len(expected.body_codes())

    def check_codes(self, layer: Any, expected: OracleLayer) -> None:
        """Stored codes are those first written: never decoded and encoded again."""
        if layer.state.body is None:
            assert expected.first
            return
        sides = [
            (side.words.stored().flatten(0, -2), side.scales.stored().flatten()[:, None])
            for side in (layer.state.body.keys, layer.state.body.values)
        ]
        assert torch.equal(torch.cat([part for side in sides for part in side], -1), expected.body_codes())

    @invariant()
    def encodes_each_token_once(self) -> None:
        """The codecs were given as many vectors as tokens were coded, and fitted once for each row."""
        assert self.cache.counter.encoded_vectors == self.oracle.encoded_vectors
        assert self.cache.counter.fitted_rows == self.oracle.fitted_rows

    def teardown(self) -> None:
        for original, before in getattr(self, "originals", ()):
            assert state_of(original) == before


def assert_same(given: Any, expected: Any, *, exact: bool = True) -> None:
    for x, y in zip(given, expected, strict=True):
        assert x.dtype == y.dtype
        if exact:
            assert torch.equal(x, y)
        else:  # a rounding in the last place, of sums as long as the vectors
            largest = float(y.abs().max()) if y.numel() else 0.0
            torch.testing.assert_close(x, y, rtol=2 * torch.finfo(x.dtype).eps, atol=1e-5 * largest)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(stateful_step_count=12, max_examples=2 * settings().max_examples)
SIMPLE: dict[str, Any] = {
    "preset": {"key_bits": 2, "value_bits": 2},
    "lengths": {
        "keep_ratio": 0.5,
        "sink_tokens": 2,
        "residual_length": 2,
        "flush_length": 2,
        "min_tokens": 4,
        "min_kept": 0,
    },
    "model": {
        "layers": 1,
        "heads": 1,
        "group": 2,
        "head_dims": (8, 8),
        "dtype": torch.float32,
        "with_config": True,
        "sliding": (),
    },
    "rows": 1,
    "when": "post_prefill",
    "policy": KeyNormPolicy(),
    "prompt": 0,
    "forward": PLAIN,
}
TWO_LAYERS = {"model": SIMPLE["model"] | {"layers": 2}}
SLIDING = {"model": SIMPLE["model"] | {"layers": 2, "sliding": (0,)}}
DURING = {"when": "during_prefill"}
BY_QUERIES = {"policy": None, "prompt": 40, "rows": 2}
BY_FAR = {"policy": FarAttentionPolicy(pool=3), "prompt": 40, "rows": 2}
LITTLE = {"lengths": dict(zip(SIMPLE["lengths"], (0.5, 0, 1, 1, 1, 0), strict=True))}
NO_SINKS = {"lengths": SIMPLE["lengths"] | {"sink_tokens": 0}}


def padded(kind: str) -> dict[str, Any]:
    """Return a forward in which the last rows are padded."""
    return PLAIN | {"padding": ["none", kind, kind, kind]}


def unseen(*layers: int) -> dict[str, Any]:
    """Return a forward in which the attention of these layers is not seen."""
    return PLAIN | {"attention": ["unseen" if index in layers else "sdpa" for index in range(MAX_LAYERS)]}


ONE = ("update", 1)
RECORD = ("activate_past_recording",)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # What is known of padding outlives a crop, ...
        ({"rows": 2, "prompt": 40, "forward": padded("left")}, [("crop", 5), ONE]),
        # ... belongs to rows, which move, ...
        ({"rows": 2, "prompt": 40, "forward": padded("inner")}, [("take", [1, 0]), ("crop", 10), ("update", 20), ONE]),
        # ... leave, and become more.
        ({"rows": 2, "prompt": 40, "forward": padded("left")}, [("take", [0]), ONE, ("crop", 39)]),
        ({"rows": 2, "prompt": 40, "forward": padded("right")}, [("repeat_interleave",), ONE]),
        # A cut into the sinks of padded rows is refused and changes nothing; to nothing it is not.
        ({"rows": 2, "prompt": 40, "forward": padded("left")}, [ONE, ("crop", 36), ("crop", 41), ("update", 20), ONE]),
        # A cut to the sinks forgets the pads of a later turn.
        ({"rows": 2, "prompt": 30}, [ONE, ("update", 20, padded("left")), ("crop", 49), ("update", 20), ONE]),
        # Rows keep different numbers of tokens, also after a crop.
        ({"rows": 3, "prompt": 40, "forward": padded("any")}, [ONE, ("crop", 20), ("update", 20, padded("any")), ONE]),
        # A policy sees the queries of text alone, wherever the padding is, ...
        (BY_QUERIES, [("update", 30, padded("right")), ONE]),
        (BY_QUERIES, [("update", 30, padded("inner")), ONE, ("update", 30, padded("left")), ONE]),
        # ... as is what they look back at.
        (BY_FAR, [("update", 30, padded("inner")), ("update", 20), ONE, ("update", 30, padded("any")), ONE]),
        (BY_FAR | TWO_LAYERS, [("update", 30), ("take", [1, 0, 0]), ONE]),
        # A policy sees the queries of what is left after a crop.
        (BY_QUERIES, [("update", 60), ("crop", 60), ONE]),
        (BY_QUERIES, [("update", 60), ("crop", 61), ONE]),
        # Without sinks the rows of a padded batch have no first tokens that stay.
        (NO_SINKS | {"rows": 2, "prompt": 40, "forward": padded("left")}, [ONE, ("crop", 5), ("crop", 20)]),
        # Where there is nothing but padding between sinks and recent tokens, nothing is left to keep.
        (
            {"prompt": 40, "forward": PLAIN | {"padding": ["all"] * MAX_BATCH}},
            [("update", 2), ONE, ("update", 20), ONE],
        ),
        # With attention that is not seen all tokens stay, with one warning, whatever brings the compression about, ...
        ({"prompt": 30, "forward": unseen(0)}, [ONE, ("update", 20, unseen(0)), ONE]),
        ({}, [RECORD, ("update", 30, unseen(0)), ("crop", 0)]),
        ({"prompt": 30, "forward": unseen(0, 1), **TWO_LAYERS, **DURING}, [ONE]),
        # ... in that layer, ...
        ({"prompt": 30, "forward": unseen(1), **TWO_LAYERS}, [ONE, ("crop", 20), ("update", 20), ONE]),
        # ... until a prompt comes of which all was seen; a step that was not is enough.
        ({"prompt": 30}, [("update", 1, unseen(0)), ("update", 20), ONE, ("update", 20), ONE]),
        # What is taken back, and was not seen, leaves no trace.
        ({"prompt": 30}, [("update", 2, unseen(0)), ("crop", 2), ONE]),
        ({"prompt": 30}, [RECORD, ("update", 2, unseen(0)), ("crop", 2), ONE]),
        (TWO_LAYERS | {"prompt": 20, "forward": unseen(0)}, [("fail_at", 1)]),
        ({"prompt": 30, "forward": unseen(0)}, [("update", 2), ("crop", 2), ONE]),
        (TWO_LAYERS | {"prompt": 20}, [("update", 5, unseen(0)), ("fail_at", 1), ("crop", 5)]),
        # Nothing is said where nothing would have been evicted.
        ({"prompt": 5, "forward": unseen(0)}, [ONE]),
        # A file says all that decides when tokens are encoded.
        (LITTLE | {"prompt": 20}, [ONE, ("file_round_trip", None), ("crop", 3), ONE, ONE, ONE]),
        (LITTLE | TWO_LAYERS | {"prompt": 20}, [ONE, ("crop", 3), ONE, ONE, ("file_round_trip", 3), ONE]),
        # The last layer waits for its compression when recording begins.
        ({"prompt": 30, **TWO_LAYERS, **DURING}, [RECORD, ONE]),
        # What was taken back does not count for the tokens that come in its place.
        (BY_FAR, [("crop", 20), ("update", 10), ("update", 10), ONE]),
        # It looks back from the step whose crop compresses it, too.
        (BY_FAR, [RECORD, ONE, ("crop", 0), ONE]),
        # What is too short to be coded waits with the next prompt, in rows whose first tokens are there or not.
        (
            {"rows": 2, "prompt": 4, "forward": padded("all")},
            [("compress",), ("update", 20), ("update", 30), ("compress",), ONE],
        ),
        # A prompt without a crop before it ends the recording.
        (DURING, [RECORD, ("update", 4), ("crop", 0), ("update", 20), ("update", 20)]),
        # What slid out of a window before its past was recorded does not come back.
        (SLIDING | {"prompt": 35}, [("update", 20), RECORD, ("crop", 43), ("crop", 3), ("update", 2)]),
        (SLIDING | {"prompt": 35}, [("update", 20), RECORD, ("update", 8), ("crop", 29), ("file_round_trip", 3), ONE]),
        (SLIDING | {"prompt": 30}, [RECORD, ("crop", 30), ("update", 20)]),
        (SLIDING | {"prompt": 20}, [RECORD, ("update", 20), ("crop", 0), ("update", 8), ("crop", 8), ("crop", 9), ONE]),
        # A crop that is refused compresses nothing.
        ({"rows": 2, "prompt": 40, "forward": padded("left"), **DURING}, [("crop", 38)]),
        # A loop of several tokens a forward is known by the second one; a longer update is a turn again.
        ({"prompt": 30}, [("update", 3), ("update", 3), ("update", 3), ("update", 30), ("update", 3), ONE]),
    ],
)
def test_sequences_that_are_easily_got_wrong(options: dict[str, Any], steps: list[tuple[Any, ...]]) -> None:
    """The law in short sequences, found by the state machine, that a small number of random ones may miss."""
    machine = CacheMachine()
    machine.start(**(SIMPLE | options))
    for name, *arguments in steps:
        getattr(machine, name)(*arguments)
        machine.holds_what_the_model_holds()
        machine.encodes_each_token_once()


def hybrid_model() -> Qwen2ForCausalLM:
    """Build a random model in which every other layer has a sliding window."""
    state = torch.get_rng_state()
    torch.manual_seed(7)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Qwen2Config(
        **(TINY | {"num_hidden_layers": 4}), use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds
    )
    model = Qwen2ForCausalLM(config).eval()
    torch.set_rng_state(state)
    return model


@pytest.fixture(scope="module", params=[tiny_llama, hybrid_model])
def model(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.mark.parametrize("when", ["post_prefill", "during_prefill"])
@pytest.mark.parametrize(
    ("pads", "options"),
    [
        ([0, 5, 40], {}),
        ([0, 40], {"num_beams": 2}),
        ([3, 0], {"prefill_chunk_size": 13}),
        ([0], {"prompt_lookup_num_tokens": 4}),
        ([0], {"do_sample": True, "num_return_sequences": 3}),
    ],
)
def test_generates_what_the_model_generates(model: Any, when: str, pads: list[int], options: dict[str, Any]) -> None:
    """In `generate` the same things happen as above: the same tokens come out, and the same ones are kept."""
    ids, mask = prompt(60, len(pads)), torch.ones(len(pads), 60, dtype=torch.int64)
    ids[:, 40:] = ids[:, 20:40]  # something for prompt lookup to find
    for row, count in enumerate(pads):
        ids[row, : count + 1] = torch.tensor([0] * count + [TINY["bos_token_id"]])
        mask[row, :count] = 0
    results = []
    for make in (CountingCache, OracleCache):
        torch.manual_seed(1)
        options_of_cache = SMALL | {"most_code_error": 1e9, "transform": "hadamard"}
        cache = make("balanced", config=model.config, when=when, **options_of_cache)
        tokens = generate(model, ids, cache, 12, attention_mask=mask, **options)
        results.append((cache, tokens))
    (cache, tokens), (oracle, expected) = results
    assert torch.equal(tokens, expected)
    for index, held in enumerate(oracle.layers):
        if isinstance(held, OracleLayer):
            assert torch.equal(kept_positions(cache, index), held.positions())
            tail = cache.layers[index].state.tail
            exact = [torch.stack([row.exact[side][:, held.tail_from :] for row in held.rows]) for side in (0, 1)]
            torch.testing.assert_close(tail, tuple(exact), atol=1e-4, rtol=1e-4)
    assert oracle.used[0].kept < oracle.get_seq_length()
    assert not oracle.used[0].first
