"""What a cache takes from attention that comes in parts, late, or otherwise than most models have it."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from integration.tiny import SMALL, TINY, LosslessCache, balanced, generate, kept_mask, logits, prompt, tiny_llama
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    CodeGenConfig,
    CodeGenForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nexusquant_cache import (
    CacheStateError,
    KeyNormPolicy,
    NexusQuantCache,
    PrefixStore,
    RecentAttentionPolicy,
    UnsupportedError,
    attention,
    compressed_generation,
)
from nexusquant_cache.attention import record_queries
from nexusquant_cache.layer import observations
from nexusquant_cache.releases import CACHE

PROMPT = 256


def filled(preset: str = "quant", **options: Any) -> NexusQuantCache:
    """Return a compressed cache of one layer, whose attention was seen."""
    cache = NexusQuantCache(preset, **(SMALL | options))
    keys, values = cache.update(*states(80), 0)
    F.scaled_dot_product_attention(torch.randn(1, 4, 80, 16), keys, values, is_causal=True, enable_gqa=True)
    cache.compress()
    return cache


def states(tokens: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, tokens, 16), torch.randn(rows, 2, tokens, 16)


# Queries that come in blocks


def by_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)


def by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    weights = (query @ key.transpose(2, 3)) * scaling
    return weights.masked_fill(~mask, torch.finfo(query.dtype).min).softmax(-1) @ value


@pytest.fixture(params=[by_sdpa, by_products])
def in_blocks(request: pytest.FixtureRequest) -> Iterator[LlamaForCausalLM]:
    """Return a model that attends with 64 queries at a time, to save memory."""

    def attend(  # noqa: PLR0917 - transformers' own signature
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[Tensor, None]:
        del module
        seen = key.shape[2]
        mask = torch.ones(seen, seen, dtype=torch.bool).tril()[None, None, seen - query.shape[2] :]
        if attention_mask is not None:
            mask = attention_mask
        parts = zip(query.split(64, 2), mask.split(64, 2), strict=True)
        return torch.cat([request.param(q, key, value, m, scaling) for q, m in parts], 2).transpose(1, 2), None

    AttentionInterface.register("blocks", attend)
    AttentionMaskInterface.register("blocks", sdpa_mask)
    model = tiny_llama()
    model.set_attn_implementation("blocks")
    yield model
    for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        table._global_mapping.pop("blocks", None)


@pytest.mark.parametrize("pads", [0, 20])
def test_queries_in_blocks_are_known_by_the_last(in_blocks: LlamaForCausalLM, pads: int) -> None:
    """The first block says nothing of the tokens behind it: they are no padding, and its queries not the last."""
    caches = []
    for model in (tiny_llama(), in_blocks):
        ids, mask = prompt(PROMPT, 2), torch.ones(2, PROMPT, dtype=torch.int64)
        mask[0, :pads] = 0
        cache = balanced(model, policy=RecentAttentionPolicy())
        generate(model, ids, cache, 3, attention_mask=mask)
        caches.append(cache)
    for layer in range(len(caches[0].layers)):
        whole, blocks = (kept_mask(cache, layer) for cache in caches)
        assert not whole[:, :, :-12].all()
        assert not whole[0, :, :pads].any()
        assert (whole == blocks).float().mean() > 0.98  # but for roundings


# Masks of other kinds


@pytest.mark.parametrize("hides", [-torch.inf, -1e9, -65504.0, -1e4])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_pads_are_known_whatever_number_hides_them(kind: str, hides: float) -> None:
    model, rows = tiny_llama(kind), []
    visible = torch.ones(80, 80, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    visible[0, ..., :40] = False
    visible[0, :, :40, 0] = True  # a query that sees nothing would give no number
    visible[0, :, 40:, 0] = False
    for number in (torch.finfo(torch.float32).min, hides):
        cache = balanced(model)
        logits(model, prompt(80, 2), cache, attention_mask=torch.zeros(2, 1, 80, 80).masked_fill(~visible, number))
        cache.compress()
        rows.append([kept_mask(cache, layer) for layer in range(len(cache.layers))])
    assert not rows[0][0][0, :, 1:40].any()
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


def eager_models() -> dict[str, Callable[[], PreTrainedModel]]:
    """Return families that cast keys before they attend to them."""
    size = {"vocab_size": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    neo = {"vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512}
    return {
        "gpt_neo": lambda: GPTNeoForCausalLM(GPTNeoConfig(**neo, **ends, attention_types=[[["global"], 2]])),
        "gptj": lambda: GPTJForCausalLM(GPTJConfig(**size, **ends)),
        "codegen": lambda: CodeGenForCausalLM(CodeGenConfig(**size, **ends)),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(eager_models()))
def test_families_that_cast_their_keys(name: str, dtype: torch.dtype) -> None:
    """In half precision: pads are known by the mask's own smallest number, and many queries attend to codes."""
    torch.manual_seed(3)
    model = eager_models()[name]().eval().to(dtype).requires_grad_(requires_grad=False)
    model.set_attn_implementation("eager")
    ids, mask = prompt(100, 2), torch.ones(2, 100, dtype=torch.int64)
    mask[0, :40] = 0
    cache = balanced(model)
    model(ids, attention_mask=mask, **{CACHE: cache})
    cache.compress()
    kept = kept_mask(cache, 0)
    assert not kept[0, :, :40].any()
    assert 8 + 2 < int(kept[0, 0].sum()) < 60  # more than the newest, and the first
    plain, ours = DynamicCache(config=model.config), LosslessCache("quant", config=model.config, **SMALL)
    found = []
    for each in (plain, ours):
        model(ids, attention_mask=mask, **{CACHE: each})
        model(prompt(1, 2, seed=1), attention_mask=F.pad(mask, (0, 1), value=1), **{CACHE: each})
        longer = F.pad(mask, (0, 31), value=1)
        found.append(model(prompt(30, 2, seed=2), attention_mask=longer, **{CACHE: each}).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.1)


# What comes with `enable`


@pytest.mark.parametrize("options", [{"output_hidden_states": True}, {"output_attentions": True}])
def test_options_that_change_no_attention(options: dict[str, Any]) -> None:
    model = tiny_llama("eager")
    expected = generate(model, prompt(80), balanced(model), 5, **options)
    attention.enable(model)
    cache = balanced(model)
    assert torch.equal(generate(model, prompt(80), cache, 5, **options), expected)
    assert not cache.layers[0].state.is_whole


def test_a_window_without_a_config() -> None:
    """A window that is wider than the text; where it is not, tokens outside it are hidden by the mask."""
    for window in (2000, 40):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=window)).eval()
        texts = []
        for is_enabled in (False, True):
            if is_enabled:
                attention.enable(model)
            cache = NexusQuantCache("balanced", policy=KeyNormPolicy(), **SMALL)
            texts.append(generate(model, prompt(80), cache, 6))
            assert not cache.layers[0].state.is_whole
        assert torch.equal(*texts)


def test_an_option_that_is_not_understood() -> None:
    """In the prompt, nothing is evicted; behind it, an error says which option it is."""
    model = tiny_llama()
    attention.enable(model)
    cache = balanced(model)
    logits(model, prompt(80), cache, cu_seqlens_of_a_kernel=1)
    with pytest.warns(UserWarning, match="attention of layer 0 was not seen"):
        logits(model, prompt(1), cache)
    assert cache.layers[0].state.is_whole
    cache = balanced(model)
    logits(model, prompt(80), cache)
    logits(model, prompt(1), cache)
    with pytest.raises(UnsupportedError, match="was asked for with cu_seqlens_of_a_kernel"):
        logits(model, prompt(1), cache, cu_seqlens_of_a_kernel=1)


def test_a_recording_outlives_a_block(in_blocks: LlamaForCausalLM) -> None:
    """Both enable the model; whichever ends last disables it."""
    model = in_blocks
    block, recording = compressed_generation(model, "quant", **SMALL), record_queries(model, 64)
    block.__enter__()
    queries = recording.__enter__()
    block.__exit__(None, None, None)
    model(prompt(40))
    assert len(queries) == len(model.model.layers)
    recording.__exit__(None, None, None)
    assert model.config._attn_implementation == "blocks"
    with record_queries(model, 64):
        attention.enable(model)
    assert model.config._attn_implementation == "nexusquant_blocks"


# States that are used in other ways


@pytest.mark.parametrize(
    "write", [lambda x: x.mul_(3), lambda x: x.__setitem__(slice(None), 0), lambda x: x.__imul__(3)]
)
def test_writing_to_what_is_read_from_codes(write: Callable[[Tensor], Any]) -> None:
    """It would be lost; while the layer is exact it counts, as with a plain cache."""
    for preset in ("quant", "balanced"):
        _, values = filled(preset).update(*states(1), 0)
        with pytest.raises(UnsupportedError, match="would write to the values"):
            write(values)
    cache, queries = NexusQuantCache("quant", **SMALL), torch.randn(1, 4, 20, 16)
    keys, values = cache.update(*states(20), 0)
    expected = values.clone()
    write(values)
    write(expected)
    found = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
    right = F.scaled_dot_product_attention(queries, keys.clone(), expected, enable_gqa=True)
    assert torch.equal(found, right)


CHANGES: dict[str, Callable[[NexusQuantCache], Any]] = {
    "an update": lambda cache: cache.update(*states(40, 2), 0),
    "a reset": lambda cache: cache.reset(),
    "a choice of rows": lambda cache: cache.batch_select_indices([0]),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_attention_that_comes_late_says_nothing_of_what_came_since(change: str) -> None:
    cache = NexusQuantCache("balanced", **SMALL)
    keys, values = cache.update(*states(40, 2), 0)
    CHANGES[change](cache)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None].clone()
    mask[..., :10] = False
    F.scaled_dot_product_attention(torch.randn(2, 4, 40, 16), keys, values, attn_mask=mask, enable_gqa=True)
    assert cache.layers[0].state.pads is None
    assert cache.layers[0].state.shown == (0, 0)


def test_grouped_heads_in_the_place_of_queries_are_not_seen() -> None:
    """Of several tokens nobody knows in which order they are."""
    cache = NexusQuantCache("balanced", **SMALL)
    keys, values = cache.update(*states(80), 0)
    mask = torch.ones(80, 80, dtype=torch.bool).tril().repeat(2, 1)[None, None]
    F.scaled_dot_product_attention(torch.randn(1, 2, 160, 16), keys, values, attn_mask=mask)
    assert not cache.layers[0].state.is_shown


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("form", ["grouped", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_of_a_prompt_are_those_of_its_attention(
    dtype: torch.dtype, scale: float | None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first forward gives torch's own numbers, and what far attention is found from costs no second softmax."""
    given = []
    found_by = observations.greatest_attention
    monkeypatch.setattr(
        observations, "greatest_attention", lambda *args, **how: given.append((args, how)) or found_by(*args, **how)
    )
    exact, queries = tuple(x.to(dtype) for x in states(300)), torch.randn(1, 4, 300, 16, dtype=dtype)
    group = 4 // exact[0].shape[1]
    cache = NexusQuantCache("balanced", **SMALL)
    returned = cache.update(*exact, 0)
    if form == "repeated":
        returned, exact = ([x.repeat_interleave(group, 1) for x in each] for each in (returned, exact))
    how: dict[str, Any] = {"is_causal": True, "scale": scale, "enable_gqa": form == "grouped"}
    out = F.scaled_dot_product_attention(queries, *returned, **how)
    assert torch.equal(out, F.scaled_dot_product_attention(queries, *exact, **how))
    ((args, kwargs),) = given
    assert kwargs["log_sums"] is not None
    without = found_by(*args, **(kwargs | {"log_sums": None}))
    rounded = {"atol": 1e-3, "rtol": 1e-3}  # in half precision torch's own products are
    torch.testing.assert_close(found_by(*args, **kwargs), without, **({} if dtype == torch.float32 else rounded))


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_torch_takes_the_way_that_it_was_told(backend: SDPBackend) -> None:
    exact = states(80)
    queries = torch.randn(1, exact[0].shape[1], 80, 16)
    with sdpa_kernel(backend):
        expected = F.scaled_dot_product_attention(queries, *exact, is_causal=True)
        returned = NexusQuantCache("balanced", **SMALL).update(*exact, 0)
        assert torch.equal(F.scaled_dot_product_attention(queries, *returned, is_causal=True), expected)


def test_queries_of_one_row_attend_to_a_batch() -> None:
    keys, values = (x.repeat(2, 1, 1, 1) for x in states(80))
    cache = NexusQuantCache("quant", **SMALL)
    cache.update(keys, values, 0)
    cache.compress()
    returned, queries = cache.update(keys[:, :, :1], values[:, :, :1], 0), torch.randn(1, 4, 1, 16)
    found = F.scaled_dot_product_attention(queries, *returned, enable_gqa=True)
    expected = F.scaled_dot_product_attention(queries.expand(2, -1, -1, -1), *returned, enable_gqa=True)
    assert torch.equal(found, expected)


def test_small_things_that_torch_allows() -> None:
    keys, values = NexusQuantCache("quant", **SMALL).update(*states(20), 0)
    assert keys.type() == "torch.FloatTensor"
    assert values.type(torch.float64).dtype == torch.float64
    cache = filled()
    keys, values = cache.update(*(x[:, :, :0] for x in states(1)), 0)
    out = F.scaled_dot_product_attention(
        torch.randn(1, 4, 0, 16), keys, values, torch.zeros(1, 1, 0, 80), enable_gqa=True
    )
    assert out.shape == (1, 4, 0, 16)
    given = torch.randn(1, 4, 3, 16), *cache.update(*states(3), 0), torch.zeros(1, 1, 3, 83)
    held = given[0], cache.layers[0].keys.clone(), cache.layers[0].values.clone(), given[3]
    found, right = (
        F.scaled_dot_product_attention(*each, is_causal=True, enable_gqa=True) for each in (given, held)
    )  # of which torch makes what it likes
    torch.testing.assert_close(found, right)


# What a model does with logits and states


BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda x: 5 * torch.tanh(x / 5),
    "clamp_min": lambda x: x.clamp_min(-10),
    "maximum": lambda x: torch.maximum(x, torch.tensor(-10.0)),
    "atan": lambda x: 5 * torch.atan(x / 5),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "nan_to_num": lambda x: torch.nan_to_num(x, neginf=-10.0),
}


@pytest.mark.parametrize("name", list(BOUNDS))
def test_bounded_logits_do_not_bring_evicted_tokens_back(name: str) -> None:
    cache = LosslessCache("balanced", policy=KeyNormPolicy(), **SMALL)
    first, more = states(80), states(1)
    keys, values = cache.update(*first, 0)
    F.scaled_dot_product_attention(torch.randn(1, 4, 80, 16), keys, values, is_causal=True, enable_gqa=True)
    keys, values = cache.update(*more, 0)
    kept = kept_mask(cache, 0).repeat_interleave(2, 1)[:, :, None]
    assert not kept.all()

    def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        logits = BOUNDS[name](torch.matmul(query, key.transpose(2, 3)) * 0.25)
        logits = logits if visible is None else logits.masked_fill(~visible, -torch.inf)
        return torch.matmul(logits.softmax(-1), value)

    queries = torch.randn(1, 4, 1, 16)
    exact = (torch.cat(pair, 2) for pair in zip(first, more, strict=True))
    torch.testing.assert_close(attend(queries, keys, values), attend(queries, *exact, visible=kept))


def test_values_that_a_model_reads_itself_are_kept() -> None:
    """As Doge does: such a prompt counts as not seen, before its attention or after it."""
    for is_after in (False, True):
        cache = NexusQuantCache("balanced", **SMALL)
        keys, values = cache.update(*states(80), 0)
        gates = [] if is_after else [values.exp().mean()]
        F.scaled_dot_product_attention(torch.randn(1, 4, 80, 16), keys, values, is_causal=True, enable_gqa=True)
        gates += [values.exp().mean()] if is_after else []
        with pytest.warns(UserWarning, match="attention of layer 0 was not seen"):
            cache.update(*states(1), 0)
        assert cache.layers[0].state.is_whole
        assert gates[0].isfinite()


def test_values_that_a_model_reads_itself_are_kept_in_a_later_turn() -> None:
    """Doge's mask is made of a view of the values; its second turn was evicted from, and no step could go on."""
    cache = NexusQuantCache("balanced", **SMALL)
    for turn in range(2):
        keys, values = cache.update(*states(80), 0)
        gates = values.transpose(1, 2).reshape(1, values.shape[2], -1)
        mask = torch.ones(80, values.shape[2], dtype=torch.bool).tril(values.shape[2] - 80)
        F.scaled_dot_product_attention(torch.randn(1, 4, 80, 16), keys, values, attn_mask=mask, enable_gqa=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that attention was not seen; said once, in the first turn
            keys, values = cache.update(*states(1), 0)
        assert values.transpose(1, 2).reshape(1, values.shape[2], -1)[:, : gates.shape[1]].isfinite().all()
        assert cache.layers[0].state.is_whole, turn


def test_pad_queries_that_see_everything_are_not_asked() -> None:
    """As in a model that takes the row's maximum off before the softmax, and a user's mask that leaves no row empty."""
    caches = []
    for takes_off in (None, False, True):
        cache = balanced(tiny_llama(), policy=KeyNormPolicy())
        torch.manual_seed(0)
        keys, values = cache.update(*states(80), 0)
        visible = torch.ones(80, 80, dtype=torch.bool).tril()
        visible[:, :40] = False
        sees_all = torch.arange(80) < (0 if takes_off is None else 40)
        mask = (visible | sees_all[:, None])[None, None]
        queries = torch.randn(1, 4, 80, 16)
        if takes_off:
            logits_ = torch.matmul(queries, keys.repeat_interleave(2, 1).transpose(2, 3))
            logits_ = logits_ + torch.zeros(80, 80).masked_fill(~visible, torch.finfo(torch.float32).min)
            weights = (logits_ - logits_.max(-1, keepdim=True).values).softmax(-1)
            torch.matmul(weights, values.repeat_interleave(2, 1))
        else:
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        cache.compress()
        caches.append(kept_mask(cache, 0))
    assert not caches[0][:, :, :40].any()
    assert all(torch.equal(caches[0], each) for each in caches[1:])


def test_cross_attention_is_kept_whole() -> None:
    """Queries of another text say nothing of which of the encoder's tokens are needed."""
    torch.manual_seed(0)
    size = {"vocab_size": 256, "d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.15}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 1, "decoder_layers": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1}
    config = BartConfig(**size, **heads, **ends, max_position_embeddings=512, forced_eos_token_id=None, dropout=0.0)
    model = BartForConditionalGeneration(config).eval()
    texts = []
    for tokens in (1, 20, 60):
        for make in (DynamicCache, lambda: LosslessCache("balanced", **SMALL)):
            cache = EncoderDecoderCache(DynamicCache(), make())
            given = {"decoder_input_ids": prompt(tokens, seed=5), CACHE: cache}
            texts.append(model.generate(prompt(30), **given, max_new_tokens=8, do_sample=False))
        assert torch.equal(*texts[-2:])
    ours = NexusQuantCache("quant", config=model.config)
    with pytest.raises(UnsupportedError, match="use EncoderDecoderCache"):
        model.generate(prompt(30), decoder_input_ids=prompt(20, seed=5), max_new_tokens=2, **{CACHE: ours})


# Gradients


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_tangents_of_forward_mode_are_refused() -> None:
    model = tiny_llama("eager")
    embed = model.get_input_embeddings()

    def loss(given: Tensor, *, cache: Any) -> Tensor:
        model(inputs_embeds=given, use_cache=True, **{CACHE: cache})
        logits_: Tensor = model(inputs_embeds=embed(prompt(8)), use_cache=True, **{CACHE: cache}).logits
        return logits_.square().mean()

    given = embed(prompt(60)).detach()
    tangent = torch.randn_like(given)
    _, right = torch.func.jvp(lambda x: loss(x, cache=DynamicCache()), (given,), (tangent,))
    assert float(right)
    with pytest.raises(UnsupportedError, match="carries no gradients"):
        torch.func.jvp(lambda x: loss(x, cache=LosslessCache("quant", **SMALL)), (given,), (tangent,))


def test_a_loss_on_what_a_cache_shows_is_refused() -> None:
    """It can be looked at, but not differentiated: the tokens were stored without their graph."""
    model = tiny_llama()
    cache = balanced(model)
    with torch.enable_grad():
        model.requires_grad_(requires_grad=True)
        model(prompt(30), use_cache=True, **{CACHE: cache})
        keys = cache.layers[0].keys
        assert keys.detach().isfinite().all()
        with pytest.raises(UnsupportedError, match="carries no gradients"):
            keys.square().mean().backward()
        with pytest.raises(UnsupportedError, match="carries no gradients"):
            next(iter(cache))[1].square().mean().backward()
    with torch.no_grad():
        assert not cache.layers[0].keys.requires_grad


# Forwards that were not finished


def test_a_first_forward_that_was_interrupted_is_not_kept(tmp_path: Any) -> None:
    model = tiny_llama()
    cache = balanced(model)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        logits(model, prompt(60), cache)
    handle.remove()
    assert "one was not finished" in repr(cache)
    with pytest.raises(CacheStateError, match="layers 1 to 1 have seen no tokens"):
        cache.save(tmp_path / "a")
    with pytest.raises(CacheStateError, match="layers 1 to 1 have seen no tokens"):
        PrefixStore(tmp_path / "store").put(cache, prompt(60))
    assert not list((tmp_path / "store").glob("*.safetensors"))
    cache.crop(-60)
    assert torch.equal(generate(model, prompt(60), cache), generate(model, prompt(60), balanced(model)))


def test_steps_that_give_no_states_of_linear_attention() -> None:
    """As LFM3's: a prompt behind such steps begins a forward, and does not go on with one that has failed."""
    config = Lfm2Config(
        **(TINY | {"num_hidden_layers": 3}), layer_types=["conv", "full_attention", "conv"], conv_L_cache=3
    )
    cache = NexusQuantCache("quant", config=config, **SMALL)
    for tokens in (48, 1, 1, 20, 1):
        if tokens > 1:
            cache.update_conv_state(torch.randn(1, 64, 3), 0)
        cache.update(*states(tokens), 1)
        if tokens > 1:
            cache.update_conv_state(torch.randn(1, 64, 3), 2)
    assert cache.get_seq_length(1) == 71


# Crops


def test_crop_where_the_first_layers_are_of_another_stage() -> None:
    cache = NexusQuantCache("balanced", config=tiny_llama().config, **SMALL)
    cache.update(*states(30), 1)
    cache.crop(-10)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 20]


class Fails(KeyNormPolicy):
    """Fails in the second layer."""

    def score(self, inputs: Any) -> Tensor:
        if inputs.layer_idx == 1:
            raise ZeroDivisionError
        return super().score(inputs)


def test_a_crop_that_fails_removes_nothing() -> None:
    """Of ours; layers of transformers cannot take back theirs."""
    model = tiny_llama()
    cache = balanced(model, policy=Fails())
    cache.activate_past_recording()
    logits(model, prompt(120), cache)
    before = [copy.copy(layer.state.turn) for layer in cache.layers]
    with pytest.raises(ZeroDivisionError):
        cache.crop(-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [120, 120]
    assert [layer.state.turn for layer in cache.layers] == before
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Qwen2Config(**(TINY | {"num_hidden_layers": 4}), use_sliding_window=True, layer_types=kinds)
    mixed = Qwen2ForCausalLM(config).eval()
    cache = balanced(mixed, policy=Fails())
    cache.activate_past_recording()
    logits(mixed, prompt(120), cache)
    cache.layers[3].layer_idx = cache.layers[3].state.layer_idx = 1
    with pytest.raises(ZeroDivisionError):
        cache.crop(-5)
    with pytest.raises(CacheStateError, match="could not be undone"):
        logits(mixed, prompt(1), cache)
