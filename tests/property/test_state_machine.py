"""The cache against its slow model, over random sequences of everything that may happen to a cache.

**The law.**  After any sequence of updates and operations the cache returns the keys and values that
`OracleCache` returns, bit for bit (but for rounding with principal axes, whose products are summed in any order); it
announces the mask sizes of the model before each update; it keeps the same
positions in each head; it holds the codes that were first written for them; and it has given each token to a
codec once.  What the model refuses, it refuses too, and changes nothing.

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
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from integration.tiny import SMALL, TINY, fingerprint, generate, kept_positions, prompt, tiny_config, tiny_llama
from oracle_cache import Counter, CountingCache, CountingCodec, OracleCache, OracleLayer
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

from nexusquant_cache import CacheConfig, KeyNormPolicy, register_codec
from nexusquant_cache.codec.registry import CodecMeta, describe_codec, make_codec
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.parts import part_of

register_codec(
    "tests.counting",
    CountingCodec,
    lambda codec: dataclasses.asdict(describe_codec(codec.inner)),
    lambda options: CountingCodec(make_codec(CodecMeta(**options)), Counter()),
)

MAX_BATCH = 4
WINDOW = 30
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# As dictionaries: the checks of types at run time, which a CacheConfig goes through, draw random numbers.
lengths = st.fixed_dictionaries(
    {
        "keep_ratio": st.sampled_from([0.5, 0.2, 0.9, 1.0]),
        "sink_tokens": st.sampled_from([0, 1, 4]),
        "residual_length": st.sampled_from([1, 2, 7]),
        "flush_length": st.sampled_from([1, 3, 8]),
        "min_tokens": st.sampled_from([1, 5, 12]),
    }
)
coding = st.fixed_dictionaries(
    {
        "key_bits": st.sampled_from([1, 2, 2.5, 3, 4]),
        "value_bits": st.sampled_from([1, 1.75, 2, 3, 4]),
        "center_keys": st.booleans(),
        "remove_rope": st.sampled_from([True, True, False]),
        "transform": st.sampled_from(["auto", "hadamard", "principal"]),
    }
)
presets = st.one_of(coding, st.sampled_from(["quant", "high", "asym", "balanced", "max"]))
models = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "head_dims": st.sampled_from([(8, 8), (16, 16), (24, 24), (32, 32), (16, 24), (24, 8)]),
        "dtypes": st.sampled_from([*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16)]),
        "with_config": st.booleans(),
        "sliding": st.sampled_from([(), (), (), (0,), (1,), (0, 2)]),  # layers with a window, where there is a config
    }
)
pads = st.lists(st.sampled_from([0, 0, 1, 2, 5, 11, 30]), min_size=1, max_size=3)
batches = st.one_of(
    # Nothing is padded: every row begins with the same token, or a mask of ones says so.
    st.builds(lambda rows: ("alike", [0] * rows), st.integers(1, 3)),
    st.builds(lambda rows: ("mask", [0] * rows), st.integers(1, 3)),
    st.builds(lambda rows: ("mask", rows), pads),
    # The mask of one prompt for several rows, as with num_return_sequences.
    st.builds(lambda count, repeats: ("mask", [count] * repeats), st.sampled_from([0, 7]), st.integers(2, 3)),
    # No mask: runs of equal keys tell, or nothing does.
    st.builds(lambda rows: ("runs", [count if count != 1 else 2 for count in rows]), pads),
    st.builds(lambda rows: ("unknown", [0] * rows), st.integers(2, 3)),
)


def mask_of(pads: list[int]) -> Tensor:
    """Return the attention mask of a prompt with so many pads in each row."""
    order = torch.arange(max(pads) + 3)
    return torch.stack([order >= count for count in pads]).long()


def config_of(model: dict[str, Any]) -> PreTrainedConfig:
    """Return the config of a model of which some layers may have a sliding window."""
    shape = {
        "num_hidden_layers": model["layers"],
        "num_key_value_heads": model["heads"],
        "num_attention_heads": model["heads"],
        "hidden_size": model["heads"] * model["head_dims"][0],
        "head_dim": model["head_dims"][0],
    }
    kinds = ["sliding_attention" if index in model["sliding"] else "full_attention" for index in range(model["layers"])]
    if set(kinds) == {"sliding_attention", "full_attention"}:
        return Qwen2Config(**(TINY | shape), use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds)
    return tiny_config(**shape)


def state_of(cache: Any) -> list[object]:
    """Return all that the compressed layers of a cache hold and count."""
    layers = [layer for layer in cache.layers if isinstance(layer, NexusQuantLayer)]
    return fingerprint(SimpleNamespace(shared=cache.shared, layers=layers))


class CacheMachine(RuleBasedStateMachine):
    """The cache and its slow model, moved along together."""

    @initialize(
        preset=presets,
        lengths=lengths,
        model=models,
        batch=batches,
        when=st.sampled_from(["post_prefill", "during_prefill"]),
        by_norm=st.booleans(),
        early_mask=st.booleans(),
        prompt=st.one_of(st.integers(20, 60), st.integers(0, 60)),
    )
    def start(  # noqa: PLR0917 - hypothesis gives them by name
        self,
        preset: Any,
        lengths: dict[str, Any],
        model: dict[str, Any],
        batch: tuple[str, list[int]],
        when: str,
        by_norm: bool,
        early_mask: bool,
        prompt: int,
    ) -> None:
        """Make both from the same arguments; some begin with a prompt."""
        self.model, self.seed = model, 0
        # Bits are never raised here: random vectors would have the most everywhere.
        options: dict[str, Any] = {"when": when, "most_code_error": 1e9, **lengths}
        options["policy"] = KeyNormPolicy() if by_norm else None
        if model["with_config"]:
            options["config"] = config_of(model)
        if batch[0] == "mask" and early_mask:
            options["attention_mask"] = self.mask_for(batch[1])
        settings = preset if isinstance(preset, str) else CacheConfig(**preset)
        self.cache: CountingCache = CountingCache(settings, **options)
        self.oracle = OracleCache(settings, **options)
        self.originals: list[tuple[CountingCache, list[object]]] = []
        self.is_sent_away = False
        self.begin(batch, stated="attention_mask" in options)
        if prompt:
            self.update(prompt)

    def mask_for(self, pads: list[int]) -> Tensor:
        """Return the mask of a batch; if all rows are equal, one row stands for all."""
        return mask_of(pads[:1] if len(set(pads)) == 1 else pads)

    def begin(self, batch: tuple[str, list[int]], *, stated: bool) -> None:
        """Fix the rows of the next prompt."""
        self.kind, self.pads = batch[0], list(batch[1])
        if self.kind == "mask" and not stated:
            self.state_mask(self.mask_for(self.pads))

    def state_mask(self, mask: Tensor) -> None:
        self.cache.set_attention_mask(mask)
        self.oracle.set_attention_mask(mask)

    @property
    def seen(self) -> int:
        return self.oracle.get_seq_length()

    @property
    def coded(self) -> bool:
        return bool(self.oracle.used) and not self.oracle.used[0].first

    # Both at once

    def states(self, layer_idx: int, side: int, tokens: int) -> Tensor:
        """Draw new keys or values, with a common component, as real keys have; pads and beginnings as asked for."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        fixed = torch.Generator().manual_seed(100 * layer_idx + side)
        shape = (len(self.pads), self.model["heads"], tokens, self.model["head_dims"][side])
        states = torch.randn(shape, generator=generator) + 3 * torch.randn(shape[-1], generator=fixed)
        pad, begin = torch.randn(2, shape[1], shape[3], generator=fixed)
        for row, pads in enumerate(self.pads):
            for token in range(tokens):
                if self.seen_by(layer_idx) + token < pads:
                    # A mask says what they are, so they may be anything; without one they are recognised.
                    states[row, :, token] = pad if self.kind == "runs" else 100 * states[row, :, token]
                if self.seen_by(layer_idx) + token == 0 and self.kind == "alike":
                    states[row, :, token] = begin
        return states.to(self.model["dtypes"][side])

    def seen_by(self, layer_idx: int) -> int:
        return self.oracle.get_seq_length(layer_idx)

    def update(self, tokens: int) -> None:
        """Let a forward bring these tokens to all layers, which transformers gives a mask of the same size."""
        announced = [self.cache.get_mask_sizes(tokens, index) for index in range(self.model["layers"])]
        full = set()
        for index, sizes in enumerate(announced):
            keys, values = (self.states(index, side, tokens) for side in (0, 1))
            self.both(lambda cache, index=index, k=keys, v=values: cache.update(k.clone(), v.clone(), index))
            if isinstance(self.oracle.layers[index], OracleLayer):
                kept = self.returned[0].shape[2]
                assert sizes == (kept, self.oracle.get_seq_length(index) - kept)
                full.add(sizes)
        assert len(full) == 1

    def both(self, act: Callable[[Any], Any]) -> None:
        """Do the same to both, the model first."""
        known = len(self.oracle.warned)
        expected = act(self.oracle)
        self.follow(act, known)
        if expected is not None:
            assert_same(self.returned, expected, exact=self.is_exact)

    @property
    def is_exact(self) -> bool:
        return all(layer.is_exact() for layer in self.oracle.used)

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

    @rule(tokens=st.integers(2, 60))
    def prefill(self, tokens: int) -> None:
        """A prompt, a chunk of it, or a later turn."""
        self.update(tokens)

    @rule(tokens=st.integers(10, 40), steps=st.integers(1, 3))
    def turn(self, tokens: int, steps: int) -> None:
        """A prompt and its answer."""
        self.update(tokens)
        self.generation_steps(steps)

    @rule(tokens=st.integers(2, 6))
    def several_tokens(self, tokens: int) -> None:
        self.update(tokens)

    @rule(steps=st.integers(1, 9))
    def generation_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.update(1)

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
        except (UnsupportedError, RuntimeError) as refusal:  # the latter is that of a sliding window
            with pytest.raises(type(refusal)):
                self.cache.crop(-tokens)
            assert state_of(self.cache) == before
        else:
            self.follow(lambda cache: cache.crop(-tokens), known)

    @precondition(lambda self: self.coded)
    @rule(data=st.data())
    def crop_into_codes(self, data: st.DataObject) -> None:
        first = self.oracle.used[0]
        self.crop(first.seen - first.tail_from + data.draw(st.integers(1, first.tail_from)))

    @rule()
    def activate_past_recording(self) -> None:
        self.both(lambda cache: cache.activate_past_recording())

    @rule(candidates=st.lists(st.integers(0, 5), min_size=1, max_size=4), rejected=st.integers(0, 5))
    def assisted_steps(self, candidates: list[int], rejected: int) -> None:
        """Forwards over candidates, each followed by a crop of those that were rejected."""
        for count in candidates:
            self.update(1 + count)
            self.crop(min(count, rejected))

    @rule()
    def compress(self) -> None:
        self.both(lambda cache: cache.compress())

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.pads) - 1), min_size=len(self.pads), max_size=len(self.pads)))
        self.both(lambda cache: cache.reorder_cache(torch.tensor(rows)))
        self.pads = [self.pads[row] for row in rows]

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, len(self.pads) - 1), min_size=1, max_size=MAX_BATCH))
        self.take(rows)

    def take(self, rows: list[int]) -> None:
        self.both(lambda cache: cache.batch_select_indices(torch.tensor(rows)))
        self.pads = [self.pads[row] for row in rows]

    @precondition(lambda self: self.seen and 2 * len(self.pads) <= MAX_BATCH)
    @rule()
    def repeat_interleave(self) -> None:
        self.both(lambda cache: cache.batch_repeat_interleave(2))
        self.pads = [count for count in self.pads for _ in range(2)]

    @rule(batch=batches)
    def reset(self, batch: tuple[str, list[int]]) -> None:
        self.both(lambda cache: cache.reset())
        self.begin(batch, stated=False)

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
        self.cache.counter = cache.counter
        for layer in self.cache.layers:
            if isinstance(layer, NexusQuantLayer) and layer.is_initialized:
                for codec in (*layer.state.asked, layer.state.codecs[0], layer.state.codecs[1]):
                    codec.counter = cache.counter

    # What must be true

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        """Lengths, keys, values, positions, codes and announced sizes are those of the model."""
        for layer, expected in zip(self.cache.layers, self.oracle.layers, strict=True):
            if not isinstance(expected, OracleLayer):
                assert type(layer) is type(expected)
                continue
            assert (layer.state.seen, layer.state.kept, layer.state.turn.is_pending) == (
                expected.seen,
                expected.kept,
                expected.pending_from is not None,
            )
            assert layer.get_seq_length() == expected.seen
            assert layer.state.tail_tokens == expected.seen - expected.tail_from
            for tokens in (1, 2, 7):
                assert layer.get_mask_sizes(tokens) == expected.get_mask_sizes(tokens)
            if expected.seen:
                assert_same(part_of(layer, 0).dense(), expected.visible(), exact=expected.is_exact())
                assert torch.equal(kept_positions(self.cache, expected.layer_idx), expected.positions())
                self.check_codes(layer, expected)
                self.check_padding(expected)

    def check_codes(self, layer: Any, expected: Any) -> None:
        """Stored codes are those first written: never decoded and encoded again."""
        if layer.state.body is None:
            assert expected.first
            return
        sides = [
            (side.words.view(), side.scales.view()[..., None])
            for side in (layer.state.body.keys, layer.state.body.values)
        ]
        assert torch.equal(torch.cat([part for side in sides for part in side], -1), expected.body_codes())

    def check_padding(self, expected: Any) -> None:
        """transformers' mask, cut to what is kept, hides the pads that are kept and nothing else."""
        kept = expected.kept
        columns = torch.arange(expected.seen - kept, expected.seen)
        for row, pads in zip(expected.positions(), self.oracle.pads or [0] * len(self.pads), strict=True):
            assert torch.equal(row < pads, (columns < pads).expand(row.shape))

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
    "lengths": {"keep_ratio": 0.5, "sink_tokens": 2, "residual_length": 2, "flush_length": 2, "min_tokens": 4},
    "model": {
        "layers": 1,
        "heads": 1,
        "head_dims": (8, 8),
        "dtypes": (torch.float32, torch.float32),
        "with_config": True,
        "sliding": (),
    },
    "batch": ("alike", [0]),
    "when": "post_prefill",
    "by_norm": True,
    "early_mask": True,
    "prompt": 0,
}
TWO_LAYERS = {"model": SIMPLE["model"] | {"layers": 2}}
DURING = {"when": "during_prefill"}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        # What is known of the padding outlives a crop: a mask ...
        ({"batch": ("mask", [0, 20]), "prompt": 40}, [("crop", 25), ("update", 1)]),
        # ... what was recognised ...
        ({}, [("activate_past_recording",), ("update", 23), ("crop", 3)]),
        # ... and a run of pads that goes on.
        ({"batch": ("runs", [0, 20]), "prompt": 10}, [("crop", 5), ("update", 25), ("update", 1)]),
        # It belongs to rows, which move, ...
        ({"batch": ("mask", [0, 5]), "prompt": 20}, [("take", [1, 0]), ("crop", 20), ("update", 20), ("update", 1)]),
        # ... and leave: without padded rows nothing is padded.
        ({"batch": ("mask", [0, 20]), "prompt": 15}, [("take", [0]), ("update", 1)]),
        ({"batch": ("mask", [0, 5]), "prompt": 40}, [("update", 1), ("take", [0]), ("crop", 39)]),
        # Padding that shows after tokens have been coded comes too late: keys would turn by other angles.
        ({"batch": ("runs", [0, 20]), "prompt": 15}, [("compress",), ("update", 20), ("update", 1)]),
        # The warning comes with the compression that would have evicted, whatever brings it about, ...
        ({"batch": ("unknown", [0, 0]), "prompt": 30, **TWO_LAYERS, **DURING}, [("update", 1)]),
        ({"batch": ("unknown", [0, 0])}, [("activate_past_recording",), ("update", 30), ("crop", 0)]),
        # ... not without one, and not when the mask was given.
        ({"batch": ("unknown", [0, 0]), "prompt": 5}, [("update", 1)]),
        ({"batch": ("mask", [0, 20]), "prompt": 15}, [("update", 1)]),
        # The last layer waits for its compression when recording begins: all must keep equally many.
        ({"prompt": 30, **TWO_LAYERS, **DURING}, [("activate_past_recording",), ("update", 1)]),
        # A prompt without a crop before it ends the recording.
        (DURING, [("activate_past_recording",), ("update", 4), ("crop", 0), ("update", 20), ("update", 20)]),
        # A crop that is refused compresses nothing.
        ({"batch": ("mask", [0, 5]), "prompt": 40, **DURING}, [("crop", 36)]),
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
    """In `generate` the same things happen as above: the same tokens, and the same keys and values in the end."""
    ids, mask = prompt(60, len(pads)), torch.ones(len(pads), 60, dtype=torch.int64)
    ids[:, 40:] = ids[:, 20:40]  # something for prompt lookup to find
    for row, count in enumerate(pads):
        ids[row, : count + 1] = torch.tensor([0] * count + [TINY["bos_token_id"]])
        mask[row, :count] = 0
    results = []
    for make in (CountingCache, OracleCache):
        torch.manual_seed(1)
        options_of_cache = SMALL | {"most_code_error": 1e9, "transform": "hadamard"}
        cache = make("balanced", config=model.config, attention_mask=mask, when=when, **options_of_cache)
        tokens = generate(model, ids, cache, 12, attention_mask=mask, **options)
        results.append((cache, tokens))
    (cache, tokens), (oracle, expected) = results
    assert torch.equal(tokens, expected)
    for layer, held in zip(cache.layers, oracle.layers, strict=True):
        assert_same([layer.keys, layer.values], [held.keys, held.values])
    assert oracle.used[0].kept < oracle.get_seq_length()
    assert not oracle.used[0].first
