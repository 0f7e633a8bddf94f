"""The thread that owns the model: it answers one prompt after the other."""

import logging
import threading
from collections import deque
from collections.abc import Iterable

import torch

from nexusquant_cache.errors import NexusQuantError
from nexusquant_cache.serving.chat_model import Answer, ChatModel
from nexusquant_cache.serving.conversation import Conversation
from nexusquant_cache.serving.errors import BusyError
from nexusquant_cache.serving.jobs import Failure, Job
from nexusquant_cache.serving.pool import ConversationPool
from nexusquant_cache.store.store import PrefixStore

_LOGGER = logging.getLogger(__name__)
_PATIENCE = 30.0  # seconds that an answer has to stop in, at the end
LEAST_SHARED = 256  # tokens of a system message that is worth a file


class Worker:
    """Answers prompts, each through the conversation that it goes on with.

    Args:
        model: The model.
        pool: Where conversations are between two prompts.
        most_waiting: How many prompts may wait while another is answered.
        store: Where long system messages go, and conversations that have no place in the pool; they are found again.
    """

    def __init__(
        self, model: ChatModel, pool: ConversationPool, most_waiting: int, store: PrefixStore | None = None
    ) -> None:
        """Make a worker that does not work yet."""
        self._model, self.pool, self._store = model, pool, store
        self._most_waiting = most_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._now: Job | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._work, name="nexusquant-worker", daemon=True)

    # For other threads

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many prompts wait."""
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Let a prompt wait for its turn.

        Raises:
            BusyError: If too many wait already, or the worker stops.
        """
        with self._changed:
            if self._is_over:
                msg = "the server is about to stop"
                raise BusyError(msg)
            if len(self._waiting) >= self._most_waiting and (self._now is not None or self._waiting):
                msg = f"{len(self._waiting)} prompts wait already: try again later"
                raise BusyError(msg)
            self._waiting.append(job)
            self._changed.notify()

    def withdraw(self, job: Job) -> None:
        """Take a prompt back: it waits no longer, or its answer ends with the next token."""
        job.leave()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def stop(self) -> None:
        """End the present answer, and put idle conversations into the store."""
        with self._changed:
            self._is_over = True
            for job in (*self._waiting, *filter(None, [self._now])):
                job.leave()
            self._changed.notify()
        self._thread.join(_PATIENCE)

    # In the thread

    def _work(self) -> None:
        while (job := self._next()) is not None:
            self._serve(job)
        self._put_away(self.pool.clear())

    def _next(self) -> Job | None:
        with self._changed:
            self._now = None
            self._changed.wait_for(lambda: self._waiting or self._is_over)
            self._now = self._waiting.popleft() if self._waiting else None
            return self._now

    def _serve(self, job: Job) -> None:
        """Answer a prompt; whatever happens, the next one can be answered."""
        try:
            if job.wants_no_more:
                job.post(Answer(0, 0, "left"))
                return
            conversation = self._find(job)
            answer = self._model.answer(conversation, job.prompt, job.wish, job)
            if len(conversation.ids):
                self._put_away(self.pool.put(conversation))
            job.post(answer)
        except torch.OutOfMemoryError:
            _LOGGER.exception("out of memory: idle conversations are dropped")
            self._put_away(self.pool.clear())
            job.post(Failure("out of memory: try again, or a shorter prompt"))
        except Exception:
            _LOGGER.exception("an answer failed")
            job.post(Failure("the answer failed; the server's log says why"))

    def _find(self, job: Job) -> Conversation:
        """Return the conversation that knows most of a prompt, or a new one."""
        conversation = self.pool.take(job.prompt) or self._stored(job) or self._model.new_conversation()
        if self._store is not None and len(conversation.ids) < job.shared:
            self._share(conversation, job)
        return conversation

    def _stored(self, job: Job) -> Conversation | None:
        if self._store is None:
            return None
        model = self._model.model
        try:
            found = self._store.get(
                job.prompt, config=model.config, preset=self._model.preset, device=model.device, dtype=model.dtype
            )
        except (NexusQuantError, OSError):
            _LOGGER.warning("the prefix store cannot be used", exc_info=True)
            return None
        return None if found is None else Conversation(found[0], job.prompt[: found[1]], found[1])

    def _share(self, conversation: Conversation, job: Job) -> None:
        """Read a system message by itself, and store it for all prompts that begin with it."""
        if self._model.read(conversation, job.prompt[: job.shared], job):
            self._put_away([conversation])

    def _put_away(self, conversations: Iterable[Conversation]) -> None:
        """Store conversations, if there is a store."""
        for conversation in conversations:
            if self._store is None:
                continue
            try:
                self._store.put(conversation.cache, conversation.ids)
            except (NexusQuantError, OSError):
                _LOGGER.warning("a conversation could not be stored", exc_info=True)
