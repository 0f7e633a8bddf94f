"""A cache, and the ids of what it has seen: what a next prompt need not have read again."""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.errors import NexusQuantError


@dataclass(frozen=True)
class Place:
    """Where a conversation stands, to be gone back to.

    Attributes:
        tokens: Tokens seen.
        answer_from: See `Conversation`.
        evicted: Tokens that each compressed layer has evicted.
    """

    tokens: int
    answer_from: int
    evicted: tuple[int, ...]


class Conversation:
    """A cache that goes from prompt to prompt.

    Prompts that go on with a conversation share their beginning with it.  They may part from it inside its last answer:
    chat templates drop thoughts and trim ends, and a text has other tokens when it is read than when it was written.
    The rest of the answer is then cut off the cache, which takes back codes, and nothing else: nothing of an answer is
    evicted before the next turn.  Before the last answer nothing is cut, since what was evicted there depends on all
    that was read.

    Attributes:
        cache: The cache.
        ids: The ids of the tokens that it has seen.
        answer_from: How many of them a prompt has to share: where the last answer begins.
    """

    def __init__(self, cache: NexusQuantCache, ids: Int[Tensor, " n"] | None = None, answer_from: int = 0) -> None:
        """Begin a conversation, or take one up."""
        self.cache = cache
        self.ids = torch.empty(0, dtype=torch.long) if ids is None else ids
        self.answer_from = answer_from

    @property
    def held_bytes(self) -> int:
        """Bytes that the cache holds."""
        return self.cache.memory_report().held_bytes

    def known_of(self, prompt: Int[Tensor, " m"]) -> int:
        """Return how many tokens of a prompt need not be read again; 0 if it does not go on with this conversation.

        At least one is left, since a model has to read one to say something.
        """
        most = min(len(self.ids), len(prompt) - 1)
        differences = (self.ids[:most] != prompt[:most]).nonzero()
        common = int(differences[0]) if len(differences) else most
        return common if 0 < self.answer_from <= common else 0

    def begin(self, prompt: Int[Tensor, " m"]) -> Place:
        """Bring the cache to where a prompt goes on, or empty it; return where that is."""
        known = self.known_of(prompt)
        if not known or not self.go_back(Place(known, self.answer_from, self._evicted())):
            self.reset()
        return Place(len(self.ids), self.answer_from, self._evicted())

    def go_back(self, place: Place) -> bool:
        """Take back all that came after a place; tell whether everything is as it was then.

        If not, the conversation has to be reset: layers of transformers' own cannot all go back, and the compression of
        a turn also evicts what stood in full precision before it.
        """
        try:
            excess = self.cache.get_seq_length() - place.tokens
            if excess > 0:  # by 0, layers with a window would refuse
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of what is lost, which is found below
                    self.cache.crop(-excess)
        except (NexusQuantError, RuntimeError):
            return False
        if self._evicted() != place.evicted or self.cache.memory_report().trouble:
            return False
        self.ids, self.answer_from = self.ids[: place.tokens], place.answer_from
        return True

    def _evicted(self) -> tuple[int, ...]:
        return tuple(part.state.evicted for part in self.cache.parts() if part.state is not None)

    def settle(self, tokens: Int[Tensor, " m"], answer_from: int) -> None:
        """Take note of what the cache has seen by now: the first of these tokens."""
        self.ids = tokens[: self.cache.get_seq_length()].to("cpu", copy=True)
        self.answer_from = answer_from

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self.ids, self.answer_from = self.ids[:0], 0
