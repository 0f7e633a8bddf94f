"""One of two chats that are shown side by side."""

import time
from collections.abc import Callable

from nexusquant_cache.serving.chat_model import Answer, ChatModel, Listener, Message, Wish
from nexusquant_cache.serving.meter import Meter
from nexusquant_cache.serving.session import ChatSession

Told = Callable[[str], None]
"""Called with what is being done, in words, whenever there is something new to show."""


class Side:
    """A chat with what is shown of it.

    One thread may change it; others may look at `shown` and `meter`.

    Args:
        name: What it is called.
        model: Who answers.
        wish: How answers shall be.
        most_tokens: Most tokens of a chat with its answer.

    Attributes:
        shown: Messages, with the one that is being said.
        meter: What the cache held after the last answer; None if it has seen nothing.
    """

    def __init__(self, name: str, model: ChatModel, wish: Wish, most_tokens: int | None) -> None:
        """Begin a chat."""
        self.name = name
        self._new: Callable[[], ChatSession] = lambda: ChatSession(model, wish, most_tokens=most_tokens)
        self._session = self._new()
        self._done: tuple[Message, ...] = ()
        self.shown: tuple[Message, ...] = ()
        self.meter: Meter | None = None

    def reset(self) -> None:
        """Begin a new chat, without a document."""
        self._session.reset()
        self._done = self.shown = ()
        self.meter = None

    def release(self) -> None:
        """Let go of the cache: the next question has everything read again."""
        self._session.conversation = self._session.model.new_conversation()
        self.meter = None

    def use_preset(self, name: str) -> None:
        """Use another preset from the next question on.

        Raises:
            OptionError: If there is no such preset.
        """
        self._session.use_preset(name)
        self.meter = None

    def catch_up(self, messages: tuple[Message, ...], document: str) -> None:
        """Take over what another side shows, if this one has missed a turn of it; there may be a document."""
        if len(self._done) == len(messages):
            return
        self._done = self.shown = messages
        if not document:  # of one, each question begins anew
            self._session.messages = list(messages)

    def read(self, text: str, watch: "Watch") -> bool:
        """Begin a new chat about a document; tell whether it was read to its end, otherwise all is as before.

        Raises:
            LengthError: If the document is too long.
        """
        start = time.perf_counter()
        watch.tell("reading")
        session = self._new()
        if not session.read(text, watch):
            return False
        self._session, self._done, self.shown = session, (), ()
        self.meter = Meter.of(session.report(), f"document read in {time.perf_counter() - start:.1f} s")
        return True

    def ask(self, document: str, text: str, watch: "Watch") -> Answer:
        """Ask something: in the chat, or, if there is a document, of a copy of the cache that has read it.

        What was said before the answer was stopped belongs to the chat.

        Args:
            document: What has been read; empty without.  It is read again if the cache was let go of.
            text: The question.
            watch: Who hears the answer.

        Raises:
            LengthError: If the chat is too long.
        """
        start = time.perf_counter()
        question = {"role": "user", "content": text}
        self.shown = (*self._done, question)
        watch.on_text = lambda said: self._show(question, said)
        watch.tell("reading")
        try:
            session = self._ready(document, watch)
            answer = session.ask(text, watch) if session else Answer(0, 0, "left")
            if session and answer.tokens:
                self._done = (*self._done, question, _assistant(watch.text))
                last = f"{answer.tokens} tokens in {time.perf_counter() - start:.1f} s"
                self.meter = Meter.of(session.report(), last)
        finally:
            self.shown = self._done
        return answer

    def _ready(self, document: str, watch: "Watch") -> ChatSession | None:
        """Return what to ask; None if reading the document again was stopped."""
        if not document:
            return self._session
        if not len(self._session.conversation.ids):
            self._session.reset()
            if not self._session.read(document, watch):
                return None
        return self._session.fork()

    def _show(self, question: Message, said: str) -> None:
        self.shown = (*self._done, question, _assistant(said))


class Watch(Listener):
    """Follows one side's answer, and has it shown.

    Args:
        name: Of the side.
        told: Called with what is being done.
        is_left: Tells whether to stop.
    """

    def __init__(self, name: str, told: Told, is_left: Callable[[], bool]) -> None:
        """Hear nothing yet."""
        self._name, self._told, self._is_left = name, told, is_left
        self.text = ""
        self.on_text: Told = lambda _: None

    def tell(self, doing: str) -> None:
        """Say what is being done."""
        self._told(f"{self._name}: {doing} ...")

    def read(self, done: int, total: int) -> None:
        """Say how much has been read."""
        self.tell(f"reading, {done:,} of {total:,} tokens")

    def say(self, text: str) -> None:
        """Show the answer as far as it goes."""
        self.text += text
        self.on_text(self.text)
        self.tell("answering")

    @property
    def wants_no_more(self) -> bool:
        """Whether to stop."""
        return self._is_left()


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
