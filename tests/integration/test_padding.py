"""Padded batches: every row is served as if it were alone, wherever the padding is."""

import itertools
from math import ceil
from typing import Any

import pytest
import torch
from feeding import feed
from integration.families import build
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
from transformers import DynamicCache, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from grids import combined
from nexusquant_cache import EvictionPolicy, NexusQuantCache, OptionError, ScoreInputs, ShapeError
from nexusquant_cache.releases import CACHE

TOKENS = 60
SINKS, RESIDUAL, LEAST = SMALL["sink_tokens"], SMALL["residual_length"], SMALL["min_tokens"]
# Pads of each row of 60 tokens: rows with 50 to 10 candidates, one that fits into sinks and residual, one that fits
# into the residual, and one token alone.
PADS = [(0, 5, 20), (0, 25, 40), (2, 0, 49), (0, 51, 55), (3, 59, 58)]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return with_pad_embedding(tiny_llama(request.param))


def with_pad_embedding(model: PreTrainedModel) -> Any:
    """Give pads an embedding: nn.Embedding starts them at zero, which would hide mistakes."""
    with torch.no_grad():
        # The same in every run: with some numbers a vector stands between two codes, and rounding decides.
        drawn = torch.randn(3, TINY["hidden_size"], generator=torch.Generator().manual_seed(1))
        model.get_input_embeddings().weight[:3] = drawn
    return model


def padded(pads: tuple[int, ...], pad: int = 0, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Return ids and mask of a batch whose rows have these numbers of pads on the left."""
    ids, mask = prompt(tokens, len(pads)), torch.ones(len(pads), tokens, dtype=torch.int64)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = pad, 0
        ids[row, min(count, tokens - 1)] = TINY["bos_token_id"]
    return ids, mask


def answers(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: object, tokens: int = 24, **options: Any
) -> list[Tensor]:
    """Return new tokens and the logits they were chosen by."""
    options |= {"attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    out = generate(model, ids, cache, tokens, **options)
    return [out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)]


def seen_positions(cache: NexusQuantCache, layer_idx: int, row: int, head: int) -> list[int]:
    """Return the positions of the packed tokens that a head of a row attends to."""
    body = cache.layers[layer_idx].state.body
    kept, visible = body.positions.positions(torch.device("cpu")), body.positions.visible()
    if kept.ndim == 1:  # all heads have the same
        return kept.tolist()
    return kept[row, head].tolist() if visible is None else kept[row, head][visible[row, head]].tolist()


# Left padding


@combined(pads=PADS, preset=["quant", "balanced"], when=["post_prefill", "during_prefill"])
def test_the_pad_token_changes_no_logit(model: LlamaForCausalLM, pads: Any, preset: str, when: str) -> None:
    """Not by a bit: pads receive no attention, and neither statistics nor scores see them."""
    results = []
    for pad in (0, 2):
        ids, mask = padded(pads, pad)
        cache = NexusQuantCache(preset, config=model.config, when=when, **SMALL)
        results.append(answers(model, ids, mask, cache))
        assert all(layer.state.body is not None for layer in cache.layers)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@combined(keep_ratio=[1.0, 0.5, 0.2], with_config=[False, True], pads=[(0, 5, 20), (18, 0, 30), (0, 1, 2)])
def test_a_row_equals_that_row_alone(model: LlamaForCausalLM, pads: Any, with_config: bool, keep_ratio: float) -> None:
    """With the real codec: sinks, scores, statistics, rotary positions and kept counts are those of the row alone.

    Which rotation keys have is given: of its own accord a cache asks the longest rows.
    """
    ids, mask = padded(pads)
    config = model.config if with_config else None
    options = SMALL | {"keep_ratio": keep_ratio, "transform": "principal"}
    make = lambda: NexusQuantCache("balanced", config=config, **options)  # noqa: E731
    cache = make()
    together = answers(model, ids, mask, cache)
    for row, count in enumerate(pads):
        single = make()
        alone = answers(model, ids[row : row + 1, count:], mask[row : row + 1, count:], single)
        for layer_idx, head in itertools.product(range(2), range(2)):
            kept, expected = (seen_positions(*args, head) for args in ((cache, layer_idx, row), (single, layer_idx, 0)))
            assert [at - count for at in kept if at >= count] == expected
        assert torch.equal(alone[0][0], together[0][row])
        assert (alone[1][0] - together[1][row]).abs().max() < ROUNDING


@pytest.mark.parametrize("pads", PADS)
def test_keeping_all_without_loss_is_the_plain_cache(model: LlamaForCausalLM, pads: Any) -> None:
    ids, mask = padded(pads)
    given, expected = (answers(model, ids, mask, each) for each in (lossless_cache(model.config), DynamicCache()))
    assert torch.equal(given[0], expected[0])
    assert (given[1] - expected[1]).abs().max() < ROUNDING


@pytest.mark.parametrize("pads", PADS)
def test_a_row_keeps_what_it_would_alone_and_no_pad(model: LlamaForCausalLM, pads: Any) -> None:
    """Half of its candidates, on average over heads, or all if they are fewer than are ever coded alone."""
    ids, mask = padded(pads)
    cache = NexusQuantCache("quant", config=model.config, **(SMALL | {"keep_ratio": 0.5}))
    answers(model, ids, mask, cache, 2)
    for row, count in enumerate(pads):
        candidates = max(TOKENS - count - SINKS - RESIDUAL, 0)
        kept = [seen_positions(cache, layer_idx, row, head) for layer_idx in range(2) for head in range(2)]
        assert sum(map(len, kept)) == 4 * (ceil(candidates / 2) if candidates >= LEAST else candidates)
        assert all(at >= count + SINKS for positions in kept for at in positions)


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
    """The pad token makes no difference to any beam or sample."""
    results = []
    for pad in (0, 2):
        ids, mask = padded((0, 9, 31), pad)
        cache = NexusQuantCache("balanced", config=model.config, **SMALL)
        torch.manual_seed(3)
        results.append(generate(model, ids, cache, 24, attention_mask=mask, **options)[:, TOKENS:])
    assert torch.equal(*results)


def test_all_rows_padded_and_no_positions_given(model: LlamaForCausalLM) -> None:
    """As where a tokenizer pads to a multiple, in a loop of one's own: keys are turned further, which is no matter."""
    pads, text = 96, prompt(160)
    ids = torch.cat([torch.full((1, pads), 2), text], 1)
    mask = (torch.arange(pads + 160) >= pads).long()[None]
    found, alone = (lossless_cache(model.config, keep_ratio=0.5) for _ in range(2))
    with torch.no_grad():
        for step in range(6):
            given = model(input_ids=ids, attention_mask=mask, **{CACHE: found}).logits[:, -1]
            expected = model(input_ids=text, **{CACHE: alone}).logits[:, -1]
            assert (given - expected).abs().max() < 10 * ROUNDING  # of angles, too
            ids = text = torch.tensor([[7 + step]])
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for layer_idx, head in itertools.product(range(2), range(2)):
        kept = seen_positions(found, layer_idx, 0, head)
        assert [at - pads for at in kept] == seen_positions(alone, layer_idx, 0, head)
    assert found.layers[0].state.kept < 100


# Padding anywhere, in any turn


def opt() -> OPTForCausalLM:
    """Return a random OPT: positions are learned, so that keys do not show them."""
    torch.manual_seed(7)
    sizes = {name: TINY[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    special = {name: TINY[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = OPTConfig(word_embed_proj_dim=64, ffn_dim=96, init_std=0.15, dropout=0.0, **sizes, **special)
    return OPTForCausalLM(config).eval().requires_grad_(requires_grad=False)


MODELS = {
    "llama": lambda: with_pad_embedding(tiny_llama("sdpa")),
    "llama, eager": lambda: with_pad_embedding(tiny_llama("eager")),
    "gpt2": lambda: build("gpt2"),
    "opt": opt,
    "qwen2_vl": lambda: build("qwen2_vl"),  # positions of three axes
}


@pytest.fixture(scope="module", params=MODELS)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


def compressed_prefix(model: PreTrainedModel, text: Tensor, cache: Any) -> Any:
    """Return a cache that has read a text, which it has compressed."""
    with torch.no_grad():
        model(input_ids=text, **{CACHE: cache})
    cache.compress()
    return cache


@pytest.mark.parametrize("pads", [1, 8])
def test_questions_of_different_length_about_one_text(any_model: PreTrainedModel, pads: int) -> None:
    """A compressed text, given to two rows, and questions padded on the left: each row gets its own answer."""
    text = prompt(120, seed=1) % 240 + 3
    questions = [prompt(20, seed=10)[:, 1:] % 240 + 3, prompt(20 - pads, seed=11)[:, 1:] % 240 + 3]
    rows = [torch.cat([text, torch.zeros(1, 19 - q.shape[1], dtype=torch.long), q], 1) for q in questions]
    ids, mask = torch.cat(rows), torch.ones(2, 139, dtype=torch.long)
    mask[1, 120 : 120 + pads] = 0

    def make() -> Any:
        return compressed_prefix(any_model, text, lossless_cache(any_model.config, keep_ratio=0.5))

    alone = []
    for question in questions:
        whole = torch.cat([text, question], 1)
        alone.append(answers(any_model, whole, torch.ones_like(whole), make(), 8))
    cache = make()
    cache.batch_repeat_interleave(2)
    found = answers(any_model, ids, mask, cache, 8)
    for row, (tokens, logits) in enumerate(alone):
        assert torch.equal(found[0][row], tokens[0])
        assert (found[1][row] - logits[0]).abs().max() < 1e-4
    assert cache.memory_report().kept_tokens < 0.7 * cache.get_seq_length()


class Reader:
    """A model and a cache that read turns padded anywhere, with the positions of the text alone."""

    def __init__(self, model: PreTrainedModel, cache: Any, rows: int) -> None:
        self.model, self.cache = model, cache
        self.real = torch.ones(rows, 0, dtype=torch.bool)

    @torch.no_grad()
    def read(self, ids: Tensor, real: Tensor) -> list[Tensor]:
        """Return of each row the logits of the tokens that are no padding."""
        self.real = torch.cat([self.real, real], 1)
        positions = self.real.long().cumsum(1).sub(1).clamp_min(0)[:, -ids.shape[1] :]
        if self.model.config.model_type == "qwen2_vl":
            positions = positions.expand(3, -1, -1)  # time, height, width
        mask = self.real.long()
        logits = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: self.cache}).logits
        return [logits[row, real[row]] for row in range(len(ids))]


# From where to where each row is padded, turn by turn; turns of one token are generated.
TURNS: dict[str, list[tuple[int, list[tuple[int, int]]]]] = {
    "left": [
        (60, [(0, 0), (0, 7)]),
        (1, []),
        (30, [(0, 9), (0, 0)]),
        (1, []),
        (1, []),
        (40, [(0, 3), (0, 12)]),
        (1, []),
    ],
    "inner": [(60, [(20, 35), (0, 0)]), (1, []), (1, []), (40, [(10, 20), (3, 8)]), (1, []), (1, [])],
    "gone on": [(60, [(0, 0), (0, 20)]), (20, [(0, 0), (5, 9)]), (1, []), (1, []), (1, [])],
}


@pytest.mark.parametrize("where", TURNS)
def test_each_row_is_served_as_if_alone(any_model: PreTrainedModel, where: str) -> None:
    """Also in later turns, and where attention has to skip padding in the middle: what is kept and what comes out."""
    make = lambda: lossless_cache(any_model.config, keep_ratio=0.5)  # noqa: E731 - short and used twice
    batch, alone = Reader(any_model, make(), 2), [Reader(any_model, make(), 1) for _ in range(2)]
    for seed, (tokens, pads) in enumerate(TURNS[where]):
        ids, real = prompt(tokens, 2, seed) % 240 + 3, torch.ones(2, tokens, dtype=torch.bool)
        for row, (start, stop) in enumerate(pads):
            real[row, start:stop] = False
        found = batch.read(ids, real)
        for row, reader in enumerate(alone):
            (expected,) = reader.read(ids[row, real[row]][None], torch.ones(1, int(real[row].sum()), dtype=torch.bool))
            assert (found[row] - expected).abs().max() < 1e-4
    assert batch.cache.layers[0].state.kept < 0.75 * batch.cache.get_seq_length()


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
def test_padding_on_the_right(any_model: PreTrainedModel, keep_ratio: float) -> None:
    """No pad makes a difference, in a prompt or a later turn; without eviction all is as with the plain cache."""
    results = []
    for kind, pad in (("ours", 0), ("ours", 2), ("plain", 0)):
        cache = lossless_cache(any_model.config, keep_ratio=keep_ratio) if kind == "ours" else DynamicCache()
        reader, found = Reader(any_model, cache, 3), []
        for seed, (tokens, pads) in enumerate(((60, (0, 9, 31)), (1, ()), (1, ()), (30, (12, 0, 3)), (1, ()), (1, ()))):
            ids, real = prompt(tokens, 3, seed) % 240 + 3, torch.ones(3, tokens, dtype=torch.bool)
            for row, count in enumerate(pads):
                ids[row, tokens - count :], real[row, tokens - count :] = pad, False
            found += reader.read(ids, real)
        results.append(found)
    ours, other, plain = results
    assert all(torch.equal(x, y) for x, y in zip(ours, other, strict=True))
    if keep_ratio == 1:
        assert all((x - y).abs().max() < 1e-4 for x, y in zip(ours, plain, strict=True))


def test_a_row_that_finishes_early(model: LlamaForCausalLM) -> None:
    """What `generate` fills it with is hidden in the next turn, and the answer is that of the plain cache."""
    ids, mask = padded((0, 9))
    first = generate(model, ids, DynamicCache(), 12, attention_mask=mask)
    stop = int(first[0, TOKENS + 3])  # the fourth new token of the first row ends its answer
    results = []
    for cache in (DynamicCache(), lossless_cache(model.config)):
        text = generate(model, ids, cache, 12, attention_mask=mask, eos_token_id=stop)
        stops = text[:, TOKENS:] == stop
        real = (stops.long().cumsum(1) - stops.long() == 0).long()  # up to the end of the answer
        assert real[0].sum() < real.shape[1]
        ended = torch.cat([mask, real], 1)
        text = torch.cat([text, prompt(30, 2, seed=5)], 1)
        full = torch.nn.functional.pad(ended, (0, 30), value=1)
        results.append(answers(model, text, full, cache, 12))
    assert torch.equal(results[0][0], results[1][0])
    assert (results[0][1] - results[1][1]).abs().max() < ROUNDING


# The mask that the constructor takes


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mask", "message"), [(torch.ones(2, 1, 3, 3), r"got shape \(2, 1, 3, 3\)"), ([[1, 1]], "got list")]
)
def test_what_is_no_mask_of_a_prompt(mask: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        NexusQuantCache(attention_mask=mask)


@pytest.mark.parametrize("shape", [(2, 60), (3, 59), (1, 61)])
def test_a_mask_of_another_prompt(shape: tuple[int, int]) -> None:
    cache = NexusQuantCache(attention_mask=torch.ones(shape))

    def read() -> None:
        for tokens in (60, 1):  # a longer mask may be that of a prompt in chunks, until the first step
            cache.update(*random_states((3, 2, tokens, 16), 0), 0)

    with pytest.raises(ShapeError, match=r"attention_mask has the shape \[\d, \d\d\], and the prompt is \[3, 60\]"):
        read()


def test_a_mask_is_not_needed(model: LlamaForCausalLM) -> None:
    """It is checked and makes no difference; of another prompt, after a reset, nothing is known."""
    ids, mask = padded((0, 5, 20))
    given = NexusQuantCache("balanced", config=model.config, attention_mask=mask, **SMALL)
    without = NexusQuantCache("balanced", config=model.config, **SMALL)
    results = [answers(model, ids, mask, cache) for cache in (given, without)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    given.reset()
    generate(model, prompt(40), given, 2)


# What policies see


class Spy(EvictionPolicy):
    """Notes what it is shown."""

    wants_queries = True  # in place of the property

    def __init__(self) -> None:
        self.seen: list[ScoreInputs] = []

    def score(self, inputs: ScoreInputs) -> Tensor:
        self.seen.append(inputs)
        return inputs.keys[..., 0]


@pytest.mark.parametrize("pads", list(itertools.product((0, 3, 24), repeat=2)))
@pytest.mark.parametrize("start", [0, 30, TOKENS])
def test_a_policy_sees_rows_without_their_pads(pads: tuple[int, int], start: int) -> None:
    """Wherever they are: on the left, inside, on the right.  Rows with the same pads are shown together."""
    policy = Spy()
    cache = lossless_cache(policy=policy, keep_ratio=0.5)
    keys, values = random_states((2, 2, TOKENS, 16), 0)
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    for row, count in enumerate(pads):
        real[row, min(start, TOKENS - count) :][:count] = False
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    feed(cache, keys, values, 0, mask=(real[:, None] & causal)[:, None])
    cache.compress()
    shown = {inputs.keys.shape[2]: inputs for inputs in policy.seen}
    assert sorted(shown) == sorted({TOKENS - count for count in pads})
    for count in set(pads):
        inputs, rows = shown[TOKENS - count], [row for row in range(2) if pads[row] == count]
        text = real[rows[0]]
        assert torch.equal(inputs.keys, keys[rows][:, :, text])
        assert torch.equal(inputs.values, values[rows][:, :, text])
        assert torch.equal(inputs.queries, keys[rows].repeat_interleave(2, 1)[:, :, text])  # as `feed` has them
        assert torch.equal(inputs.positions, torch.arange(TOKENS - count))
        last = int(text[: TOKENS - RESIDUAL].sum())  # what comes later is recent
        assert inputs.protected.nonzero()[:, 0].tolist() == [0, 1, *range(last, TOKENS - count)]
