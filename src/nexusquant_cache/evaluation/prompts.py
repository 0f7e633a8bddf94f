"""Sentences hidden in a text, the prompt around both, and what a model answers."""

import random
import re
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.texts import tokenize
from nexusquant_cache.releases import CACHE

_SENTENCE_END = re.compile(r"[.!?][\"”)]?\s+")
_HAVE_READ = "I have read the text."  # the model's turn before a later question


def hide(text: str, placed: Iterable[tuple[str, float]]) -> str:
    """Insert sentences at the sentence boundaries nearest to their depths, 0 (beginning) to 1 (end)."""
    text += " "
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    places = [(min(ends, key=lambda end: abs(end - depth * len(text))), sentence) for sentence, depth in placed]
    for place, sentence in sorted(places, reverse=True):
        text = f"{text[:place]}{sentence} {text[place:]}"
    return text.strip()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, request: str, context: str, question: str, *, comes_later: bool
) -> tuple[Int[Tensor, "1 n"], Int[Tensor, "1 q"]]:
    """Return the prompt's tokens up to the end of the context, and those after it.

    Args:
        tokenizer: A tokenizer of transformers; its chat template is used if it has one.
        request: What stands before the context.
        context: The text to read.
        question: What to ask.
        comes_later: Whether the question is a turn of its own.
    """
    prompt = _prompt(tokenizer, f"{request}\n\n{context}", question, comes_later=comes_later)
    end = prompt.index(context) + len(context)
    return tokenize(tokenizer, prompt[:end]), tokenize(tokenizer, prompt[end:])


def decode(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "n"]) -> str:
    """Return the text of tokens, without special ones."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def draw_window(ids: Int[Tensor, "1 n"], length: int, name: str, seed: str) -> Int[Tensor, "1 m"]:
    """Return a window at a place that the seed chooses.

    Raises:
        EvaluationError: If the text is too short.
    """
    total = ids.shape[1]
    if total < length:
        msg = f"{name} is too short: it has {total} tokens, a window of {length} tokens is needed"
        raise EvaluationError(msg)
    start = random.Random(f"window {seed}").randint(0, total - length)  # noqa: S311 - reproducible, not secret
    return ids[:, start : start + length]


def answer_to(loaded: LoadedModel, cache: Cache, prompt_ids: Int[Tensor, "1 n"], *, max_new_tokens: int) -> str:
    """Return the greedy answer to a prompt, through a cache that has read a part of it.

    Args:
        loaded: Model and tokenizer.
        cache: The cache; it is filled.
        prompt_ids: The whole prompt.
        max_new_tokens: Longest answer.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = prompt_ids.to(model.device)
    generate: Any = model.generate
    output = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    return decode(tokenizer, output[0, prompt.shape[1] :])


def _prompt(tokenizer: PreTrainedTokenizerBase, reading: str, question: str, *, comes_later: bool) -> str:
    if not tokenizer.chat_template:
        return f"{tokenizer.bos_token or ''}{reading}\n\nQuestion: {question}\nAnswer:"
    if comes_later:
        turns = [("user", reading), ("assistant", _HAVE_READ), ("user", question)]
    else:
        turns = [("user", f"{reading}\n\nQuestion: {question}")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
