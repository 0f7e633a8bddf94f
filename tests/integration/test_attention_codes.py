"""Attention that reads codes: what attention on decoded tokens computes, without decoding them."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from integration.families import FAMILIES, WITHOUT_INTERFACE, build, inputs
from integration.modes import MODES, PROMPT
from integration.tiny import LosslessCodec, balanced, generate, logits, prompt, random_states, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from nexusquant_cache import EvictionPolicy, LeveragePolicy, NexusQuantCache, ScoreInputs, attention
from nexusquant_cache.attention import function as implementation
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.torch import attend as plain
from nexusquant_cache.codec.torch.attend import attend
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.releases import CACHE
from nexusquant_cache.states import HeldStates

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
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each decoding of a layer's keys."""
    found: list[int] = []
    whole = HeldTokens.dense_keys

    def dense_keys(self: HeldTokens) -> Tensor:
        if self.sinks is not None:
            found.append(self.tokens)
        return whole(self)

    monkeypatch.setattr(HeldTokens, "dense_keys", dense_keys)
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the queries of each attention that was read from codes."""
    found: list[tuple[int, ...]] = []

    def spy(queries: Tensor, *given: Any) -> Any:
        found.append(tuple(queries.shape))
        return attend(queries, *given)

    monkeypatch.setattr(plain, "attend", spy)
    return found


@pytest.mark.parametrize(("name", "stock"), SERVED)
def test_families_compute_the_same(name: str, stock: str, reads: list[tuple[int, ...]], decodings: list[int]) -> None:
    """Logits of generation with eviction, of each family and stock implementation; no layer of ours is decoded."""
    plain, enabled = build(name, stock), copy.deepcopy(build(name, stock))
    attention.enable(enabled)
    results = []
    for model in (plain, enabled):
        decodings.clear()
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
    if name not in NOT_READ:
        assert reads
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
    few, many = prompt(implementation.MOST_QUERIES, seed=1), prompt(implementation.MOST_QUERIES + 1, seed=2)
    caches = [compressed(model, policy=Latest()) for model in (plain, enabled)]
    decodings.clear()
    torch.testing.assert_close(*[logits(m, few, c) for m, c in zip((plain, enabled), caches, strict=True)])
    assert reads == [(1, 4, implementation.MOST_QUERIES, 16)] * 2
    assert len(decodings) == 2  # of the plain model
    torch.testing.assert_close(
        *[logits(m, many, c) for m, c in zip((plain, enabled), caches, strict=True)], rtol=1e-4, atol=1e-4
    )
    assert len(reads) == 2
    assert len(decodings) == 6


def test_eager_attention_tells_its_weights() -> None:
    """In the order of the tokens, as it does on decoded ones."""
    plain, enabled = tiny_llama("eager"), tiny_llama("eager")
    attention.enable(enabled)
    found = []
    for model in (plain, enabled):
        cache = compressed(model, batch=2, policy=Latest())
        found.append(model(torch.tensor([[5], [6]]), **{CACHE: cache}, output_attentions=True).attentions)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.sum(-1), torch.ones(2, 4, 1))


def test_a_disabled_model_decodes(decodings: list[int], reads: list[tuple[int, ...]]) -> None:
    """Also when the cache was read by the enabled one before."""
    model = tiny_llama()
    attention.enable(model)
    cache = compressed(model)
    expected = logits(model, torch.tensor([[7]]), copy.deepcopy(cache))
    assert len(reads) == 2
    attention.disable(model)
    decodings.clear()
    torch.testing.assert_close(logits(model, torch.tensor([[7]]), cache), expected, rtol=1e-4, atol=1e-4)
    assert len(decodings) == len(reads) == 2


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
    small = {"sink_tokens": 2, "residual_length": 8, "flush_length": 4, "min_tokens": 16}
    for kind in (Lossless, Shrunk):
        found = [
            generate(model, prompt(60), kind("quant", config=model.config if rotary else None, **small), 6)
            for model in (plain, enabled)
        ]
        assert torch.equal(*found)
        assert len(reads) == 2 * 5  # layers and steps
        assert len(decodings) == 2 * 5  # of the plain model
        reads.clear()
        decodings.clear()


def test_dropout_is_refused() -> None:
    model = tiny_llama(attention_dropout=0.3)
    attention.enable(model)
    cache = compressed(model)
    model.train()
    with pytest.raises(UnsupportedError, match=r"without dropout, got dropout=0\.3: call model\.eval"):
        model(torch.tensor([[5]]), **{CACHE: cache})


@pytest.mark.parametrize(
    "change", [{"unheard_of": 1}, {"attention_mask": torch.ones(1, 91)}, {"attention_mask": None, "queries": 2}]
)
def test_what_is_not_understood_is_left_to_the_stock_implementation(change: dict[str, Any]) -> None:
    layer = compressed(tiny_llama(), policy=Latest()).layers[0]
    assert isinstance(layer, NexusQuantLayer)
    held = part_of(layer, 0).held()
    given: dict[str, Any] = {"attention_mask": None, "queries": 1} | change
    queries, mask = torch.randn(1, 4, given.pop("queries"), 16), given.pop("attention_mask")
    assert implementation.read_codes("sdpa", queries, held, mask, given) is None
    assert implementation.read_codes("sdpa", queries[:, :, :1], held, None, {"unheard_of": None}) is not None


@pytest.mark.parametrize("moment", ["other", "decoded"])
def test_keys_and_values_of_different_moments_are_not_read(moment: str) -> None:
    """Values that are none of ours, or not those of the keys, are for the stock implementation."""
    layer = compressed(tiny_llama(), policy=Latest()).layers[0]
    assert isinstance(layer, NexusQuantLayer)
    keys = HeldStates(part_of(layer, 0).held(), "keys")
    value: Any = HeldStates(part_of(layer, 0).held(), "values") if moment == "other" else keys.decoded()
    assert implementation.held_tokens(keys, value) is None
    assert implementation.held_tokens(keys, HeldStates(keys.held, "values")) is keys.held


class TestHeldStates:
    @pytest.fixture
    def held(self) -> Iterator[HeldTokens]:
        layer = compressed(tiny_llama(), policy=Latest()).layers[0]
        assert isinstance(layer, NexusQuantLayer)
        return part_of(layer, 0).held()

    @pytest.mark.parametrize("side", ["keys", "values"])
    def test_looks_like_the_decoded_tensor(self, held: HeldTokens, side: Any, decodings: list[int]) -> None:
        states = HeldStates(held, side)
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
            lambda x: torch.cat([x, x], 2),
            lambda x: x.to(torch.bfloat16),
            lambda x: torch.nn.functional.scaled_dot_product_attention(torch.ones(1, 2, 1, 16), x, x),
            lambda x: torch.matmul(torch.ones(16), x.mT),
            copy.copy,
            lambda x: torch.stack([x.clone(), x.detach()]),
            lambda x: x.mul_(2).sum(),
        ],
    )
    def test_everything_else_sees_the_decoded_tensor(self, held: HeldTokens, use: Callable[[Tensor], Tensor]) -> None:
        states = HeldStates(held, "keys")
        expected = use(held.dense_keys())
        found = use(states)
        assert torch.equal(torch.as_tensor(found), expected)

    def test_is_decoded_once(self, held: HeldTokens, decodings: list[int]) -> None:
        states = HeldStates(held, "keys")
        assert torch.equal(states * 2, states + states)
        assert len(decodings) == 1

    def test_stays_as_it_was_when_the_layer_goes_on(self) -> None:
        """Appended tokens, a crop and an eviction after it was made are not in it."""
        cache = compressed(tiny_llama(), keep_ratio=1.0)
        layer = cache.layers[0]
        assert isinstance(layer, NexusQuantLayer)
        states = HeldStates(part_of(layer, 0).held(), "keys")
        expected = part_of(layer, 0).dense()[0].clone()
        for seed in range(12):
            layer.update(*random_states((1, 2, 1, 16), seed))
        layer.crop(-40)
        layer.batch_repeat_interleave(2)
        assert torch.equal(states.decoded(), expected)


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
        attention_mask=mask,
        sink_tokens=3,
        residual_length=8,
        flush_length=4,
        min_tokens=16,
        **options,
    )
    keys, values = random_states((batch, heads, tokens, 16), 1, dtype)
    for index in range(2):
        cache.update(keys, values, index)
    cache.compress()
    layer = cache.layers[0]
    assert isinstance(layer, NexusQuantLayer)
    return part_of(layer, 0).held()


def by_hand(queries: Tensor, held: HeldTokens, mask: Tensor | None, options: Softmax) -> Tensor:
    """Attention over the decoded tokens in float64."""
    keys, values = held.dense_keys().double(), held.dense_values().double()
    groups = queries.shape[1] // keys.shape[1]
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
    assert weights.shape == (2, 6, count, held.tokens)


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sink_logits", [False, True])
def test_masks_and_what_families_add(kind: str, softcap: float | None, has_sink_logits: bool) -> None:
    held = held_tokens()
    generator = torch.Generator().manual_seed(4)
    queries = torch.randn(2, 4, 3, 16, generator=generator)
    mask = torch.rand(2, 1, 3, held.tokens, generator=generator) > 0.3
    given = {"bool": mask, "float": torch.where(mask, 0.5, -torch.inf), "none": None}[kind]
    sinks = torch.randn(4, generator=generator) if has_sink_logits else None
    options = Softmax(scaling=0.25, softcap=softcap, sink_logits=sinks)
    out, _ = attend(queries, held, given, options)
    torch.testing.assert_close(out.double(), by_hand(queries, held, given, options), rtol=1e-4, atol=1e-4)


def test_a_query_that_may_see_nothing_sees_nothing() -> None:
    held = held_tokens()
    mask = torch.zeros(2, 1, 1, held.tokens, dtype=torch.bool)
    mask[1] = True
    out, weights = attend(torch.randn(2, 4, 1, 16), held, mask, Softmax(scaling=0.25))
    assert not out[0].any()
    assert not weights[0].any()
    assert out[1].any()


def test_kept_pads_come_before_the_sinks() -> None:
    """Weights are in the order of the tokens, as the mask is."""
    pads = 120
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :pads] = 0
    held = held_tokens(attention_mask=mask, keep_ratio=0.9)
    assert held.before_sinks is not None
    assert held.before_sinks[1] > 0
    queries = torch.randn(2, 4, 2, 16)
    visible = torch.rand(2, 1, 2, held.tokens) > 0.5
    options = Softmax(scaling=0.25)
    out, weights = attend(queries, held, visible, options)
    torch.testing.assert_close(out.double(), by_hand(queries, held, visible, options), rtol=1e-4, atol=1e-4)
    assert not weights.masked_select(~visible).any()


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
