"""Hide a fact in a real text, ask for it, and see whether the model still finds it.

The question stands at the end of the same prompt.  All but the prompt's last token are prefilled once; each
cache is filled from that and handed to ``model.generate`` with the whole prompt, so that the generation path
of transformers runs as it does for a user, and the first generation step compresses.
"""

import copy
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from nexusquant_cache.evaluation.caches import CacheFactory, Footprint, Progress, fill, footprint, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.texts import token_windows, tokenize

_PLACES = (
    "the harbour office in Lisbon",
    "the observatory on Mount Kenya",
    "the old library of Prague",
    "the bakery in Cornwall",
    "the greenhouse in Oslo",
    "the museum in Toronto",
    "the railway depot in Kyoto",
    "the vineyard near Siena",
    "the lighthouse at Cape Horn",
    "the clinic in Nairobi",
    "the bookshop in Dublin",
    "the theatre in Vienna",
    "the ferry terminal in Bergen",
    "the weather station on Iceland",
    "the botanical garden in Lima",
    "the shipyard in Gdansk",
)
_DIGITS = 6
_REQUEST = "Somewhere in the following text, an access code is mentioned. Find it."
_SENTENCE_END = re.compile(r"[.!?][\"”)]?\s+")
_ANSWER_TOKENS = 20  # the question's words and six digits


@dataclass(frozen=True)
class Fact:
    """A number that no text contains by chance and no model knows."""

    place: str
    number: str

    @classmethod
    def draw(cls, seed: int) -> "Fact":
        """Return the fact of a seed."""
        source = random.Random(f"fact {seed}")  # noqa: S311 - reproducible, not secret
        return cls(source.choice(_PLACES), str(source.randrange(10 ** (_DIGITS - 1), 10**_DIGITS)))

    @property
    def sentence(self) -> str:
        """The sentence to hide."""
        return f"The access code of {self.place} is {self.number}."

    @property
    def question(self) -> str:
        """The question to ask."""
        return f"What is the access code of {self.place}?"

    def is_in(self, answer: str) -> bool:
        """Return whether the answer contains the number, however its digits are grouped."""
        return self.number in re.sub(r"(?<=\d)[ ,.](?=\d)", "", answer)


@dataclass(frozen=True)
class NeedleTask:
    """A prompt with a hidden fact.

    Attributes:
        name: Text, length and depth in words.
        fact: What is hidden and asked for.
        context_ids: The prompt up to the end of the text, ``[1, context]``.
        question_ids: The rest of the prompt: the question and the start of the answer's turn.
        depth: Where the fact stands in the text, 0 (beginning) to 1 (end).
        text_tokens: Tokens of the window that the context holds; the text goes on after them.
    """

    name: str
    fact: Fact
    context_ids: Int[Tensor, "1 n"]
    question_ids: Int[Tensor, "1 q"]
    depth: float
    text_tokens: int

    @property
    def prompt_ids(self) -> Int[Tensor, "1 m"]:
        """The whole prompt."""
        return torch.cat([self.context_ids, self.question_ids], dim=1)

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return self.context_ids.shape[1] + self.question_ids.shape[1]


@dataclass(frozen=True)
class NeedleResult:
    """One cache on one task."""

    task: str
    length: int
    depth: float
    expected: str
    answer: str
    found: bool
    footprint: Footprint


def make_needle(
    tokenizer: PreTrainedTokenizerBase, window: Int[Tensor, "1 n"], *, depth: float, seed: int, name: str = "text"
) -> NeedleTask:
    """Hide a fact between two sentences of a text and ask for it.

    Args:
        tokenizer: A tokenizer of transformers; its chat template is used if it has one.
        window: Tokens of a real text.  The whole prompt gets as long, to within a few tokens: the end of the
            text makes room for fact and question.
        depth: Where to hide the fact, 0 (beginning) to 1 (end).
        seed: Chooses the fact.
        name: What to call the text.

    Raises:
        EvaluationError: If the depth is outside [0, 1], or the prompt too short for fact and question.
    """
    if not 0 <= depth <= 1:
        msg = f"depth must be from 0 (beginning of the text) to 1 (its end), got {depth}"
        raise EvaluationError(msg)
    fact = Fact.draw(seed)
    length = window.shape[1]
    extra = sum(part.shape[1] for part in _encode(tokenizer, fact.sentence, fact.question))
    if length <= extra:
        msg = f"{name}: fact and question alone take {extra} tokens, the prompt has room for {length}"
        raise EvaluationError(msg)
    text_tokens = length - extra
    text = _decode(tokenizer, window[0, :text_tokens])
    context_ids, question_ids = _encode(tokenizer, _hide(text, fact.sentence, depth), fact.question)
    return NeedleTask(f"{name}, {length} tokens, depth {depth:g}", fact, context_ids, question_ids, depth, text_tokens)


def needle_grid(
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int = 0,
) -> list[NeedleTask]:
    """Return a task for every length and depth, going through the texts in turn.

    Raises:
        EvaluationError: If a text is too short.
    """
    grid = [(length, depth) for length in lengths for depth in depths]
    names = list(texts)
    shares = {name: len(grid[index :: len(names)]) for index, name in enumerate(names)}
    windows = {
        name: token_windows(tokenizer, texts[name], length=max(lengths), count=share, name=name)
        for name, share in shares.items()
        if share
    }
    return [
        make_needle(
            tokenizer,
            windows[names[index % len(names)]][index // len(names)][:, :length],
            depth=depth,
            seed=seed * len(grid) + index,
            name=names[index % len(names)],
        )
        for index, (length, depth) in enumerate(grid)
    ]


@torch.no_grad()
def prefill_needle(
    model: PreTrainedModel, task: NeedleTask, *, context: DynamicCache | None = None, progress: Progress | None = None
) -> DynamicCache:
    """Return a plain cache of the whole prompt but its last token.

    Args:
        model: A causal language model of transformers.
        task: The task.
        context: A plain cache that already holds the task's context; it is copied, not changed.
        progress: See `prefill`.
    """
    if context is None:
        return prefill(model, task.prompt_ids[:, :-1], progress=progress)
    return prefill(model, task.question_ids[:, :-1], cache=copy.deepcopy(context), progress=progress)


def ask(
    loaded: LoadedModel,
    task: NeedleTask,
    plain: DynamicCache,
    factory: CacheFactory,
    *,
    max_new_tokens: int = _ANSWER_TOKENS,
) -> NeedleResult:
    """Generate the answer greedily through a new cache and look for the number in it.

    Args:
        loaded: Model and tokenizer.
        task: The task.
        plain: What `prefill_needle` returned for it; not changed.
        factory: Makes the cache.
        max_new_tokens: Longest answer.
    """
    cache = fill(factory, plain)
    model, tokenizer = loaded.model, loaded.tokenizer
    prompt = task.prompt_ids.to(model.device)
    generate: Any = model.generate
    output = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    answer = _decode(tokenizer, output[0, prompt.shape[1] :])
    return NeedleResult(
        task=task.name,
        length=task.length,
        depth=task.depth,
        expected=task.fact.number,
        answer=answer,
        found=task.fact.is_in(answer),
        footprint=footprint(cache),
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, "n"]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _hide(text: str, sentence: str, depth: float) -> str:
    """Insert a sentence at the sentence boundary nearest to a depth."""
    wanted = depth * len(text)
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    place = min(ends, key=lambda end: abs(end - wanted))
    if place == len(text):
        return f"{text} {sentence}"
    return f"{text[:place]}{sentence} {text[place:]}"


def _encode(tokenizer: PreTrainedTokenizerBase, context: str, question: str) -> tuple[Tensor, Tensor]:
    """Return the prompt's tokens up to the end of the context, and those after it."""
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": f"{_REQUEST}\n\n{context}\n\nQuestion: {question}"}]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    else:
        prompt = f"{tokenizer.bos_token or ''}{_REQUEST}\n\n{context}\n\nQuestion: {question}\nAnswer:"
    end = prompt.index(context) + len(context)
    return tokenize(tokenizer, prompt[:end]), tokenize(tokenizer, prompt[end:])
