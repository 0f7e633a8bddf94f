"""Attention that shows queries: the same outputs as without, and to the cache the queries of its own tokens."""

import copy
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from integration.families import FAMILIES, VISION_START, WITHOUT_INTERFACE, build, inputs
from integration.modes import MODES, PROMPT, assistant_of, pad_left
from integration.tiny import (
    SMALL,
    TINY,
    LosslessCache,
    balanced,
    fingerprint,
    generate,
    kept_mask,
    logits,
    lossless_cache,
    prompt,
    tiny_llama,
)
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from grids import combined
from nexusquant_cache import (
    Combined,
    EvictionPolicy,
    ExpectedAttentionPolicy,
    IfReadAgain,
    KeyDiffPolicy,
    KeyNormPolicy,
    LeveragePolicy,
    NexusQuantCache,
    ReconstructionPolicy,
    ScoreInputs,
    SharedOverHeads,
    ValueAware,
    WindowAttentionPolicy,
    attention,
    compressed_generation,
)
from nexusquant_cache.cache.cache import _NOT_READ_AGAIN
from nexusquant_cache.errors import CacheStateError, OptionError, ShapeError, UnsupportedError
from nexusquant_cache.layer.parts import compressed
from nexusquant_cache.releases import CACHE

SERVED = [
    (name, implementation)
    for name, family in FAMILIES.items()
    if name not in WITHOUT_INTERFACE
    for implementation in family.attentions
]
families = pytest.mark.parametrize(("name", "implementation"), SERVED, ids="-".join)


@pytest.fixture
def enabled(model: LlamaForCausalLM) -> Any:
    attention.enable(model)
    yield model
    attention.disable(model)


@dataclass(frozen=True)
class Witness(EvictionPolicy):
    """Keeps what it is shown, and the latest tokens."""

    shown: list[ScoreInputs] = field(default_factory=list)

    @property
    def requires_queries(self) -> bool:
        return True

    def score(self, inputs: ScoreInputs) -> Tensor:
        self.shown.append(inputs)
        return inputs.positions.float().expand(inputs.keys.shape[:3])

    def __deepcopy__(self, memo: Any) -> "Witness":
        return self


def all_queries(model: PreTrainedModel, ids: Tensor, **given: Any) -> Any:
    """Return the queries of a whole text, read at once."""
    with attention.record_queries(model, 4096) as recorded, torch.no_grad():
        model(ids, **given)
    return recorded


@families
def test_outputs_are_those_of_the_stock_implementation(name: str, implementation: str) -> None:
    """Bit for bit, over a prompt and generated tokens, in a padded batch too."""
    plain, shown = build(name, implementation), copy.deepcopy(build(name, implementation))
    attention.enable(shown)
    padded = pad_left(plain, (0, 7))
    padded = {key: padded[key].clamp(max=VISION_START - 1) for key in ("input_ids", "attention_mask")}  # no image
    for given in (inputs(plain, PROMPT, 2), padded):
        results = [
            model.generate(**given, do_sample=False, max_new_tokens=5, output_logits=True, return_dict_in_generate=True)
            for model in (plain, shown)
        ]
        assert torch.equal(results[0].sequences, results[1].sequences)
        assert all(torch.equal(a, b) for a, b in zip(results[0].logits, results[1].logits, strict=True))


@families
def test_the_cache_gets_the_same_keys_and_values(name: str, implementation: str) -> None:
    plain, shown = build(name, implementation), copy.deepcopy(build(name, implementation))
    attention.enable(shown)
    policy = ExpectedAttentionPolicy()
    caches = [balanced(model, keep_ratio=1.0, policy=policy) for model in (plain, shown)]
    tokens = [
        model.generate(**inputs(model, PROMPT, 2), **{CACHE: cache}, do_sample=False, max_new_tokens=8)
        for model, cache in zip((plain, shown), caches, strict=True)
    ]
    assert torch.equal(*tokens)
    # Those of generated tokens depend on how attention was rounded: read from codes, or decoded.
    for a, b in zip(*caches, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["beams", "prompt_lookup", "assisted", "chunked", "two_turns", "taken_back", "padded"])
def test_modes_of_generation(mode: str) -> None:
    """The tokens of every mode are those without: the keys decide, and queries are only looked at."""
    plain, shown = build("llama"), copy.deepcopy(build("llama"))
    attention.enable(shown)
    attention.enable(assistant_of(shown))
    policy = Witness()

    def make(model: PreTrainedModel, policy: EvictionPolicy) -> Any:
        return lambda mask=None: balanced(model, policy=policy, attention_mask=mask)

    expected = MODES[mode](plain, make(plain, Latest()))
    assert torch.equal(MODES[mode](shown, make(shown, policy)), expected)
    assert policy.shown


class Latest(EvictionPolicy):
    """Keeps the latest tokens, without a look at queries."""

    def score(self, inputs: ScoreInputs) -> Tensor:
        return inputs.positions.float().expand(inputs.keys.shape[:3])


def test_queries_are_those_of_the_model_by_hand(enabled: LlamaForCausalLM) -> None:
    """From the hidden states, by the model's own projection and rotary embedding."""
    seen: dict[int, tuple[Tensor, Any]] = {}

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        del args
        seen[module.layer_idx] = (kwargs["hidden_states"], kwargs["position_embeddings"])

    handles = [layer.self_attn.register_forward_pre_hook(see, with_kwargs=True) for layer in enabled.model.layers]
    policy, ids = Witness(), prompt(90, batch=2)
    cache = lossless_cache(enabled.config, keep_ratio=0.5, policy=policy)
    logits(enabled, ids, cache)
    for handle in handles:
        handle.remove()
    cache.compress()
    assert len(policy.shown) == len(enabled.model.layers)
    for index, inputs_ in enumerate(policy.shown):
        hidden, (cos, sin) = seen[index]
        attend = enabled.model.layers[index].self_attn
        queries = attend.q_proj(hidden).view(2, 90, 4, 16).transpose(1, 2)
        queries, _ = apply_rotary_pos_emb(queries, queries, cos, sin)
        assert inputs_.queries is not None
        assert torch.equal(inputs_.queries, queries[:, :, -64:])
        torch.testing.assert_close(
            inputs_.unrotated_keys.transpose(1, 2).flatten(2), attend.k_proj(hidden), rtol=1e-4, atol=1e-4
        )


# All heads and tokens are attended to by a plain softmax: no window, no sink, no cap, no latent keys.
PLAIN = sorted(
    set(FAMILIES)
    - WITHOUT_INTERFACE
    - {"mistral", "gemma2", "gemma3", "gemma4", "gpt_oss", "deepseek_v2", "deepseek_v3"}
)


@pytest.mark.parametrize("name", PLAIN)
def test_products_with_the_keys_are_the_attention_of_the_model(name: str) -> None:
    """Whatever scaling the family has: softmax(q k / sqrt(d)) is what the model says of its attention."""
    model = copy.deepcopy(build(name, "eager"))
    given = inputs(model, 20)
    weights = model(**given, output_attentions=True).attentions
    cache = DynamicCache(config=model.config)
    recorded = all_queries(model, **{CACHE: cache}, ids=given.pop("input_ids"), **given)
    assert recorded
    heard = [weight for weight in weights if weight is not None and weight.ndim == 4]
    for (index, queries), weight in zip(sorted(recorded.items()), heard, strict=True):
        keys = cache.layers[index].keys.repeat_interleave(queries.shape[1] // cache.layers[index].keys.shape[1], 1)
        scores = queries @ keys.mT * queries.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["post_prefill", "during_prefill"])
@pytest.mark.parametrize("chunk", [None, 64, 25, 7])
def test_the_window_grows_over_chunks(enabled: LlamaForCausalLM, chunk: int | None, when: Any) -> None:
    """However the prompt is cut, the policy sees the queries of the last tokens that it decides about."""
    ids, policy = prompt(100), Witness()
    expected = all_queries(enabled, ids)
    generate(enabled, ids, balanced(enabled, policy=policy, when=when), 2, prefill_chunk_size=chunk)
    assert policy.shown
    for shown in policy.shown:
        assert shown.queries is not None
        if when == "post_prefill" or chunk is None:
            assert shown.queries.shape[2] == 64
            torch.testing.assert_close(shown.queries, expected[shown.layer_idx][:, :, -64:], rtol=1e-3, atol=1e-4)
        elif shown.layer_idx == 0:  # deeper layers have attended to codes
            last = int(shown.positions[-1]) + 1
            count = shown.queries.shape[2]
            torch.testing.assert_close(shown.queries, expected[0][:, :, last - count : last], rtol=1e-3, atol=1e-4)


def test_a_second_turn_shows_its_own_queries(enabled: LlamaForCausalLM) -> None:
    policy = Witness()
    cache = balanced(enabled, policy=policy)
    text = generate(enabled, prompt(60), cache, 4)
    policy.shown.clear()
    text = torch.cat([text, prompt(40, seed=1)], -1)
    generate(enabled, text, cache, 2)
    # The last token of the answer is new to the cache as well.
    assert [shown.queries.shape[2] for shown in policy.shown if shown.queries is not None] == [41, 41]
    assert [shown.positions[-1] for shown in policy.shown] == [text.shape[1] - 1] * 2


def test_rows_see_their_own_queries_after_beams_are_reordered(sdpa: LlamaForCausalLM) -> None:
    attention.enable(sdpa)
    ids, policy = prompt(60, batch=3), Witness()
    cache = balanced(sdpa, policy=policy)
    logits(sdpa, ids, cache)
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    cache.compress()
    expected = all_queries(sdpa, ids)
    for shown in policy.shown:
        torch.testing.assert_close(shown.queries, expected[shown.layer_idx][rows])
    attention.disable(sdpa)


def test_padded_rows_see_what_they_would_see_alone(enabled: LlamaForCausalLM) -> None:
    pads, ids = [0, 30], prompt(80, batch=2)
    ids[1, :31] = torch.tensor([0] * 30 + [TINY["bos_token_id"]])
    mask = (torch.arange(80) >= torch.tensor(pads)[:, None]).long()
    policy = Witness()
    cache = balanced(enabled, policy=policy, attention_mask=mask)
    generate(enabled, ids, cache, 2, attention_mask=mask)
    alone = all_queries(enabled, ids[1:, 30:])
    assert [shown.queries.shape for shown in policy.shown if shown.queries is not None] == [
        (1, 4, 64, 16),
        (1, 4, 50, 16),
    ] * 2
    for shown in policy.shown[1::2]:
        torch.testing.assert_close(shown.queries, alone[shown.layer_idx], rtol=1e-3, atol=1e-4)
        assert shown.positions.tolist() == list(range(50))


def test_models_and_caches_in_threads_do_not_mix() -> None:
    model = tiny_llama()
    attention.enable(model)
    prompts = [prompt(60 + 5 * seed, seed=seed) for seed in range(4)]
    policies = [Witness() for _ in prompts]

    def run(ids: Tensor, policy: Witness) -> None:
        generate(model, ids, balanced(model, policy=policy), 3)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(prompts, policies, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ids, policy in zip(prompts, policies, strict=True):
        expected = all_queries(model, ids)
        assert len(policy.shown) == 2
        for shown in policy.shown:
            count = shown.queries.shape[2]  # type: ignore[union-attr]
            torch.testing.assert_close(shown.queries, expected[shown.layer_idx][:, :, -count:], rtol=1e-3, atol=1e-4)


def test_assisted_decoding_with_two_compressed_caches() -> None:
    """The assistant has a cache of its own; each policy is shown the queries of its own model."""
    model = tiny_llama()
    assistant = copy.deepcopy(assistant_of(model))
    policies = [Witness(), Witness()]
    for each in (model, assistant):
        attention.enable(each)
    caches = [balanced(each, policy=policy) for each, policy in zip((model, assistant), policies, strict=True)]
    assistant.generation_config.use_cache = True
    ids = prompt(60)
    generate(model, ids, caches[0], 8, assistant_model=assistant)
    expected = all_queries(model, ids)
    for shown in policies[0].shown[:2]:
        count, last = shown.queries.shape[2], int(shown.positions[-1]) + 1  # type: ignore[union-attr]
        assert last >= 60
        own = count - (last - 60)
        torch.testing.assert_close(
            shown.queries[:, :, :own], expected[shown.layer_idx][:, :, 60 - own :], rtol=1e-3, atol=1e-4
        )


def test_a_model_that_is_compiled_shows_its_queries() -> None:
    model = tiny_llama()
    attention.enable(model)
    policy, plain = Witness(), Witness()
    ids = prompt(60)
    expected = generate(model, ids, balanced(model, policy=plain), 6)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(generate(model, ids, balanced(model, policy=policy), 6), expected)
    assert len(policy.shown) == len(plain.shown) == 2
    for compiled, eager in zip(policy.shown, plain.shown, strict=True):
        torch.testing.assert_close(compiled.queries, eager.queries)
    torch._dynamo.reset()


def test_queries_that_are_cut_stay_causal() -> None:
    """Gemma 4 computes the last queries only in some layers, which needs a mask that sdpa would do without."""
    plain, shown = build("gemma4", "sdpa"), copy.deepcopy(build("gemma4", "sdpa"))
    attention.enable(shown)
    ids = inputs(plain, 10)["input_ids"]  # shorter than the window
    results = [model(ids, use_cache=True, logits_to_keep=4).logits for model in (plain, shown)]
    torch.testing.assert_close(*results)


def test_training_is_not_affected() -> None:
    plain, shown = (tiny_llama(attention_dropout=0.3).train().requires_grad_() for _ in range(2))
    attention.enable(shown)
    gradients = []
    for model in (plain, shown):
        torch.manual_seed(5)
        ids = prompt(20)
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


CHOICES: list[EvictionPolicy] = [
    WindowAttentionPolicy(),
    ExpectedAttentionPolicy(),
    LeveragePolicy(),
    KeyDiffPolicy(),
    ValueAware(WindowAttentionPolicy(pool=1), pool=21),
    SharedOverHeads(WindowAttentionPolicy()),
    Combined([ExpectedAttentionPolicy(), KeyNormPolicy()]),
]


@combined(policy=CHOICES, mode=["two_turns", "padded", "chunked", "prompt_lookup"])
def test_policies_serve_whole_conversations(policy: EvictionPolicy, mode: str) -> None:
    """The same tokens each time; tokens are evicted, and no query is left."""
    model = copy.deepcopy(build("llama"))
    attention.enable(model)
    caches = []

    def make(mask: Tensor | None = None) -> NexusQuantCache:
        caches.append(balanced(model, policy=policy, attention_mask=mask))
        return caches[-1]

    first, second = MODES[mode](model, make), MODES[mode](model, make)
    assert torch.equal(first, second)
    assert all(layer.state.kept < layer.state.seen for cache in caches for layer in cache.layers)
    assert all(layer.state.observed.queries is None for cache in caches for layer in cache.layers)


def test_without_passing_a_cache() -> None:
    """`compressed_generation` and `enable` are independent of each other."""
    model = tiny_llama()
    attention.enable(model)
    expected = generate(model, prompt(60), balanced(model, policy=WindowAttentionPolicy()), 6)
    with compressed_generation(model, policy=WindowAttentionPolicy(), **SMALL) as compressed:
        found = model.generate(prompt(60), do_sample=False, max_new_tokens=6)
    assert torch.equal(found, expected)
    assert compressed.cache.layers[0].state.kept < compressed.cache.layers[0].state.seen


class TestReconstruct:
    def read(self, model: PreTrainedModel, ids: Tensor, **options: Any) -> NexusQuantCache:
        cache = LosslessCache("balanced", config=model.config, policy=ReconstructionPolicy(), **(SMALL | options))
        logits(model, ids, cache)
        return cache

    @pytest.mark.parametrize("repeat", [None, torch.tensor([7, 8, 9])])
    @pytest.mark.parametrize("chunk", [1000, 20, 1])
    def test_is_the_greatest_attention_of_a_second_reading(
        self, model: LlamaForCausalLM, chunk: int, repeat: Tensor | None
    ) -> None:
        """Chunk by chunk with an uncompressed cache, from the weights that the model itself tells."""
        ids = prompt(50, batch=2)
        cache = self.read(model, ids)
        attention.reconstruct(model, cache, ids, chunk=chunk, repeat_prompt_ids=repeat)
        telling = tiny_llama("eager")
        expected = torch.zeros(2, 2, 2, 50)
        for part in ids.split(chunk, 1):
            again = part if repeat is None else torch.cat([repeat.expand(2, -1), part], 1)
            weights = telling(torch.cat([ids, again], 1), output_attentions=True).attentions
            best = torch.stack(weights)[..., 50:, :50].amax(3).unflatten(2, (2, 2)).amax(3)
            expected = torch.maximum(expected, best)
        for layer, scores in zip(cache.layers, expected, strict=True):
            torch.testing.assert_close(layer.state.observed.reconstruction, scores, rtol=1e-3, atol=1e-5)

    def test_a_cache_reads_again_by_itself(self, model: LlamaForCausalLM) -> None:
        """With the default policy, and progress; where nothing is evicted there is nothing to read."""
        ids, told = prompt(50), []
        cache, other, whole = balanced(model), balanced(model), NexusQuantCache("quant", config=model.config)
        for each in (cache, other, whole):
            logits(model, ids, each)
            each.read_again(model, ids, chunk=20, progress=lambda done, total: told.append((done, total)))
            attention.reconstruct(model, other, ids, chunk=20) if each is other else None
        assert told == [(20, 50), (40, 50), (50, 50)] * 2
        assert whole.layers[0].state.observed.reconstruction is None
        for each in (cache, other):
            each.compress()
        assert fingerprint(cache) == fingerprint(other)
        once = balanced(model)
        logits(model, ids, once)
        once.compress()
        assert fingerprint(once) != fingerprint(cache)
        with pytest.raises(CacheStateError, match="compressed already"):
            once.read_again(model, ids)

    def test_not_for_a_policy_that_does_not_look_at_it(self, caplog: pytest.LogCaptureFixture) -> None:
        """Such as the default beside windows, where it did harm; others still get one there."""
        model = build("gemma3", "sdpa")
        ids = inputs(model, PROMPT, 2)["input_ids"]
        caches = [
            balanced(model),
            balanced(model, policy=IfReadAgain(ReconstructionPolicy(), otherwise=KeyNormPolicy())),
        ]
        for cache in caches:
            logits(model, ids, cache)
            cache.read_again(model, ids)
        found = [[x.layer.state.observed.reconstruction for x in compressed(cache.parts())] for cache in caches]
        assert [[x is None for x in each] for each in found] == [[True] * len(found[0]), [False] * len(found[0])]
        assert len(found[0]) > 0
        assert [record.message for record in caplog.records if "read again" in record.message] == [_NOT_READ_AGAIN]

    @pytest.mark.parametrize(
        "name", ["llama", "gemma3", "gemma4", "gpt_oss", "qwen3_next", "falcon_h1", "lfm2", "gpt2"]
    )
    def test_leaves_the_cache_as_it_was(self, name: str) -> None:
        """Windows and recurrent states too; what follows is the same, bit for bit."""
        model = build(name, FAMILIES[name].attentions[-1])
        ids = inputs(model, PROMPT, 2)["input_ids"]
        cache = self.read(model, ids, keep_ratio=1.0)
        untouched = copy.deepcopy(cache)
        attention.reconstruct(model, cache, ids, chunk=20)
        for layer, before in zip(cache.layers, untouched.layers, strict=True):
            now, then = (vars(each) | vars(getattr(each, "state", each)) for each in (layer, before))
            assert now.keys() == then.keys()
            assert all(torch.equal(now[key], then[key]) for key in now if isinstance(now[key], Tensor))
            plain = [key for key, value in now.items() if isinstance(value, (int, bool, type(None)))]
            assert [now[key] for key in plain] == [then[key] for key in plain]
        assert cache.get_seq_length() == untouched.get_seq_length()
        nexts = [logits(model, torch.tensor([[5], [6]]), each) for each in (cache, untouched)]
        assert torch.equal(*nexts)
        assert model.config.get_text_config()._attn_implementation == FAMILIES[name].attentions[-1]

    def test_the_law_of_the_tiny_model(self, model: LlamaForCausalLM) -> None:
        ids = prompt(60)
        cache = self.read(model, ids)
        before = fingerprint(cache)
        attention.reconstruct(model, cache, ids)
        assert fingerprint(cache) == before

    def test_later_tokens_count_as_fully_attended(self, model: LlamaForCausalLM) -> None:
        """A question may come after the second reading; tokens of the context make room, not those of the question."""
        ids, question = prompt(60), prompt(30, seed=1)
        cache = self.read(model, ids)
        attention.reconstruct(model, cache, ids)
        scores = [layer.state.observed.reconstruction for layer in cache.layers]
        generate(model, torch.cat([ids, question], 1), cache, 2)
        for index, score in enumerate(scores):
            kept = kept_mask(cache, index)[0]
            for head in (0, 1):
                assert kept[head, 60:90].all()
                best = 2 + score[0, head, 2:].argsort(descending=True, stable=True)
                found = set((2 + kept[head, 2:60].nonzero()[:, 0]).tolist())
                assert 0 < len(found) < 58
                assert found == set(best[: len(found)].tolist())
            assert cache.layers[index].state.observed.reconstruction is None

    def test_padded_rows_are_read_as_if_alone(self, model: LlamaForCausalLM) -> None:
        given = pad_left(model, (0, 11))
        ids, mask = given["input_ids"], given["attention_mask"]
        options = SMALL | {"policy": ReconstructionPolicy()}
        cache = LosslessCache("balanced", config=model.config, attention_mask=mask, **options)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits(model, ids, cache, attention_mask=mask, position_ids=positions)
        attention.reconstruct(model, cache, ids, chunk=15)
        alone = self.read(model, ids[1:, 11:])
        attention.reconstruct(model, alone, ids[1:, 11:], chunk=37)
        for both, one in zip(cache.layers, alone.layers, strict=True):
            found = both.state.observed.reconstruction[1:]
            assert (found[..., :11] == 0).all()
            # Their chunks begin elsewhere, so a token is read behind another part of its own chunk.
            assert found.shape[2] == one.state.observed.reconstruction.shape[2] + 11
        rows = LosslessCache("balanced", config=model.config, attention_mask=mask, **options)
        logits(model, ids, rows, attention_mask=mask, position_ids=positions)
        attention.reconstruct(model, rows, ids, chunk=1000)
        for both, one in zip(rows.layers, alone.layers, strict=True):
            torch.testing.assert_close(
                both.state.observed.reconstruction[1:, :, 11:], one.state.observed.reconstruction, rtol=1e-3, atol=1e-5
            )

    def test_is_counted_until_the_compression(self, sdpa: LlamaForCausalLM) -> None:
        ids = prompt(60)
        cache = self.read(sdpa, ids)
        before = cache.memory_report()
        attention.reconstruct(sdpa, cache, ids)
        assert cache.memory_report().held_bytes - before.held_bytes == 2 * 2 * 60 * 4
        attention.reconstruct(sdpa, cache, ids)  # once more changes nothing
        assert cache.memory_report().held_bytes - before.held_bytes == 2 * 2 * 60 * 4

    def test_a_wrapper_stands_for_its_model(self, sdpa: LlamaForCausalLM) -> None:
        """One that does not say what its forward takes, like those of PEFT."""

        class Wrapper(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, **given: Any) -> Any:
                return self.inner(**given)

        ids = prompt(60)
        caches = self.read(sdpa, ids), self.read(sdpa, ids)
        for model, cache in zip((sdpa, Wrapper(sdpa)), caches, strict=True):
            attention.reconstruct(model, cache, ids)
        pairs = zip(*(cache.layers for cache in caches), strict=True)
        assert all(torch.equal(a.state.observed.reconstruction, b.state.observed.reconstruction) for a, b in pairs)

    def test_queries_of_the_prompt_stay(self, enabled: LlamaForCausalLM) -> None:
        ids = prompt(60)
        cache = balanced(enabled, policy=WindowAttentionPolicy())
        logits(enabled, ids, cache)
        before = [layer.state.observed.queries for layer in cache.layers]
        attention.reconstruct(enabled, cache, ids)
        assert all(layer.state.observed.queries is queries for layer, queries in zip(cache.layers, before, strict=True))

    def test_nothing_to_do_where_all_layers_have_a_window(self) -> None:
        model = build("mistral")
        ids = inputs(model, PROMPT)["input_ids"]
        cache = self.read(model, ids)
        attention.reconstruct(model, cache, ids)

    def test_a_failing_model_leaves_everything_as_it_was(self, sdpa: LlamaForCausalLM) -> None:
        ids = prompt(60)
        cache = self.read(sdpa, ids)
        before = fingerprint(cache)
        with pytest.raises(IndexError):
            attention.reconstruct(sdpa, cache, torch.full_like(ids, TINY["vocab_size"]))
        assert fingerprint(cache) == before
        assert all(layer.state.observed.reconstruction is None for layer in cache.layers)
        assert sdpa.config._attn_implementation == "sdpa"

    def test_latent_keys_cannot_be_seen(self) -> None:
        model = build("deepseek_v3")
        ids = inputs(model, PROMPT)["input_ids"]
        with pytest.raises(UnsupportedError, match="changes keys between cache and attention"):
            attention.reconstruct(model, self.read(model, ids), ids)

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_what_it_cannot_read(self, sdpa: LlamaForCausalLM) -> None:
        ids = prompt(60)

        def refused(cache: Any, error: type[Exception], message: str, given: Tensor = ids, **options: Any) -> None:
            with pytest.raises(error, match=message):
                attention.reconstruct(sdpa, cache, given, **options)

        refused(DynamicCache(), OptionError, "cache must be a NexusQuantCache, got DynamicCache")
        refused(balanced(sdpa), CacheStateError, "no prompt waits")
        refused(self.read(sdpa, ids), OptionError, "chunk must be at least 1 token, got 0", chunk=0)
        refused(
            self.read(sdpa, ids),
            ShapeError,
            r"must be what the cache has seen, \[1, 60\], got shape \(1, 59\)",
            ids[:, 1:],
        )
        refused(self.read(sdpa, ids), ShapeError, r"got shape \(2, 60\)", prompt(60, batch=2))
        refused(self.read(sdpa, ids), OptionError, r"tensor of integers, \[batch, tokens\], got list", ids.tolist())
        refused(self.read(sdpa, ids), OptionError, r"got torch\.float32", ids.float())
        refused(self.read(sdpa, ids), OptionError, r"got torch\.bool", ids.bool())
        compressed = balanced(sdpa, policy=Latest())
        logits(sdpa, ids, compressed)
        compressed.compress()
        refused(compressed, CacheStateError, "compressed already")
        recording = balanced(sdpa)
        recording.activate_past_recording()
        logits(sdpa, ids, recording)
        refused(recording, CacheStateError, "records a past")
        short = balanced(sdpa)
        for part in (ids[:, :10], ids[:, 10:11]):
            logits(sdpa, part, short)
        refused(short, CacheStateError, "no prompt waits", ids[:, :11])

    @pytest.mark.parametrize(
        ("options", "layer"),
        [
            ({"num_hidden_layers": 3}, 2),
            ({"num_hidden_layers": 1}, 1),
            ({"num_attention_heads": 8, "num_key_value_heads": 4}, 0),
            ({"head_dim": 32}, 0),
        ],
    )
    def test_refuses_another_model(self, sdpa: LlamaForCausalLM, options: dict[str, int], layer: int) -> None:
        ids = prompt(60)
        cache = self.read(sdpa, ids)
        before = fingerprint(cache)
        with pytest.raises(OptionError, match=f"not the one that has read the prompt: layer {layer} of cache"):
            cache.read_again(tiny_llama(**options), ids)
        assert fingerprint(cache) == before
