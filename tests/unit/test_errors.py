"""Bad input gives a clear error of ours, and leaves the cache as it was."""

import copy
from collections.abc import Callable

import feeding
import pytest
import torch
from integration.tiny import SMALL, fingerprint, random_states, tiny_config
from torch import Tensor
from transformers import Gemma3TextConfig

from nexusquant_cache import (
    CacheConfig,
    CacheStateError,
    DtypeError,
    EvictionPolicy,
    KeyKeyPolicy,
    NexusQuantCache,
    NexusQuantError,
    NonFiniteError,
    OptionError,
    ScoreInputs,
    ShapeError,
    UnsupportedError,
)
from nexusquant_cache.errors import suggest

LAYERS, LAST, SHAPE = 3, 2, (2, 2, 60, 16)


def states(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return random_states((*SHAPE[:2], tokens, SHAPE[3]), seed, dtype)


def feed(cache: NexusQuantCache, tokens: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Do what a forward pass of a model does."""
    return [feeding.feed(cache, *states(tokens, 10 * seed + index), index) for index in range(LAYERS)]


def feed_tokens(cache: NexusQuantCache, tokens: int) -> None:
    for seed in range(tokens):
        feed(cache, 1, seed)


def prompted(*turns: int, **overrides: object) -> NexusQuantCache:
    cache = NexusQuantCache("balanced", **(SMALL | overrides))
    for seed, tokens in enumerate(turns):
        feed(cache, tokens, seed)
    return cache


# The tree


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (OptionError, ValueError),
        (ShapeError, ValueError),
        (DtypeError, TypeError),
        (NonFiniteError, ValueError),
        (UnsupportedError, NotImplementedError),
        (CacheStateError, RuntimeError),
    ],
)
def test_every_error_is_ours_and_the_builtin_that_a_caller_expects(error: type, builtin: type) -> None:
    assert issubclass(error, NexusQuantError)
    assert issubclass(error, builtin)


def test_suggestions() -> None:
    assert suggest("balancd", ["max", "balanced"]) == "Did you mean 'balanced'? Allowed: balanced, max."
    assert suggest("zzz", ["b", "a"]) == "Allowed: a, b."


# Options


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NexusQuantCache("balancd"), "unknown preset 'balancd'. Did you mean 'balanced'?"),
        (lambda: NexusQuantCache(3), "unknown preset 3"),
        (lambda: NexusQuantCache(key_bit=3), "unknown option 'key_bit'. Did you mean 'key_bits'?"),
        (lambda: NexusQuantCache(residual=3), "Did you mean 'residual_length'?"),
        (lambda: NexusQuantCache(transform="principl"), "unknown transform 'principl'. Did you mean 'principal'?"),
        (lambda: NexusQuantCache(key_bits=5), "key_bits must be from 0.5 to 4 bits per channel, got 5"),
        (lambda: NexusQuantCache(value_bits=0.4), "value_bits must be from 0.5 to 4 bits per channel, got 0.4"),
        (lambda: NexusQuantCache(sink_tokens=-1), "sink_tokens must be a whole number, at least 0, got -1"),
        (lambda: NexusQuantCache(residual_length=0), "residual_length must be a whole number, at least 1"),
        (lambda: NexusQuantCache(flush_length=True), "flush_length must be a whole number"),
        (lambda: NexusQuantCache(min_tokens=0), "min_tokens must be a whole number, at least 1"),
        (lambda: NexusQuantCache(keep_ratio=0), r"keep_ratio must be in \(0, 1\]"),
        (lambda: NexusQuantCache(keep_ratio=1.5), r"keep_ratio must be in \(0, 1\].*got 1.5"),
        (lambda: NexusQuantCache(keep_ratio=float("nan")), "keep_ratio"),
        (lambda: NexusQuantCache(center_keys=1), "center_keys must be True or False, got 1"),
        (lambda: NexusQuantCache(remove_rope="no"), "remove_rope must be True or False"),
        (lambda: NexusQuantCache(policy=KeyKeyPolicy), r"write KeyKeyPolicy\(\), not KeyKeyPolicy"),
        (lambda: NexusQuantCache(policy="key_key"), "policy must be an EvictionPolicy instance, got 'key_key'"),
        (
            lambda: NexusQuantCache(when="in_prefill"),
            "unknown schedule when='in_prefill'. Did you mean 'during_prefill'",
        ),
        (lambda: KeyKeyPolicy(observation_window=0), "observation_window must be at least 1"),
        (lambda: KeyKeyPolicy(pool=4), "pool must be an odd number"),
    ],
)
def test_a_wrong_option_names_what_is_allowed(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_an_override_replaces_a_field() -> None:
    assert NexusQuantCache(CacheConfig(key_bits=4), value_bits=1).cache_config == CacheConfig(key_bits=4, value_bits=1)


# Tensors


def integers() -> tuple[Tensor, Tensor]:
    return states(60)[0].long(), states(60)[1].long()


def both(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)


BAD_FIRST: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], type[Exception], str]] = {
    "integer keys": (integers, DtypeError, "key_states must be a floating tensor, got torch.int64"),
    "integer values": (lambda: (states(60)[0], integers()[1]), DtypeError, "value_states must be a floating"),
    "three axes": (lambda: both(2, 60, 16), ShapeError, "got shape"),
    "one axis": (lambda: both(16), ShapeError, "got shape"),
    "five axes": (lambda: both(1, 1, 1, 9, 16), ShapeError, "got shape"),
    "head_dim 12": (lambda: both(1, 1, 9, 12), ShapeError, "head_dim must be a positive multiple of 8, got 12"),
    "value head_dim 12": (lambda: (torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 12)), ShapeError, "got 12"),
    "unequal lengths": (lambda: (states(60)[0], states(59)[1]), ShapeError, "must agree"),
    "NaN": (lambda: (states(60)[0].fill_(float("nan")), states(60)[1]), NonFiniteError, "in the keys of layer"),
    "infinity": (lambda: (states(60)[0], states(60)[1] / 0), NonFiniteError, "in the values of layer"),
    "overflow": (lambda: (states(60)[0] * 1e25, states(60)[1]), NonFiniteError, "overflow"),
}


@pytest.mark.parametrize("bad_layer", [0, LAST])
@pytest.mark.parametrize("name", BAD_FIRST)
def test_a_bad_first_prompt_leaves_no_trace(name: str, bad_layer: int) -> None:
    """Afterwards the cache takes a prompt of any other shape and dtype, as a new one does."""
    make, error, message = BAD_FIRST[name]
    cache, fresh = prompted(), prompted()
    for index in range(bad_layer):
        cache.update(*states(60), index)
    with pytest.raises(error, match=message):
        cache.update(*make(), bad_layer)
    assert cache.get_seq_length() == 0
    assert cache.memory_report().held_bytes == 0
    for each in (cache, fresh):
        for index in range(LAYERS):
            feeding.feed(each, *random_states((1, 3, 50, 32), index, torch.bfloat16), index)
        each.compress()
    assert fingerprint(cache) == fingerprint(fresh)


def nan_in(states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    states[1][-1, -1, -1, -1] = float("nan")
    return states


BAD_NEXT: dict[str, tuple[Callable[[int], tuple[Tensor, Tensor]], type[Exception], str]] = {
    "integers": (lambda n: (states(n)[0].long(), states(n)[1].long()), DtypeError, "floating"),
    "batch": (lambda n: random_states((1, 2, n, 16), 0), ShapeError, r"from \(2, 2, 16\) to \(1, 2, 16\)"),
    "heads": (lambda n: random_states((2, 4, n, 16), 0), ShapeError, r"from \(2, 2, 16\) to \(2, 4, 16\)"),
    "head_dim": (lambda n: random_states((2, 2, n, 8), 0), ShapeError, r"from \(2, 2, 16\) to \(2, 2, 8\)"),
    "dtype": (lambda n: states(n, 0, torch.bfloat16), DtypeError, "changed dtype from torch.float32 to torch.bf"),
    "one axis": (both, ShapeError, "got shape"),
    "two axes": (lambda n: both(n, 16), ShapeError, "got shape"),
    "three axes": (lambda n: both(2, n, 16), ShapeError, "got shape"),
}
STAGES = {"fresh prompt": (60,), "short prompt": (20, 1), "compressed": (60, 1), "second turn": (60, 1, 60)}


@pytest.mark.parametrize("bad_layer", [0, LAST])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*BAD_NEXT, "NaN"])
def test_a_bad_later_prompt_changes_nothing(name: str, stage: str, bad_layer: int) -> None:
    """Layers that have already taken the new tokens give them back: equal bit for bit, then and ever after."""
    make, error, message = BAD_NEXT.get(name, (lambda n: nan_in(states(n)), NonFiniteError, "NaN"))
    cache = prompted(*STAGES[stage])
    for layer in cache.layers:
        layer.encode()  # the last one may still wait, and is encoded before whatever comes
    before, twin = fingerprint(cache), copy.deepcopy(cache)
    for index in range(bad_layer):
        cache.update(*states(25, 7), index)
    with pytest.raises(error, match=message):
        cache.update(*make(25), bad_layer)
    assert fingerprint(cache) == before
    for tokens in (1, 30, 1):
        feed(cache, tokens, 9)
        feed(twin, tokens, 9)
    assert fingerprint(cache) == fingerprint(twin)


@pytest.mark.parametrize("bad_layer", [0, LAST])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BAD_NEXT)
def test_a_bad_generated_token_changes_no_tokens(name: str, stage: str, bad_layer: int) -> None:
    """Earlier layers may have compressed themselves already; nothing is lost and the next step goes on."""
    make, error, message = BAD_NEXT[name]
    cache = prompted(*STAGES[stage])
    seen, twin = cache.get_seq_length(), copy.deepcopy(cache)
    for index in range(bad_layer):
        cache.update(*states(1, 7), index)
    with pytest.raises(error, match=message):
        cache.update(*make(1), bad_layer)
    assert [layer.state.seen for layer in cache.layers] == [seen] * LAYERS
    feed(cache, 1, 9)
    feed(twin, 1, 9)
    assert fingerprint(cache) == fingerprint(twin)


def test_a_failing_second_turn_does_not_make_the_layers_part() -> None:
    """Tokens that were generated are never evicted, whichever layer refused a prompt after them."""
    cache = prompted(10, keep_ratio=0.5)
    for seed in range(16):
        feed(cache, 1, 1 + seed)  # 16 candidates, to be encoded at the next step
    cache.update(*states(5), 0)
    with pytest.raises(NonFiniteError):
        cache.update(*nan_in(states(5)), 1)
    feed(cache, 1, 99)
    assert [layer.state.kept for layer in cache.layers] == [27] * LAYERS


def test_nan_among_generated_tokens_is_found_when_they_are_encoded() -> None:
    cache = prompted(60, 1)
    cache.update(*nan_in(states(1)), 0)
    for index in range(1, LAYERS):
        cache.update(*states(1), index)
    with pytest.raises(NonFiniteError, match="generated tokens"):
        feed_tokens(cache, 12)
    before = fingerprint(cache)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"values of layer 0 \(generated tokens\).*not changed"):
            cache.update(*states(1), 0)
        assert fingerprint(cache) == before


def test_nan_is_refused_in_a_prompt_of_two_tokens_but_not_of_one() -> None:
    """A single token counts as generated: it is kept as it is until it is encoded."""
    cache = prompted()
    with pytest.raises(NonFiniteError, match="the prompt"):
        cache.update(*nan_in(states(2)), 0)
    cache.update(*nan_in(states(1)), 0)
    assert cache.get_seq_length() == 1


def test_after_an_error_a_hybrid_cache_needs_a_reset() -> None:
    """Layers of transformers' own, such as sliding windows, cannot give tokens back."""
    config = Gemma3TextConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    cache, fresh = (NexusQuantCache("balanced", config=config, **SMALL) for _ in range(2))
    cache.update(*states(60), 0)
    with pytest.raises(NonFiniteError):
        cache.update(*nan_in(states(60)), 1)
    cache.reset()
    for index in range(2):
        given, expected = (each.update(*states(60, index), index) for each in (cache, fresh))
        assert torch.equal(torch.stack(given), torch.stack(expected))
    assert [layer.get_seq_length() for layer in cache.layers] == [60, 60]


# Policies


class MoodyPolicy(EvictionPolicy):
    """Raises in one layer, as long as it is told to."""

    def __init__(self, bad_layer: int) -> None:
        self.bad_layer = bad_layer

    def score(self, inputs: ScoreInputs) -> Tensor:
        if inputs.layer_idx == self.bad_layer:
            raise ZeroDivisionError
        return inputs.values.float().norm(dim=-1)


@pytest.mark.parametrize("bad_layer", [0, LAST])
def test_a_policy_that_raises_leaves_the_cache_usable(bad_layer: int) -> None:
    """`compress` completes what a failing policy has left undone, and equals an undisturbed run."""
    policy, undisturbed = MoodyPolicy(bad_layer), prompted(60, policy=MoodyPolicy(-1))
    cache = prompted(60, policy=policy)
    with pytest.raises(ZeroDivisionError):
        cache.compress()
    with pytest.raises(ZeroDivisionError):
        feed(cache, 1, 5)
    assert [layer.state.seen for layer in cache.layers] == [60] * LAYERS
    policy.bad_layer = -1
    cache.compress()
    undisturbed.compress()
    assert fingerprint(cache) == fingerprint(undisturbed)
    assert cache.get_mask_sizes(30, 0) == cache.get_mask_sizes(30, LAYERS - 1)


@pytest.mark.parametrize("bad_layer", [0, LAST])
def test_after_a_policy_that_raised_generation_goes_on(bad_layer: int) -> None:
    policy, undisturbed = MoodyPolicy(bad_layer), prompted(60, 1, policy=MoodyPolicy(-1))
    cache = prompted(60, policy=policy)
    with pytest.raises(ZeroDivisionError):
        feed(cache, 1, 1)
    policy.bad_layer = -1
    feed(cache, 1, 1)
    assert fingerprint(cache) == fingerprint(undisturbed)


class WrongShape(EvictionPolicy):
    def score(self, inputs: ScoreInputs) -> Tensor:
        return inputs.keys.float()[:, :1].norm(dim=-1)


class NotFinite(EvictionPolicy):
    def score(self, inputs: ScoreInputs) -> Tensor:
        return inputs.keys.float().norm(dim=-1) / 0


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (WrongShape(), ShapeError, r"WrongShape.score must return \[batch, kv_heads, tokens\] = \(2, 2, 60\)"),
        (NotFinite(), NonFiniteError, "NotFinite.score returned NaN or infinity in layer 0"),
    ],
)
def test_bad_scores_are_refused(policy: EvictionPolicy, error: type[Exception], message: str) -> None:
    cache = prompted(60, policy=policy)
    before = fingerprint(cache)
    for act in (cache.compress, lambda: feed(cache, 1)):
        with pytest.raises(error, match=message):
            act()
        assert fingerprint(cache) == before


# Operations


@pytest.mark.parametrize("tokens_to_remove", [1, 60])
def test_crop_to_an_absolute_length_is_refused(tokens_to_remove: int) -> None:
    cache = prompted(60)
    with pytest.raises(ShapeError, match=f"0 or a negative number of tokens to remove, got {tokens_to_remove}"):
        cache.crop(tokens_to_remove)


def test_crop_into_the_first_tokens_of_a_padded_row_is_refused_and_changes_nothing() -> None:
    """Its two sinks are tokens 5 and 6: what stands at position 7 can go, they cannot, but everything can."""
    mask = torch.ones(SHAPE[0], 1, 1, 60, dtype=torch.bool)
    mask[1, ..., :5] = False
    cache = NexusQuantCache("balanced", **SMALL)
    for index in range(LAYERS):
        feeding.feed(cache, *states(60, index), index, mask=mask)
    feed(cache, 1)
    before = fingerprint(cache)
    with pytest.raises(UnsupportedError, match=r"newest 55 of 61 tokens.*behind position 7,"):
        cache.crop(-55)
    assert fingerprint(cache) == before
    cache.crop(-30)
    assert cache.get_seq_length() == 31
    cache.crop(-99)
    assert cache.get_seq_length() == cache.layers[0].state.kept == 0


def test_a_forward_that_fails_half_encoded_is_undone() -> None:
    """With ``during_prefill`` tokens of the first layers have been encoded when a later one fails, and none dropped."""
    cache, fresh = (NexusQuantCache("balanced", when="during_prefill", **SMALL) for _ in range(2))
    for each in (cache, fresh):
        feed(each, 60)
        feed(each, 1)
    before = None
    for index in range(2):
        feeding.feed(cache, *states(40, index), index)
        before = before or cache.layers[0].state.packed_tokens
    assert cache.layers[0].state.packed_tokens > before
    with pytest.raises(NonFiniteError):
        cache.update(*nan_in(states(40)), 2)
    assert fingerprint(cache) == fingerprint(fresh)
    for each in (cache, fresh):
        feed(each, 40)
        feed(each, 1)
    assert fingerprint(cache) == fingerprint(fresh)


def test_a_first_forward_that_fails_does_not_end_the_recording() -> None:
    cache = NexusQuantCache("balanced", config=tiny_config(num_hidden_layers=LAYERS), **SMALL)
    cache.activate_past_recording()
    for index in range(2):
        cache.update(*states(60, index), index)
    with pytest.raises(NonFiniteError):
        cache.update(*nan_in(states(60)), 2)
    feed(cache, 60)
    assert [layer.state.kept for layer in cache.layers] == [60] * LAYERS
    cache.crop(-3)
    assert all(layer.state.kept < 57 for layer in cache.layers)


def test_a_first_forward_that_fails_half_compressed_changes_nothing() -> None:
    cache, fresh = (NexusQuantCache("balanced", when="during_prefill", **SMALL) for _ in range(2))
    for index in range(2):
        feeding.feed(cache, *states(60, index), index)
    with pytest.raises(NonFiniteError):
        cache.update(*nan_in(states(60)), 2)
    for each in (cache, fresh):
        feed(each, 60)
        feed(each, 1)
    assert fingerprint(cache) == fingerprint(fresh)


def test_operations_on_an_empty_cache_do_nothing() -> None:
    for cache in (NexusQuantCache(), NexusQuantCache(config=tiny_config())):
        cache.crop(-3)
        cache.compress()
        cache.reorder_cache(torch.tensor([0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0]))
        cache.reset()
        assert cache.get_seq_length() == 0
        assert all(layer.keys is None and layer.values is None for layer in cache.layers)


def test_a_forward_without_tokens_is_another_prompt() -> None:
    cache = prompted(60)
    with pytest.raises(CacheStateError, match=r"has seen 60:.*cache.reset\(\)"):
        cache.get_mask_sizes(0, 0)


def test_a_refused_batch_does_not_decide_about_the_next() -> None:
    """Rows that begin differently cannot be told from padded ones; what is refused is forgotten."""
    cache = prompted()
    keys, values = states(60)
    keys[1, :, 0] += 1
    with pytest.raises(NonFiniteError):
        cache.update(*nan_in((keys, values)), 0)
    feed(cache, 60)
    cache.compress()
    assert cache.layers[0].state.kept < 60
