"""Every family of models in every mode of generation, against caches that cannot be wrong.

The quick suite draws some of these cases, `nox -s grid` runs all.
`benchmarks/compatibility.py` runs the same families and modes; its table in the docs points to the tests here.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.families import FAMILIES, build, inputs
from integration.modes import DRAFTED, MODES, MOVED, NEW, PROMPT, REFUSED_BY_TRANSFORMERS
from integration.tiny import SMALL, LosslessCache, LosslessCodec, kept_mask, lossless_cache
from oracle_cache import OracleCache
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from nexusquant_cache import EvictionPolicy, NexusQuantCache, UnsupportedError
from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.policy import ScoreInputs
from nexusquant_cache.releases import CACHE

# Their attention adds a bias that grows with the distance, which transformers computes from the number of kept tokens.
ALIBI = {"falcon_alibi", "bloom"}
# No layer of full attention alone, so nothing to compress.
DELEGATED = {"mistral", "falcon_h1"}
# What attends is made of what the cache holds, so that the cache cannot see the attention: all tokens are kept.
LATENT = {"deepseek_v2", "deepseek_v3"}
# `baddbmm`, over rows and heads as one axis: all tokens are kept, and decoded at each step.
OWN_PRODUCTS = {"bloom"}
# The cache must be told of these layers, which hold no tokens.
NEEDS_CONFIG = {"qwen3_next", "lfm2", "falcon_h1"}
EVICTING = SMALL | {"keep_ratio": 0.5}

BUILDS = [(name, attention) for name, family in FAMILIES.items() for attention in family.attentions]
CASES = [(name, mode, attention) for name, attention in BUILDS for mode in MODES]
# With sdpa one family of each kind is enough: eager is the stricter one, it needs the mask at every step.
ALSO_SDPA = {"llama", "gemma3", "qwen3_next", "deepseek_v3"}
EVICTED = [case for case in CASES if case[0] not in ALIBI and (case[2] == "eager" or case[0] in ALSO_SDPA)]


@pytest.fixture(autouse=True)
def _annotations(request: pytest.FixtureRequest) -> None:
    """Check annotations in one mode of each family: it takes longer than all that is to be tested."""
    names = request.fixturenames
    given = {name: request.getfixturevalue(name) for name in ("mode", "attention") if name in names}
    if "mode" in given and given != {"mode": "greedy", "attention": "eager"}:
        request.getfixturevalue("unchecked")


def ids(cases: list[tuple[str, ...]]) -> list[str]:
    return ["-".join(case) for case in cases]


def every(cases: list[tuple[str, ...]], *names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(names, cases, ids=ids(cases))


def is_drawn(name: str, mode: str, attention: str, turn: int) -> bool:
    """Tell whether the quick suite has this case: all modes of one family, one mode of all, a diagonal of the others.

    So each family meets several modes, and each mode several families; another turn draws other ones.
    """
    place = list(FAMILIES).index(name) + list(MODES).index(mode) + 3 * (attention == "sdpa")
    return name == "llama" or mode == "greedy" or place % 6 == turn


def grid(cases: list[tuple[str, str, str]], turn: int) -> pytest.MarkDecorator:
    """Run all these cases; those that are not drawn have a mark."""
    marks = [() if is_drawn(*case, turn) else pytest.mark.grid for case in cases]
    params = [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize(("name", "mode", "attention"), params, ids=ids(cases))


@dataclass
class Maker:
    """Makes caches of one kind for one model, and keeps them to be looked at."""

    make: Callable[..., Any]
    config: PreTrainedConfig | None

    def __post_init__(self) -> None:
        self.made: list[Any] = []

    def __call__(self) -> Any:
        self.made.append(self.make(config=self.config))
        return self.made[-1]

    @property
    def layers(self) -> list[NexusQuantLayer]:
        """The layers of our kind in all caches made."""
        return [layer for cache in self.made for layer in cache.layers if isinstance(layer, NexusQuantLayer)]


def same_tokens(name: str, mode: str, attention: str, expected: Callable[..., Any], given: Maker) -> None:
    """Assert that both caches give the same tokens, or the same error where transformers cannot do it at all."""
    model, plain = build(name, attention), Maker(expected, given.config)
    error = REFUSED_BY_TRANSFORMERS.get((name, mode))
    if error is None:
        assert torch.equal(MODES[mode](model, plain), MODES[mode](model, given))
        return
    for each in (Maker(DynamicCache, given.config), given):
        with pytest.raises(error) as raised:
            MODES[mode](model, each)
        assert raised.type is error


@grid(CASES, turn=0)
def test_keeping_all_without_loss_is_the_plain_cache(name: str, mode: str, attention: str) -> None:
    """The same tokens, though the older ones went through the codec."""
    ours = Maker(lossless_cache, build(name, attention).config)
    same_tokens(name, mode, attention, DynamicCache, ours)
    if (name, mode) not in REFUSED_BY_TRANSFORMERS:
        assert bool(ours.layers) == (name not in DELEGATED)
        assert all(layer.state.body is not None and layer.state.kept == layer.state.seen for layer in ours.layers)


@pytest.mark.filterwarnings("ignore:the prompt was cut where tokens had been evicted")
@pytest.mark.filterwarnings("ignore:the attention of layer . was not seen")
@grid(EVICTED, turn=1)
def test_codes_and_eviction_are_those_of_the_slow_model(name: str, mode: str, attention: str) -> None:
    """The same tokens as a cache that keeps everything, and hides or replaces what ours evicts or encodes.

    Both go by the queries of the model's attention, which each sees in its own way.
    """
    balanced = lambda kind: lambda **known: kind("balanced", **known, **EVICTING)  # noqa: E731 - reads best in one line
    ours = Maker(balanced(NexusQuantCache), build(name, attention).config)
    same_tokens(name, mode, attention, balanced(OracleCache), ours)
    if (name, mode) not in REFUSED_BY_TRANSFORMERS:
        assert all(layer.state.body is not None for layer in ours.layers)
        assert all((layer.state.kept < layer.state.seen) == (name not in LATENT) for layer in ours.layers)


class Witness(EvictionPolicy):
    """Writes down what it is shown of each layer, row by row: keys and queries."""

    wants_queries = requires_queries = True  # in place of the properties

    def __init__(self) -> None:
        self.shown: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def __reduce__(self) -> Any:
        return (Witness, ())

    def score(self, inputs: ScoreInputs) -> Tensor:
        self.shown.setdefault(inputs.layer_idx, []).extend(zip(inputs.keys, inputs.queries, strict=True))
        return inputs.keys[..., 0]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, choosing: list[Any]) -> list[str]:
    """Write down what is decoded, but for a choice."""
    names: list[str] = []

    def noted(name: str, stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def decode(held: HeldTokens, **options: Any) -> Tensor:
            if held.keys is not None and not choosing:
                names.append(name)
            return stock(held, **options)

        return decode

    for name in ("dense_keys", "dense_values", "decoded_keys", "decoded_values"):
        monkeypatch.setattr(HeldTokens, name, noted(name, getattr(HeldTokens, name)))
    return names


ONE_LINE = [
    (*case, told)
    for case in BUILDS
    for told in ("config", "no_config")
    if case[0] not in LATENT | OWN_PRODUCTS and (told == "config" or case[0] not in NEEDS_CONFIG)
]


@every(ONE_LINE, "name", "attention", "told")
def test_one_line_is_all(name: str, attention: str, told: str, decoded: list[str]) -> None:
    """Nothing is enabled: the policy sees the queries of the prompt, and each step is answered from the codes."""
    model, witness = build(name, attention), Witness()
    evicting = EVICTING if name not in ALIBI else SMALL | {"keep_ratio": 1.0}
    make = partial(NexusQuantCache, "balanced", policy=witness, **evicting)
    ours = Maker(make, model.config if told == "config" else None)
    assert MODES["greedy"](model, ours).shape == (2, PROMPT + NEW)
    assert bool(ours.layers) == (name not in DELEGATED or told == "no_config")
    for layer in ours.layers:
        assert layer.state.is_shown
        assert layer.state.body is not None
        assert (layer.state.kept < layer.state.seen) == (name not in ALIBI)
    assert not decoded
    assert set(witness.shown) == (set() if name in ALIBI else {layer.state.layer_idx for layer in ours.layers})


@every([case for case in BUILDS if case[0] not in LATENT | ALIBI | DELEGATED], "name", "attention")
def test_the_queries_are_those_of_the_model(name: str, attention: str) -> None:
    """Bit for bit what the slow model sees of the same prompt, in its own way; keys tell that these are its tokens."""
    model, shown = build(name, attention), []
    for kind in (NexusQuantCache, OracleCache):
        witness = Witness()
        MODES["greedy"](model, Maker(partial(kind, "balanced", policy=witness, **EVICTING), model.config))
        shown.append(witness.shown)
    ours, expected = shown
    assert set(ours) == set(expected)
    for layer_idx, rows in ours.items():
        for (keys, queries), (right_keys, right_queries) in zip(rows, expected[layer_idx], strict=True):
            assert queries.shape[1] == PROMPT
            torch.testing.assert_close(keys, right_keys, rtol=1e-5, atol=1e-6)
            assert torch.equal(queries, right_queries)


@every([case for case in BUILDS if case[0] in LATENT | OWN_PRODUCTS], "name", "attention")
def test_attention_that_cannot_be_seen(name: str, attention: str, decoded: list[str]) -> None:
    """All tokens are kept and decoded at each step, and a warning says so where some would have been evicted."""
    model, preset = build(name, attention), "quant" if name in ALIBI else "balanced"
    ours = Maker(partial(NexusQuantCache, preset, **(SMALL if name in ALIBI else EVICTING)), model.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MODES["greedy"](model, ours)
    said = [str(warning.message) for warning in caught]
    assert len(said) == (name not in ALIBI)
    assert all("attention of layer 0 was not seen, so all tokens are kept" in what for what in said)
    for layer in ours.layers:
        assert not layer.state.is_shown
        assert layer.state.kept == layer.state.seen == PROMPT + NEW - 1
    assert decoded


class ByPosition(EvictionPolicy):
    """Keeps the same tokens in all layers, heads and rows, and some of every region."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        scores = (inputs.positions * 7919 % 101).float()
        return scores.expand(*inputs.keys.shape[:3])


def positions_of(model: PreTrainedModel, first: int, count: int) -> dict[str, Tensor]:
    """Return what tells a model the positions of these tokens, if it takes that."""
    order = torch.arange(first, first + count)[None].expand(2, -1)
    if model.config.model_type == "qwen2_vl":
        return {"position_ids": order.expand(3, -1, -1)}  # time, height, width
    return {"position_ids": order}


@every([case for case in BUILDS if case[0] not in ALIBI | LATENT], "name", "attention")
@torch.no_grad()
def test_evicted_tokens_are_out_of_sight_and_nothing_else_moves(name: str, attention: str) -> None:
    """Logits are those of the plain cache with a mask that hides the evicted tokens, in steps and in turns.

    The evicted tokens are older than the windows of sliding layers, which would still see them.
    """
    model = build(name, attention)
    options = EVICTING | {"residual_length": 16, "policy": ByPosition()}
    cache, plain = lossless_cache(model.config, **options), DynamicCache(config=model.config)
    mask, text = torch.ones(2, 0, dtype=torch.long), inputs(model, 100, 2, seed=5)["input_ids"].clamp_max(200)
    for tokens in (48, 1, 1, 6, 1, 30, 1):
        seen = mask.shape[1]
        mask = torch.cat([mask, torch.ones(2, tokens, dtype=torch.long)], -1)
        new = {"input_ids": text[:, seen : seen + tokens]} | positions_of(model, seen, tokens)
        given = model(**new, **{CACHE: cache}, attention_mask=torch.ones_like(mask)).logits
        for layer in cache.layers:
            if isinstance(layer, NexusQuantLayer):
                mask[:, ~kept_mask(cache, layer.layer_idx)[0, 0]] = 0
        expected = model(**new, **{CACHE: plain}, attention_mask=mask).logits
        assert (given - expected).abs().max() < 1e-4 * expected.abs().max()
    assert bool((mask == 0).any()) == (name not in DELEGATED)


class ShiftedCodec(LosslessCodec):
    """Gives every vector to the token behind its own."""

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Tensor:
        return super().decode(packed, transform).roll(1, 2)


class ShiftedCache(LosslessCache):
    """A cache with a bug, in keys or in values."""

    side = "keys"

    def make_codec(self, side: str, head_dim: int, layer_idx: int) -> LosslessCodec:
        del layer_idx
        return (ShiftedCodec if side == self.side else LosslessCodec)(head_dim)


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DELEGATED])
def test_tokens_tell_what_the_cache_holds(name: str, side: str) -> None:
    """The models of these tests attend to what is coded: a mistake there changes their tokens."""
    model, kind = build(name, "eager"), type("Shifted", (ShiftedCache,), {"side": side})
    caches = (DynamicCache(config=model.config), kind("quant", config=model.config, most_code_error=1e9, **SMALL))
    right, wrong = (MODES["greedy"](model, lambda cache=cache: cache)[:, PROMPT:] for cache in caches)
    assert len(right.unique()) > 2
    assert not torch.equal(right, wrong)


class WatchedCache(LosslessCache):
    """Writes down how it was used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.events: list[tuple[str, Any]] = []
        super().__init__(*args, **kwargs)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx == 0:
            self.events.append(("update", tuple(key_states.shape[:3:2])))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        self.events.append(("crop", tokens_to_remove))
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.events.append(("reorder", tuple(beam_idx.tolist())))
        super().reorder_cache(beam_idx)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_does_to_the_cache_what_its_name_says(mode: str) -> None:
    model, caches = build("llama"), []

    def make() -> WatchedCache:
        caches.append(WatchedCache("quant", config=model.config, **SMALL))
        return caches[-1]

    MODES[mode](model, make)
    (cache,) = caches
    updates = [what for event, what in cache.events if event == "update"]
    crops = {what for event, what in cache.events if event == "crop"}
    swaps = {what for event, what in cache.events if event == "reorder" and list(what) != sorted(set(what))}
    batches, tokens = {batch for batch, _ in updates}, [count for _, count in updates]
    drafted, turns = mode in DRAFTED, mode in {"two_turns", "continued", "taken_back", "shared_prefix"}
    assert drafted or tokens[0] == (16 if mode == "chunked" else PROMPT)
    assert (tokens[:3] == [16, 16, 16]) == (mode == "chunked")
    assert bool(swaps) == (mode in {"beams", "sampled_beams", "padded_beams"})
    assert any(crop < 0 for crop in crops) == (drafted or mode == "taken_back")
    if mode in {"assisted", "assisted_sampling"}:
        assert len(tokens) < 8  # some guesses were right: fewer forwards than tokens
    assert any(count > 1 for count in tokens[1:]) == (drafted or turns or mode == "chunked")
    expected = {"several": 6, "beams": 6, "sampled_beams": 6, "padded": 3, "padded_beams": 6}
    expected |= dict.fromkeys((*DRAFTED, "streamed", "shared_prefix"), 1)
    assert batches == {expected.get(mode, 2)}
    assert (cache.layers[0].state.sink_positions is not None) == (mode in {"padded", "padded_beams"})


@pytest.mark.parametrize("mode", MOVED)
@pytest.mark.parametrize("kind", [DynamicCache, lossless_cache])
def test_modes_that_transformers_gave_up_are_refused_with_any_cache(mode: str, kind: Callable[..., Any]) -> None:
    """They live in repositories of their own, of which transformers wants to run the code."""
    model = build("llama")
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        MOVED[mode](model, lambda: kind(config=model.config))


@pytest.mark.parametrize("name", sorted(ALIBI))
def test_evicting_is_refused_where_distances_would_be_wrong(name: str) -> None:
    config = build(name, "eager").config
    with pytest.raises(UnsupportedError, match="ALiBi"):
        NexusQuantCache("balanced", config=config)
    NexusQuantCache("quant", config=config)


def test_the_table_in_the_docs_shows_these_cases() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "compatibility.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert {(row["family"], row["mode"]) for row in rows} == {(name, mode) for name in FAMILIES for mode in MODES}
    for row in rows:
        if row["verdicts"]["plain"] == "ok":
            expected = "ok without eviction" if row["family"] in ALIBI else "ok"
            assert row["verdicts"]["nexusquant"] == expected
