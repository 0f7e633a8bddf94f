"""A prompt as HTML, coloured by how many heads and layers have kept each token."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol, runtime_checkable

from nexusquant_cache.errors import OptionError
from nexusquant_cache.files.kept import KeptTokens
from nexusquant_cache.pages.elements import printable

LEVELS = 10
"""Levels of colour for tokens that something has kept; level 0 is for those that nothing has."""

_CUT_OFF = "\ufffd"  # what tokenizers decode half a character to
_LONGEST = 8  # tokens of one character, at most
_MARK_TEXT = 500  # tokens between two numbers in a text
_LINE = 100  # positions of a line without text
_DOT = "·"


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers, which importing this package does not load."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str | list[str]:
        """Return the text of token ids."""

    def __len__(self) -> int: ...


@dataclass
class Run:
    """Tokens one behind the other whose shares have one level.

    Attributes:
        start: Position of the first.
        stop: Position behind the last.
        level: Their level.
        least: The smallest number of heads that have kept one of them.
        most: The largest.
        text: What they say.
    """

    start: int
    stop: int
    level: int
    least: int
    most: int
    text: str


def level_of(count: int, heads: int) -> int:
    """Return the level of a token: 0 if no head of any layer has kept it, `LEVELS` if more than nine tenths have."""
    return -(-LEVELS * count // heads) if heads else 0


def legend() -> str:
    """Return what the colours mean."""
    names = ["none", *(f"to {100 * level // LEVELS} %" for level in range(1, LEVELS + 1))]
    cells = (f'<span class="k{level}">{name}</span>' for level, name in enumerate(names))
    return f'<p class="legend">kept by {" ".join(cells)} of all heads in all layers</p>'


def text_html(ids: Sequence[int], tokenizer: Tokenizer, kept: KeptTokens) -> str:
    """Return a prompt as text.

    Args:
        ids: Its token ids.
        tokenizer: The tokenizer that they are from.
        kept: What was kept of it.

    Raises:
        OptionError: If the tokenizer does not know the ids.
    """
    known = len(tokenizer)
    if ids and not 0 <= min(ids) <= max(ids) < known:
        msg = (
            f"the prompt has token ids from {min(ids):,} to {max(ids):,}, and the tokenizer knows {known:,}: give the "
            "tokenizer of the model that the cache is of"
        )
        raise OptionError(msg)
    return _html(_pieces(ids, tokenizer), kept, _MARK_TEXT)


def strip_html(kept: KeptTokens) -> str:
    """Return the positions of a prompt whose text is not known: a dot for each, a line for each hundred."""
    dots = ((place, place + 1, _DOT) for place in range(len(kept.counts)))
    return _html(dots, kept, _LINE, between="\n")


def runs(pieces: Iterable[tuple[int, int, str]], kept: KeptTokens, step: int) -> Iterator[Run]:
    """Yield the runs of a prompt.

    Args:
        pieces: Where each piece of the text begins and ends, and what it says.
        kept: What was kept.
        step: A run ends where a multiple of this begins.
    """
    counts: list[int] = kept.counts.tolist()
    run: Run | None = None
    for start, stop, text in pieces:
        inside = counts[start:stop]
        least, most = min(inside), max(inside)
        level = level_of(sum(inside), kept.heads * len(inside))
        if run is not None and level == run.level and start // step == run.start // step:
            run.stop, run.text = stop, run.text + text
            run.least, run.most = min(run.least, least), max(run.most, most)
            continue
        if run is not None:
            yield run
        run = Run(start, stop, level, least, most, text)
    if run is not None:
        yield run


def _html(pieces: Iterable[tuple[int, int, str]], kept: KeptTokens, step: int, between: str = "") -> str:
    parts = []
    last = -1
    for run in runs(pieces, kept, step):
        if run.start // step > last:
            parts.append(f"{between if last >= 0 else ''}<small>{run.start:,}</small>")
            last = run.start // step
        text = escape(printable(run.text, "\n\t"))
        parts.append(f'<span class="k{run.level}" title="{_title(run, kept.heads)}">{text}</span>')
    return f'<div class="prompt{" strip" * bool(between)}">{"".join(parts)}</div>'


def _title(run: Run, heads: int) -> str:
    place = f"{run.start:,}" if run.stop == run.start + 1 else f"{run.start:,}-{run.stop - 1:,}"
    least, most = (f"{100 * count / heads:.0f}" if heads else "0" for count in (run.least, run.most))
    return f"{place}: {least} %" if least == most else f"{place}: {least}-{most} %"


def _pieces(ids: Sequence[int], tokenizer: Tokenizer) -> Iterator[tuple[int, int, str]]:
    """Yield the text of each token, or of several that make a character together.

    Tokens are decoded behind those before them, since some tokenizers drop the space before a text's first word.
    """
    before, start = 0, 0
    known = ""  # what the tokens from `before` to `start` say
    for stop in range(1, len(ids) + 1):
        said = _decoded(tokenizer, ids[before:stop])
        is_whole = len(said) > len(known) and not said.endswith(_CUT_OFF)
        if not is_whole and stop - start < _LONGEST and stop < len(ids):
            continue
        yield start, stop, said[len(known) :]
        before, start = start, stop
        known = _decoded(tokenizer, ids[before:stop])


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
