"""Attention that reads codes: what attention on decoded tokens computes, without decoding them."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from feeding import feed
from integration.families import FAMILIES, WITHOUT_INTERFACE, build, inputs
from integration.modes import MODES, PROMPT
from integration.tiny import (
    LosslessCodec,
    balanced,
    generate,
    kept_positions,
    logits,
    prompt,
    random_states,
    tiny_llama,
)
from torch import Tensor
from transformers import AttentionInterface, LlamaForCausalLM

from nexusquant_cache import EvictionPolicy, LeveragePolicy, NexusQuantCache, ScoreInputs, attention
from nexusquant_cache.codec import impl
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.torch.attend import attend
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.releases import CACHE
from nexusquant_cache.states import answer
from nexusquant_cache.states.answer import MOST_QUERIES
from nexusquant_cache.states.source import Source
from nexusquant_cache.states.tensors import HeldStates, source_of

# Layers of ours whose keys change between cache and attention, or families without any layer of ours.
NOT_READ = {"mistral", "falcon_h1", "deepseek_v2", "deepseek_v3"}
SERVED = [
    (name, stock) for name, family in FAMILIES.items() if name not in WITHOUT_INTERFACE for stock in family.attentions
]


class Latest(EvictionPolicy):
    """Keeps the latest tokens, so that attention has no part in the choice."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        return inputs.positions.float().expand(inputs.keys.shape[:3])


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch, choosing: list[Any]) -> list[int]:
    """The number of tokens of each decoding of a layer's keys, but for a choice."""
    found: list[int] = []
    whole = HeldTokens.decoded_keys

    def decoded_keys(self: HeldTokens, **options: Any) -> Tensor:
        if self.sinks is not None and not choosing:
            found.append(self.tokens)
        return whole(self, **options)

    monkeypatch.setattr(HeldTokens, "decoded_keys", decoded_keys)
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the queries of each attention that was read from codes."""
    found: list[tuple[int, ...]] = []

    def spy(queries: Tensor, *given: Any, **options: Any) -> Any:
        found.append(tuple(queries.shape))
        return whole(queries, *given, **options)

    whole = impl.attend
    monkeypatch.setattr(impl, "attend", spy)
    return found


@pytest.mark.parametrize(("name", "stock"), SERVED)
@pytest.mark.filterwarnings("ignore:the attention of layer 0 was not seen")  # in latent attention, see NOT_READ
def test_families_compute_the_same(name: str, stock: str, reads: list[tuple[int, ...]], decodings: list[int]) -> None:
    """States by themselves and `attention.enable`, with eviction: the same logits, and no layer of ours is decoded."""
    plain, enabled = build(name, stock), copy.deepcopy(build(name, stock))
    attention.enable(enabled)
    results = []
    for model in (plain, enabled):
        reads.clear()
        results.append(
            model.generate(
                **inputs(model, PROMPT, 2),
                **{CACHE: balanced(model, policy=Latest())},
                do_sample=False,
                max_new_tokens=6,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    for a, b in zip(results[0].logits, results[1].logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        if name not in NOT_READ and stock == "sdpa":
            assert reads
    if name not in NOT_READ:
        # transformers 5.17 moves the keys that layers of Gemma 4 share to where they are, which decodes them.
        assert name == "gemma4" or not decodings


@pytest.mark.parametrize("mode", sorted(MODES))
def test_modes_compute_the_same(mode: str, reads: list[tuple[int, ...]]) -> None:
    """Beams, padding, assistants, turns ...: the tokens of attention on decoded tokens."""
    plain, enabled = build("llama"), copy.deepcopy(build("llama"))
    attention.enable(enabled)
    found = [
        MODES[mode](model, lambda mask=None, model=model: balanced(model, policy=Latest(), attention_mask=mask))
        for model in (plain, enabled)
    ]
    assert torch.equal(*found)
    assert reads


def compressed(model: LlamaForCausalLM, tokens: int = 90, batch: int = 1, **options: Any) -> NexusQuantCache:
    cache = balanced(model, **options)
    logits(model, prompt(tokens, batch), cache)
    cache.compress()
    return cache


def test_decodes_where_many_queries_come_at_once(reads: list[tuple[int, ...]], decodings: list[int]) -> None:
    """And where few do, reads codes with a causal mask."""
    plain, enabled = tiny_llama(), tiny_llama()
    attention.enable(enabled)
    few, many = prompt(MOST_QUERIES, seed=1), prompt(MOST_QUERIES + 1, seed=2)
    caches = [compressed(model, policy=Latest()) for model in (plain, enabled)]
    decodings.clear()
    torch.testing.assert_close(*[logits(m, few, c) for m, c in zip((plain, enabled), caches, strict=True)])
    assert reads == [(1, 4, MOST_QUERIES, 16)] * 4
    assert not decodings
    torch.testing.assert_close(
        *[logits(m, many, c) for m, c in zip((plain, enabled), caches, strict=True)], rtol=1e-4, atol=1e-4
    )
    assert len(reads) == len(decodings) == 4


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [MOST_QUERIES + 1, 100])
def test_many_queries_in_small_parts(stock: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of long turns are made for some queries at a time, which changes nothing."""
    model = tiny_llama(stock)
    cache = compressed(model, batch=2, policy=Latest())
    expected = logits(model, prompt(tokens, 2, seed=1), copy.deepcopy(cache))
    monkeypatch.setattr(answer, "_LOGITS", 1)
    torch.testing.assert_close(logits(model, prompt(tokens, 2, seed=1), cache), expected, rtol=1e-4, atol=1e-5)


def test_eager_attention_tells_its_weights() -> None:
    """Of every token that was seen: 0 for those that were evicted."""
    plain, enabled = tiny_llama("eager"), tiny_llama("eager")
    attention.enable(enabled)
    found = []
    for model in (plain, enabled):
        cache = compressed(model, batch=2, policy=Latest())
        found.append(model(torch.tensor([[5], [6]]), **{CACHE: cache}, output_attentions=True).attentions)
    for layer, (a, b) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.sum(-1), torch.ones(2, 4, 1))
        kept = kept_positions(cache, layer)
        assert b.shape == (2, 4, 1, 91)
        assert kept.shape[2] < 91
        hidden = torch.ones(2, 2, 91, dtype=torch.bool).scatter_(2, kept, value=False).repeat_interleave(2, 1)
        assert not b[:, :, 0][hidden].any()


@pytest.mark.parametrize("rotary", [True, False])
def test_codecs_of_users_are_read(rotary: bool, reads: list[tuple[int, ...]], decodings: list[int]) -> None:
    """One that knows no channels, and one that decodes in its own way: some tokens at a time."""

    class Shrinking(E8Codec):
        def decode(self, packed: Any, transform: Any) -> Tensor:
            return super().decode(packed, transform) * 0.9

    class Lossless(NexusQuantCache):
        def make_codec(self, side: Any, head_dim: int, layer_idx: int) -> Any:
            del side, layer_idx
            return LosslessCodec(head_dim)

    class Shrunk(NexusQuantCache):
        def make_codec(self, side: Any, head_dim: int, layer_idx: int) -> Any:
            own = super().make_codec(side, head_dim, layer_idx)
            assert isinstance(own, E8Codec)
            return Shrinking(layout=own.layout)

    plain, enabled = tiny_llama(), tiny_llama()
    attention.enable(enabled)
    small = {"sink_tokens": 2, "residual_length": 8, "flush_length": 4, "min_tokens": 16, "min_kept": 0}
    for kind in (Lossless, Shrunk):
        found = [
            generate(model, prompt(60), kind("quant", config=model.config if rotary else None, **small), 6)
            for model in (plain, enabled)
        ]
        assert torch.equal(*found)
        assert len(reads) == 2 * 2 * 5  # models, layers and steps
        assert not decodings
        reads.clear()


@pytest.mark.parametrize("is_enabled", [True, False])
def test_dropout_is_refused(is_enabled: bool) -> None:
    model = tiny_llama(attention_dropout=0.3)
    if is_enabled:
        attention.enable(model)
    cache = compressed(model)
    model.train()
    with pytest.raises(UnsupportedError, match=r"without dropout, got dropout=0\.3: call model\.eval"):
        model(torch.tensor([[5]]), **{CACHE: cache})


@pytest.mark.parametrize("change", [{"unheard_of": 1}, {"attention_mask": torch.zeros(1, 1, 1, 89)}])
def test_what_is_not_understood_is_left_to_the_stock_implementation(
    change: dict[str, Any], decodings: list[int]
) -> None:
    """Which can compute it where all tokens are kept, and must not where some have been evicted."""
    model = tiny_llama()
    attention.enable(model)
    ours = AttentionInterface()["nexusquant_sdpa"]
    given: dict[str, Any] = {"attention_mask": None} | change
    for keep_ratio in (1.0, 0.5):
        states = states_of(compressed(model, policy=Latest(), keep_ratio=keep_ratio))
        call = partial(ours, model.model.layers[0].self_attn, torch.randn(1, 4, 1, 16), *states)
        decodings.clear()
        if keep_ratio == 1.0 and "unheard_of" in change:
            call(**given)
            assert decodings
        elif keep_ratio < 1:
            with pytest.raises(UnsupportedError, match=r"from which \d+ of 90 tokens|which is not understood"):
                call(**given)
        decodings.clear()
        call(attention_mask=None, unheard_of=None)
        assert not decodings


def states_of(cache: NexusQuantCache, layer: int = 0) -> tuple[HeldStates, HeldStates]:
    """Return what attention would be given, without new tokens."""
    source = Source(part_of(cache.layers[layer], layer).held(), 1, lambda *_: None)
    return HeldStates.of(source, "keys"), HeldStates.of(source, "values")


@pytest.mark.parametrize("moment", ["other", "decoded"])
def test_keys_and_values_of_different_moments_are_not_read(moment: str) -> None:
    """Values that are none of ours, or not those of the keys, are for the stock implementation."""
    cache = compressed(tiny_llama(), policy=Latest(), keep_ratio=1.0)
    keys, values = states_of(cache)
    other: Any = states_of(cache)[1] if moment == "other" else values.plain()
    assert source_of(keys, other) is None
    assert source_of(keys, values) is keys.source


class TestHeldStates:
    @pytest.fixture
    def held(self) -> HeldTokens:
        return part_of(compressed(tiny_llama(), keep_ratio=1.0).layers[0], 0).held()

    @staticmethod
    def states(held: HeldTokens, side: Any) -> HeldStates:
        return HeldStates.of(Source(held, 1, lambda *_: None), side)

    @pytest.mark.parametrize("side", ["keys", "values"])
    def test_looks_like_the_decoded_tensor(self, held: HeldTokens, side: Any, decodings: list[int]) -> None:
        states = self.states(held, side)
        dense = held.dense_keys() if side == "keys" else held.dense_values()
        decodings.clear()
        assert (states.shape, states.dtype, states.device) == (dense.shape, dense.dtype, dense.device)
        assert (states.ndim, states.size(2), len(states), states.numel()) == (4, dense.shape[2], 1, dense.numel())
        assert states.is_floating_point()
        assert not states.requires_grad
        assert repr(states).startswith(f"HeldStates({side}, shape=(1, 2, ")
        assert not decodings

    @pytest.mark.parametrize(
        "use",
        [
            lambda x: x + 1,
            lambda x: 1 - x,
            lambda x: x[:, :, 3:5].repeat_interleave(2, 1),
            lambda x: x.transpose(2, 3).contiguous(),
            lambda x: x[:, :, None].expand(-1, -1, 3, -1, -1).reshape(1, 6, -1, 16),
            lambda x: x.repeat_interleave(3, dim=1).mT,
            lambda x: x.permute(0, 1, 3, 2).double(),
            lambda x: torch.cat([x, x], 2),
            lambda x: x.to(torch.bfloat16),
            lambda x: torch.nn.functional.scaled_dot_product_attention(torch.ones(1, 2, 1, 16), x, x),
            lambda x: torch.matmul(torch.ones(16), x.mT),
            copy.copy,
            lambda x: torch.stack([x.clone(), x.detach()]),
            lambda x: x.mul(2).sum(),
        ],
    )
    def test_everything_else_sees_the_decoded_tensor(self, held: HeldTokens, use: Callable[[Tensor], Tensor]) -> None:
        states = self.states(held, "keys")
        expected = use(held.dense_keys())
        found = use(states)
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype
        found = found.plain() if isinstance(found, HeldStates) else found
        assert torch.equal(torch.as_tensor(found), expected)

    def test_is_decoded_once(self, held: HeldTokens, decodings: list[int]) -> None:
        states = self.states(held, "keys")
        assert torch.equal(states * 2, states + states)
        assert len(decodings) == 1

    def test_stays_as_it_was_when_the_layer_goes_on(self) -> None:
        """Appended tokens, a crop and an eviction after it was made are not in it."""
        cache = compressed(tiny_llama(), keep_ratio=1.0)
        layer = cache.layers[0]
        assert isinstance(layer, NexusQuantLayer)
        states = states_of(cache)[0]
        expected = part_of(layer, 0).dense()[0].clone()
        for seed in range(12):
            feed(layer, *random_states((1, 2, 1, 16), seed))
        layer.crop(-40)
        layer.batch_repeat_interleave(2)
        assert torch.equal(states.plain(), expected)


def held_tokens(
    dtype: torch.dtype = torch.float32, batch: int = 2, heads: int = 2, tokens: int = 150, **options: Any
) -> HeldTokens:
    """Return the content of a layer with or without its rotary phase, evicted or whole, by either transform."""
    model = tiny_llama(num_key_value_heads=heads)
    rotary = options.pop("rotary", True)
    policy = options.pop("policy", Latest())
    mask = options.pop("attention_mask", None)
    cache = NexusQuantCache(
        "balanced",
        config=model.config if rotary else None,
        policy=policy,
        sink_tokens=3,
        residual_length=8,
        flush_length=4,
        min_tokens=16,
        min_kept=0,
        **options,
    )
    keys, values = random_states((batch, heads, tokens, 16), 1, dtype)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    visible = visible if mask is None else visible & mask[:, None, None].bool()
    for index in range(2):
        feed(cache, keys, values, index, mask=visible)
    cache.compress()
    layer = cache.layers[0]
    assert isinstance(layer, NexusQuantLayer)
    return part_of(layer, 0).held()


def by_hand(queries: Tensor, held: HeldTokens, mask: Tensor | None, options: Softmax) -> Tensor:
    """Attention over the decoded tokens in float64; the mask is that of all tokens seen."""
    keys, values = held.decoded_keys().double(), held.decoded_values().double()
    groups = queries.shape[1] // keys.shape[1]
    if mask is not None:
        columns = held.columns.expand(*keys.shape[:3]).repeat_interleave(groups, 1)
        every = mask.expand(len(keys), queries.shape[1], -1, -1)
        mask = every.gather(3, columns[:, :, None].expand(-1, -1, every.shape[2], -1))
        if held.visible is not None:
            empty = ~held.visible[:, :, 0].repeat_interleave(groups, 1)
            mask = mask & ~empty if mask.dtype == torch.bool else mask.masked_fill(empty, -torch.inf)
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    found = queries.double() @ keys.mT * options.scaling
    if options.softcap is not None:
        found = options.softcap * (found / options.softcap).tanh()
    if mask is not None:
        found = found.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else found + mask
    weights = found.exp()
    total = weights.sum(-1, keepdim=True)
    if options.sink_logits is not None:
        total = total + options.sink_logits.double().exp()[None, :, None, None]
    return weights / total @ values


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("transform", ["principal", "hadamard"])
@pytest.mark.parametrize("keep_ratio", [1.0, 0.4])
@pytest.mark.parametrize("count", [1, 5])
def test_is_attention_on_the_decoded_tokens(rotary: bool, transform: Any, keep_ratio: float, count: int) -> None:
    held = held_tokens(rotary=rotary, transform=transform, keep_ratio=keep_ratio, tokens=400)
    queries = torch.randn(2, 6, count, 16, generator=torch.Generator().manual_seed(3))
    options = Softmax(scaling=0.3)
    out, weights = attend(queries, held, None, options)
    torch.testing.assert_close(out.double(), by_hand(queries, held, None, options), rtol=1e-4, atol=1e-4)
    assert weights.shape == (2, 2, 3, count, held.tokens)


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sink_logits", [False, True])
def test_masks_and_what_families_add(kind: str, softcap: float | None, has_sink_logits: bool) -> None:
    held = held_tokens()
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(2, 4, 3, 16, generator=generator)
    mask = torch.rand(2, 1, 3, held.seen, generator=generator) > 0.3
    given = {"bool": mask, "float": torch.where(mask, 0.5, -torch.inf), "none": None}[kind]
    sinks = torch.randn(4, generator=generator) if has_sink_logits else None
    options = Softmax(scaling=0.25, softcap=softcap, sink_logits=sinks)
    out, _ = attend(queries, held, given, options)
    torch.testing.assert_close(out.double(), by_hand(queries, held, given, options), rtol=1e-4, atol=1e-4)


def test_a_query_that_may_see_nothing_sees_nothing() -> None:
    held = held_tokens()
    mask = torch.zeros(2, 1, 1, held.seen, dtype=torch.bool)
    mask[1] = True
    out, weights = attend(torch.randn(2, 4, 1, 16), held, mask, Softmax(scaling=0.25))
    assert not out[0].any()
    assert not weights[0].any()
    assert out[1].any()


def test_sinks_behind_padding() -> None:
    """They are stored first, whatever comes before them in the row; nobody looks at empty places."""
    pads = 120
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :pads] = 0
    held = held_tokens(attention_mask=mask, keep_ratio=0.9)
    assert held.sink_positions is not None
    assert held.sink_positions.tolist() == [[0, 1, 2], [120, 121, 122]]
    assert held.visible is not None
    queries = torch.randn(2, 4, 2, 16)
    visible = torch.rand(2, 1, 2, held.seen) > 0.5
    options = Softmax(scaling=0.25)
    out, weights = attend(queries, held, visible, options)
    real = visible & mask[:, None, None].bool()
    torch.testing.assert_close(out.double(), by_hand(queries, held, real, options), rtol=1e-4, atol=1e-4)
    assert not weights.masked_select(~held.visible).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    """Closer to attention on the exact codes than decoding to that precision is."""
    held = held_tokens(dtype)
    queries = torch.randn(2, 4, 1, 16).to(dtype)
    options = Softmax(scaling=0.25)
    single = replace(held, tail=tuple(x.float() for x in held.tail), sinks=tuple(x.float() for x in held.sinks or ()))
    exact = by_hand(queries, single, None, options)
    out, _ = attend(queries, held, None, options)
    decoded = by_hand(queries, held, None, options)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
    assert (out - exact).abs().max() < (decoded - exact).abs().max()


def test_autocast_does_not_round_what_is_read() -> None:
    held = held_tokens()
    queries, options = torch.randn(2, 4, 1, 16), Softmax(scaling=0.25)
    expected = attend(queries, held, None, options)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(queries, held, None, options)[0], expected)


def test_the_leverage_policy_and_codes_in_a_whole_conversation() -> None:
    """Three turns, evicted each time."""
    plain, enabled = tiny_llama(), tiny_llama()
    attention.enable(enabled)
    found = []
    for model in (plain, enabled):
        cache, ids = balanced(model, policy=LeveragePolicy()), prompt(60)
        for turn in range(3):
            ids = generate(model, ids, cache, 8)
            ids = torch.cat([ids, prompt(30, seed=turn + 1)], 1)
        found.append(ids)
    assert torch.equal(*found)
