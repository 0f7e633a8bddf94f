"""What a cache fits to a prompt: handed on to others, moved with the batch, given more bits where they are needed."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from feeding import feed
from integration.tiny import ROUNDING, SMALL, fingerprint, generate, kept_positions, logits, prompt, tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from nexusquant_cache import LayerTransforms, NexusQuantCache, OptionError
from nexusquant_cache.codec.rotation import HadamardRotation, PrincipalRotation
from nexusquant_cache.policy import KeyNormPolicy

HEADS, HEAD_DIM, LAYERS = 2, 16, 4
FREE: dict[str, Any] = SMALL | {"most_code_error": 1e9}  # bits stay what they are


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(num_hidden_layers=LAYERS)


def states(tokens: int, batch: int = 1, seed: int = 0, head_dim: int = HEAD_DIM) -> tuple[Tensor, Tensor]:
    """Draw keys and values with a few large channels, that begin with the same token in every row."""
    generator = torch.Generator().manual_seed(seed)
    slope = 4.0 ** -torch.linspace(0, 2, head_dim)
    keys, values = torch.randn(2, batch, HEADS, tokens, head_dim, generator=generator).mul(slope).unbind()
    if tokens > 1:
        keys[1:, :, 0], values[1:, :, 0] = keys[0, :, 0], values[0, :, 0]
    return keys, values


def filled(cache: NexusQuantCache, keys: Tensor, values: Tensor, layers: int = 1) -> NexusQuantCache:
    for layer_idx in range(layers):
        feed(cache, keys, values, layer_idx)
    cache.compress()
    return cache


def principal(**options: Any) -> NexusQuantCache:
    return NexusQuantCache("balanced", **(FREE | {"transform": "principal"} | options))


class TestHandedOn:
    def test_are_none_before_anything_is_coded(self, model: LlamaForCausalLM) -> None:
        cache = principal(config=model.config)
        assert cache.transforms == (None,) * LAYERS
        logits(model, prompt(10), cache)
        cache.compress()
        assert cache.transforms == (None,) * LAYERS

    @pytest.mark.parametrize("transform", ["principal", "hadamard", "auto"])
    def test_on_the_same_prompt_nothing_changes(self, model: LlamaForCausalLM, transform: str) -> None:
        first, second = (principal(config=model.config, transform=transform) for _ in range(2))
        tokens = generate(model, prompt(100), first, 12)
        assert all(isinstance(each, LayerTransforms) for each in first.transforms)
        second = principal(config=model.config, transform=transform, transforms=first.transforms)
        assert torch.equal(generate(model, prompt(100), second, 12), tokens)
        assert fingerprint(second) == fingerprint(first)
        for mine, given in zip(second.transforms, first.transforms, strict=True):
            assert mine.codecs == given.codecs
            assert torch.equal(mine.keys.reference, given.keys.reference)

    def test_on_another_prompt_they_stay_the_same(self) -> None:
        first = filled(principal(), *states(100))
        second = filled(principal(transforms=first.transforms), *states(80, seed=1))
        own = filled(principal(), *states(80, seed=1))
        for side in ("keys", "values"):
            given, used, fitted = (getattr(cache.transforms[0], side) for cache in (first, second, own))
            assert isinstance(used.rotation, PrincipalRotation)
            assert torch.equal(used.rotation.basis, given.rotation.basis)
            assert not torch.equal(used.rotation.basis, fitted.rotation.basis)
        assert second.layers[0].state.kept == own.layers[0].state.kept

    def test_they_take_no_memory_of_their_own(self) -> None:
        """The axes of one prompt serve all: the storage is the same."""
        first = filled(principal(), *states(100))
        second = filled(principal(transforms=first.transforms), *states(100, seed=1))
        shared = [
            cache.layers[0].state.body.keys.transform.rotation.basis.untyped_storage() for cache in (first, second)
        ]
        assert shared[0].data_ptr() == shared[1].data_ptr()

    def test_a_short_prompt_has_the_axes_of_a_long_one(self) -> None:
        long = filled(NexusQuantCache("quant", **FREE), *states(600))
        short = filled(NexusQuantCache("quant", **FREE), *states(60, seed=1))
        helped = filled(NexusQuantCache("quant", transforms=long.transforms, **FREE), *states(60, seed=1))
        kinds = [type(cache.transforms[0].keys.rotation) for cache in (long, short, helped)]
        assert kinds == [PrincipalRotation, HadamardRotation, PrincipalRotation]
        sizes = [cache.memory_report().layers[0].code_bytes for cache in (short, helped)]
        assert sizes[1] < sizes[0]

    def test_one_row_serves_a_batch(self) -> None:
        keys, values = states(100, batch=3)
        first = filled(principal(), keys[1:2], values[1:2])
        batch = filled(principal(transforms=first.transforms), keys, values)
        assert torch.equal(batch.layers[0].keys[1], first.layers[0].keys[0])
        assert batch.transforms[0].keys.reference.shape[0] == 3
        batch.reorder_cache(torch.tensor([1, 0, 2]))
        torch.testing.assert_close(batch.layers[0].keys[:1], first.layers[0].keys, rtol=1e-5, atol=1e-5)

    def test_raised_bits_are_handed_on(self) -> None:
        """They belong to what was fitted; the settings are the same."""
        options = SMALL | {"key_bits": 1, "value_bits": 1, "most_code_error": 0.3}
        first = filled(NexusQuantCache("quant", **options), *states(100))
        assert first.transforms[0].codecs != first.transforms[0].asked
        second = filled(NexusQuantCache("quant", transforms=first.transforms, **options), *states(100))
        assert fingerprint(second) == fingerprint(first)

    def test_outlive_reset_and_copies(self) -> None:
        first = filled(principal(), *states(100))
        second = filled(principal(transforms=first.transforms), *states(100, seed=1))
        before = fingerprint(second)
        for other in (copy.deepcopy(second), pickle.loads(pickle.dumps(second)), second):  # noqa: S301 - our own
            other.reset()
            assert other.transforms == (None,)
            assert fingerprint(filled(other, *states(100, seed=1))) == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"key_bits": 3}, "layer 0 were fitted by E8Codec"),
            ({"transform": "hadamard"}, "layer 0 were fitted by E8Codec"),
            ({"center_keys": False}, "layer 0 were fitted by E8Codec"),
        ],
    )
    def test_refuses_those_of_other_settings(self, options: dict[str, Any], message: str) -> None:
        first = filled(principal(), *states(100))
        with pytest.raises(OptionError, match=message + ".* Use those of a cache of the same model, preset and config"):
            filled(principal(transforms=first.transforms, **options), *states(100))

    def test_refuses_those_of_another_model(self) -> None:
        first = filled(principal(), *states(100))
        keys, values = states(100, head_dim=24)
        with pytest.raises(OptionError, match=r"fitted by E8Codec\(layout=CodeLayout\(head_dim=16"):
            filled(principal(transforms=first.transforms), keys, values)
        keys, values = states(100)
        with pytest.raises(OptionError, match=r"are for 1 rows and 2 KV heads, this prompt has 1 and 1\. Use"):
            filled(principal(transforms=first.transforms), keys[:, :1], values[:, :1])

    def test_refuses_those_of_another_batch(self) -> None:
        first = filled(principal(), *states(100, batch=2))
        with pytest.raises(OptionError, match="are for 2 rows and 2 KV heads, this prompt has 3 and 2"):
            filled(principal(transforms=first.transforms), *states(100, batch=3))

    def test_refuses_those_of_keys_with_their_phase(self, model: LlamaForCausalLM) -> None:
        caches = [principal(), principal(config=model.config)]
        for cache in caches:
            logits(model, prompt(100), cache)
            cache.compress()
        for cache, other, word in ((caches[0], {"config": model.config}, "with"), (caches[1], {}, "without")):
            with pytest.raises(OptionError, match=f"are for keys {word} their rotary phase, unlike this cache's"):
                logits(model, prompt(100), principal(transforms=cache.transforms, **other))

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("given", [3, "max", [1], object()])
    def test_refuses_anything_else(self, given: object) -> None:
        with pytest.raises(OptionError, match=r"must be the transforms of another cache, cache\.transforms; got"):
            NexusQuantCache(transforms=given)

    def test_a_refusal_leaves_the_cache_as_it_was(self) -> None:
        first = filled(principal(), *states(100, batch=2))
        cache = principal(transforms=first.transforms)
        with pytest.raises(OptionError):
            feed(cache, *states(100, batch=3), 0)
        assert cache.get_seq_length() == 0
        filled(cache, *states(100, batch=2))
        assert fingerprint(cache) == fingerprint(first)


def loud(keys: Tensor) -> Tensor:
    """Return keys so large that attention looks at one token, which any error of the codes makes another one."""
    return 60 * keys


class TestBits:
    @pytest.mark.parametrize(("tokens", "more"), [(70, 0.5), (71, 0.0)])
    @pytest.mark.parametrize("transform", ["hadamard", "principal"])
    def test_there_are_more_where_a_text_begins_short(self, tokens: int, more: float, transform: str) -> None:
        """Ten tokens are protected; what comes later has the bits of the beginning."""
        short = FREE | {"min_kept": 60, "short_text_bits": 0.5, "keep_ratio": 0.5}
        cache = NexusQuantCache("quant", key_bits=1.5, value_bits=2, transform=transform, **short)
        feed(cache, *states(tokens), 0)
        for seed in (1, 2):
            cache.compress()
            bits = [codec.layout.bits_per_channel for codec in cache.layers[0].state.codecs]
            assert bits == [1.5 + more, 2 + more]
            feed(cache, *states(200, seed=seed), 0)

    def test_a_first_chunk_is_not_taken_for_a_short_text(self) -> None:
        """With ``during_prefill`` it waits until it has more tokens than a short text, or the text has ended."""
        short = FREE | {"min_kept": 60, "short_text_bits": 0.5, "keep_ratio": 0.5, "transform": "hadamard"}
        for chunks, more in (((40, 40, 40, 1), 0.0), ((40, 20, 1), 0.5)):
            cache = NexusQuantCache("quant", key_bits=1.5, value_bits=2, when="during_prefill", **short)
            for seed, tokens in enumerate(chunks):
                for layer_idx in (0, 1):
                    feed(cache, *states(tokens, seed=seed), layer_idx)
            for layer in cache.layers:
                assert [codec.layout.bits_per_channel for codec in layer.state.codecs] == [1.5 + more, 2 + more]

    def test_a_text_that_is_kept_for_another_reason_has_no_more(self) -> None:
        """Here none is shown to attention, so none is evicted."""
        short = FREE | {"min_kept": 60, "short_text_bits": 0.5, "keep_ratio": 0.5, "transform": "hadamard"}
        cache = NexusQuantCache("quant", key_bits=1.5, value_bits=2, **short)
        cache.update(*states(100), 0)
        with pytest.warns(UserWarning, match="evict"):
            cache.compress()
        assert [codec.layout.bits_per_channel for codec in cache.layers[0].state.codecs] == [1.5, 2]

    def test_are_raised_where_attention_would_suffer(self) -> None:
        """In the layers where the error is high, and up to where it is not; all keep equally many tokens."""
        bits: dict[str, Any] = {"key_bits": 1, "value_bits": 1, "policy": KeyNormPolicy()}
        cache = NexusQuantCache("balanced", **bits, **(SMALL | {"most_code_error": 0.5}))
        free = NexusQuantCache("balanced", **bits, **FREE)
        keys, values = states(200)
        for layer_idx, size in enumerate((1.0, 4.0, 0.0)):
            for each in (cache, free):
                feed(each, size * keys, values + 3 * (size == 0), layer_idx)
        for each in (cache, free):
            each.compress()
        errors = [[row.code_error for row in each.memory_report().layers] for each in (cache, free)]
        given = [[layer.state.codecs[0].layout.bits_per_channel for layer in each.layers] for each in (cache, free)]
        assert max(errors[0]) <= 0.5 < max(errors[1])
        for index in range(3):
            assert (given[0][index] > given[1][index]) == (errors[1][index] > 0.5)
        assert given[0][2] == given[1][2]
        assert len({layer.state.kept for layer in (*cache.layers, *free.layers)}) == 1
        sizes = [[row.code_bytes for row in each.memory_report().layers] for each in (cache, free)]
        assert sizes[0][2] == sizes[1][2]
        assert sizes[0][1] > sizes[1][1]

    def test_stay_raised_for_later_tokens(self) -> None:
        cache = NexusQuantCache("quant", key_bits=1, value_bits=1, **(SMALL | {"most_code_error": 0.3}))
        filled(cache, *states(200))
        width = cache.layers[0].state.body.keys.words.view().shape[-1]
        assert width > NexusQuantCache("quant", key_bits=1).make_codec("keys", HEAD_DIM, 0).bytes_per_vector
        keys, values = states(20, seed=1)
        for step in range(20):
            feed(cache, keys[:, :, step : step + 1], values[:, :, step : step + 1], 0)
        assert cache.layers[0].state.body.keys.words.view().shape[-1] == width
        assert cache.layers[0].state.body.positions.tokens > 200 - 10

    def test_begin_anew_when_nothing_is_left(self) -> None:
        """After a crop to nothing, and after a reset, bits and error are those of the next prompt alone."""
        options = SMALL | {"key_bits": 1, "value_bits": 1, "most_code_error": 0.3}
        fresh = filled(NexusQuantCache("quant", **(options | {"most_code_error": 1e9})), *states(200))
        for clear in (lambda cache: cache.crop(-200), lambda cache: cache.reset()):
            cache = filled(NexusQuantCache("quant", **options), *states(200))
            assert cache.layers[0].state.codecs[0] != fresh.layers[0].state.codecs[0]
            clear(cache)
            assert cache.layers[0].state.code_error is None
            assert cache.transforms == (None,)
            cache.shared.settings = fresh.cache_config
            filled(cache, *states(200))
            assert cache.layers[0].state.codecs[0] == fresh.layers[0].state.codecs[0]
            assert cache.layers[0].state.code_error == fresh.layers[0].state.code_error

    def test_a_warning_where_four_do_not_suffice(self) -> None:
        keys, values = states(200)
        cache = NexusQuantCache("balanced", **(SMALL | {"most_code_error": 1e-3}))

        def read() -> None:
            feed(cache, keys, values, 0)
            feed(cache, loud(keys), values, 1)
            cache.compress()

        with pytest.warns(
            UserWarning, match=r"layer \d by \d+ % .* most bits its codec has; 0 % are allowed"
        ) as caught:
            read()
        assert [str(each.message)[38:58] for each in caught] == ["output of layer 0 by", "output of layer 1 by"]
        for layer in cache.layers:
            assert layer.state.codecs[0].layout.block_bits == layer.state.codecs[1].layout.block_bits == (4, 4)
            assert layer.state.code_error > 1e-3

    def test_no_warning_without_need(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache = filled(NexusQuantCache("balanced", **SMALL), *states(200))
        assert 0 < cache.memory_report().layers[0].code_error <= 0.7

    def test_pads_are_not_looked_at(self) -> None:
        """Their codes may be as bad as they like: nothing attends to them."""
        keys, values = states(60, batch=2)
        mask = torch.ones(2, 60, dtype=torch.int64)
        mask[1, :30] = 0
        keys[1, :, :30] *= 1000
        values[1, :, :30] *= 1000
        cache, unchecked = (
            filled(NexusQuantCache("quant", attention_mask=mask, **options), keys, values) for options in (SMALL, FREE)
        )
        assert cache.layers[0].state.code_error < 0.7
        assert cache.layers[0].state.codecs == unchecked.layers[0].state.codecs


class TestReport:
    def test_says_how_far_outputs_moved(self) -> None:
        cache = NexusQuantCache("quant", **FREE)
        feed(cache, *states(200), 0)
        assert cache.memory_report().layers[0].code_error is None
        cache.compress()
        (row,) = cache.memory_report().layers
        assert row.code_error == cache.layers[0].state.code_error
        assert 0.01 < row.code_error < 0.7

    def test_more_bits_move_them_less(self) -> None:
        errors = [
            filled(NexusQuantCache("quant", key_bits=bits, value_bits=bits, **FREE), *states(300))
            .layers[0]
            .state.code_error
            for bits in (1, 2, 3, 4)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.4 * errors[0]

    def test_counts_the_axes(self) -> None:
        """16 axes of 16 bytes and a step of 4 for each head of keys and of values, besides the mean and the scales."""
        sizes = [
            filled(NexusQuantCache("quant", transform=t, **FREE), *states(100)).memory_report().layers[0].other_bytes
            for t in ("principal", "hadamard")
        ]
        assert sizes[0] - sizes[1] == 2 * HEADS * (16 * 16 + 16 * 4 + 1)  # and a byte for the plan


class TestPrincipalAxes:
    """All that happens to a cache, with axes of the prompt."""

    def test_rows_of_a_batch_are_independent(self, model: LlamaForCausalLM) -> None:
        ids = torch.cat([prompt(90, seed=seed) for seed in range(3)])
        together = generate(model, ids, principal(config=model.config), 16)
        for row in range(3):
            alone = generate(model, ids[row : row + 1], principal(config=model.config), 16)
            assert torch.equal(alone[0], together[row])

    def test_a_padded_row_is_that_row_alone(self, model: LlamaForCausalLM) -> None:
        """Fitted without its pads, at rotary positions of its own."""
        ids, mask = torch.cat([prompt(90, seed=seed) for seed in range(2)]), torch.ones(2, 90, dtype=torch.int64)
        ids[1, :20], mask[1, :20], ids[1, 20] = 0, 0, ids[1, 0]
        options = FREE | {"transform": "principal", "keep_ratio": 1.0}
        cache = NexusQuantCache("quant", config=model.config, attention_mask=mask, **options)
        together = generate(model, ids, cache, 12, attention_mask=mask)
        alone = NexusQuantCache("quant", config=model.config, **options)
        assert torch.equal(generate(model, ids[1:, 20:], alone, 12)[0], together[1, 20:])
        ours, theirs = (each.layers[0].state.body.keys.transform.rotation for each in (cache, alone))
        assert torch.equal(ours.basis[1], theirs.basis[0])

    def test_a_second_turn(self, model: LlamaForCausalLM) -> None:
        """Is encoded with the axes of the first, which nothing changes any more."""
        cache = principal(config=model.config, policy=KeyNormPolicy())  # by which heads keep equally many
        first = generate(model, prompt(80), cache, 6)
        basis = cache.layers[0].state.body.keys.transform.rotation.basis.clone()
        words = cache.layers[0].state.body.keys.words.view().clone()
        turn = torch.cat([first, prompt(60, seed=3)], 1)
        assert generate(model, turn, cache, 6).shape == (1, 152)
        assert torch.equal(cache.layers[0].state.body.keys.transform.rotation.basis, basis)
        assert torch.equal(cache.layers[0].state.body.keys.words.view()[:, :, : words.shape[2]], words)
        assert cache.layers[0].state.body.positions.tokens > words.shape[2]
        assert len({layer.state.kept for layer in cache.layers}) == 1

    def test_a_crop(self, model: LlamaForCausalLM) -> None:
        """Leaves the codes and axes that were there; the same tokens again give the same logits."""
        cache = principal(config=model.config, keep_ratio=1.0)
        logits(model, prompt(80), cache)
        expected = [logits(model, prompt(5, seed=seed), cache) for seed in (1, 2)]
        cache.crop(-5)
        assert (logits(model, prompt(5, seed=2), cache) - expected[1]).abs().max() < ROUNDING
        cache.crop(-40)
        assert cache.layers[0].state.kept == 50

    @pytest.mark.parametrize("beams", [2, 3])
    def test_beams(self, model: LlamaForCausalLM, beams: int) -> None:
        """Axes follow the rows: a row that is moved decodes as before."""
        cache = principal(config=model.config)
        out = generate(model, torch.cat([prompt(60, seed=seed) for seed in (0, 1)]), cache, 10, num_beams=beams)
        assert out.shape == (2, 70)
        layer = cache.layers[0]
        before = layer.keys.clone()
        order = torch.arange(2 * beams).flip(0)
        cache.reorder_cache(order)
        torch.testing.assert_close(layer.keys, before[order], rtol=1e-5, atol=1e-5)
        assert layer.state.body.keys.transform.rotation.basis.shape[0] == 2 * beams

    def test_copies(self) -> None:
        cache = filled(principal(), *states(100, batch=2))
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):  # noqa: S301 - our own
            assert fingerprint(other) == fingerprint(cache)
            assert torch.equal(other.layers[0].keys, cache.layers[0].keys)

    def test_heads_choose_their_own_tokens(self, model: LlamaForCausalLM) -> None:
        cache = principal(config=model.config)
        logits(model, prompt(100), cache)
        cache.compress()
        positions = [kept_positions(cache, layer_idx) for layer_idx in range(LAYERS)]
        assert len({each.shape for each in positions}) > 1  # and how many
        assert not torch.equal(positions[0][0, 0], positions[0][0, 1])
