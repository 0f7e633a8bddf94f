"""Hide a needle in a real text, ask for it, and see whether the model still finds it.

The prompt is read once with the plain cache: all but its last token, or, where the question comes in a later
turn, the text alone.  Each cache is filled from that, compressed, and handed to ``model.generate`` with the
whole prompt, so that the generation path of transformers runs as it does for a user.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from nexusquant_cache.evaluation.caches import Candidate, Footprint, Prefilled, Progress, fill_and_compress, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.kinds import Needle, check_kinds
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.prompts import answer_to, decode, draw_window, encode_prompt, hide
from nexusquant_cache.evaluation.texts import tokenize


@dataclass(frozen=True)
class NeedleTask:
    """A prompt with a hidden needle.

    Attributes:
        name: Kind, text, length and depth in words.
        needle: What is hidden and asked for.
        context_ids: The prompt up to the end of the text, ``[1, context]``.
        question_ids: The rest of the prompt: the question and the start of the answer's turn.
        length: Tokens the whole prompt was to have; it has as many to within a few.
        depth: Where the needle stands in the text, 0 (beginning) to 1 (end).
        text_tokens: Tokens of the window that the context holds; the text goes on after them.
    """

    name: str
    needle: Needle
    context_ids: Int[Tensor, "1 n"]
    question_ids: Int[Tensor, "1 q"]
    length: int
    depth: float
    text_tokens: int

    @property
    def prompt_ids(self) -> Int[Tensor, "1 m"]:
        """The whole prompt."""
        return torch.cat([self.context_ids, self.question_ids], dim=1)

    @property
    def asked_ids(self) -> Int[Tensor, "1 k"]:
        """The part of the question that is in the cache when it is compressed: all but a token, or nothing."""
        return self.question_ids[:, : 0 if self.needle.comes_later else -1]


@dataclass(frozen=True)
class NeedleResult:
    """One cache on one task.

    Attributes:
        task: The task's name.
        kind: The needle's kind.
        length: See `NeedleTask`.
        depth: See `NeedleTask`.
        expected: The numbers asked for.
        answer: What the model said.
        found: Whether the answer gives them.
        footprint: What the cache held when it had been compressed.
        compress_seconds: Time that preparing and compressing took; None if there was nothing to do.
    """

    task: str
    kind: str
    length: int
    depth: float
    expected: tuple[str, ...]
    answer: str
    found: bool
    footprint: Footprint
    compress_seconds: float | None = None


def make_needle(
    tokenizer: PreTrainedTokenizerBase, window: Int[Tensor, "1 n"], needle: Needle, *, depth: float, name: str = "text"
) -> NeedleTask:
    """Hide a needle between sentences of a text and ask for it.

    Args:
        tokenizer: A tokenizer of transformers; its chat template is used if it has one.
        window: Tokens of a real text.  The whole prompt gets as long, to within a few tokens: the end of the
            text makes room for needle and question.
        needle: What to hide.
        depth: Where to hide it, 0 (beginning) to 1 (end).
        name: What to call the task.

    Raises:
        EvaluationError: If the depth is outside [0, 1], or the prompt too short for needle and question.
    """
    if not 0 <= depth <= 1:
        msg = f"depth must be from 0 (beginning of the text) to 1 (its end), got {depth}"
        raise EvaluationError(msg)
    length = window.shape[1]
    extra = sum(part.shape[1] for part in _encode(tokenizer, needle, " ".join(needle.sentences)))
    if length <= extra:
        msg = f"{name}: fact and question alone take {extra} tokens, the prompt has room for {length}"
        raise EvaluationError(msg)
    text = decode(tokenizer, window[0, : length - extra])
    placed = zip(needle.sentences, _depths(depth, len(needle.sentences)), strict=True)
    context_ids, question_ids = _encode(tokenizer, needle, hide(text, placed))
    return NeedleTask(name, needle, context_ids, question_ids, length, depth, length - extra)


def needle_grid(  # noqa: PLR0913 - all but four have defaults
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    kinds: Sequence[str] = ("single",),
    repeats: int = 1,
    seed: int = 0,
) -> list[NeedleTask]:
    """Return tasks for every kind, length and depth, going through the texts in turn.

    A task depends on its own kind, length, depth, repetition and text, and not on the rest of the grid, so that
    a grid can grow without changing what it had.

    Raises:
        EvaluationError: If a text is too short, or a kind does not exist.
    """
    check_kinds(tuple(kinds))
    ids = {name: tokenize(tokenizer, text) for name, text in texts.items()}
    names = list(ids)
    tasks = []
    cells = product(kinds, range(repeats), enumerate(lengths), enumerate(depths))
    for kind, repeat, (row, length), (column, depth) in cells:
        text = names[(row + column + repeat) % len(names)]
        place = f"{text}, {length} tokens, depth {depth:g}" + (f", #{repeat + 1}" if repeat else "")
        window = draw_window(ids[text], length, text, f"{seed} {place}")
        needle = Needle.draw(kind, f"{seed} {place}")
        tasks.append(make_needle(tokenizer, window, needle, depth=depth, name=f"{kind}: {place}"))
    return tasks


@torch.no_grad()
def prefill_needle(
    model: PreTrainedModel, task: NeedleTask, *, context: Prefilled | None = None, progress: Progress | None = None
) -> Prefilled:
    """Return the prompt up to where caches are compressed: all but its last token, or the text alone.

    Args:
        model: A causal language model of transformers.
        task: The task.
        context: The task's context, if it has been read already; it is copied, not changed.
        progress: See `prefill`.
    """
    if context is None:
        return prefill(model, torch.cat([task.context_ids, task.asked_ids], dim=1), progress=progress)
    return prefill(model, task.asked_ids, start=context, progress=progress) if task.asked_ids.shape[1] else context


def ask(  # noqa: PLR0913 - private to the package, and all but four have defaults
    loaded: LoadedModel,
    task: NeedleTask,
    plain: Prefilled,
    candidate: Candidate,
    *,
    start: Cache | None = None,
    max_new_tokens: int | None = None,
) -> NeedleResult:
    """Generate the answer greedily through a new cache and look for the needle in it.

    Args:
        loaded: Model and tokenizer.
        task: The task.
        plain: What `prefill_needle` returned for it; not changed.
        candidate: The cache.
        start: See `fill_and_compress`.
        max_new_tokens: Longest answer; what the needle needs if None.
    """
    held = fill_and_compress(loaded, candidate, plain, start=start)
    longest = max_new_tokens or task.needle.answer_tokens
    answer = answer_to(loaded, held.cache, task.prompt_ids, max_new_tokens=longest)
    return NeedleResult(
        task=task.name,
        kind=task.needle.kind,
        length=task.length,
        depth=task.depth,
        expected=task.needle.expected,
        answer=answer,
        found=task.needle.is_found_in(answer),
        footprint=held.footprint,
        compress_seconds=held.seconds,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, needle: Needle, context: str) -> tuple[Tensor, Tensor]:
    return encode_prompt(tokenizer, needle.request, context, needle.question, comes_later=needle.comes_later)


def _depths(depth: float, count: int) -> Iterator[float]:
    """Yield the depth of the first sentence, and those of the others, spread evenly from there."""
    return (depth if index == 0 else (depth + index / count) % 1 for index in range(count))
