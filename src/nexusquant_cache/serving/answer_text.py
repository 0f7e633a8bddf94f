"""The text of an answer, as its tokens come: whole characters, up to the first stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class AnswerText:
    """Turns tokens into pieces of text, which together are the text of the whole answer.

    A piece is held back while it may be the beginning of a character or of a stop string.

    Args:
        tokenizer: The model's.
        stop: Texts at which the answer ends; they do not belong to it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """Begin an answer."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Tokens before `_from` have no effect on the text any more; those before `_to` are in `_text` already.
        self._from = self._to = 0
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain by now."""
        self._ids.append(token)
        grown = self._decoded(len(self._ids))
        if grown.endswith(_UNFINISHED):
            return ""
        return self._accept(grown)

    def end(self) -> str:
        """Return what was held back."""
        text = "" if self.is_stopped else self._accept(self._decoded(len(self._ids)))
        text, self._held = text + self._held, ""
        return text

    def _decoded(self, end: int) -> str:
        """Return the text of the last tokens.  Those before the new ones come along: a space may depend on them."""
        return str(self._tokenizer.decode(self._ids[self._from : end], skip_special_tokens=True))

    def _accept(self, grown: str) -> str:
        new = grown[len(self._decoded(self._to)) :]
        self._from, self._to = self._to, len(self._ids)
        text = self._held + new
        ends = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
