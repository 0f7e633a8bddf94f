"""Conversations that nobody is having just now."""

from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.serving.conversation import Conversation


class ConversationPool:
    """Keeps idle conversations, as many as fit into so many bytes; those that were used longest ago go first.

    One thread may change it; others may read what it holds.

    Args:
        max_bytes: What all caches together may hold.
    """

    def __init__(self, max_bytes: int) -> None:
        """Make an empty pool."""
        self.max_bytes = max_bytes
        self._idle: list[tuple[Conversation, int]] = []  # with their bytes; the newest last
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, prompt: Int[Tensor, " n"]) -> Conversation | None:
        """Take out the conversation that knows most of a prompt; None if none goes on with it."""
        best, most = None, 0
        for place, (conversation, _) in enumerate(self._idle):
            known = conversation.known_of(prompt)
            if known > most:
                best, most = place, known
        return None if best is None else self._remove(best)

    def put(self, conversation: Conversation) -> list[Conversation]:
        """Keep a conversation; return those that have to go for it, itself among them if it is too large."""
        size = conversation.held_bytes
        self._idle.append((conversation, size))
        self.held_bytes += size
        gone = []
        while self.held_bytes > self.max_bytes:
            gone.append(self._remove(0))
        return gone

    def clear(self) -> list[Conversation]:
        """Keep none; return those that were kept."""
        return [self._remove(0) for _ in range(len(self))]

    def _remove(self, place: int) -> Conversation:
        conversation, size = self._idle.pop(place)
        self.held_bytes -= size
        return conversation
