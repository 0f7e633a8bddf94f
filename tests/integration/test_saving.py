"""Saved and loaded caches.

**The law.**  A loaded cache is the cache that was saved: it holds the same, counts the same, and whatever happens next,
happens to both bit for bit.
"""

import copy
import errno
import hashlib
import os
import re
import threading
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from feeding import feed
from files import file_bytes
from integration.families import FAMILIES, build, inputs
from integration.modes import PROMPT, ask
from integration.tiny import (
    SMALL,
    LosslessCache,
    LosslessCodec,
    balanced,
    fingerprint,
    generate,
    logits,
    lossless_cache,
    prompt,
    random_states,
    tiny_config,
    tiny_llama,
)
from transformers import DynamicCache

import nexusquant_cache
from nexusquant_cache import (
    DEFAULT_BESIDE_WINDOWS,
    DEFAULT_POLICY,
    CacheConfig,
    CacheStateError,
    FormatError,
    KeyNormPolicy,
    NexusQuantCache,
    NonFiniteError,
    OptionError,
    UnsupportedError,
    WindowAttentionPolicy,
    register_codec,
)
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.codec.transform import Rotation
from nexusquant_cache.files import (
    container,
    hash_tokens,
    inspect_file,
    packing,
    reader,
    verify_file,
    writer,
)
from nexusquant_cache.files.contents import FileTensor
from nexusquant_cache.files.state import Lists
from nexusquant_cache.layer.layer import NexusQuantLayer
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.policy.default import FORMER_DEFAULTS
from nexusquant_cache.releases import CACHE
from nexusquant_cache.store import store

register_codec(
    "tests.lossless", LosslessCodec, lambda codec: {"head_dim": codec.head_dim}, lambda x: LosslessCodec(**x)
)


def saved(cache: Any, path: Any, **options: Any) -> Any:
    """Save a cache and load it again."""
    cache.save(path / "cache.safetensors")
    return type(cache).load(path / "cache.safetensors", **options)


def assert_goes_on_alike(model: Any, one: Any, other: Any, steps: int = 14) -> None:
    """Feed a later turn and single tokens to both."""
    batch = one.layers[0].state.tail[0].shape[0]
    for step in range(steps):
        ids = prompt(3 if step == steps // 2 else 1, batch=batch, seed=step + 1)
        assert torch.equal(logits(model, ids, one), logits(model, ids, other)), step
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize("level", [None, 1, 19])
@pytest.mark.parametrize("tokens", [1, 20, 50, 300])
def test_a_loaded_cache_goes_on_bit_for_bit(sdpa, tokens, level, tmp_path):
    cache = balanced(sdpa)
    generate(sdpa, prompt(tokens), cache)
    cache.save(tmp_path / "a", level=level)
    loaded = NexusQuantCache.load(tmp_path / "a", config=sdpa.config)
    assert fingerprint(loaded) == fingerprint(cache)
    assert_goes_on_alike(sdpa, cache, loaded)


@pytest.mark.parametrize("preset", list(nexusquant_cache.PRESETS))
@pytest.mark.parametrize("transform", ["hadamard", "principal"])
def test_every_preset(sdpa, preset, transform, tmp_path):
    cache = NexusQuantCache(preset, config=sdpa.config, transform=transform, **SMALL)
    generate(sdpa, prompt(80, batch=2), cache)
    assert_goes_on_alike(sdpa, cache, saved(cache, tmp_path, config=sdpa.config))


def test_a_named_preset_keeps_its_name(sdpa, tmp_path):
    cache = NexusQuantCache("max", config=sdpa.config)
    logits(sdpa, prompt(30), cache)
    loaded = saved(cache, tmp_path, config=sdpa.config)
    assert (loaded.preset, loaded.cache_config, loaded.shared.when) == ("max", cache.cache_config, "during_prefill")


def test_which_implementation_computes_is_the_readers_choice(sdpa, tmp_path):
    """A file of a machine that insisted on its kernels serves one without."""
    cache = balanced(sdpa, impl="torch")
    generate(sdpa, prompt(60), cache)
    loaded = saved(cache, tmp_path, config=sdpa.config)
    assert loaded.cache_config == replace(cache.cache_config, impl="auto")
    assert loaded.layers[0].state.codecs[0].impl == "auto"


def test_an_empty_cache(sdpa, tmp_path):
    for cache, config in ((balanced(sdpa), sdpa.config), (NexusQuantCache("quant", **SMALL), None)):
        loaded = saved(cache, tmp_path, config=config)
        logits(sdpa, prompt(50), cache)
        logits(sdpa, prompt(50), loaded)
        assert_goes_on_alike(sdpa, cache, loaded)


def test_a_prompt_that_waits_for_its_compression(sdpa, tmp_path):
    cache = balanced(sdpa)
    logits(sdpa, prompt(60), cache)
    loaded = saved(cache, tmp_path, config=sdpa.config)
    assert loaded.layers[0].state.turn.is_pending
    assert_goes_on_alike(sdpa, cache, loaded)


def test_a_later_turn_that_waits(sdpa, tmp_path):
    cache = balanced(sdpa)
    generate(sdpa, prompt(60), cache)
    logits(sdpa, prompt(40, seed=5), cache)
    assert_goes_on_alike(sdpa, cache, saved(cache, tmp_path, config=sdpa.config))


def test_compressed_during_the_prefill(sdpa, tmp_path):
    cache = balanced(sdpa, when="during_prefill")
    for seed in range(3):
        logits(sdpa, prompt(30, seed=seed), cache)
    assert cache.layers[0].state.body is not None
    loaded = saved(cache, tmp_path, config=sdpa.config)
    assert loaded.shared.when == "during_prefill"
    assert_goes_on_alike(sdpa, cache, loaded)


def test_without_config(sdpa, tmp_path):
    cache = NexusQuantCache("balanced", **SMALL)
    generate(sdpa, prompt(60), cache)
    assert_goes_on_alike(sdpa, cache, saved(cache, tmp_path))


def test_a_compressed_cache_can_be_loaded_without_the_config_it_was_made_with(sdpa, tmp_path):
    cache = balanced(sdpa)
    generate(sdpa, prompt(60), cache)
    loaded = saved(cache, tmp_path)
    assert loaded.layers[0].state.phase is loaded.layers[1].state.phase is not None
    assert_goes_on_alike(sdpa, cache, loaded)


def test_a_config_is_asked_for_where_it_is_needed(sdpa, tmp_path):
    cache = balanced(sdpa)
    logits(sdpa, prompt(60), cache)
    with pytest.raises(OptionError, match=r"needs the model's config, config=model\.config"):
        saved(cache, tmp_path)


@pytest.mark.parametrize("where", ["waits", "is packed"])
def test_padding(sdpa, where, tmp_path):
    """Which tokens are padding is kept while a prompt waits, and where the rows begin, and what is hidden, after it."""
    ids = prompt(60, batch=2)
    mask = torch.ones_like(ids)
    ids[0, :9], mask[0, :9] = 0, 0
    cache = balanced(sdpa)
    logits(sdpa, ids, cache, attention_mask=mask)
    if where == "waits":
        assert cache.layers[0].state.pads.tolist() == (mask == 0).tolist()
    else:
        cache.compress()
        assert cache.layers[0].state.pads is None
        assert cache.layers[0].state.sink_positions.tolist() == [[9, 10], [0, 1]]
        assert cache.layers[0].state.body.positions.counts is not None
    loaded = saved(cache, tmp_path, config=sdpa.config)
    assert fingerprint(loaded) == fingerprint(cache)
    for step in range(9):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        both = [logits(sdpa, prompt(1, 2, seed=step), each, attention_mask=mask) for each in (cache, loaded)]
        assert torch.equal(*both)
    assert fingerprint(loaded) == fingerprint(cache)


def test_what_was_said_once_is_not_said_again(sdpa, tmp_path):
    cache = balanced(sdpa)
    states = random_states((1, 2, 60, 16), 0)

    def unseen(cache):
        for tokens in (slice(None), slice(1)):
            for layer in range(2):
                cache.update(*(x[:, :, tokens] for x in states), layer)

    with pytest.warns(UserWarning, match="the attention of layer 0 was not seen"):
        unseen(cache)
    loaded = saved(cache, tmp_path, config=sdpa.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (cache, loaded):
            unseen(each)
    assert fingerprint(loaded) == fingerprint(cache)


def test_queries_that_were_observed(sdpa, tmp_path):
    policy, states = WindowAttentionPolicy(), [random_states((1, 2, n, 16), n) for n in (50, 3, 1)]
    cache = balanced(sdpa, policy=policy)
    for seed, (keys, values) in enumerate(states[:2]):
        for layer in range(2):
            feed(cache, keys, values, layer)
            queries = torch.randn(1, 4, keys.shape[2], 16, generator=torch.Generator().manual_seed(seed))
            cache.observe_queries(queries, layer)
    for layer in range(2):
        part_of(cache.layers[layer], 0).observe_reconstruction(torch.rand(1, 2, 53))
    assert cache.layers[0].state.observed.before is not None
    loaded = saved(cache, tmp_path, config=sdpa.config, policy=policy)
    for count, layer in ((-3, 0), (-3, 1)):
        for each in (cache, loaded):
            each.layers[layer].crop(count)
    for layer in range(2):
        assert torch.equal(cache.layers[layer].state.observed.queries, loaded.layers[layer].state.observed.queries)
    for layer in range(2):
        for each in (cache, loaded):
            feed(each, *states[2], layer)
    assert cache.layers[0].state.body is not None
    assert fingerprint(loaded) == fingerprint(cache)


def test_recording(sdpa, tmp_path):
    cache = balanced(sdpa)
    cache.activate_past_recording()
    logits(sdpa, prompt(50), cache)
    loaded = saved(cache, tmp_path, config=sdpa.config)
    for each in (cache, loaded):
        each.crop(-2)
    assert cache.layers[0].state.body is not None
    assert_goes_on_alike(sdpa, cache, loaded)


@pytest.mark.parametrize("removed", [4, 30, 49])
def test_a_cropped_cache(sdpa, removed, tmp_path):
    cache = balanced(sdpa)
    generate(sdpa, prompt(50), cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache.crop(-removed)
        loaded = saved(cache, tmp_path, config=sdpa.config)
        assert_goes_on_alike(sdpa, cache, loaded)
        for each in (cache, loaded):
            each.crop(-20)
    assert_goes_on_alike(sdpa, cache, loaded)


def test_transforms_of_another_prompt(sdpa, tmp_path):
    first = balanced(sdpa, transform="principal")
    generate(sdpa, prompt(300), first)
    for tokens in (20, 60):
        cache = balanced(sdpa, transform="principal", transforms=first.transforms)
        logits(sdpa, prompt(tokens, batch=2, seed=4), cache)
        loaded = saved(cache, tmp_path, config=sdpa.config)
        for step in range(30):
            ids = prompt(1, batch=2, seed=step)
            assert torch.equal(logits(sdpa, ids, cache), logits(sdpa, ids, loaded))
        assert torch.equal(
            loaded.layers[0].state.body.keys.transform.rotation.basis[:1], first.transforms[0].keys.rotation.basis
        )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:the attention of layer 0 was not seen")  # in latent attention
@pytest.mark.parametrize("name", list(FAMILIES))
def test_families(name, tmp_path):
    """Sliding windows, linear attention, shared and latent layers: everything that a model keeps is in the file."""
    attention = FAMILIES[name].attentions[0]
    model = build(name, attention)
    keep = {"keep_ratio": 1.0} if name in {"falcon_alibi", "bloom"} else {}
    cache = NexusQuantCache("balanced", config=model.config, **(SMALL | keep))
    given = inputs(model, PROMPT, 2)
    begun = ask(model, given, cache)
    loaded = saved(cache, tmp_path, config=model.config)
    given["input_ids"] = torch.cat([begun, prompt(3, batch=2)], 1)
    given = {key: x for key, x in given.items() if key in {"input_ids", "attention_mask"}}
    with torch.no_grad():
        for step in range(6):
            new = prompt(1, batch=2, seed=step)
            at = torch.tensor([[cache.get_seq_length()]] * 2)
            outputs = [model(input_ids=new, **{CACHE: x}, use_cache=True, position_ids=at) for x in (cache, loaded)]
            assert torch.equal(outputs[0].logits, outputs[1].logits)


def test_rotary_phases_are_kept_apart(tmp_path):
    """Layers of one model may turn differently."""
    config = build("gemma3").config
    cache = NexusQuantCache("quant", config=config, **SMALL)
    phases = [RotaryPhase(torch.tensor([1.0, 0.5])), RotaryPhase(torch.tensor([1.0, 0.25]), interleaved=True)]
    lists = Lists()
    assert [lists.phase(phase) for phase in (*phases, phases[1], phases[0])] == [0, 1, 1, 0]
    cache.layers = [NexusQuantLayer(cache.shared, index) for index in range(2)]
    for layer, phase in zip(cache.layers, phases, strict=True):
        feed(layer, *random_states((1, 1, 50, 16), 0))
        layer.compress()
        layer.state.phase = phase
    cache.model_config = None
    loaded = saved(cache, tmp_path)
    assert [layer.state.phase.matches(phase) for layer, phase in zip(loaded.layers, phases, strict=True)] == [
        True,
        True,
    ]


def test_codecs_of_ones_own(tmp_path):
    model = tiny_llama()
    cache = lossless_cache(model.config)
    generate(model, prompt(50), cache)
    loaded = saved(cache, tmp_path, config=model.config)
    assert isinstance(loaded, LosslessCache)
    assert isinstance(loaded.layers[0].state.codecs[0], LosslessCodec)
    plain = DynamicCache(config=model.config)
    logits(model, generate(model, prompt(50), None)[:, :-1], plain)
    ids = prompt(1, seed=3)
    assert torch.allclose(logits(model, ids, loaded), logits(model, ids, plain), atol=1e-4)


class TestCannotBeSaved:
    def test_unknown_codecs(self, sdpa, tmp_path):
        class Odd(LosslessCodec):
            pass

        class OddCache(NexusQuantCache):
            def make_codec(self, side, head_dim, layer_idx):
                del side, layer_idx
                return Odd(head_dim)

        cache = OddCache("quant", config=sdpa.config, **SMALL)
        logits(sdpa, prompt(50), cache)
        with pytest.raises(UnsupportedError, match="cannot name the codec class Odd: register it first"):
            cache.save(tmp_path / "a")
        assert not list(tmp_path.iterdir())

    @pytest.mark.usefixtures("unchecked")
    def test_unknown_rotations(self, sdpa, tmp_path):
        class Turned(Rotation):
            rotate = unrotate = None

        cache = balanced(sdpa)
        generate(sdpa, prompt(50), cache)
        side = cache.layers[1].state.body.keys
        Turned.__abstractmethods__ = frozenset()
        side.transform = replace(side.transform, rotation=Turned())
        with pytest.raises(UnsupportedError, match="a rotation of the class Turned"):
            cache.save(tmp_path / "a")

    @pytest.mark.parametrize("wrong", [{"oddity": 1}, {"keys": torch.zeros(1, 1, 1, 1, dtype=torch.complex64)}])
    def test_unknown_layers(self, wrong, tmp_path):
        model = build("gemma3")
        cache = NexusQuantCache("quant", config=model.config)
        ask(model, inputs(model, PROMPT), cache)
        vars(cache.layers[0]).update(wrong)
        with pytest.raises(UnsupportedError, match=r"cannot hold layer 0: (nothing is known of oddity|its dtype)"):
            cache.save(tmp_path / "a")

    def test_numbers_that_are_none(self, sdpa, tmp_path):
        cache = balanced(sdpa)
        generate(sdpa, prompt(50), cache)
        cache.layers[1].state.tail[0][0, 0, 0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"layers\.1\.keys\.tail holds NaN"):
            cache.save(tmp_path / "a")

    def test_a_broken_cache(self, sdpa, tmp_path):
        cache = balanced(sdpa)
        cache._forward.is_broken = True
        with pytest.raises(CacheStateError, match="failed half-way and could not be undone"):
            cache.save(tmp_path / "a")

    @pytest.mark.usefixtures("unchecked")
    def test_wrong_options(self, sdpa, tmp_path):
        cache = balanced(sdpa)
        for options, message in (
            ({"level": 0}, "level must be a whole number from 1"),
            ({"level": "fast"}, "level must be a whole number from 1"),
            ({"metadata": {"a": 1}}, "metadata must be texts by name"),
            ({"token_ids": torch.zeros(3)}, "token_ids must be integers"),
            ({"token_ids": [[[1]]]}, "token_ids must be integers"),
            ({"threads": 0}, "threads must be a whole number from 1"),
            ({"threads": -1}, "threads must be a whole number from 1"),
            ({"threads": "x"}, "threads must be a whole number from 1"),
            ({"threads": True}, "threads must be a whole number from 1"),
            ({"threads": 1 << 20}, "threads must be a whole number from 1"),
        ):
            with pytest.raises(OptionError, match=message):
                cache.save(tmp_path / "a", **options)
        assert not list(tmp_path.iterdir())


class TestWhoseFile:
    def test_another_model(self, sdpa, tmp_path):
        cache = balanced(sdpa)
        generate(sdpa, prompt(50), cache)
        cache.save(tmp_path / "a")
        other = tiny_config(num_key_value_heads=4)
        with pytest.raises(FormatError, match=r"another model: num_key_value_heads 2 \(here 4\)"):
            NexusQuantCache.load(tmp_path / "a", config=other)
        with pytest.raises(FormatError, match=r"another model: .*rope_theta"):
            NexusQuantCache.load(tmp_path / "a", config=tiny_config(rope_theta=5000.0))

    def test_what_does_not_matter_to_keys_and_values_may_differ(self, sdpa, tmp_path):
        cache = balanced(sdpa)
        generate(sdpa, prompt(50), cache)
        other = copy.deepcopy(sdpa.config)
        other.dtype, other.use_cache, other.name_or_path = torch.bfloat16, False, "elsewhere"
        saved(cache, tmp_path, config=other)

    def test_no_model(self, sdpa, tmp_path):
        cache = NexusQuantCache("quant", **SMALL)
        logits(sdpa, prompt(50), cache)
        with pytest.raises(FormatError, match="saved without a config"):
            saved(cache, tmp_path, config=sdpa.config)

    def test_tokens(self, sdpa, tmp_path):
        cache, ids = balanced(sdpa), prompt(50)
        logits(sdpa, ids, cache)
        cache.save(tmp_path / "a", token_ids=ids, metadata={"tokenizer": "T"})
        NexusQuantCache.load(tmp_path / "a", config=sdpa.config, token_ids=ids[0].tolist())
        with pytest.raises(FormatError, match="is of another prompt"):
            NexusQuantCache.load(tmp_path / "a", config=sdpa.config, token_ids=ids[:, :-1])
        for wrong in (ids[:, :-1], torch.cat([ids, ids]), [1]):
            with pytest.raises(OptionError, match=r"the cache has seen \[1, 50\]: give the ids of all"):
                cache.save(tmp_path / "a", token_ids=wrong)
        assert inspect_file(tmp_path / "a").meta.user == {"tokenizer": "T"}
        assert inspect_file(tmp_path / "a").meta.tokens_hash == hash_tokens(ids.int())
        cache.save(tmp_path / "a")
        with pytest.raises(FormatError, match="does not say of which tokens"):
            NexusQuantCache.load(tmp_path / "a", config=sdpa.config, token_ids=ids)

    def test_the_hash_of_tokens_never_changes(self):
        expected = "d29170db0bf8b68c9287ddbe806954e01d1ec561eea64d11b21c81a1b837eb8a"
        assert hash_tokens([1, 2, 3]) == hash_tokens(torch.tensor([[1, 2, 3]])) == expected
        assert hash_tokens([1, 2, 3]) != hash_tokens(torch.tensor([[1], [2], [3]]))

    def test_policies(self, sdpa, tmp_path):
        cache = balanced(sdpa, policy=KeyNormPolicy())
        generate(sdpa, prompt(50), cache)
        with pytest.raises(OptionError, match=re.escape("saved with the policy KeyNormPolicy(")):
            saved(cache, tmp_path, config=sdpa.config)
        assert_goes_on_alike(sdpa, cache, saved(cache, tmp_path, config=sdpa.config, policy=KeyNormPolicy()))
        saved(cache, tmp_path, config=sdpa.config, policy=WindowAttentionPolicy())  # what is asked for, is done

    @pytest.mark.parametrize(("family", "number"), [("llama", 0), ("llama", 1), ("gemma3", 2), ("gemma3", 3)])
    def test_former_default_policies(self, family, number, tmp_path):
        """Such files go on with the present default; in a model with sliding windows, those of `DEFAULT_POLICY` too."""
        model = build(family)
        cache = balanced(model, policy=FORMER_DEFAULTS[number])
        ask(model, inputs(model, PROMPT), cache)
        loaded = saved(cache, tmp_path, config=model.config)
        policies = [layer.state.policy for layer in loaded.layers if not layer.is_sliding]
        assert policies == [DEFAULT_BESIDE_WINDOWS if family == "gemma3" else DEFAULT_POLICY] * len(policies) != []

    def test_a_policy_without_anything_to_decide(self, sdpa, tmp_path):
        cache = balanced(sdpa, policy=KeyNormPolicy(), keep_ratio=1.0)
        generate(sdpa, prompt(50), cache)
        saved(cache, tmp_path, config=sdpa.config)

    def test_layers_of_another_kind(self, tmp_path, monkeypatch):
        model = build("gemma3")
        cache = NexusQuantCache("quant", config=model.config)
        ask(model, inputs(model, PROMPT), cache)
        cache.save(tmp_path / "a")
        made = NexusQuantCache._make_layers
        monkeypatch.setattr(NexusQuantCache, "_make_layers", lambda self: made(self)[::-1])
        with pytest.raises(FormatError, match="layer 0 of the file is of another kind than NexusQuantLayer"):
            NexusQuantCache.load(tmp_path / "a", config=model.config)
        monkeypatch.setattr(
            NexusQuantCache, "_make_layers", lambda self: [*made(self), NexusQuantLayer(self.shared, 2)]
        )
        with pytest.raises(FormatError, match="the file holds 2 layers, the cache of this model has 3"):
            NexusQuantCache.load(tmp_path / "a", config=model.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype(sdpa, dtype, tmp_path):
    """Codes are the same codes; tokens in full precision are cast."""
    cache = balanced(sdpa)
    generate(sdpa, prompt(50), cache)
    loaded = saved(cache, tmp_path, config=sdpa.config, dtype=dtype)
    for ours, theirs in zip(loaded.layers, cache.layers, strict=True):
        assert torch.equal(ours.state.tail[0], theirs.state.tail[0].to(dtype))
        assert torch.equal(ours.state.body.keys.words.view(), theirs.state.body.keys.words.view())
        assert ours.state.body.keys.transform.reference.dtype == torch.float32
        assert ours.keys.dtype == dtype
    model = tiny_llama().to(dtype)
    assert logits(model, prompt(1), loaded).dtype == dtype


def test_another_dtype_of_layers_that_are_not_compressed(tmp_path):
    model = build("gemma3")
    cache = NexusQuantCache("quant", config=model.config)
    ask(model, inputs(model, PROMPT), cache)
    loaded = saved(cache, tmp_path, config=model.config, dtype=torch.bfloat16)
    first = loaded.layers[0]
    # Up to 5.23 such a layer also remembers the dtype.
    assert first.keys.dtype == getattr(first, "dtype", torch.bfloat16) == torch.bfloat16


def test_another_device(sdpa, tmp_path):
    """`meta` stands for any: every tensor but those that belong on the CPU goes there."""
    cache = balanced(sdpa)
    generate(sdpa, prompt(50), cache)
    loaded = saved(cache, tmp_path, config=sdpa.config, device="meta")
    layer = loaded.layers[0]
    for x in (
        *layer.state.tail,
        *layer.state.sinks,
        layer.state.body.keys.words.view(),
        layer.state.body.keys.transform.mean,
    ):
        assert x.device.type == "meta"
    assert layer.state.device == torch.device("meta")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_from_device_to_device(tmp_path):
    """What was saved on a GPU is the same on the CPU, and the other way round."""
    model = tiny_llama().cuda()
    cache = balanced(model)
    generate(model, prompt(60).cuda(), cache)
    cache.save(tmp_path / "a")
    here = NexusQuantCache.load(tmp_path / "a", config=model.config)
    there = NexusQuantCache.load(tmp_path / "a", config=model.config, device="cuda")
    here.save(tmp_path / "b")
    assert torch.equal(cache.layers[0].state.tail[0].cpu(), here.layers[0].state.tail[0])
    assert inspect_file(tmp_path / "a").kinds == inspect_file(tmp_path / "b").kinds
    for seed in range(9):
        ids = prompt(1, seed=seed).cuda()
        assert torch.equal(logits(model, ids, cache), logits(model, ids, there))


class TestWriting:
    def test_a_failure_leaves_the_old_file(self, sdpa, tmp_path, monkeypatch):
        cache, path = balanced(sdpa), tmp_path / "a"
        cache.save(path)
        before = path.read_bytes()
        generate(sdpa, prompt(50), cache)

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            cache.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_the_result_does_not_depend_on_threads(self, sdpa, tmp_path):
        cache = balanced(sdpa)
        generate(sdpa, prompt(300), cache)
        for threads in (1, 2, 5):
            cache.save(tmp_path / str(threads), threads=threads)
        assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "5").read_bytes()

    def test_little_is_in_memory_at_once(self, sdpa, tmp_path, monkeypatch):
        cache = balanced(sdpa)
        generate(sdpa, prompt(300), cache)
        cache.save(tmp_path / "a")
        monkeypatch.setattr(writer, "_AT_ONCE", 1)
        monkeypatch.setattr(os, "name", "other")  # a folder that cannot be put on the disk
        cache.save(tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_large_tensors_are_written_as_they_are_compressed(self, sdpa, tmp_path, monkeypatch):
        cache = balanced(sdpa)
        generate(sdpa, prompt(300), cache)
        cache.save(tmp_path / "a")
        monkeypatch.setattr(writer, "_LARGE", 64)
        for level in (None, 3):
            for threads in (1, 3):
                cache.save(tmp_path / f"{level}{threads}", level=level, threads=threads)
            assert (tmp_path / f"{level}1").read_bytes() == (tmp_path / f"{level}3").read_bytes()
            assert verify_file(tmp_path / f"{level}1").sha256 == inspect_file(tmp_path / "a").sha256
        assert cache.memory_report(at_rest=True).at_rest.total_bytes - (tmp_path / "31").stat().st_size in range(
            -64, 64
        )

    def test_a_large_tensor_that_does_not_shrink_after_all(self, sdpa, tmp_path, monkeypatch):
        """What is left of the attempt is written over, or cut off."""
        cache = balanced(sdpa)
        generate(sdpa, prompt(300), cache)
        for large in (1 << 30, 64):
            monkeypatch.setattr(writer, "_LARGE", large)
            monkeypatch.setattr(writer, "choose_packing", lambda spec, *_: "zstd" if spec.nbytes else None)
            cache.save(tmp_path / str(large), level=1)
        assert verify_file(tmp_path / "64").sha256 == verify_file(tmp_path / str(1 << 30)).sha256
        assert any("bytes" in row.packings for row in inspect_file(tmp_path / "64").kinds)

    def test_large_tensors_are_not_held(self, tmp_path, monkeypatch):
        """Neither the one that is being written, nor the one before it."""
        monkeypatch.setattr(writer, "_LARGE", 8 << 20)
        cache = NexusQuantCache("quant", **SMALL)
        cache.update(*random_states((1, 16, 16_000, 16), 0), 0)  # 16 MiB each, and not compressed
        tracemalloc.start()
        cache.save(tmp_path / "a", threads=2)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 14 << 20

    def test_what_is_done_for_a_tensor_does_not_grow_with_their_number(self, tmp_path, monkeypatch):
        asked = 0
        size = FileTensor.nbytes.func

        def counting(spec: FileTensor) -> Any:
            nonlocal asked
            asked += 1
            return size(spec)

        monkeypatch.setattr(FileTensor, "nbytes", property(counting))
        for layers in (4, 40):
            cache = NexusQuantCache("quant", **SMALL)
            for layer in range(layers):
                feed(cache, *random_states((1, 1, 20, 8), layer), layer)
            asked = 0
            count = len(cache.save(tmp_path / "a", threads=1, progress=lambda *_: None).tensors)
            assert count == 2 * layers
            assert asked < 40 * count

    def test_what_zstd_needs_for_its_tables_limits_what_is_compressed_at_once(self, sdpa, tmp_path, monkeypatch):
        """At level 22 a tensor of 8 MiB takes 130 MiB."""
        spec = FileTensor("x", "uint8", (1, 1, 1 << 20, 8), "key words")
        assert packing.working_memory(spec, 22) > 16 * packing.working_memory(spec, 3)
        cache, running, most, lock = balanced(sdpa), 0, 0, threading.Lock()
        generate(sdpa, prompt(300), cache)
        compress = writer.compress

        def counted(*given: Any) -> Any:
            nonlocal running, most
            assert given[4] == 0  # threads of zstd, beside our own
            with lock:
                running += 1
                most = max(most, running)
            try:
                return compress(*given)
            finally:
                with lock:
                    running -= 1

        monkeypatch.setattr(writer, "compress", counted)
        monkeypatch.setattr(writer, "_TABLES", 1)
        cache.save(tmp_path / "a", level=22, threads=4)
        assert most == 1

    def test_an_interrupt_drops_what_has_not_begun(self, sdpa, tmp_path, monkeypatch):
        cache, begun, interrupted = balanced(sdpa), 0, threading.Event()
        generate(sdpa, prompt(300), cache)
        compress = writer.compress

        def slow(*given: Any) -> Any:
            nonlocal begun
            begun += 1
            if begun > 1:
                interrupted.wait(30)
            return compress(*given)

        def progress(_done: int, _total: int) -> None:
            if begun:
                interrupted.set()
                raise KeyboardInterrupt

        monkeypatch.setattr(writer, "compress", slow)
        with pytest.raises(KeyboardInterrupt):
            cache.save(tmp_path / "a", threads=1, progress=progress)
        assert begun <= 2
        assert not list(tmp_path.iterdir())

    def test_what_has_begun_stops_soon(self):
        spec = FileTensor("x", "uint8", (1, 1, 1 << 20, 8), "key words")
        tensor = torch.randint(0, 9, spec.shape, dtype=torch.uint8)
        answers = iter([True, True])
        with pytest.raises(packing.CancelledError):
            packing.compress(spec, tensor, "zstd", 1, 0, lambda: next(answers, False))
        with pytest.raises(packing.CancelledError):
            packing.hash_bytes(spec, tensor, lambda: False)

    @pytest.mark.parametrize("call", ["open", "fsync"])
    def test_a_folder_that_cannot_be_put_on_the_disk(self, call, sdpa, tmp_path, monkeypatch):
        """The file has its name by then."""
        real = getattr(os, call)

        def refusing(what: Any, *more: Any) -> Any:
            if Path(f"/proc/self/fd/{what}").resolve() == tmp_path if isinstance(what, int) else what == tmp_path:
                raise OSError(errno.EINVAL, "not for folders")
            return real(what, *more)

        monkeypatch.setattr(os, call, refusing)
        balanced(sdpa).save(tmp_path / "a")
        verify_file(tmp_path / "a")

    def test_permissions_are_kept(self, sdpa, tmp_path):
        path, cache = tmp_path / "a", balanced(sdpa)
        cache.save(path)
        usual = os.umask(0o022)
        os.umask(usual)
        assert path.stat().st_mode & 0o777 == 0o666 & ~usual
        for mode in (0o600, 0o640, 0o444):
            path.chmod(mode)
            cache.save(path)
            assert path.stat().st_mode & 0o777 == mode

    def test_a_symbolic_link_stays_one(self, sdpa, tmp_path):
        (tmp_path / "there").mkdir()
        link, target = tmp_path / "link", tmp_path / "there" / "a"
        link.symlink_to(target)
        for _ in range(2):  # there is nothing yet, and then there is
            balanced(sdpa).save(link)
            assert link.is_symlink()
            assert not target.is_symlink()
            verify_file(target)
        assert list(target.parent.iterdir()) == [target]

    def test_what_is_no_file_is_not_replaced(self, sdpa, tmp_path):
        pipe, link = tmp_path / "pipe", tmp_path / "link"
        os.mkfifo(pipe)
        link.symlink_to(pipe)
        for path in (pipe, link):
            with pytest.raises(FileExistsError, match="is no regular file, and is not replaced"):
                balanced(sdpa).save(path)
        assert pipe.is_fifo()
        assert set(tmp_path.iterdir()) == {pipe, link}

    @pytest.mark.parametrize("path", ["", ".", "/", "..", "folder"])
    def test_folders(self, path, sdpa, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        with pytest.raises(IsADirectoryError):
            balanced(sdpa).save(path)
        assert list(tmp_path.iterdir()) == [tmp_path / "folder"]

    @pytest.mark.parametrize("name", ["a" * 240, "a" * 255, "é" * 127])
    def test_long_names(self, name, sdpa, tmp_path):
        balanced(sdpa).save(tmp_path / name)
        verify_file(tmp_path / name)

    def test_a_store_knows_the_temporary_names_of_its_files(self, tmp_path):
        assert store._OURS.fullmatch(writer._beside(tmp_path / f"{'0a' * 16}.safetensors").name)

    def test_no_header_is_written_that_would_not_be_read(self, sdpa, tmp_path, monkeypatch):
        cache = balanced(sdpa)
        generate(sdpa, prompt(50), cache)
        monkeypatch.setattr(container, "MOST_HEADER", 1000)
        with pytest.raises(OptionError, match=r"header of the file would take .* more than 1,000 would be read again"):
            cache.save(tmp_path / "a")
        assert not list(tmp_path.iterdir())

    def test_progress_reaches_the_end(self, sdpa, tmp_path):
        cache, seen = balanced(sdpa), []
        generate(sdpa, prompt(50), cache)
        cache.save(tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
        assert seen[-1][0] == seen[-1][1] > 0
        assert seen == sorted(seen)
        again: list[tuple[int, int]] = []
        NexusQuantCache.load(tmp_path / "a", progress=lambda done, total: again.append((done, total)))
        assert again[-1] == seen[-1]

    def test_a_cache_in_inference_mode(self, sdpa, tmp_path):
        with torch.inference_mode():
            cache = balanced(sdpa)
            generate(sdpa, prompt(50), cache)
            loaded = saved(cache, tmp_path, config=sdpa.config)
        assert_goes_on_alike(sdpa, cache, loaded)


class TestReading:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "a"
        path.write_bytes(file_bytes("compressed"))
        return path

    @pytest.mark.parametrize("has_pread", [True, False])
    @pytest.mark.parametrize("change", ["replaced", "deleted"])
    def test_another_file_takes_its_place_meanwhile(self, change, has_pread, path, monkeypatch):
        """What was opened is read."""
        expected = inspect_file(path).sha256
        read_header = reader.read_header

        def changing(file: Any) -> Any:
            found = read_header(file)
            if change == "replaced":
                (path.parent / "b").write_bytes(file_bytes("padded"))
                (path.parent / "b").replace(path)
            else:
                path.unlink()
            return found

        monkeypatch.setattr(reader, "read_header", changing)
        if not has_pread:
            monkeypatch.delattr(os, "pread")
        assert verify_file(path).sha256 == expected

    @pytest.mark.parametrize("together", [0, 1 << 20])
    def test_small_tensors_are_read_together(self, together, path, monkeypatch):
        tasks, submit = [], ThreadPoolExecutor.submit
        monkeypatch.setattr(reader, "_TOGETHER", together)
        monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *given: tasks.append(given) or submit(*given))
        verify_file(path)
        count = len(reader.read_promise(path).tensors)
        assert len(tasks) == (1 if together else count) < count + 1

    def test_an_error_drops_what_has_not_begun(self, path, monkeypatch):
        begun, decompress, failed = 0, reader.decompress, threading.Event()

        def slow(*given: Any) -> Any:
            nonlocal begun
            begun += 1
            if begun > 1:
                failed.wait(30)
            return decompress(*given)

        def progress(_done: int, _total: int) -> None:
            failed.set()
            raise KeyboardInterrupt

        monkeypatch.setattr(reader, "decompress", slow)
        monkeypatch.setattr(reader, "_TOGETHER", 0)
        with pytest.raises(KeyboardInterrupt):
            NexusQuantCache.load(path, threads=1, progress=progress)
        assert begun <= 2

    @pytest.mark.parametrize("look", [inspect_file, verify_file, NexusQuantCache.load])
    def test_what_is_no_file(self, look, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        found: list[str] = []

        def wait() -> None:
            for path in (tmp_path / "pipe", Path("/dev/zero"), Path("/dev/null")):
                with pytest.raises(FormatError) as error:
                    look(path)
                found.append(str(error.value))

        thread = threading.Thread(target=wait, daemon=True)  # or the failure would last for ever
        thread.start()
        thread.join(30)
        assert [text.partition(" is ")[2] for text in found] == ["no regular file, so it is no saved cache"] * 3
        with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
            look(tmp_path)

    def test_a_header_that_is_too_long(self, path):
        """It is not read, however harmless."""
        assert container.MOST_HEADER == 8 << 20
        data = path.read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        for longest, reason in ((8 << 20, None), ((8 << 20) + 1, "no safetensors file")):
            head = container.padded_header(data[:length], 8 + longest)
            path.write_bytes(head + data[length:])
            if reason is None:
                verify_file(path)
            else:
                with pytest.raises(FormatError, match=reason):
                    inspect_file(path)

    @pytest.mark.usefixtures("unchecked")
    def test_wrong_options(self, path):
        for dtype in (torch.int8, torch.complex64, torch.float8_e4m3fn, torch.bool, "float16"):
            with pytest.raises(OptionError, match=r"dtype must be one of torch\.float64, .* got "):
                NexusQuantCache.load(path, dtype=dtype)
        for threads in (0, -1, "x", 1.0):
            with pytest.raises(OptionError, match="threads must be a whole number from 1"):
                NexusQuantCache.load(path, threads=threads)


class TestOneFrame:
    """What is stored of a tensor is one zstd frame, and nothing else."""

    spec = FileTensor("x", "uint8", (1, 1, 3000, 10), "key words")
    tensor = torch.randint(0, 50, spec.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def read(self, data: bytes) -> str:
        out = torch.zeros(1, 3000, 10, dtype=torch.uint8)
        return packing.decompress(self.spec, BytesIO(data), len(data), "zstd", out)

    def frame(self, **options: Any) -> bytes:
        return zstandard.ZstdCompressor(**options).compress(self.tensor.numpy().tobytes())

    @pytest.mark.parametrize("options", [{}, {"write_checksum": True}, {"level": 19}, {"threads": 2}])
    def test_it_is_read(self, options):
        assert self.read(self.frame(**options)) == hashlib.sha256(self.tensor.numpy().tobytes()).hexdigest()

    def test_blocks_of_every_kind(self):
        """Stored, repeated and compressed ones, in reads of every length."""
        data = torch.cat([torch.randint(0, 256, (1 << 18,)), torch.zeros(1 << 18), torch.randint(0, 3, (1 << 18,))])
        tensor = data.to(torch.uint8).view(1, 1, -1, 64)
        stored = zstandard.ZstdCompressor(write_checksum=True).compress(tensor.numpy().tobytes())

        class Slow(BytesIO):
            def read(self, count: int | None = -1, /) -> bytes:
                return super().read(min(count or 0, 1 + self.tell() % 5) if self.tell() % 1000 < 50 else count)

        spec = FileTensor("x", "uint8", tuple(tensor.shape), "key words")
        out = torch.zeros(tensor.shape[1:], dtype=torch.uint8)
        packing.decompress(spec, Slow(stored), len(stored), "zstd", out)
        assert torch.equal(out, tensor[0])

    def test_nothing_else_is(self):
        skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
        as_long = b"\x50\x2a\x4d\x18" + (30_000).to_bytes(4, "little") + bytes(30_000)
        empty = zstandard.ZstdCompressor().compress(b"")
        for data, reason in (
            (as_long + self.frame(), "is no zstd frame with content"),
            (self.frame() + skipped, "longer than its shape allows"),
            (self.frame() + empty, "longer than its shape allows"),
            (self.frame(write_checksum=True) + empty, "longer than its shape allows"),
            (self.frame(write_checksum=True)[:-4], "its end is missing"),
            (self.frame() + b"\0", "longer than its shape allows"),
        ):
            with pytest.raises(FormatError, match=reason):
                self.read(data)


def test_bytes_at_rest_are_those_of_the_file(sdpa, tmp_path):
    cache = balanced(sdpa)
    generate(sdpa, prompt(400), cache)
    report = cache.memory_report(at_rest=True)
    written = cache.save(tmp_path / "a")
    size = (tmp_path / "a").stat().st_size
    assert written.total_bytes == size
    assert abs(report.at_rest.total_bytes - size) <= 64  # the peak that the metadata mention may have grown
    assert set(report.at_rest.kinds) >= {"key words", "value words", "scales", "positions", "exact", "transforms"}
    assert "at rest key words" in str(report)
    assert cache.memory_report().at_rest is None
    assert "at rest" not in str(cache.memory_report())


def test_settings_are_all_kept(tmp_path):
    settings = CacheConfig(key_bits=3, scale_candidates=(1.0,), center_keys=False)
    assert saved(NexusQuantCache(settings), tmp_path).cache_config == settings
