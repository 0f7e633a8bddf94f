"""The ways to generate: each takes a model and a way to make caches, and returns the tokens that came out.

A mode is a function of `(model, make_cache)`.  It makes one cache, ``make_cache()``, so that the same mode runs with
any kind of cache.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import transformers
from integration.families import inputs
from torch import Tensor
from transformers import PreTrainedModel, TextIteratorStreamer

from nexusquant_cache.releases import CACHE

PROMPT = 48
NEW = 6  # enough for tokens to leave the exact tail a second time


MakeCache = Callable[[], Any]
Mode = Callable[[PreTrainedModel, MakeCache], Tensor]


def ask(model: PreTrainedModel, given: dict[str, Tensor], cache: Any, **options: Any) -> Tensor:
    """Generate from this prompt, always in the same random state."""
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW} | options
    first = given.get("input_ids", given.get("inputs_embeds"))
    masked = {"attention_mask": torch.ones(first.shape[:2], dtype=torch.long)} | given
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model.generate(**masked, **{CACHE: cache}, **settings)


def simple(batch: int = 2, **options: Any) -> Mode:
    """Return the mode that generates once with these options."""

    def mode(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
        return ask(model, inputs(model, PROMPT, batch), make_cache(), **options)

    return mode


def prompt_lookup(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Draft from a prompt that repeats itself, and from tokens that happen to come again."""
    given = inputs(model, PROMPT)
    ids = given["input_ids"]
    ids[:, -18:] = ids[:, -36:-18].clone()
    return ask(model, given, make_cache(), prompt_lookup_num_tokens=4, max_new_tokens=16)


@cache
def assistant_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a noisy copy of a model, which guesses some of its tokens and misses others."""
    assistant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    for parameter in assistant.parameters():
        parameter.data += 0.008 * torch.randn(parameter.shape, generator=generator)
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def assisted(**options: Any) -> Mode:
    """Return the mode in which another model drafts, with a plain cache of its own."""

    def mode(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
        settings = {"assistant_model": assistant_of(model), "max_new_tokens": 8} | options
        return ask(model, inputs(model, PROMPT), make_cache(), **settings)

    return mode


def early_exit(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Draft with the first layer of the model itself, or with all of it where it cannot stop there."""
    # `generate` changes the config for the time of a draft, and forgets to change it back after an error.
    model = copy.deepcopy(model)
    return ask(model, inputs(model, PROMPT), make_cache(), assistant_early_exit=1)


def two_turns(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Answer, then answer a second message of several tokens, given the whole text again."""
    cache = make_cache()
    text = ask(model, inputs(model, PROMPT, 2), cache)
    message = inputs(model, PROMPT, 2, seed=1)["input_ids"][:, -9:]
    return ask(model, {"input_ids": torch.cat([text, message], -1)}, cache)


def continued(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Go on twice from what the cache holds, given only what it has not seen and the mask of all."""
    cache = make_cache()
    text = ask(model, inputs(model, PROMPT, 2), cache)
    for seed in (1, 2):
        message = inputs(model, PROMPT, 2, seed=seed)["input_ids"][:, -5:]
        text = torch.cat([text, message], -1)
        new = {"input_ids": text[:, cache.get_seq_length() :], "attention_mask": torch.ones_like(text)}
        text = torch.cat([text, ask(model, new, cache)[:, -NEW:]], -1)
    return text


def taken_back(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Take back the answer and the end of the prompt, and ask something else in their place."""
    cache = make_cache()
    text = ask(model, inputs(model, PROMPT, 2), cache)
    cache.crop(-12)
    message = inputs(model, PROMPT, 2, seed=1)["input_ids"][:, -9:]
    text = torch.cat([text[:, : PROMPT + NEW - 1 - 12], message], -1)
    return ask(model, {"input_ids": text}, cache)


def shared_prefix(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Read the beginning of two prompts once, and copy the cache for one of them."""
    prefix, cache = inputs(model, PROMPT), make_cache()
    with torch.no_grad():
        model(**prefix, **{CACHE: cache}, use_cache=True)
    ends = [inputs(model, PROMPT, seed=seed)["input_ids"][:, -9:] for seed in (1, 2)]
    texts = [{"input_ids": torch.cat([prefix["input_ids"], end], -1)} for end in ends]
    caches = copy.deepcopy(cache), cache
    return torch.cat([ask(model, text, each) for text, each in zip(texts, caches, strict=True)])


def pad_left(model: PreTrainedModel, pads: tuple[int, ...]) -> dict[str, Tensor]:
    """Return a batch whose rows begin with so many pads."""
    given = inputs(model, PROMPT, len(pads))
    ids = given["input_ids"]
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        ids[row] = torch.cat([torch.zeros(count, dtype=torch.long), ids[row, : PROMPT - count].clone()])
        mask[row, :count] = 0
    return given | {"attention_mask": mask}


def padded(**options: Any) -> Mode:
    """Return the mode that answers prompts of different lengths at once."""

    def mode(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
        return ask(model, pad_left(model, (0, 1, 11)), make_cache(), **options)

    return mode


class _Speller:
    """Stands in for a tokenizer: each token is its number and a space."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(f"{int(token)} " for token in tokens)


def streamed(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Generate in another thread, and read what comes out."""
    streamer = TextIteratorStreamer(_Speller(), skip_prompt=True, timeout=60)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, model, inputs(model, PROMPT), make_cache(), streamer=streamer)
        answer.add_done_callback(lambda _: streamer.end())  # even if it failed
        read = [int(word) for word in "".join(streamer).split()]
        assert answer.result()[0, PROMPT:].tolist() == read
    return torch.tensor([read])


def embeds(model: PreTrainedModel, make_cache: MakeCache) -> Tensor:
    """Give embeddings in place of ids."""
    ids = inputs(model, PROMPT, 2)["input_ids"]
    return ask(model, {"inputs_embeds": model.get_input_embeddings()(ids).detach()}, make_cache())


MODES: dict[str, Mode] = {
    "greedy": simple(),
    "sampling": simple(do_sample=True, top_k=50),
    "several": simple(do_sample=True, num_return_sequences=3),
    "beams": simple(num_beams=3),
    "sampled_beams": simple(num_beams=3, do_sample=True, num_return_sequences=2),
    "prompt_lookup": prompt_lookup,
    "assisted": assisted(),
    "assisted_sampling": assisted(do_sample=True),
    "early_exit": early_exit,
    "chunked": simple(prefill_chunk_size=16),
    "two_turns": two_turns,
    "continued": continued,
    "taken_back": taken_back,
    "shared_prefix": shared_prefix,
    "padded": padded(),
    "padded_beams": padded(num_beams=2),
    "streamed": streamed,
    "embeds": embeds,
}
# Modes that transformers moved into repositories of their own: it asks for trust in their code, and for the network.
MOVED: dict[str, Mode] = {
    "contrastive": simple(penalty_alpha=0.6, top_k=4),
    "dola": simple(dola_layers="high"),
    "group_beams": simple(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    "constrained": simple(num_beams=2, force_words_ids=[[5, 6]]),
}

DRAFTED = ("prompt_lookup", "assisted", "assisted_sampling", "early_exit")
FLOOR = transformers.__version__.startswith("5.17.")


def _refused_by_transformers() -> dict[tuple[str, str], type[Exception]]:
    """Return what fails in transformers itself, whatever the cache, and how."""
    early_exit: dict[type[Exception], tuple[str, ...]] = {
        # Other layers than the first belong to the cache, to the lists in the config, or to shared keys and values.
        IndexError: ("gpt_neox", "gptj", "gpt2", "falcon_alibi", "bloom"),
        AttributeError: ("llava", "qwen2_vl"),  # the number of layers stands in the text part of the config
    }
    if FLOOR:
        early_exit[TypeError] = ("qwen2", "qwen3", "gemma2", "gemma3", "smollm3")
        early_exit[RuntimeError] = ("gemma4",)
    else:
        early_exit[IndexError] += ("gemma4", "gpt_oss")
        early_exit[ValueError] = ("lfm2",)
    refused = {(name, "early_exit"): error for error, names in early_exit.items() for name in names}
    # A recurrent state cannot go back.
    refused |= {(name, mode): ValueError for name in ("qwen3_next", "falcon_h1") for mode in DRAFTED}
    refused["falcon_h1", "embeds"] = ValueError
    # Nor can a window, once it has moved on.
    windowed = ("mistral", "gemma2", "gemma3", "gemma4", "gpt_oss")
    refused |= {(name, "taken_back"): RuntimeError for name in (*windowed, "qwen3_next", "lfm2", "falcon_h1")}
    if FLOOR:
        # A prompt longer than the window comes together with the first guesses.
        refused |= {(name, mode): RuntimeError for name in windowed for mode in ("assisted", "assisted_sampling")}
        refused["qwen2_vl", "chunked"] = RuntimeError
    return refused


REFUSED_BY_TRANSFORMERS = _refused_by_transformers()
