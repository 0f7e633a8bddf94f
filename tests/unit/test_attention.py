"""`attention.enable` and `disable`: what they select, what they refuse, and how queries find their layer."""

import copy
import subprocess
import sys
import threading
import types
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from feeding import feed
from integration.families import WITHOUT_INTERFACE, build
from integration.tiny import TINY, balanced, generate, prompt, random_states, tiny_llama
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama import modeling_llama

from nexusquant_cache import KeyNormPolicy, NexusQuantCache, WindowAttentionPolicy, attention
from nexusquant_cache.attention import function as implementation
from nexusquant_cache.codec.held import HeldTokens
from nexusquant_cache.errors import OptionError, ShapeError, UnsupportedError
from nexusquant_cache.layer.observations import greatest_attention
from nexusquant_cache.layer.schedule import wants_queries
from nexusquant_cache.releases import CACHE
from nexusquant_cache.states.source import Source
from nexusquant_cache.states.tensors import ExactStates

NOTHING_REGISTERED = """
import nexusquant_cache, nexusquant_cache.attention
from transformers import AttentionInterface, AttentionMaskInterface
print([name for name in (*AttentionInterface(), *AttentionMaskInterface()) if "nexusquant" in name])
"""


def name_of(model: nn.Module) -> str:
    return model.config.get_text_config(decoder=True)._attn_implementation


def test_importing_registers_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", NOTHING_REGISTERED], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("stock", ["sdpa", "eager"])
def test_enable_selects_ours_and_disable_what_was_there(stock: str) -> None:
    model = tiny_llama(stock)
    attention.enable(model)
    assert name_of(model) == f"nexusquant_{stock}"
    attention.enable(model)
    assert name_of(model) == f"nexusquant_{stock}"
    attention.disable(model)
    assert name_of(model) == stock
    attention.disable(model)
    assert name_of(model) == stock


def test_what_is_selected_later_is_respected() -> None:
    model = tiny_llama("sdpa")
    attention.enable(model)
    model.set_attn_implementation("eager")
    attention.disable(model)
    assert name_of(model) == "eager"
    attention.enable(model)
    assert name_of(model) == "nexusquant_eager"


def test_a_copy_of_a_model_is_on_its_own() -> None:
    model = tiny_llama()
    attention.enable(model)
    other = copy.deepcopy(model)
    attention.disable(model)
    assert (name_of(model), name_of(other)) == ("sdpa", "nexusquant_sdpa")
    attention.disable(other)
    assert name_of(other) == "sdpa"


def test_nothing_of_it_is_saved(tmp_path: Any) -> None:
    model = tiny_llama()
    before = model.config.to_json_string()
    attention.enable(model)
    assert model.config.to_json_string() == before
    model.save_pretrained(tmp_path)
    assert name_of(LlamaForCausalLM.from_pretrained(tmp_path)) == "sdpa"


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_only_the_part_that_writes_text_changes(family: str) -> None:
    model = copy.deepcopy(build(family))
    attention.enable(model)
    names = {config._attn_implementation for config in (model.config, model.config.vision_config)}
    assert names == {"sdpa"}
    text = model.get_decoder()
    assert text.config._attn_implementation == name_of(model) == "nexusquant_sdpa"
    attention.disable(model)
    assert text.config._attn_implementation == name_of(model) == "sdpa"


def test_a_wrapper_stands_for_its_model() -> None:
    model = tiny_llama()
    attention.enable(nn.Sequential(model))
    assert name_of(model) == "nexusquant_sdpa"


@pytest.mark.parametrize("given", [None, 3, "llama", nn.Linear(2, 2)])
@pytest.mark.parametrize("function", [attention.enable, attention.disable])
@pytest.mark.usefixtures("unchecked")
def test_refuses_what_is_no_model(given: Any, function: Any) -> None:
    with pytest.raises(OptionError, match=r"must be a model of transformers, got .*give its \.model"):
        function(given)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    return T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))


def upcasting_gpt2() -> nn.Module:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, reorder_and_upcast_attn=True)
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (t5, "encoder-decoder"),
        *(
            (partial(build, name, "eager"), "without transformers' AttentionInterface")
            for name in sorted(WITHOUT_INTERFACE)
        ),
        (upcasting_gpt2, "if its implementation is not named 'eager'"),
    ],
)
def test_refuses_models_whose_queries_it_cannot_see(make: Any, message: str) -> None:
    model = make()
    before = name_of(model)
    with pytest.raises(UnsupportedError, match=message):
        attention.enable(model)
    assert name_of(model) == before


def test_refuses_code_that_asks_for_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of DeepSeek V3.2 does, which makes a mask for eager and sdpa only."""
    source = 'if self.config._attn_implementation in ("eager", "sdpa"):'
    monkeypatch.setattr("inspect.getsource", lambda _: source)
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM computes attention in another way"):
        attention.enable(tiny_llama())


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_code_without_a_source_is_trusted(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> str:
        raise error

    model = tiny_llama()
    monkeypatch.setattr("inspect.getsource", refuse)
    attention.enable(model)
    assert name_of(model) == "nexusquant_sdpa"


def custom(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Compute eager attention, if it is called by its name and looks like a module."""
    assert module.config._attn_implementation == "flash_of_ours"
    assert module.config.hidden_size == TINY["hidden_size"]
    assert module.layer_idx in {0, 1}
    return modeling_llama.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


def test_any_registered_implementation_may_be_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash attention finds its kernels by the name in the config, so there it has to stand."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_of_ours", custom)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_of_ours", AttentionMaskInterface()["eager"])
    model, ids = tiny_llama("eager"), prompt(20)
    expected = model(ids).logits
    model.config._attn_implementation = "flash_of_ours"
    attention.enable(model)
    assert name_of(model) == "nexusquant_flash_of_ours"  # "flash" is in the name, which is what transformers looks for
    assert torch.equal(model(ids).logits, expected)


def test_an_implementation_without_masks_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def unmasked(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        seen.append(attention_mask)
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "unmasked", unmasked)
    model = tiny_llama()
    model.config._attn_implementation = "unmasked"
    attention.enable(model)
    model(prompt(20))
    assert seen == [None, None]


def test_a_module_without_an_attention_function_is_refused() -> None:
    def forward() -> Any:
        return ALL_ATTENTION_FUNCTIONS

    namespace = {"ALL_ATTENTION_FUNCTIONS": AttentionInterface()}
    kind = type("Odd", (), {"forward": types.FunctionType(forward.__code__, namespace)})
    assert implementation.has_interface(kind)
    assert implementation.find_stock(kind, "sdpa") is AttentionInterface()["sdpa"]
    with pytest.raises(UnsupportedError, match="Odd has no attention function for 'eager'"):
        implementation.find_stock(kind, "eager")


class TestSource:
    """What an update returns knows its layer, and shows it the attention once."""

    @pytest.fixture
    def seen(self) -> list[tuple[Any, ...]]:
        return []

    @pytest.fixture
    def states(self, seen: list[tuple[Any, ...]]) -> tuple[ExactStates, ExactStates]:
        keys, values = random_states((2, 1, 6, 8), 0)
        source = Source(HeldTokens((keys, values), 6), 4, lambda *shown: seen.append(shown))
        return ExactStates.of(keys, source, "keys"), ExactStates.of(values, source, "values")

    def test_attention_shows_its_queries_scale_and_padding(self, states: Any, seen: list[tuple[Any, ...]]) -> None:
        queries, mask = torch.randn(2, 3, 4, 8), torch.ones(2, 1, 4, 6, dtype=torch.bool)
        mask[1, :, :, 2:4] = False
        out = F.scaled_dot_product_attention(queries, *states, attn_mask=mask, scale=0.3, enable_gqa=True)
        plain = [x.as_subclass(Tensor).expand(-1, 3, -1, -1) for x in states]
        assert torch.equal(out, F.scaled_dot_product_attention(queries, *plain, attn_mask=mask, scale=0.3))
        fresh, shown, scaling, pads, sums = seen.pop()
        assert (fresh, scaling, sums) == (4, 0.3, None)
        assert torch.equal(shown, queries)
        assert pads.tolist() == [[False] * 4, [True, True, False, False]]

    def test_two_products_around_a_softmax_show_the_same(self, states: Any, seen: list[tuple[Any, ...]]) -> None:
        queries = torch.randn(2, 3, 4, 8)
        mask = torch.zeros(2, 1, 4, 6)
        mask[1, :, :, 2:4] = torch.finfo(torch.float32).min
        keys, values = (x[:, :, None].expand(2, 1, 3, 6, 8).reshape(2, 3, 6, 8) for x in states)
        logits = queries @ keys.transpose(2, 3) * 0.3
        weights = F.softmax(logits + mask, dim=-1, dtype=torch.float32)
        assert not seen
        out = weights @ values
        assert type(out) is Tensor
        fresh, shown, scaling, pads, sums = seen.pop()
        assert (fresh, scaling, sums) == (4, 0.3, None)
        assert torch.equal(shown, queries)
        assert pads.tolist() == [[False] * 4, [True, True, False, False]]

    def test_only_the_first_attention_counts(self, states: Any, seen: list[tuple[Any, ...]]) -> None:
        """Layers of a model that share the keys of another have queries of their own."""
        for _ in range(2):
            F.scaled_dot_product_attention(torch.randn(2, 1, 4, 8), *states)
        assert len(seen) == 1

    @pytest.mark.parametrize(
        "use",
        [
            lambda keys, values: keys.sum() + values.sum(),
            lambda keys, values: (torch.ones(2, 1, 4, 8) @ keys.mT).exp() @ values,  # a softmax of one's own
            lambda keys, _: F.softmax(torch.ones(2, 1, 4, 8) @ keys.mT, -1),
            lambda keys, values: torch.einsum("bhqd,bhkd,bhke->bhqe", torch.ones(2, 1, 4, 8), keys, values),
        ],
    )
    def test_what_is_no_attention_shows_nothing(self, states: Any, seen: list[tuple[Any, ...]], use: Any) -> None:
        assert type(use(*states)) is Tensor
        assert not seen


class TestObserveQueries:
    """By hand: what a layer keeps, and what it ignores."""

    @pytest.fixture
    def cache(self) -> NexusQuantCache:
        settings: dict[str, Any] = {"sink_tokens": 1, "residual_length": 4, "min_tokens": 4, "min_kept": 0}
        return NexusQuantCache("balanced", policy=WindowAttentionPolicy(), **settings)

    def feed(self, cache: NexusQuantCache, tokens: int) -> None:
        keys, values = random_states((1, 2, tokens, 8), tokens)
        feed(cache, keys, values, 0)

    def test_keeps_the_last_64(self, cache: NexusQuantCache) -> None:
        self.feed(cache, 100)
        queries = torch.randn(1, 4, 100, 8)
        cache.observe_queries(queries, 0)
        observed = cache.layers[0].state.observed.queries
        assert torch.equal(observed, queries[:, :, -64:])
        assert observed.untyped_storage().nbytes() == 4 * 64 * 8 * 4

    def test_joins_what_comes_together(self, cache: NexusQuantCache) -> None:
        parts = [torch.randn(1, 4, 30, 8) for _ in range(3)]
        for part in parts:
            self.feed(cache, 30)
            cache.observe_queries(part, 0)
        assert torch.equal(cache.layers[0].state.observed.queries, torch.cat(parts, 2)[:, :, -64:])

    def test_forgets_them_with_the_compression(self, cache: NexusQuantCache) -> None:
        self.feed(cache, 30)
        cache.observe_queries(torch.randn(1, 4, 30, 8), 0)
        assert cache.memory_report().layers[0].exact_bytes == 4 * (2 * 2 * 30 * 8 + 4 * 30 * 8)
        cache.compress()
        assert cache.layers[0].state.observed.queries is None
        assert cache.layers[0].state.kept < 30

    def test_ignores_them_when_nothing_waits(self, cache: NexusQuantCache) -> None:
        self.feed(cache, 30)
        for _ in range(2):
            cache.observe_queries(torch.randn(1, 4, 30, 8), 0)
            cache.compress()
        cache.observe_queries(torch.randn(1, 4, 30, 8), 0)
        assert cache.layers[0].state.observed.queries is None

    @pytest.mark.parametrize(
        "options", [{"policy": KeyNormPolicy()}, {"policy": WindowAttentionPolicy(), "keep_ratio": 1.0}]
    )
    def test_ignores_them_if_the_policy_would_not_look(self, options: dict[str, Any]) -> None:
        cache = NexusQuantCache("balanced", **options)
        self.feed(cache, 30)
        assert not wants_queries(cache.layers[0].state, cache.shared)
        cache.observe_queries(torch.randn(1, 4, 30, 8), 0)
        assert cache.layers[0].state.observed.queries is None

    def test_layers_of_transformers_ignore_them(self) -> None:
        config = build("mistral").config
        NexusQuantCache(config=config).observe_queries(torch.randn(1, 4, 3, 8), 0)

    @pytest.mark.parametrize("shape", [(2, 4, 3, 8), (1, 3, 3, 8), (1, 4, 3, 16), (1, 4, 0, 8), (4, 3, 8)])
    @pytest.mark.usefixtures("unchecked")
    def test_refuses_what_does_not_fit_the_keys(self, cache: NexusQuantCache, shape: tuple[int, ...]) -> None:
        self.feed(cache, 30)
        with pytest.raises(ShapeError, match=r"queries of layer 0 must be \[1, a multiple of 2, tokens, 8\], got"):
            cache.observe_queries(torch.zeros(shape), 0)


class TestRecordQueries:
    def test_the_last_ones_over_all_forwards(self) -> None:
        model, ids = tiny_llama(), prompt(30)
        with attention.record_queries(model, 100) as everything:
            model(ids)
        cache = NexusQuantCache("quant", config=model.config)
        with attention.record_queries(model, 12) as recorded, torch.no_grad():
            for part in (ids[:, :8], ids[:, 8:29], ids[:, 29:]):
                model(part, **{CACHE: cache})
        assert set(recorded) == {0, 1}
        for index, queries in recorded.items():
            assert queries.shape == (1, 4, 12, 16)
            assert not queries.requires_grad
            torch.testing.assert_close(queries, everything[index][:, :, -12:])
            assert queries.untyped_storage().nbytes() == queries.nbytes

    @pytest.mark.parametrize("was_enabled", [False, True])
    def test_leaves_the_model_as_it_was(self, was_enabled: bool) -> None:
        model = tiny_llama()
        if was_enabled:
            attention.enable(model)
        before = name_of(model)
        with pytest.raises(ZeroDivisionError), attention.record_queries(model, 3):
            raise ZeroDivisionError
        assert name_of(model) == before
        assert implementation.OBSERVERS.all == []

    def test_of_this_model_and_this_thread(self) -> None:
        model, other = tiny_llama(), tiny_llama()
        attention.enable(other)
        with attention.record_queries(model, 3) as recorded:
            other(prompt(5))
            thread = threading.Thread(target=model, args=(prompt(5),))
            thread.start()
            thread.join()
            assert recorded == {}
            with attention.record_queries(model, 2) as inner:
                model(prompt(5))
            assert inner[0].shape[2] == 2
        assert recorded[0].shape[2] == 3
        assert torch.equal(recorded[1][:, :, -2:], inner[1])

    @pytest.mark.parametrize("window", [0, -2])
    def test_refuses_an_empty_window(self, window: int) -> None:
        recording = attention.record_queries(nn.Identity(), window)
        with pytest.raises(OptionError, match="window must be at least 1 query"), recording:
            pass

    def test_another_scaling_is_in_the_queries(self) -> None:
        """Logits of a model are its scaling times the product; a policy divides by the root of the width."""
        model, scaled = tiny_llama(), tiny_llama()
        for layer in scaled.model.layers:
            layer.self_attn.scaling *= 3
        ids = prompt(10)
        with attention.record_queries(model, 10) as plain:
            model(ids)
        with attention.record_queries(scaled, 10) as tripled:
            scaled(ids)
        torch.testing.assert_close(tripled[0], 3 * plain[0])


@pytest.mark.parametrize(("distance", "every"), [(0, 1), (1, 1), (4, 1), (0, 2), (4, 3), (0, 20)])
@pytest.mark.parametrize("block", [1, 37, 200, 1 << 25])
def test_greatest_attention_by_hand(block: int, distance: int, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax per query and head over the tokens before it, in a loop; padding neither attends nor is attended to.

    What is nearer than the least distance takes part in the softmax, and is not looked at.  Places and distances are
    those of a row without its padding.
    """
    monkeypatch.setattr("nexusquant_cache.layer.observations._BLOCK", block)
    queries, keys = torch.randn(2, 6, 5, 8), torch.randn(2, 3, 12, 8)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :3] = real[1, 8] = False
    found = greatest_attention(queries, keys, real, least_distance=distance, every=every)
    expected = torch.zeros(2, 3, 12)
    for row, head, place in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(5)).tolist():
        visible = [at for at in range(8 + place) if real[row, at]]
        if real[row, 7 + place] and (len(visible) - 1) % every == 0:
            weights = (keys[row, head // 2, visible] @ queries[row, head, place] / 8**0.5).softmax(0)
            for at, weight in list(zip(visible, weights, strict=True))[: max(len(visible) - distance, 0)]:
                expected[row, head // 2, at] = max(expected[row, head // 2, at], weight)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("distance", "every"), [(0, 1), (1, 2), (64, 1), (64, 3), (200, 1), (0, 160)])
@pytest.mark.parametrize("block", [(7, 16), (64, 1), (128, 2048)])
@pytest.mark.parametrize("count", [150, 37])
def test_greatest_attention_from_known_sums(
    block: tuple[int, int], distance: int, every: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is known what a softmax divides by, the same comes out, whatever the blocks."""
    monkeypatch.setattr("nexusquant_cache.layer.observations._ROWS", block[0])
    monkeypatch.setattr("nexusquant_cache.layer.observations._COLUMNS", block[1])
    queries, keys = 3 * torch.randn(2, 6, count, 8), torch.randn(2, 3, 150, 8)
    real = torch.ones(2, 150, dtype=torch.bool)
    logits = queries @ keys.repeat_interleave(2, 1).mT / 8**0.5
    future = torch.ones(count, 150, dtype=torch.bool).triu(151 - count)
    sums = logits.masked_fill(future, -torch.inf).logsumexp(-1)
    expected = greatest_attention(queries, keys, real, least_distance=distance, every=every)
    found = greatest_attention(queries, keys, real, least_distance=distance, every=every, log_sums=sums)
    torch.testing.assert_close(found, expected)
    assert bool((found == 0).any()) == (distance > 0 or every > 1)


def test_rows_of_padding_alone_are_nothing() -> None:
    real = torch.tensor([[False] * 4, [True] * 4])
    found = greatest_attention(torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8), real)
    assert (found[0] == 0).all()
    assert (found[1] > 0).all()


def test_a_policy_that_requires_queries_has_them_in_the_one_line() -> None:
    model = tiny_llama()
    cache = balanced(model, policy=WindowAttentionPolicy())
    generate(model, prompt(60), cache)
    assert cache.layers[0].state.kept < cache.get_seq_length()


def test_where_attention_is_not_seen_all_tokens_are_kept() -> None:
    """Whatever the policy, and a warning says what to call."""
    cache = balanced(tiny_llama(), policy=WindowAttentionPolicy())
    keys, values = random_states((1, 2, 60, 16), 0)
    cache.update(keys, values, 0)
    with pytest.warns(UserWarning, match=r"layer 0 was not seen.*nexusquant_cache\.attention\.enable\(model\)"):
        cache.update(keys[:, :, :1], values[:, :, :1], 0)
    assert cache.layers[0].state.body is not None
    assert cache.layers[0].state.kept == cache.get_seq_length() == 61
