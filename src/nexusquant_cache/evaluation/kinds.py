"""The kinds of needles: what is hidden in a text, how it is asked for, and what counts as found.

Every kind asks for numbers that no text contains by chance and no model knows.  A cache that finds one kind may
lose another:

* ``single``: one fact; the question repeats its words.
* ``multikey``: several facts of the same form about different places; one is asked for, and the number of
  another does not count.
* ``two_part``: one sentence with two numbers; both are asked for, so a longer span has to survive as a whole.
* ``paraphrase``: the question shares no word but the town's name with the fact.
* ``later``: the question comes in a later turn, when the text has been compressed already.
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nexusquant_cache.errors import suggest
from nexusquant_cache.evaluation.errors import EvaluationError

# What a fact is about, and the same place in other words.
_PLACES = (
    ("the harbour office in Lisbon", "the port building in Lisbon"),
    ("the observatory on Mount Kenya", "the telescope station on Mount Kenya"),
    ("the old library of Prague", "the book collection of Prague"),
    ("the bakery in Cornwall", "the bread shop in Cornwall"),
    ("the greenhouse in Oslo", "the plant nursery in Oslo"),
    ("the museum in Toronto", "the art gallery in Toronto"),
    ("the railway depot in Kyoto", "the train shed in Kyoto"),
    ("the vineyard near Siena", "the wine estate near Siena"),
    ("the lighthouse at Cape Horn", "the beacon at Cape Horn"),
    ("the clinic in Nairobi", "the hospital in Nairobi"),
    ("the bookshop in Dublin", "the novel store in Dublin"),
    ("the theatre in Vienna", "the playhouse in Vienna"),
    ("the ferry terminal in Bergen", "the ship landing in Bergen"),
    ("the weather station on Iceland", "the storm observatory on Iceland"),
    ("the botanical garden in Lima", "the plant park in Lima"),
    ("the shipyard in Gdansk", "the boat works in Gdansk"),
    ("the post office in Quito", "the mail building in Quito"),
    ("the brewery in Munich", "the beer works in Munich"),
    ("the school in Bombay", "the classroom building in Bombay"),
    ("the bank in Geneva", "the money house in Geneva"),
    ("the stable in Seville", "the horse barn in Seville"),
    ("the cinema in Havana", "the film house in Havana"),
    ("the pharmacy in Warsaw", "the drugstore in Warsaw"),
    ("the airport in Denver", "the airfield in Denver"),
    ("the dairy in Normandy", "the cheese farm in Normandy"),
    ("the mine in Bolivia", "the silver pit in Bolivia"),
    ("the monastery in Tibet", "the abbey in Tibet"),
    ("the printing house in Leipzig", "the newspaper press in Leipzig"),
    ("the restaurant in Naples", "the dining hall in Naples"),
    ("the power plant in Quebec", "the electricity works in Quebec"),
    ("the sawmill in Finland", "the timber works in Finland"),
    ("the tailor in Istanbul", "the suit maker in Istanbul"),
)
_DIGITS = 6
_RIVALS = 2  # facts besides the one that is asked for
_REQUEST = "Somewhere in the following text, an access code is mentioned. Find it."
_REQUEST_MANY = "Somewhere in the following text, access codes are mentioned. Find them."
_REQUEST_LATER = "Read the following text. I will ask you about it."
_ANSWER_TOKENS = 24  # the question's words and six digits
_ANSWER_TOKENS_TWO = 36


@dataclass(frozen=True)
class Needle:
    """What is hidden in a text and asked for.

    Attributes:
        kind: The kind's name, see `KINDS`.
        request: What stands before the text.
        sentences: What to hide: the first at the depth of the task, the others spread evenly from there.
        question: What to ask.
        expected: Numbers that the answer must all contain.
        rivals: Numbers that the answer must not contain.
        comes_later: Whether the question comes in a later turn, when the text has been compressed.
        answer_tokens: Longest answer.
    """

    kind: str
    request: str
    sentences: tuple[str, ...]
    question: str
    expected: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    comes_later: bool = False
    answer_tokens: int = _ANSWER_TOKENS

    @classmethod
    def draw(cls, kind: str, seed: int | str) -> "Needle":
        """Return the needle of a seed.

        Raises:
            EvaluationError: If there is no such kind.
        """
        check_kinds((kind,))
        return _MAKERS[kind](random.Random(f"{kind} {seed}"))  # noqa: S311 - reproducible, not secret

    def is_found_in(self, answer: str) -> bool:
        """Return whether an answer gives the expected numbers and no other's, however digits are grouped."""
        digits = re.sub(r"(?<=\d)[ ,.](?=\d)", "", answer)
        return all(number in digits for number in self.expected) and not any(n in digits for n in self.rivals)


def check_kinds(kinds: tuple[str, ...]) -> None:
    """Make sure that these are kinds of needles.

    Raises:
        EvaluationError: If one is not; the message names the nearest that is.
    """
    for kind in kinds:
        if kind not in KINDS:
            msg = f"unknown kind of needle {kind!r}. {suggest(kind, KINDS)}"
            raise EvaluationError(msg)


def _single(source: random.Random) -> Needle:
    place, _ = source.choice(_PLACES)
    (number,) = _numbers(source, 1)
    return Needle("single", _REQUEST, (_code_of(place, number),), _ask_code(place), (number,))


def _multikey(source: random.Random) -> Needle:
    places = [place for place, _ in source.sample(_PLACES, 1 + _RIVALS)]
    numbers = _numbers(source, 1 + _RIVALS)
    sentences = tuple(_code_of(*fact) for fact in zip(places, numbers, strict=True))
    return Needle("multikey", _REQUEST_MANY, sentences, _ask_code(places[0]), numbers[:1], rivals=numbers[1:])


def _two_part(source: random.Random) -> Needle:
    place, _ = source.choice(_PLACES)
    first, second = numbers = _numbers(source, 2)
    return Needle(
        kind="two_part",
        request=_REQUEST_MANY,
        sentences=(f"The access codes of {place} are {first} and {second}.",),
        question=f"What are the access codes of {place}?",
        expected=numbers,
        answer_tokens=_ANSWER_TOKENS_TWO,
    )


def _paraphrase(source: random.Random) -> Needle:
    place, other_words = source.choice(_PLACES)
    (number,) = _numbers(source, 1)
    question = f"Which number opens the door of {other_words}?"
    return Needle("paraphrase", _REQUEST, (_code_of(place, number),), question, (number,))


def _later(source: random.Random) -> Needle:
    place, _ = source.choice(_PLACES)
    (number,) = _numbers(source, 1)
    sentences = (_code_of(place, number),)
    return Needle("later", _REQUEST_LATER, sentences, _ask_code(place), (number,), comes_later=True)


_MAKERS: Mapping[str, Callable[[random.Random], Needle]] = MappingProxyType(
    {"single": _single, "multikey": _multikey, "two_part": _two_part, "paraphrase": _paraphrase, "later": _later}
)
KINDS = tuple(_MAKERS)
"""The kinds of needles by name; the module's docstring says what they are."""


def _numbers(source: random.Random, count: int) -> tuple[str, ...]:
    return tuple(str(n) for n in source.sample(range(10 ** (_DIGITS - 1), 10**_DIGITS), count))


def _code_of(place: str, number: str) -> str:
    return f"The access code of {place} is {number}."


def _ask_code(place: str) -> str:
    return f"What is the access code of {place}?"
