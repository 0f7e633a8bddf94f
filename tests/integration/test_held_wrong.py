"""Held in other ways than the documents show: gradients, loops of one's own, interrupts at any line, edits, copies.

**The law.**  Each gives the answer of the plain cache, or says what to do; never another answer in silence.
"""

import copy
import importlib
import inspect
import linecache
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
import transformers
from feeding import feed
from integration.tiny import (
    ROUNDING,
    SMALL,
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
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import nexusquant_cache
from nexusquant_cache import (
    CacheConfig,
    CacheStateError,
    KeyNormPolicy,
    NexusQuantCache,
    OptionError,
    PrefixStore,
    ShapeError,
    UnsupportedError,
    attention,
    compressed_generation,
    register_codec,
)
from nexusquant_cache.cache.forward import Forward
from nexusquant_cache.cache.leaving import left_by
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.layer import budget
from nexusquant_cache.releases import CACHE


def forward(model: PreTrainedModel, ids: Tensor, cache: object) -> Tensor:
    """Return logits in whatever grad mode there is."""
    return model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits


def step(token: int = 9) -> Tensor:
    return torch.tensor([[token]])


# Gradients


@pytest.fixture
def trained(model: LlamaForCausalLM) -> Iterator[LlamaForCausalLM]:
    """Return the model with gradients."""
    yield model.requires_grad_(requires_grad=True)
    model.requires_grad_(requires_grad=False)
    model.zero_grad()


def gradients(model: LlamaForCausalLM, out: Tensor) -> list[Tensor]:
    model.zero_grad()
    out.float().logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("with_config", [False, True])
def test_the_first_update_passes_gradients_like_the_plain_cache(trained: LlamaForCausalLM, with_config: bool) -> None:
    cache = NexusQuantCache("balanced", config=trained.config if with_config else None, **SMALL)
    given = gradients(trained, forward(trained, prompt(40), cache))
    expected = gradients(trained, forward(trained, prompt(40), DynamicCache()))
    assert len(given) == len(list(trained.parameters()))
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
    with torch.no_grad():
        assert not any(x.requires_grad for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_later_update_that_needs_gradients_is_refused(trained: LlamaForCausalLM, tokens: int, steps: int) -> None:
    """And changes nothing: without gradients the conversation goes on."""
    cache, other = (balanced(trained, when="post_prefill") for _ in range(2))
    for each in (cache, other):
        logits(trained, prompt(60), each)
        for _ in range(steps):
            logits(trained, step(), each)
    before = fingerprint(cache)
    with pytest.raises(UnsupportedError, match=r"carries no gradients, and layer 0 already holds 6\d tokens.*no_grad"):
        forward(trained, prompt(tokens, seed=1), cache)
    assert fingerprint(cache) == before
    assert torch.equal(logits(trained, prompt(tokens, seed=1), cache), logits(trained, prompt(tokens, seed=1), other))
    with torch.inference_mode():
        forward(trained, step(), cache)


def test_a_learned_prompt_gets_no_wrong_gradient(model: LlamaForCausalLM) -> None:
    """The model is frozen: the second forward needs gradients only for what was stored by the first."""
    soft = model.get_input_embeddings()(prompt(20)).detach().requires_grad_()
    cache = balanced(model)
    model(inputs_embeds=soft, **{CACHE: cache}, use_cache=True)
    with pytest.raises(UnsupportedError, match="carries no gradients, and layer 0 already holds 20 tokens"):
        forward(model, prompt(5, seed=1), cache)
    assert torch.isfinite(logits(model, prompt(5, seed=1), cache)).all()


@contextmanager
def only_queries_trained(model: LlamaForCausalLM) -> Iterator[nn.Parameter]:
    weight = model.model.layers[0].self_attn.q_proj.weight
    yield weight.requires_grad_()
    weight.requires_grad_(requires_grad=False)
    weight.grad = None


def query_gradient(model: LlamaForCausalLM, cache: object, *ids: Tensor) -> Tensor:
    """Read all but the last of some texts, and return the gradient that the last gives."""
    for each in ids[:-1]:
        logits(model, each, cache)
    with only_queries_trained(model) as weight:
        forward(model, ids[-1], cache).float().logsumexp(-1).sum().backward()
        return weight.grad.clone()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "nexusquant sdpa", "nexusquant eager"])
def test_queries_alone_get_their_gradient_from_exact_tokens_and_an_error_from_codes(implementation: str) -> None:
    """Keys and values are frozen, as where an adapter changes the queries only."""
    model = tiny_llama(implementation.removeprefix("nexusquant "), num_hidden_layers=1)
    if implementation.startswith("nexusquant"):
        attention.enable(model)
    turns = prompt(60), prompt(7, seed=1)
    expected = query_gradient(model, DynamicCache(), *turns)
    assert expected.abs().max() > 0.01
    exact = lossless_cache(model.config, when="post_prefill")
    torch.testing.assert_close(query_gradient(model, exact, *turns), expected)
    for tokens in (7, 40):  # few queries are answered from codes, of many more than that the tokens are decoded
        with pytest.raises(UnsupportedError, match=r"carries no gradients, and the attention to coded tokens.*no_grad"):
            query_gradient(model, lossless_cache(model.config), prompt(60), step(), prompt(tokens, seed=1))


def test_training_mode_without_gradients_is_as_ever(trained: LlamaForCausalLM) -> None:
    for grad in (torch.no_grad, torch.inference_mode):
        cache, plain = lossless_cache(trained.config), DynamicCache()
        with grad():
            for ids in (prompt(60), step(), step(10)):
                given, expected = (forward(trained, ids, each) for each in (cache, plain))
                torch.testing.assert_close(given, expected, rtol=0, atol=10 * ROUNDING)


# Loops without a one-token update


def speculate(model: LlamaForCausalLM, cache: Any, rounds: int, tokens: int = 4, reject: int = 2) -> list[Tensor]:
    """Check several candidates in each forward, and take back some."""
    out = []
    for seed in range(rounds):
        out.append(logits(model, prompt(tokens, seed=seed + 1), cache))
        cache.crop(-reject)
    return out


def test_a_speculative_loop_of_ones_own_is_compressed(model: LlamaForCausalLM) -> None:
    """At the second of two short updates; what comes then is coded by and by, and none of it evicted."""
    cache, plain = lossless_cache(model.config, keep_ratio=0.5), lossless_cache(model.config)
    logits(model, prompt(100), cache)
    logits(model, prompt(100), plain)
    assert cache.layers[0].state.is_whole
    speculate(model, cache, 1)
    assert cache.layers[0].state.is_whole
    speculate(model, cache, 1)
    # Of 92 + 4 - 2 candidates half stay, on average over the layers.
    assert sum(layer.state.kept for layer in cache.layers) == 2 * (2 + 46 + 8 + 2)
    speculate(model, cache, 40)
    assert sum(layer.state.kept for layer in cache.layers) == 2 * (58 + 80)
    for layer in cache.layers:
        assert layer.state.seen == 100 + 84
        assert layer.state.tail_tokens <= SMALL["residual_length"] + SMALL["flush_length"] + 4
        assert layer.state.turn.pending_from is None


def test_such_a_loop_loses_nothing_by_that(model: LlamaForCausalLM) -> None:
    cache, plain = lossless_cache(model.config), DynamicCache()
    expected = [[logits(model, prompt(100), each), *speculate(model, each, 30)] for each in (cache, plain)]
    for given, right in zip(*expected, strict=True):
        torch.testing.assert_close(given, right, rtol=0, atol=10 * ROUNDING)
    assert cache.layers[0].state.packed_tokens > 130


def shape_of(cache: NexusQuantCache) -> tuple[int, int, bool, int]:
    state = cache.layers[0].state
    return state.kept, state.tail_tokens, state.turn.is_pending, state.turn.short_updates


def after(*lengths: int, **options: Any) -> NexusQuantCache:
    """Return a cache that was given updates of these lengths; a negative one is a crop."""
    cache = lossless_cache(**({"keep_ratio": 0.5} | options))
    for seed, tokens in enumerate(lengths):
        if tokens < 0:
            cache.crop(tokens)
        else:
            feed(cache, *random_states((1, 2, tokens, 16), seed), 0)
    return cache


@pytest.mark.parametrize(
    ("lengths", "is_loop"),
    [
        ((100, 4), False),
        ((100, 4, 4), True),
        ((100, 4, -2, 3, -1), True),
        ((100, 99, 98), True),
        ((100, 4, 4, 1, 4), True),  # a single token does not end it
        ((100, 4, 4, 1, 1, 1), True),
        ((100, 4, 4, 100), False),  # as long as the longest
        ((100, 4, 4, 120, 110), False),
        ((100, 4, 4, 100, 4, 4), True),
        ((100, 4, 1, 4, 1, 4), False),  # turns, each of them answered
        ((100, 1, 30, 1, 50, 1, 20), False),
        ((16, 16, 16, 16, 7), False),  # chunks of a prompt
        ((16, 16, 16, 7, 1, 1, 16, 16, 3, 1), False),
        ((4, 4, 4, 4), False),
        ((1, 1, 1), False),
        ((100, -100, 4, 4), False),  # another prompt
        ((4, 100, 4), False),
    ],
)
def test_what_is_a_loop(lengths: tuple[int, ...], is_loop: bool) -> None:
    cache = after(*lengths)
    assert (cache.layers[0].state.turn.short_updates == 2) == is_loop


def test_chunks_of_a_prompt_wait_for_the_first_token() -> None:
    cache = after(24, 24, 24, 24, 10)
    assert shape_of(cache) == (106, 18, True, 1)  # all of them kept, as codes
    feed(cache, *random_states((1, 2, 1, 16), 9), 0)
    assert shape_of(cache)[:3] == (2 + 48 + 8 + 1, 9, False)


def test_a_turn_of_a_chat_waits_for_its_answer() -> None:
    """Turns shorter than the first one are evicted from like it, one after another."""
    cache = after(100, 1, 1, 30)
    assert shape_of(cache) == (2 + 45 + 8 + 2 + 30, 40, True, 1)
    feed(cache, *random_states((1, 2, 1, 16), 9), 0)
    # Of the first turn and of the second half each, and what was generated between them.
    assert shape_of(cache)[:3] == (2 + 45 + 10 + 11 + 8 + 1, 9, False)


def test_a_prompt_behind_a_loop_is_a_prompt_again() -> None:
    cache = after(60, 4, 4, 4, 4, 60)
    before = shape_of(cache)
    assert before[2]
    feed(cache, *random_states((1, 2, 1, 16), 9), 0)
    assert shape_of(cache)[0] == before[0] + 1 - 26


def test_a_loop_behind_a_prompt_that_was_encoded_early() -> None:
    """The first candidates are of the prompt, since nobody knows of the loop yet."""
    cache = after(100, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4)
    assert cache.layers[0].state.tail_tokens <= 8 + 4 + 4
    assert cache.layers[0].state.kept == 2 + 47 + 8 + 36


@pytest.mark.parametrize("lengths", [(100, 4), (100, 4, 4), (100, 4, 4, 1), (100, 1)])
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_an_error_takes_a_loops_update_back(lengths: tuple[int, ...], tokens: int) -> None:
    cache = NexusQuantCache("quant", config=tiny_config(), **SMALL)
    for seed, count in enumerate(lengths):
        for layer_idx in range(2):
            feed(cache, *random_states((1, 2, count, 16), seed), layer_idx)
    turns = [(layer.state.turn.longest, layer.state.turn.short_updates) for layer in cache.layers]
    cache.update(*random_states((1, 2, tokens, 16), 8), 0)
    with pytest.raises(ShapeError):
        cache.update(*random_states((1, 3, tokens, 16), 8), 1)
    assert cache.get_seq_length() == sum(lengths)
    assert [(layer.state.turn.longest, layer.state.turn.short_updates) for layer in cache.layers] == turns


def test_a_loop_goes_on_from_a_file(tmp_path: Path) -> None:
    model = tiny_llama()
    cache = lossless_loop(model)
    cache.save(tmp_path / "cache")
    loaded = NexusQuantCache.load(tmp_path / "cache", config=model.config)
    for each in (cache, loaded):
        speculate(model, each, 6)
    assert fingerprint(loaded) == fingerprint(cache)
    assert [layer.state.turn for layer in loaded.layers] == [layer.state.turn for layer in cache.layers]


def lossless_loop(model: LlamaForCausalLM) -> NexusQuantCache:
    cache = balanced(model)
    logits(model, prompt(100), cache)
    speculate(model, cache, 3)
    return cache


def test_assisted_decoding_is_no_loop_of_ones_own(sdpa: LlamaForCausalLM) -> None:
    """Its crops tell candidates from prompts; what comes after it is a turn as ever."""
    ids = prompt(60)
    ids[:, -18:] = ids[:, -36:-18].clone()
    cache = balanced(sdpa)
    generate(sdpa, ids, cache, 12, prompt_lookup_num_tokens=4)
    assert {layer.state.turn.short_updates for layer in cache.layers} <= {0, 1}
    assert cache.layers[0].state.body is not None


# Models that go on without their cache

LIMIT = 64


def phi(kind: str) -> PreTrainedModel:
    """Return a tiny model of Phi-3's kind, whose rope changes behind `LIMIT` tokens."""
    torch.manual_seed(7)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": LIMIT}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 16.0, **factors}
    options: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.1,
        "sliding_window": None,
    }
    if kind == "phi3":
        config = Phi3Config(**options, original_max_position_embeddings=LIMIT, rope_parameters=rope)
        return Phi3ForCausalLM(config).eval().requires_grad_(requires_grad=False)
    scales = {"short_mscale": 1.0, "long_mscale": 1.0}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    moe = PhimoeConfig(**options, **experts, rope_parameters=rope | scales)
    return PhimoeForCausalLM(moe).eval().requires_grad_(requires_grad=False)


def warned(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught if "without this cache" in str(each.message)]


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
@pytest.mark.parametrize("prompted", [LIMIT - 8, LIMIT, LIMIT + 1, LIMIT + 20])
def test_a_model_that_leaves_its_cache_is_told_of_once(kind: str, prompted: int) -> None:
    model = phi(kind)
    for cache in (balanced(model), NexusQuantCache("quant", config=model.config, offloading=True)):
        said = warned(lambda cache=cache: generate(model, prompt(prompted), cache, 20))
        assert len(said) == 1
        assert f"{type(model).__name__} goes on without this cache: beyond {LIMIT} tokens" in said[0]
        assert "compressed_generation" in said[0]
        assert cache.get_seq_length() <= LIMIT


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
def test_nothing_is_said_where_the_cache_stays(kind: str) -> None:
    """A text that ends before; a loop of one's own, which keeps its cache; and a block, which gives a new one."""
    model = phi(kind)
    cache = balanced(model)
    assert not warned(lambda: generate(model, prompt(LIMIT - 10), cache, 11))
    assert cache.get_seq_length() == LIMIT

    def loop() -> None:
        own = balanced(model)
        for tokens in (LIMIT, 1, 1):
            assert own.get_seq_length() >= 0
            logits(model, prompt(tokens), own)

    assert not warned(loop)
    # transformers 5.17 gives the new cache the newest token alone.
    plain = generate(model, prompt(LIMIT - 8), None, 20, return_dict_in_generate=True)[CACHE].get_seq_length()
    with compressed_generation(model, "balanced", **SMALL) as compressed:
        assert not warned(lambda: generate(model, prompt(LIMIT - 8), None, 20))
        assert compressed.cache.get_seq_length() == plain
        assert (compressed.cache.layers[0].state.body is not None) == (plain > LIMIT)
    with compressed_generation(model, "balanced", **SMALL) as compressed:
        generate(model, prompt(LIMIT - 20), None, 4)
        left = compressed.cache
    assert len(warned(lambda: generate(model, prompt(LIMIT - 8), left, 20))) == 1


def test_a_later_turn_that_leaves_is_told_of_and_reset_begins_anew() -> None:
    model = phi("phi3")
    cache = balanced(model)
    text = generate(model, prompt(40), cache, 4)
    longer = torch.cat([text, prompt(40, seed=1)], 1)
    assert len(warned(lambda: generate(model, longer, cache, 4))) == 1
    assert not warned(lambda: generate(model, longer, cache, 4))  # once is enough
    cache.reset()
    assert len(warned(lambda: generate(model, prompt(LIMIT + 5), cache, 4))) == 1


def test_every_model_that_leaves_is_recognised_by_what_it_asks() -> None:
    """Those of the installed release that look at the field before they generate."""
    found = set()
    for file in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = file.read_text(encoding="utf-8")
        prepares = re.search(r"def prepare_inputs_for_generation\(.*", source, re.DOTALL)
        if prepares is None or "original_max_position_embeddings" not in prepares[0].split("\n    def ")[0]:
            continue
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        for value in vars(module).values():
            prepare = vars(value).get("prepare_inputs_for_generation") if isinstance(value, type) else None
            if prepare is not None and value.__module__ == module.__name__:
                code = inspect.unwrap(prepare).__code__
                assert "original_max_position_embeddings" in (*code.co_names, *code.co_consts)
                found.add(file.parent.name)
    assert {"phi3", "phimoe", "phi4_multimodal"} <= found
    assert left_by(sys._getframe(), 0) is None
    assert left_by(None, 0) is None


# Interrupts at any line

_ROOT = str(Path(nexusquant_cache.__file__).parent)


class Interrupt:
    """Raises KeyboardInterrupt at a line of the package, the `at`-th that is run; counts lines if that is 0."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> Any:
        self.before = sys.gettrace()
        sys.settrace(self.enter_frame)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.before)

    def enter_frame(self, frame: FrameType, event: str, arg: object) -> Any:
        del event, arg
        return self.trace if frame.f_code.co_filename.startswith(_ROOT) else None

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        del arg
        # No signal comes between the end of a block and its `__exit__`, though a trace function is called there.
        is_with = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip().startswith("with ")
        if event == "line" and not is_with:
            self.count += 1
            if self.count == self.at:
                sys.settrace(self.before)
                raise KeyboardInterrupt
        return self.trace


def prompted(model: LlamaForCausalLM, *texts: int, **options: Any) -> NexusQuantCache:
    cache = lossless_cache(model.config, **({"keep_ratio": 0.5} | options))
    for seed, tokens in enumerate(texts):
        logits(model, prompt(tokens, seed=seed), cache)
    return cache


INTERRUPTED: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "first prompt": ((), 60, {}),
    "first step": ((60,), 1, {}),
    "first step, offloading": ((60,), 1, {"offloading": True}),
    "a step": ((60, 1, 1), 1, {}),
    "a flush": ((60, 1, 1, 1, 1), 1, {}),
    "a later turn": ((60, 1, 1), 20, {}),
    "loop": ((60, 4), 4, {}),
    "first chunk": ((), 60, {"when": "during_prefill"}),
    "a later chunk": ((60,), 60, {"when": "during_prefill"}),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:the attention of layer")
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_at_any_line_is_undone_or_told(sdpa: LlamaForCausalLM, name: str) -> None:
    """Each layer is as it was or has all of it; if they differ, the next forward says so."""
    texts, tokens, options = INTERRUPTED[name]
    base, given = prompted(sdpa, *texts, **options), prompt(tokens, seed=50)
    later = [step(10), step(11), step(12)]
    undisturbed, lines = copy.deepcopy(base), Interrupt(0)
    with lines:
        first = logits(sdpa, given, undisturbed)
    expected = [logits(sdpa, each, undisturbed) for each in later]
    told = right = 0
    for at in range(1, lines.count, max(lines.count // 40, 1) | 1):
        cache = copy.deepcopy(base)
        with pytest.raises(KeyboardInterrupt), Interrupt(at):
            logits(sdpa, given, cache)
        seen = {layer.get_seq_length() for layer in cache.layers}
        is_done = seen == {sum(texts) + tokens} and len(cache.layers) == 2
        try:
            if not is_done:
                torch.testing.assert_close(logits(sdpa, given, cache), first, rtol=0, atol=5 * ROUNDING)
            answers = [logits(sdpa, each, cache) for each in later]
        except CacheStateError as error:
            assert re.search(r"cache\.reset\(\)", str(error))  # noqa: PT017 - some are told, some are right
            told += 1
            continue
        right += 1
        if cache.shared.has_warned:  # the attention to it was interrupted: no token is evicted
            assert cache.layers[-1].state.kept > undisturbed.layers[-1].state.kept
            continue
        for answer, each in zip(answers, expected, strict=True):
            torch.testing.assert_close(answer, each, rtol=0, atol=5 * ROUNDING)
    assert right > 20
    assert told < right


@pytest.mark.parametrize("where", ["positions", "tail", "peak"])
@pytest.mark.parametrize("layer_idx", [0, 1])
def test_an_interrupt_between_two_halves_of_a_change(
    sdpa: LlamaForCausalLM, where: str, layer_idx: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the codes are stored and before the tail is cut; after an update, where the peak is noted."""
    options = {} if where == "peak" else {"when": "post_prefill"}
    cache, fresh = prompted(sdpa, 60, **options), prompted(sdpa, 60, **options)
    given = prompt(60, seed=5) if where == "peak" else step()
    expected = logits(sdpa, given, fresh)
    owner, name = {
        "positions": (PositionMap, "restrict"),
        "tail": (type(cache.layers[0].state), "cut_tail"),
        "peak": (Forward, "note_peak"),
    }[where]
    original, calls = getattr(owner, name), []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == layer_idx + 1:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            logits(sdpa, given, cache)
    torch.testing.assert_close(logits(sdpa, given, cache), expected, rtol=0, atol=ROUNDING)


def stop_at(module: nn.Module, kind: type[BaseException] = KeyboardInterrupt) -> Any:
    def stop(*_: object) -> None:
        raise kind

    return module.register_forward_pre_hook(stop)


@pytest.mark.parametrize("texts", [(), (60,), (60, 1, 1)])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_between_two_layers_is_told(
    sdpa: LlamaForCausalLM, texts: tuple[int, ...], kind: type[BaseException]
) -> None:
    """Nobody tells the cache; the next forward finds layers that are ahead, and a crop takes them back."""
    cache, fresh = prompted(sdpa, *texts), prompted(sdpa, *texts)
    given = step() if texts else prompt(60)
    handle = stop_at(sdpa.model.layers[1], kind)
    with pytest.raises(kind):
        logits(sdpa, given, cache)
    handle.remove()
    with pytest.raises(CacheStateError, match=r"not finished.*cache\.reset\(\)"):
        logits(sdpa, given, cache)
    if texts:
        assert "one was not finished" in repr(cache)
        with pytest.raises(CacheStateError, match=r"cache\.crop\(-1\)"):
            logits(sdpa, given, cache)
        cache.crop(-1)
    else:
        cache.reset()
    torch.testing.assert_close(logits(sdpa, given, cache), logits(sdpa, given, fresh), rtol=0, atol=ROUNDING)


def test_a_crop_inside_an_unfinished_forward_is_refused(sdpa: LlamaForCausalLM) -> None:
    cache, fresh = prompted(sdpa, 60, 1), prompted(sdpa, 60, 1)
    handle = stop_at(sdpa.model.layers[1])
    with pytest.raises(KeyboardInterrupt):
        logits(sdpa, prompt(10, seed=3), cache)
    handle.remove()
    with pytest.raises(CacheStateError, match=r"cache\.crop\(-10\)"):
        cache.crop(-4)
    cache.crop(-12)
    fresh.crop(-2)
    assert {layer.get_seq_length() for layer in cache.layers} == {59}
    torch.testing.assert_close(logits(sdpa, step(), cache), logits(sdpa, step(), fresh), rtol=0, atol=ROUNDING)


def gemma() -> PreTrainedModel:
    torch.manual_seed(7)
    config = Gemma3TextConfig(
        **(vars_of_tiny() | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        sliding_window=12,
        head_dim=16,
    )
    return Gemma3ForCausalLM(config).eval().requires_grad_(requires_grad=False)


def qwen() -> PreTrainedModel:
    torch.manual_seed(7)
    config = Qwen3NextConfig(
        **(vars_of_tiny() | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    return Qwen3NextForCausalLM(config).eval().requires_grad_(requires_grad=False)


def vars_of_tiny() -> dict[str, Any]:
    from integration.tiny import TINY  # noqa: PLC0415 - a copy for each

    return TINY | {"num_hidden_layers": 3}


@pytest.mark.parametrize("make", [gemma, qwen])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("texts", [(), (60,), (60, 1)])
def test_layers_of_transformers_that_are_ahead_are_told_too(make: Any, at: int, texts: tuple[int, ...]) -> None:
    """Windows and linear attention cannot give back what they have taken."""
    model = make()
    cache, fresh = prompted(model, *texts), prompted(model, *texts)
    given = step() if texts else prompt(60)
    handle = stop_at(model.model.layers[at])
    with pytest.raises(KeyboardInterrupt):
        logits(model, given, cache)
    handle.remove()
    with pytest.raises(CacheStateError, match=r"cache\.reset\(\)"):
        logits(model, given, cache)
    cache.reset()
    for seed, tokens in enumerate(texts):
        logits(model, prompt(tokens, seed=seed), cache)
    assert torch.equal(logits(model, given, cache), logits(model, given, fresh))


@pytest.mark.parametrize("make", [gemma, qwen])
def test_an_error_behind_such_layers_is_told(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    cache = prompted(model, 60)
    with monkeypatch.context() as patch:
        patch.setattr(budget, "_choose", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, step(), cache)
    with pytest.raises(CacheStateError, match=r"half-way.*cache\.reset\(\)"):
        logits(model, step(), cache)
    assert "broken" in repr(cache)


def test_rows_that_are_changed_half_way_are_told(sdpa: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = lossless_cache(sdpa.config)
    logits(sdpa, prompt(60, 2), cache)
    logits(sdpa, prompt(1, 2), cache)
    before = fingerprint(cache)
    with pytest.raises((IndexError, RuntimeError)):
        cache.reorder_cache(torch.tensor([0, 7]))
    assert fingerprint(cache) == before
    kind, calls = type(cache.layers[0].state), []
    original = kind.map_rows

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "map_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(CacheStateError, match="half-way"):
        logits(sdpa, prompt(1, 2), cache)


# Configs


@pytest.mark.usefixtures("unchecked")
def test_a_model_in_the_place_of_anything(sdpa: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"first argument, got LlamaForCausalLM: .*config=model\.config"):
        NexusQuantCache(sdpa)
    with pytest.raises(OptionError, match=r"config must be the config of a model, got LlamaForCausalLM"):
        NexusQuantCache(config=sdpa)
    cache = balanced(sdpa)
    logits(sdpa, prompt(60), cache)
    cache.save(tmp_path / "cache")
    with pytest.raises(OptionError, match=r"config must be the config of a model, got LlamaForCausalLM"):
        NexusQuantCache.load(tmp_path / "cache", config=sdpa)
    with pytest.raises(OptionError, match=r"config must be the config of a model, got LlamaForCausalLM"):
        PrefixStore(tmp_path / "store").get(prompt(60), config=sdpa)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_config_of_a_smaller_model_leaves_no_layer_updated(layers: int) -> None:
    model = tiny_llama(num_hidden_layers=3)
    cache = NexusQuantCache(config=tiny_config(num_hidden_layers=layers))
    for _ in range(2):
        with pytest.raises(OptionError, match="give the config of this very model"):
            logits(model, prompt(40), cache)
        assert {layer.get_seq_length() for layer in cache.layers} == {0}
        assert cache.memory_report().held_bytes == 0
        assert "empty" in repr(cache)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}},
        {"num_hidden_layers": 5},
        {"head_dim": 8},
    ],
)
def test_the_config_of_another_rope_or_a_deeper_model_costs_no_token(
    sdpa: LlamaForCausalLM, options: dict[str, Any]
) -> None:
    """What is taken off the keys is put back, whatever it is: the codes are worse, the answers of exact codes right."""
    cache, expected = lossless_cache(tiny_config(**options)), DynamicCache()
    answers = [generate(sdpa, prompt(60), each, 20) for each in (cache, expected)]
    assert torch.equal(*answers)
    assert cache.layers[0].state.body is not None


def test_the_config_of_a_model_with_longer_heads_is_refused_at_once(sdpa: LlamaForCausalLM) -> None:
    cache = NexusQuantCache(config=tiny_config(head_dim=32))
    with pytest.raises(OptionError, match=r"turns 32 channels of each key, and the keys have 16: give the c"):
        logits(sdpa, prompt(60), cache)
    assert cache.get_seq_length() == 0


# Options


def test_a_config_of_the_cache_says_what_was_removed() -> None:
    with pytest.raises(OptionError, match=r"the option 'key_gain' was removed: decoded vectors always keep their norm"):
        CacheConfig(key_gain="norm")  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"unknown option 'key_bit'\. Did you mean 'key_bits'"):
        CacheConfig(key_bit=2)  # type: ignore[call-arg]
    config = CacheConfig(3, 2, keep_ratio=0.5)
    assert (config.key_bits, config.keep_ratio) == (3, 0.5)
    assert copy.deepcopy(config) == config == copy.copy(config)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((3, E8Codec), "name of a codec must be a text, got 3"),
        (("", E8Codec), "name of a codec must be a text"),
        (("mine", E8Codec(nexusquant_cache.codec.layout.CodeLayout.uniform(16, 2))), "the class and not an instance"),
        (("mine", int), "subclass of VectorCodec"),
        (("mine", E8Codec, 3, 4), "describe must be a function, got 3"),
        (("mine", E8Codec, dict, 4), "make must be a function, got 4"),
    ],
)
def test_a_codec_that_is_none_is_not_registered(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        register_codec(*given)
    with pytest.raises(OptionError, match="no codec is registered as"):
        CacheConfig(codec="mine")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("besides", ["adapter", torch.ones(2), [("a", "b")], {3: "x"}, 3, {"x": None}, {"x": [1, 2]}])
def test_what_a_prompt_is_made_of_has_names(tmp_path: Path, besides: Any) -> None:
    store, config = PrefixStore(tmp_path), tiny_config()
    cache = NexusQuantCache("quant", config=config, **SMALL)
    for layer_idx in range(2):
        feed(cache, *random_states((1, 2, 60, 16), 1), layer_idx)
    for call in (
        lambda: store.put(cache, prompt(60), besides=besides),
        lambda: store.get(prompt(60), config=config, besides=besides),
        lambda: store.longest_prefix(prompt(60), config=config, besides=besides),
        lambda: store.remove(prompt(60), config=config, besides=besides),
    ):
        with pytest.raises(OptionError, match=r"besides(\['x'\])? must"):
            call()
    assert not store.entries()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("rows", [[], (), torch.tensor([], dtype=torch.long), [False, False]])
def test_no_row_at_all_is_refused(sdpa: LlamaForCausalLM, rows: Any) -> None:
    cache = balanced(sdpa)
    logits(sdpa, prompt(60, 2), cache)
    before = fingerprint(cache)
    with pytest.raises(ShapeError, match=r"must leave a row, got none.*cache\.reset\(\)"):
        cache.batch_select_indices(rows)
    assert fingerprint(cache) == before


# Methods set on a cache


def test_methods_that_are_set_on_a_cache_are_used(sdpa: LlamaForCausalLM) -> None:
    cache, policies = balanced(sdpa), []

    def make_policy(layer_idx: int) -> KeyNormPolicy:
        policies.append(layer_idx)
        return KeyNormPolicy()

    cache.make_policy = make_policy  # type: ignore[method-assign]
    cache.make_phase = lambda *_: None  # type: ignore[method-assign]
    logits(sdpa, prompt(60), cache)
    logits(sdpa, step(), cache)
    assert policies == [0, 1]
    assert [layer.state.policy for layer in cache.layers] == [KeyNormPolicy(), KeyNormPolicy()]
    assert [layer.state.phase for layer in cache.layers] == [None, None]
    chosen = NexusQuantCache("balanced", config=sdpa.config, policy=KeyNormPolicy(), remove_rope=False, **SMALL)
    for ids in (prompt(60), step()):
        logits(sdpa, ids, chosen)
    assert torch.equal(cache.layers[1].keys, chosen.layers[1].keys)
    for name in ("make_policy", "make_codec", "make_phase", "policy"):
        with pytest.raises(CacheStateError, match=rf"{name} is asked for at the first update.*cache\.reset\(\)"):
            setattr(cache, name, KeyNormPolicy() if name == "policy" else make_policy)
    cache.reset()
    cache.policy = KeyNormPolicy()
    with pytest.raises(OptionError, match="write KeyKeyPolicy"):
        cache.policy = KeyNormPolicy  # type: ignore[assignment]


# Keys and values that are looked at


EDITS: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda x: x.mul_(2),
    "copy_": lambda x: x.copy_(x * 2),
    "item": lambda x: x.__setitem__(0, 0.0),
    "+=": lambda x: x.__iadd__(1),
    "a view": lambda x: x[:, :, 3].zero_(),
    "a view of a view": lambda x: x.transpose(1, 2)[0].expand(-1, -1, 16)[1:].fill_(1.0),
    "a part": lambda x: x.unbind(0)[0].add_(1),
    "out": lambda x: torch.add(x, 1, out=x),
    "data": lambda x: x.data.zero_(),
    "function": nn.init.zeros_,
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_of_decoded_keys_is_refused(sdpa: LlamaForCausalLM, name: str) -> None:
    cache = prompted(sdpa, 60, 1)
    for what in ("keys", "values"):
        found = getattr(cache.layers[0], what)
        with pytest.raises(UnsupportedError, match="decoded anew at each access, so an edit would be lost"):
            EDITS[name](found)
    with pytest.raises(UnsupportedError, match="the keys of a compressed layer are codes, which cannot be replaced"):
        cache.layers[0].keys = torch.zeros(1)


def test_what_is_computed_from_decoded_keys_is_plain(sdpa: LlamaForCausalLM) -> None:
    keys = prompted(sdpa, 60, 1).layers[0].keys
    for made in (keys + 1, keys.clone(), keys.float().norm(dim=-1), torch.cat([keys, keys], 2), copy.deepcopy(keys)):
        assert type(made) is Tensor
    changed = keys.clone()
    changed.zero_()
    assert changed.abs().max() == 0 < keys.abs().max()
    assert isinstance(keys.shape, torch.Size)
    assert keys.numpy().shape == tuple(keys.shape)
    assert "tensor" in repr(keys)
    assert torch.equal(keys, keys.to(torch.float64).to(torch.float32))


@pytest.mark.parametrize("repeats", [1, 2])
def test_attention_to_what_is_left_of_a_layer_is_refused(sdpa: LlamaForCausalLM, repeats: int) -> None:
    """As cross-attention does, which takes keys from the layer: the zeros of heads that keep fewer are no tokens."""
    cache = balanced(sdpa)
    generate(sdpa, prompt(60), cache)
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert not cache.layers[0].state.is_whole
    queries = torch.randn(1, 2 * repeats, 3, 16)
    if repeats > 1:
        keys, values = (
            x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(1, 2 * repeats, -1, 16) for x in (keys, values)
        )
    for attend in (
        lambda: F.scaled_dot_product_attention(queries, keys, values),
        lambda: torch.matmul(queries, keys.transpose(2, 3)),
        lambda: queries @ keys.float().contiguous().mT,
        lambda: queries.bfloat16() @ keys.bfloat16().mT,
        lambda: torch.bmm(queries[0], keys[0].reshape(2 * repeats, -1, 16).transpose(1, 2)),
        lambda: torch.einsum("bhqd,bhnd->bhqn", queries, keys),
    ):
        with pytest.raises(UnsupportedError, match=r"have been evicted.*preset 'quant'.*take a clone\(\)"):
            attend()
    assert (queries @ keys.clone().mT).isfinite().all()
    whole = NexusQuantCache("quant", config=sdpa.config, **SMALL)
    generate(sdpa, prompt(60), whole)
    assert F.scaled_dot_product_attention(queries[:, :2], whole.layers[0].keys, whole.layers[0].values).isfinite().all()


def test_compressed_cross_attention_is_refused() -> None:
    config = WhisperConfig(
        vocab_size=256, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, num_mel_bins=16,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=60, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, decoder_start_token_id=2,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval()
    cache = EncoderDecoderCache(DynamicCache(), NexusQuantCache("balanced", config=config, **SMALL))
    given = {"encoder_outputs": model.get_encoder()(torch.randn(1, 16, 120)), CACHE: cache}
    with torch.no_grad():
        model(decoder_input_ids=prompt(4), **given)
        cache.cross_attention_cache.compress()
        assert not cache.cross_attention_cache.layers[0].state.is_whole
        with pytest.raises(UnsupportedError, match="for cross-attention"):
            model(decoder_input_ids=prompt(1), **given)


def test_an_edit_of_exact_keys_is_an_edit_of_the_cache(sdpa: LlamaForCausalLM) -> None:
    """As with the plain cache, as long as nothing is coded."""
    caches = [balanced(sdpa), DynamicCache()]
    answers = []
    for cache in caches:
        logits(sdpa, prompt(20), cache)
        cache.layers[0].keys[:, :, 3:5] *= 2
        answers.append(logits(sdpa, step(), cache))
    torch.testing.assert_close(*answers, rtol=0, atol=ROUNDING)


# A plain cache made of ours


@pytest.mark.parametrize("texts", [(20,), (60,), (60, 1), (60, 1, 1, 30)])
@pytest.mark.parametrize("drop_window", [False, True])
def test_a_plain_cache_of_all_tokens_goes_on(sdpa: LlamaForCausalLM, texts: tuple[int, ...], drop_window: bool) -> None:
    ours = prompted(sdpa, *texts, keep_ratio=1.0)
    plain = DynamicCache([layer[:2] for layer in ours] if drop_window else list(ours))
    assert plain.get_seq_length() == ours.get_seq_length()
    for ids in (step(), prompt(7, seed=3)):
        given, expected = logits(sdpa, ids, plain), logits(sdpa, ids, ours)
        torch.testing.assert_close(given, expected, rtol=0, atol=10 * ROUNDING)


def test_a_plain_cache_of_what_was_evicted_from_is_refused(sdpa: LlamaForCausalLM) -> None:
    cache = prompted(sdpa, 60)
    assert DynamicCache(list(cache)).get_seq_length() == 60
    logits(sdpa, step(), cache)
    with pytest.raises(UnsupportedError, match=r"layer 0 has evicted tokens.*deepcopy.*cache\.layers\[i\]\.keys"):
        DynamicCache(list(cache))
    assert cache.layers[0].keys.shape[2] < 61


# One line


def test_a_cache_is_one_line(sdpa: LlamaForCausalLM) -> None:
    cache = NexusQuantCache("balanced", config=sdpa.config)
    assert repr(cache) == "NexusQuantCache(preset balanced, 0 tokens seen, 0 B (1.0x), empty)"
    logits(sdpa, prompt(60), cache)
    assert re.fullmatch(
        r"NexusQuantCache\(preset balanced, 60 tokens seen, [\d.]+ KiB \(0\.\dx\), not compressed yet: "
        r"32 tokens are too few to code between the first and the newest \(min_tokens is 128\)\)",
        repr(cache),
    )
    cache = lossless_cache(sdpa.config, keep_ratio=0.5)
    logits(sdpa, prompt(60), cache)
    waits = r"60 tokens seen, [\d.]+ KiB \(0\.\dx\), not compressed yet: waits for the first generation step\)$"
    assert re.search(waits, repr(cache))
    logits(sdpa, step(), cache)
    assert re.search(r"61 tokens seen, 36 kept, [\d.]+ KiB \(\d\.\dx\), compressed\)$", repr(cache))
    logits(sdpa, prompt(30, seed=1), cache)
    assert repr(cache).endswith("compressed; a later turn: waits for the next generation step)")
    assert str(cache) == repr(cache)
    assert "\n" not in repr(cache)


def test_the_report_says_that_attention_was_not_seen(sdpa: LlamaForCausalLM) -> None:
    cache = balanced(sdpa)
    for layer_idx in range(2):
        cache.update(*random_states((1, 2, 60, 16), 1), layer_idx)
    with pytest.warns(UserWarning, match="attention of layer 0 was not seen"):
        cache.compress()
    said = "compressed; attention was not seen, so all tokens were kept (attention.enable)"
    assert said in repr(cache)
    assert f"{said}; exact tokens in float32" in str(cache.memory_report()).splitlines()
    assert [layer.is_unseen for layer in cache.memory_report().layers] == [True, True]


def test_one_layer_that_differs_is_named() -> None:
    cache = lossless_cache(keep_ratio=0.5)
    feed(cache, *random_states((1, 2, 60, 16), 1), 0)
    cache.update(*random_states((1, 2, 60, 16), 1, torch.bfloat16), 1)
    with pytest.warns(UserWarning, match="attention of layer 1 was not seen"):
        cache.compress()
    assert "layer 1: compressed; attention was not seen" in repr(cache)
    lines = str(cache.memory_report()).splitlines()
    assert "layer 0 compressed; exact tokens in float32" in lines
    unseen = "layer 1 compressed; attention was not seen, so all tokens were kept (attention.enable)"
    assert f"{unseen}; exact tokens in bfloat16" in lines


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")
def test_the_peak_of_assisted_decoding_is_the_exact_prompt(sdpa: LlamaForCausalLM) -> None:
    """There a crop starts the compression, so that nothing of what is taken back leaves a trace."""
    assistant = copy.deepcopy(sdpa)
    assistant.generation_config.num_assistant_tokens = 3
    exact = 200 * 2 * 2 * 32 * 4
    cache = balanced(sdpa)
    generate(sdpa, prompt(200), cache, 6, assistant_model=assistant)
    report = cache.memory_report()
    assert report.peak_bytes > exact
    assert report.held_bytes < exact / 2
