"""Left-padded batches: every row is served as if it were alone."""

import itertools
from math import ceil
from typing import Any

import pytest
import torch
from integration.tiny import (
    ROUNDING,
    SMALL,
    TINY,
    generate,
    lossless_cache,
    prompt,
    random_states,
    tiny_llama,
)
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from grids import combined
from nexusquant_cache import (
    CacheStateError,
    EvictionPolicy,
    NexusQuantCache,
    OptionError,
    ScoreInputs,
    ShapeError,
    UnsupportedError,
)
from nexusquant_cache.layer.padding import BatchPadding, leading_pads
from nexusquant_cache.releases import CACHE

TOKENS = 60
SINKS, RESIDUAL = SMALL["sink_tokens"], SMALL["residual_length"]
# Pads of each row of 60 tokens.  With half of 50 candidates evicted: none kept, some kept, a row that fits into
# sinks and residual, one that fits into the residual, and one token alone.
PADS = [(0, 5, 20), (0, 25, 40), (2, 0, 49), (0, 51, 55), (3, 59, 58)]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return with_pad_embedding(tiny_llama(request.param))


def with_pad_embedding(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give pads an embedding: nn.Embedding starts them at zero, which would hide mistakes."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:3] = torch.randn(3, TINY["hidden_size"])
    return model


def padded(pads: tuple[int, ...], pad: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Return ids and mask of a batch whose rows have these numbers of pads."""
    ids, mask = prompt(tokens, len(pads)), torch.ones(len(pads), tokens, dtype=torch.int64)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = pad, 0
        ids[row, min(count, tokens - 1)] = TINY["bos_token_id"]
    return ids, mask


def answers(
    model: LlamaForCausalLM, ids: Tensor, mask: Tensor, cache: object, tokens: int = 24
) -> tuple[Tensor, Tensor]:
    """Return new tokens and the logits they were chosen by."""
    out = generate(model, ids, cache, tokens, attention_mask=mask, output_logits=True, return_dict_in_generate=True)
    return [out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)]


@combined(pads=PADS, preset=["quant", "balanced"], when=["post_prefill", "during_prefill"])
def test_the_pad_token_changes_no_logit(model: LlamaForCausalLM, pads: Any, preset: str, when: str) -> None:
    """Not by a bit: pads receive no attention, and neither statistics nor scores see them."""
    results = []
    for pad in (0, 2):
        ids, mask = padded(pads, pad)
        cache = NexusQuantCache(preset, config=model.config, attention_mask=mask, when=when, **SMALL)
        results.append(answers(model, ids, mask, cache))
        assert all(layer.state.body is not None for layer in cache.layers)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@combined(keep_ratio=[1.0, 0.5, 0.2], with_config=[False, True], pads=[(0, 5, 20), (18, 0, 30), (0, 1, 2)])
def test_a_row_equals_that_row_alone_with_the_same_kept_count(
    model: LlamaForCausalLM, pads: Any, with_config: bool, keep_ratio: float
) -> None:
    """With the real codec: sinks, scores, statistics and rotary positions are those of the row alone."""
    ids, mask = padded(pads)
    config = model.config if with_config else None
    settings = SMALL | {"keep_ratio": keep_ratio}
    cache = NexusQuantCache("balanced", config=config, attention_mask=mask, **settings)
    together = answers(model, ids, mask, cache)
    kept = ceil(keep_ratio * (TOKENS - SINKS - RESIDUAL))
    for row, count in enumerate(pads):
        candidates = TOKENS - count - SINKS - RESIDUAL
        settings["keep_ratio"] = min(kept / candidates, 1.0)
        single = NexusQuantCache("balanced", config=config, **settings)
        alone = answers(model, ids[row : row + 1, count:], mask[row : row + 1, count:], single)
        real = min(kept, candidates)
        coded = [each.layers[0].state.body.positions.tokens for each in (single, cache)]
        assert coded[0] - real == coded[1] - kept
        assert torch.equal(alone[0][0], together[0][row])
        assert (alone[1][0] - together[1][row]).abs().max() < ROUNDING


@pytest.mark.parametrize("pads", PADS)
def test_keeping_all_without_loss_is_the_plain_cache(model: LlamaForCausalLM, pads: Any) -> None:
    ids, mask = padded(pads)
    cache = lossless_cache(model.config, attention_mask=mask)
    given, expected = (answers(model, ids, mask, each) for each in (cache, DynamicCache()))
    assert torch.equal(given[0], expected[0])
    assert (given[1] - expected[1]).abs().max() < ROUNDING


@pytest.mark.parametrize("pads", PADS)
def test_no_real_token_is_evicted_before_the_last_pad(model: LlamaForCausalLM, pads: Any) -> None:
    """25 of 50 candidates go; a row with 25 pads or more keeps all its text, one with fewer loses less for each."""
    ids, mask = padded(pads)
    cache = NexusQuantCache("quant", config=model.config, attention_mask=mask, **(SMALL | {"keep_ratio": 0.5}))
    answers(model, ids, mask, cache, 2)
    for layer in cache.layers:
        body = layer.state.body.positions.positions(torch.device("cpu"))
        for row, count in enumerate(pads):
            place = layer.state.sink_place[row]
            for head in body[row]:
                real = int((head >= count).sum())
                in_sinks = max(SINKS - max(count - int(place[0]), 0), 0)
                in_tail = min(RESIDUAL + 1, TOKENS - count + 1)
                text = TOKENS - count + 1
                assert real + in_sinks + in_tail == text - max(25 - count, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prefill_chunk_size": 16},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
    ],
)
def test_other_ways_to_generate(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    """Each row of the mask stands for all its beams or samples; the pad token makes no difference to any."""
    results = []
    for pad in (0, 2):
        ids, mask = padded((0, 9, 31), pad)
        cache = NexusQuantCache("balanced", config=model.config, attention_mask=mask, **SMALL)
        torch.manual_seed(3)
        results.append(generate(model, ids, cache, 24, attention_mask=mask, **options)[:, TOKENS:])
    assert torch.equal(*results)


def test_a_second_turn_of_several_tokens(model: LlamaForCausalLM) -> None:
    """The full mask is given; turns are of equal length."""
    results = []
    for pad in (0, 2):
        ids, mask = padded((0, 25, 51), pad)
        cache = NexusQuantCache("balanced", config=model.config, attention_mask=mask, **SMALL)
        text = generate(model, ids, cache, 12, attention_mask=mask)
        text = torch.cat([text, prompt(30, 3, seed=5)], 1)
        full = torch.cat([mask, torch.ones(3, text.shape[1] - TOKENS, dtype=torch.int64)], 1)
        results.append(generate(model, text, cache, 12, attention_mask=full)[:, TOKENS:])
        assert cache.layers[0].state.kept < 0.8 * cache.layers[0].state.seen
    assert torch.equal(*results)


# Recognised without a mask


def recognised(keys: Tensor, chunk: int | None = None) -> BatchPadding:
    padding = BatchPadding()
    values = keys[..., :8] * 2
    for start in range(0, keys.shape[2], chunk or keys.shape[2]):
        part = slice(start, start + (chunk or keys.shape[2]))
        padding.observe(keys[:, :, part], values[:, :, part], start, position_shows=True)
    return padding


def rotary_keys(model: LlamaForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the keys that the first layer computes for a batch, as `generate` gives it positions."""
    cache = DynamicCache()
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
    return cache.layers[0].keys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "pads", [(0, 0, 0), (0, 1, 5), (2, 7, 0), (1, 0, 1), (0, 3, 3), (40, 0, 2), (59, 0, 1), (2,), (30,), (0,), (0, 1)]
)
@pytest.mark.parametrize("chunk", [None, 7, 1])
def test_recognised_exactly_where_texts_begin_alike(pads: Any, dtype: torch.dtype, chunk: int | None) -> None:
    """Single pads too: the key behind one equals another row's first key, both being at position 0."""
    model = with_pad_embedding(tiny_llama()).to(dtype)
    ids, mask = padded(pads)
    padding = recognised(rotary_keys(model, ids, mask), chunk)
    found = [0] * len(pads) if padding.pads is None else padding.pads.tolist()
    assert (found, padding.certain) == (list(pads), True)
    assert padding.settled_at is not None
    assert padding.beginning is None


def test_repeated_text_is_not_padding() -> None:
    """Equal tokens at consecutive positions differ by a rotary step."""
    model = with_pad_embedding(tiny_llama())
    ids = torch.full((2, 20), 9)
    padding = recognised(rotary_keys(model, ids, torch.ones_like(ids)))
    assert (padding.pads, padding.certain) == (None, True)


def texts_that_begin_differently() -> Tensor:
    keys, _ = random_states((2, 2, 20, 16), 1)
    keys[1, :, 0] += 1
    return keys


def test_what_cannot_be_told() -> None:
    """Rows that begin differently may hide one pad; a text may begin with the pad's own token."""
    assert not recognised(texts_that_begin_differently()).certain
    model = with_pad_embedding(tiny_llama())
    ids, mask = padded((0, 3))
    ids[0, 0] = ids[1, 3] = 0  # both texts begin with the pad's token
    assert not recognised(rotary_keys(model, ids, mask)).certain
    ids, mask = padded((2, 3))
    ids[0, :2] = 2  # two different pads
    assert not recognised(rotary_keys(model, ids, mask)).certain


def test_nothing_is_told_where_positions_do_not_show() -> None:
    padding = BatchPadding()
    keys, values = random_states((2, 2, 20, 16), 1)
    keys[0, :, 1], values[0, :, 1] = keys[0, :, 0], values[0, :, 0]
    padding.observe(keys, values, 0, position_shows=False)
    assert not padding.certain
    alone = BatchPadding()
    alone.observe(keys[:1], values[:1], 0, position_shows=False)
    assert (alone.pads, alone.certain) == (None, True)


@pytest.mark.parametrize("pads", [(0, 5, 20), (0, 1, 51)])
def test_recognised_is_as_good_as_stated(model: LlamaForCausalLM, pads: Any) -> None:
    ids, mask = padded(pads)
    stated = NexusQuantCache("balanced", config=model.config, attention_mask=mask, **SMALL)
    unstated = NexusQuantCache("balanced", config=model.config, **SMALL)
    results = [answers(model, ids, mask, cache) for cache in (stated, unstated)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(stated.shared.padding.pads, unstated.shared.padding.pads)


def test_a_batch_that_cannot_be_told_is_kept_whole_with_a_warning(model: LlamaForCausalLM) -> None:
    """One pad, and texts that begin differently: with no loss in coding, the answers are those of the plain cache."""
    ids, mask = prompt(TOKENS, 2), torch.ones(2, TOKENS, dtype=torch.int64)
    ids[1, 0], mask[1, 0] = 0, 0
    plain = generate(model, ids, DynamicCache(), attention_mask=mask)
    cache = lossless_cache(keep_ratio=0.3)
    with pytest.warns(UserWarning, match="cannot be told which tokens of this batch are padding"):
        given = generate(model, ids, cache, attention_mask=mask)
    assert torch.equal(plain, given)
    assert all(layer.state.body is not None and layer.state.kept == layer.state.seen for layer in cache.layers)


def test_the_warning_comes_once_and_not_where_nothing_would_be_evicted(recwarn: pytest.WarningsRecorder) -> None:
    keys = texts_that_begin_differently()
    for keep_ratio, warned in ((1.0, 0), (0.5, 1)):
        cache = NexusQuantCache("quant", **(SMALL | {"keep_ratio": keep_ratio, "min_tokens": 4, "sink_tokens": 0}))
        for _ in range(3):
            cache.update(keys + 1, keys, 0)
            cache.update(keys[:, :, :1], keys[:, :, :1], 0)
        assert len(recwarn) == warned


# Stated


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[0, 1, 1], [1, 1, 0]]), "zeros, then ones.*padding_side = 'left'"),
        (torch.tensor([[0, 1, 0, 1]]), "zeros, then ones"),
        (torch.ones(2, 1, 3, 3), r"got shape \(2, 1, 3, 3\)"),
        ([[1, 1]], "got list"),
    ],
)
def test_a_mask_that_is_not_left_padding(mask: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        NexusQuantCache(attention_mask=mask)
    with pytest.raises(OptionError, match=message):
        NexusQuantCache().set_attention_mask(mask)


def test_pads_of_a_mask() -> None:
    assert leading_pads(torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]])).tolist() == [2, 0, 3]
    assert leading_pads(torch.tensor([[False, True]])).tolist() == [1]


def test_a_mask_of_another_batch() -> None:
    cache = NexusQuantCache(attention_mask=torch.ones(2, 60))
    with pytest.raises(ShapeError, match="attention_mask has 2 rows, and the batch has 3"):
        cache.update(*random_states((3, 2, 60, 16), 0), 0)
    cache.update(*random_states((4, 2, 60, 16), 0), 0)
    with pytest.raises(ShapeError, match="attention_mask has 3 rows, and the batch has 4"):
        cache.set_attention_mask(torch.ones(3, 60))


def test_a_mask_that_comes_later() -> None:
    """Before the first compression it is as good as at construction; afterwards it may only agree."""
    ids_mask = padded((0, 9))[1]
    states = random_states((2, 2, TOKENS, 16), 0)
    cache = NexusQuantCache("balanced", **SMALL)
    cache.update(*states, 0)
    cache.set_attention_mask(ids_mask)
    assert cache.shared.padding.pads.tolist() == [0, 9]
    cache.update(*random_states((2, 2, 1, 16), 1), 0)
    cache.set_attention_mask(torch.nn.functional.pad(ids_mask, (0, 1), value=1))
    with pytest.raises(CacheStateError, match="says otherwise"):
        cache.set_attention_mask(torch.ones(2, 61))


def test_reset_forgets_the_mask() -> None:
    cache = NexusQuantCache("balanced", attention_mask=torch.ones(2, 60), **SMALL)
    cache.reset()
    cache.update(*random_states((3, 2, 60, 16), 0), 0)
    assert cache.shared.padding.stated is None


# What policies and codecs see


class Spy(EvictionPolicy):
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[ScoreInputs] = []

    def score(self, inputs: ScoreInputs) -> Tensor:
        self.seen.append(inputs)
        return inputs.keys[..., 0]


@pytest.mark.parametrize("pads", list(itertools.product((0, 3, 24), repeat=2)))
def test_a_policy_sees_rows_without_their_pads(pads: tuple[int, int]) -> None:
    policy = Spy()
    mask = padded(pads)[1]
    cache = NexusQuantCache("balanced", policy=policy, attention_mask=mask, **(SMALL | {"keep_ratio": 0.5}))
    keys, values = random_states((2, 2, TOKENS, 16), 0)
    cache.update(keys, values, 0)
    cache.compress()
    shown = {inputs.keys.shape[2]: inputs for inputs in policy.seen}
    assert sorted(shown) == sorted({TOKENS - count for count in pads})
    for count in set(pads):
        inputs, rows = shown[TOKENS - count], [row for row in range(2) if pads[row] == count]
        assert torch.equal(inputs.keys, keys[rows][:, :, count:])
        assert torch.equal(inputs.values, values[rows][:, :, count:])
        assert torch.equal(inputs.positions, torch.arange(TOKENS - count))
        protected = [0, 1, *range(TOKENS - count - RESIDUAL, TOKENS - count)]
        assert inputs.protected.nonzero()[:, 0].tolist() == protected


# Padding inside a conversation


def test_a_padded_later_turn_is_refused_once_tokens_are_gone(model: LlamaForCausalLM) -> None:
    """transformers' mask would hide the columns of evicted tokens; while all are kept it is right."""
    ids, mask = padded((0, 9))
    later = torch.ones(2, 12 + 30, dtype=torch.int64)
    later[1, 12:17] = 0
    full = torch.cat([mask, later], 1)
    turn = prompt(30, 2, seed=5)
    turn[1, :5] = 0
    answered = {}
    for name, cache in (("plain", DynamicCache()), ("whole", lossless_cache(model.config, attention_mask=mask))):
        text = torch.cat([generate(model, ids, cache, 12, attention_mask=mask), turn], 1)
        answered[name] = generate(model, text, cache, 8, attention_mask=full)
    assert torch.equal(answered["plain"], answered["whole"])
    cache = NexusQuantCache("balanced", config=model.config, attention_mask=mask, **SMALL)
    text = torch.cat([generate(model, ids, cache, 12, attention_mask=mask), turn], 1)
    with pytest.raises(UnsupportedError, match="this turn looks padded"):
        generate(model, text, cache, 8, attention_mask=full)
