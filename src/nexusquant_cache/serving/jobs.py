"""What is asked of the model, and what becomes of it."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.serving.chat_model import Answer, Listener, Wish


@dataclass(frozen=True)
class Failure:
    """An answer that could not be given, or not to its end.

    Attributes:
        message: What the client is told.
    """

    message: str


Event: TypeAlias = str | Answer | Failure
"""A piece of an answer; how it ended, or why it could not be given, comes last."""


class Job(Listener):
    """A prompt to be answered.

    Args:
        prompt: Its ids.
        wish: How the answer shall be.
        post: Called with every event, by the thread that owns the model.
        shared: How many of the first tokens are a system message, which other prompts may begin with; 0 if none are.
    """

    def __init__(
        self, prompt: Int[Tensor, " n"], wish: Wish, post: Callable[[Event], None], *, shared: int = 0
    ) -> None:
        """Make a job that is wanted."""
        self.prompt, self.wish, self.post, self.shared = prompt, wish, post, shared
        self._is_left = threading.Event()

    def leave(self) -> None:
        """Say that nobody waits for the answer any more."""
        self._is_left.set()

    def say(self, text: str) -> None:
        """Pass a piece on."""
        self.post(text)

    @property
    def wants_no_more(self) -> bool:
        """Whether nobody waits."""
        return self._is_left.is_set()
