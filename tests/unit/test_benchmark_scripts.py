"""The parts of the benchmark scripts that would spoil their numbers without a sound (`benchmarks/`)."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from integration.tiny import SMALL, logits, prompt, tiny_llama
from torch import Tensor
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig
from unit.evaluation_tiny import tiny

from nexusquant_cache import CacheConfig, NexusQuantCache
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.evaluation import EvaluationError, nexusquant_candidate
from nexusquant_cache.evaluation.caches import prefill
from nexusquant_cache.evaluation.quality import Continuation, run_plain
from nexusquant_cache.policy import DEFAULT_BESIDE_WINDOWS, DEFAULT_POLICY, ScoreInputs

UNCHECKED = 1e9


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def plain():
    ids = torch.randint(0, 256, (1, 317), generator=torch.Generator().manual_seed(1))
    return run_plain(tiny().model, Continuation.split("random", ids, 16))


class TestEviction:
    def test_the_rules_that_stand_for_the_default_policies_are_these(self, load):
        policies = [rule.policy for rule in load("eviction").RULES]
        assert policies[0] == DEFAULT_POLICY.otherwise
        assert DEFAULT_BESIDE_WINDOWS in policies[1:]

    def test_what_is_hidden_does_not_matter_and_all_else_does(self, load):
        eviction, model = load("eviction"), tiny_llama()
        read = prefill(model, prompt(200))
        layers = eviction.evicting_layers(model)
        inputs = eviction.scored_layers(model, read)
        kept = eviction.Rule(64, 21, shares=True).keep(inputs, 0.4)
        counts = [int(heads.sum()) for heads in kept.values()]
        free = 200 - eviction.SINKS - eviction.RECENT
        heads = len(kept[0])
        each = 200 - free + -(-free * 4 // 10)
        assert sum(counts) == len(layers) * heads * each
        assert all(bool(heads[:, :4].all() and heads[:, -24:].all()) for heads in kept.values())

        def answer(changed: bool, hides: bool) -> Tensor:
            cache = copy.deepcopy(read.cache)
            for index in layers if changed else ():
                cache.layers[index].values[0][~kept[index]] = 1e3
            with eviction.hidden(model, cache, kept if hides else {}):
                return torch.cat([logits(model, ids, cache) for ids in (prompt(1, seed=1), prompt(5, seed=2))], 1)

        assert torch.allclose(answer(changed=False, hides=True), answer(changed=True, hides=True))
        assert not torch.allclose(answer(changed=False, hides=True), answer(changed=False, hides=False), atol=1e-5)
        all_kept = eviction.Rule(64, 1, shares=False).keep(inputs, 1.0)
        assert all(bool(heads.all()) for heads in all_kept.values())

    def test_layers_with_a_window_are_left_alone(self, load):
        kinds = ["sliding_attention", "full_attention"]
        sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "head_dim": 16}
        model = Gemma3ForCausalLM(Gemma3TextConfig(num_hidden_layers=2, layer_types=kinds, **sizes))
        assert load("eviction").evicting_layers(model) == [1]


class TestBiasedKeys:
    def test_the_model_says_the_same(self, load):
        cases, model = load("hard_cases"), tiny_llama()
        exact, biased = DynamicCache(), cases.BiasedKeys(100.0)
        for ids in (prompt(40), prompt(1, seed=1), prompt(3, seed=2)):
            assert torch.allclose(logits(model, ids, biased), logits(model, ids, exact), atol=1e-3)

    def test_all_keys_of_a_layer_get_one_vector_in_the_slowest_pair(self, load):
        cases, model = load("hard_cases"), tiny_llama()
        exact, biased = DynamicCache(), cases.BiasedKeys(100.0)
        for ids in (prompt(40), prompt(1, seed=1)):
            logits(model, ids, exact)
            logits(model, ids, biased)
        added = biased.layers[0].keys - exact.layers[0].keys
        rms = exact.layers[0].keys[:, :, :40].square().mean().sqrt()
        expected = torch.zeros(16)
        expected[[7, 15]] = 100 * rms
        assert torch.allclose(added, expected.expand_as(added), rtol=1e-4, atol=1e-4)

    def test_our_cache_is_given_biased_keys_too(self, load):
        cases = load("hard_cases")
        config = tiny_llama().config
        cache = cases.BiasedNexusQuantCache(30.0, CacheConfig(key_bits=3), config=config)
        keys, values = torch.randn(2, 1, 2, 20, 16)
        held, _ = cache.update(keys, values, 0)
        assert cache.cache_config.key_bits == 3
        assert torch.allclose(held[..., 7] - keys[..., 7], 30 * keys.square().mean().sqrt(), rtol=1e-4)
        assert torch.equal(held[..., :7], keys[..., :7])


class TestHardCases:
    @pytest.mark.parametrize(("allowed", "layers", "count"), [(UNCHECKED, 0, 0), (1e-6, 2, 2)])
    def test_rows_tell_which_layers_got_more_bits_and_what_was_warned(self, load, plain, allowed, layers, count):
        settings = CacheConfig(keep_ratio=0.5, most_code_error=allowed, **SMALL)
        candidate = nexusquant_candidate("ours", settings, tiny().model.config)
        row = load("hard_cases").measure(tiny(), plain, candidate)
        assert row["layers_with_more_bits"] == layers
        assert len(row["warnings"]) == count
        assert row["code_error"] > 1e-6

    def test_a_prompt_that_is_not_coded_has_no_error(self, load, plain):
        candidate = nexusquant_candidate("ours", CacheConfig(min_tokens=1000), tiny().model.config)
        row = load("hard_cases").measure(tiny(), plain, candidate)
        assert (row["code_error"], row["layers_with_more_bits"], row["warnings"]) == (None, 0, [])

    def test_translations_that_are_not_installed_are_named(self, load, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        with pytest.raises(EvaluationError, match="pip install sphinx, or give --multilingual FILE"):
            load("_common").translated_messages()


def score_inputs(tokens=60, phase=None):
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 1, 2, tokens, 16, generator=generator)
    order = torch.arange(tokens)
    return ScoreInputs(keys, values, order + 5, (order < 4) | (order >= tokens - 8), 0, phase=phase)


class TestSharpening:
    @pytest.mark.parametrize("center", [True, False])
    def test_deviations_from_the_mean_grow(self, load, center):
        vectors = torch.randn(1, 2, 50, 16) + 3
        plain_codec = E8Codec(CodeLayout.flat(16, 2), center=center, transform="principal")
        codec = load("_codes").SharpenedCodec(**vars(plain_codec), sharpness=1.05)
        transform = codec.fit(vectors)
        packed = codec.encode(vectors, transform)
        decoded, mean = plain_codec.decode(packed, transform), transform.mean.float() if center else 0.0
        assert torch.allclose(codec.decode(packed, transform) - mean, 1.05 * (decoded - mean), atol=1e-5)

    def test_keys_alone_and_at_any_number_of_tokens(self, load):
        codes = load("_codes")
        for kind, sharpness in ((codes.SharpenedCache, 1.02), (codes.MoreSharpenedCache, 1.05)):
            cache = kind("balanced", config=tiny().model.config)
            codec = cache.make_codec("keys", 16, 0).for_tokens(torch.randn(1, 2, 100, 16), 100)
            assert codec.with_more_bits().sharpness == sharpness
            assert type(cache.make_codec("values", 16, 0)) is E8Codec


class TestTransforms:
    def test_axes_save_nothing_where_channels_are_alike_and_much_where_they_are_not(self, load):
        saved_bits = load("transforms").saved_bits
        vectors = torch.randn(1, 2, 3000, 32, generator=torch.Generator().manual_seed(0))
        steep = vectors * torch.logspace(0, -2, 32)
        alike, per_bit = saved_bits(vectors, 2, center=True)
        assert alike.abs().max() < 0.05
        assert per_bit.tolist() == [[pytest.approx(0.9, abs=0.1)] * 2]
        assert saved_bits(steep, 2, center=True)[0].min() > 0.5


class TestAtRest:
    def test_an_ideal_coder_counts_what_it_has_met(self, load):
        ideal = load("at_rest").ideal_bytes
        symbols, contexts = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 0, 2])
        # 1/2, then 3/4, then 1/6 of the first context; 1/2 of the other
        expected = -torch.tensor([1 / 2, 3 / 4, 1 / 6, 1 / 2]).log2().sum() / 8
        assert ideal(contexts, symbols, 2) == pytest.approx(float(expected), abs=1e-6)

    def test_random_words_cannot_be_shortened(self, load):
        layouts = [CodeLayout(16, (1, 2)), CodeLayout(16, (3, 0))]
        words = torch.randint(0, 256, (2, 4000, 3), dtype=torch.uint8)
        found = load("at_rest").words_ideal(words, layouts)
        assert len(found) == 7
        assert all(0.999 * words.numel() < nbytes < 1.3 * words.numel() for nbytes in found.values())

    def test_words_that_follow_from_the_token_before_are_short(self, load):
        words = torch.tensor([0b11100100, 0b00011011], dtype=torch.uint8).repeat(2000)[None, :, None].expand(1, -1, 2)
        found = load("at_rest").words_ideal(words, [CodeLayout(8, (2,))])
        assert found["fields, coset, previous token"] < 0.05 * words.numel() < 0.5 * found["fields"]

    def test_what_is_measured_is_in_the_file(self, load):
        cache = NexusQuantCache("balanced", config=tiny().model.config, **SMALL)
        logits(tiny().model, prompt(300), cache)
        cache.compress()
        script = load("at_rest")
        kinds, files = script.measure_packings(cache, [3]), script.measure_files(cache, [None, 3])
        packed = sum(row["packed_bytes"] for row in kinds)
        assert files[0]["file_bytes"] == files[0]["header_bytes"] + packed
        assert files[1]["file_bytes"] < files[0]["file_bytes"]
        assert all(row["ideal"] for row in kinds)
