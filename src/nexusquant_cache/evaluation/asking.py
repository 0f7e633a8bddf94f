"""Hide facts in a real text, ask for them, and see how probable the true answers are.

A text hides several facts, so that one reading serves many questions.  Each is asked in two places: at the end of the
prompt, so that a cache sees it before it evicts, and in a later turn, when the text has been compressed once for all
questions.  The score is the mean log probability of the answer's tokens after a given beginning of the answer.  The
plain cache's shows what the model itself can do; that of the same text without the facts, what can be guessed.
"""

import copy
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from nexusquant_cache.evaluation.caches import Candidate, Compressed, Footprint, Prefilled, fill_and_compress, prefill
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.facts import FACTS, PASSAGES, Fact
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.evaluation.prompts import answer_to, decode, draw_window, encode_prompt, hide
from nexusquant_cache.evaluation.quality import predict
from nexusquant_cache.evaluation.texts import tokenize

ABSENT = "absent"
"""The plain cache of the same text without facts and passages: what can be guessed."""
PROMPT, LATER = PLACES = ("prompt", "later")
"""Where a question is asked: at the end of the prompt, or in a turn after the text has been compressed."""
_REQUEST = "Read the following text. I will ask you about it."
_TOKENS_PER_FACT = 170
_STRETCH = 2048  # tokens from the first passage of a text to its last, and some
_BEFORE = 64  # tokens before its first
_MORE_TOKENS = 4  # that a model may say besides the answer


@dataclass(frozen=True)
class FactQuestion:
    """A question about a text.

    Attributes:
        name: Text, answer, wording and place.
        fact: What is asked for.
        place: Where it is asked, see `PLACES`.
        length: Tokens that the whole prompt was to have; it has as many to within some tens, as questions differ.
        question_ids: What follows the text: the question and the start of the answer's turn, ``[1, question]``.
        lead_ids: How the answer begins, ``[1, lead]``.
        answer_ids: How it goes on, ``[1, answer]``.
        scored: Which of the answer's tokens count, ``[answer]``.
    """

    name: str
    fact: Fact
    place: str
    length: int
    question_ids: Int[Tensor, "1 q"]
    lead_ids: Int[Tensor, "1 l"]
    answer_ids: Int[Tensor, "1 a"]
    scored: Bool[Tensor, "a"]

    @property
    def read_ids(self) -> Int[Tensor, "1 k"]:
        """The part of the question that is in the cache when it is compressed: all but a token, or nothing."""
        return self.question_ids[:, : 0 if self.place == LATER else -1]


@dataclass(frozen=True)
class FactText:
    """A text that hides facts, and questions about it.

    Attributes:
        name: Text and length in words.
        context_ids: A prompt up to the end of the text, ``[1, context]``.
        without_ids: The same without what the questions ask for, ``[1, without]``.
        questions: The questions.
    """

    name: str
    context_ids: Int[Tensor, "1 n"]
    without_ids: Int[Tensor, "1 m"]
    questions: tuple[FactQuestion, ...]


@dataclass(frozen=True)
class FactAnswer:
    """One cache on one question.

    Attributes:
        kind: The fact's kind.
        place: See `PLACES`.
        length: See `FactQuestion`.
        expected: The answer.
        log_prob: Mean log probability of the answer's tokens that count, in nats.
        answer: What the model said after the lead, greedily.
        found: Whether that contains all parts of the answer that count.
        footprint: What the cache held when it had been compressed.
        compress_seconds: Time that preparing and compressing took; None if there was nothing to do.
    """

    kind: str
    place: str
    length: int
    expected: str
    log_prob: float
    answer: str
    found: bool
    footprint: Footprint
    compress_seconds: float | None


def fact_texts(  # noqa: PLR0913 - all but three have defaults
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str],
    *,
    lengths: Sequence[int],
    count: int = len(FACTS),
    wordings: int = 1,
    repeats: int = 1,
    seed: int = 0,
) -> list[FactText]:
    """Return texts that hide the facts, as many in one as are rare in it, going through the given texts in turn.

    Where a text has passages that questions are known for, they are in its windows, as far as these are long enough.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: Real texts by name.
        lengths: Tokens of the prompts; every fact is hidden once for each.
        count: Facts to hide.
        wordings: Wordings of each question.
        repeats: How often every fact is hidden, each time elsewhere.
        seed: Chooses windows and depths.

    Raises:
        EvaluationError: If a number is outside its range, or a text or a length too short.
    """
    check_counts(count, wordings)
    ids = {name: tokenize(tokenizer, text) for name, text in texts.items()}
    names = list(ids)
    found = []
    for (row, length), repeat in product(enumerate(lengths), range(repeats)):
        together = max(1, length // _TOKENS_PER_FACT)
        for column, first in enumerate(range(0, count, together)):
            text = names[(row + repeat + column) % len(names)]
            name = f"{text}, {length} tokens, facts {first + 1}+" + (f", #{repeat + 1}" if repeat else "")
            window = _window(tokenizer, texts[text], ids[text], length, text, f"{seed} {name}")
            facts = FACTS[first : min(first + together, count)]
            found.append(make_fact_text(tokenizer, window, facts, wordings=wordings, name=name, seed=seed))
    return found


def make_fact_text(  # noqa: PLR0913 - all but three have defaults
    tokenizer: PreTrainedTokenizerBase,
    window: Int[Tensor, "1 n"],
    facts: Sequence[Fact],
    *,
    wordings: int = 1,
    name: str = "text",
    seed: int = 0,
) -> FactText:
    """Hide facts between sentences of a text, evenly from its beginning to its end.

    Args:
        tokenizer: A tokenizer of transformers; its chat template is used if it has one.
        window: Tokens of a real text; its end makes room for facts and question.
        facts: What to hide; questions about passages of the text come to them.
        wordings: Wordings of each question.
        name: What to call the text.
        seed: Chooses the order of the facts.

    Raises:
        EvaluationError: If the text is too short for the facts.
    """
    length = window.shape[1]
    placed = _placed(facts, f"{seed} {name}")
    longest = max((question for fact in (*facts, *PASSAGES) for question in fact.questions), key=len)
    sentences = " ".join(sentence for sentence, _ in placed)
    extra = sum(part.shape[1] for part in encode_prompt(tokenizer, _REQUEST, sentences, longest, comes_later=True))
    if length <= extra:
        msg = f"{name}: facts and question alone take {extra} tokens, the prompt has room for {length}"
        raise EvaluationError(msg)
    text = decode(tokenizer, window[0, : length - extra])
    full = hide(text, placed)
    passages = [fact for fact in PASSAGES if _find(fact, full)]
    without = text
    for fact in passages:
        without = _pattern(fact).sub("", without)
    questions = []
    for place, fact, wording in product(reversed(PLACES), (*facts, *passages), range(wordings)):
        asked = fact.questions[wording]
        _, question_ids = encode_prompt(tokenizer, _REQUEST, full, asked, comes_later=place == LATER)
        parts = [tokenize(tokenizer, f" {part}") for part, _ in fact.parts]
        question = FactQuestion(
            name=f"{name}: {fact.answer}, wording {wording + 1}, {place}",
            fact=fact,
            place=place,
            length=length,
            question_ids=question_ids,
            lead_ids=tokenize(tokenizer, fact.lead if tokenizer.chat_template else f" {fact.lead}"),
            answer_ids=torch.cat(parts, dim=1),
            scored=torch.tensor([counts for ids, (_, counts) in zip(parts, fact.parts, strict=True) for _ in ids[0]]),
        )
        questions.append(question)
    context_ids, without_ids = (
        encode_prompt(tokenizer, _REQUEST, each, "", comes_later=True)[0] for each in (full, without)
    )
    return FactText(name, context_ids, without_ids, tuple(questions))


@torch.no_grad()
def ask_all(
    loaded: LoadedModel,
    context: Prefilled,
    candidate: Candidate,
    questions: Sequence[FactQuestion],
) -> Iterator[FactAnswer]:
    """Ask questions through new caches of a candidate; for all later ones the text is compressed once.

    Args:
        loaded: Model and tokenizer.
        context: The context of a text, read with the plain cache; it is not changed.
        candidate: The cache.
        questions: Questions about the text.
    """
    compressed: Compressed | None = None
    for question in questions:
        if question.place == LATER:
            compressed = held = compressed or fill_and_compress(loaded, candidate, context)
            cache = copy.deepcopy(held.cache)
        else:
            held = fill_and_compress(loaded, candidate, prefill(loaded.model, question.read_ids, start=context))
            cache = held.cache
        log_prob = answer_log_prob(loaded, question, copy.deepcopy(cache))
        prompt = torch.cat([context.ids, question.question_ids, question.lead_ids], dim=1)
        said = answer_to(loaded, cache, prompt, max_new_tokens=question.answer_ids.shape[1] + _MORE_TOKENS)
        yield FactAnswer(
            kind=question.fact.kind,
            place=question.place,
            length=question.length,
            expected=question.fact.answer,
            log_prob=log_prob,
            answer=said,
            found=question.fact.is_found_in(said),
            footprint=held.footprint,
            compress_seconds=held.seconds,
        )


def answer_log_prob(loaded: LoadedModel, question: FactQuestion, cache: Cache) -> float:
    """Return the mean log probability of the answer's tokens that count, after the rest of the prompt, in nats."""
    log_probs = answer_predictions(loaded, question, cache)
    answer = question.answer_ids[0, :, None].to(log_probs.device)
    return float(log_probs.gather(1, answer)[question.scored].double().mean())


def answer_predictions(loaded: LoadedModel, question: FactQuestion, cache: Cache) -> Float[Tensor, "a vocab"]:
    """Return the log probabilities in the place of each token of the answer, after the rest of the prompt, in nats."""
    rest = question.question_ids[:, question.read_ids.shape[1] :]
    fed = torch.cat([rest, question.lead_ids, question.answer_ids], dim=1)
    return predict(loaded.model, fed, cache)[-question.answer_ids.shape[1] :]


def check_counts(count: int, wordings: int) -> None:
    """Make sure that there are so many facts, and so many wordings of each question.

    Raises:
        EvaluationError: If there are not.
    """
    most = min(len(fact.questions) for fact in (*FACTS, *PASSAGES))
    for what, given, least, limit in (("facts", count, 0, len(FACTS)), ("wordings", wordings, 1, most)):
        if not least <= given <= limit:
            msg = f"{what} must be from {least} to {limit}, got {given}"
            raise EvaluationError(msg)


def _placed(facts: Sequence[Fact], seed: str) -> list[tuple[str, float]]:
    """Return the sentences with their depths: facts evenly spread in an order that the seed chooses, parts apart."""
    order = list(facts)
    random.Random(f"order {seed}").shuffle(order)  # noqa: S311 - reproducible, not secret
    return [
        (sentence, ((index + 0.5) / len(order) + part / len(fact.sentences)) % 1)
        for index, fact in enumerate(order)
        for part, sentence in enumerate(fact.sentences)
    ]


def _window(  # noqa: PLR0913, PLR0917 - a text in three forms
    tokenizer: PreTrainedTokenizerBase, text: str, ids: Int[Tensor, "1 n"], length: int, name: str, seed: str
) -> Int[Tensor, "1 m"]:
    """Return a window with the text's passages in it if it has any, else anywhere, as the seed chooses."""
    starts = [match.start() for fact in PASSAGES if (match := _find(fact, text))]
    total = ids.shape[1]
    if not starts or total < length:
        return draw_window(ids, length, name, seed)
    first = tokenize(tokenizer, text[: min(starts)]).shape[1]
    before = random.Random(f"passages {seed}").randint(0, max(0, length - _STRETCH))  # noqa: S311 - reproducible
    start = min(max(0, first - _BEFORE - before), total - length)
    return ids[:, start : start + length]


def _find(fact: Fact, text: str) -> re.Match[str] | None:
    return _pattern(fact).search(text)


def _pattern(fact: Fact) -> re.Pattern[str]:
    """Return what matches a passage however its lines are broken."""
    return re.compile(r"\s+".join(re.escape(word) for word in " ".join(fact.sentences).split()))
