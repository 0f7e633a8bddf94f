"""A user's two chats, through the compressed and through the plain cache, and all users of a page."""

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from nexusquant_cache.errors import NexusQuantError
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.presets import CacheConfig
from nexusquant_cache.serving.chat_model import ChatModel, Message, Wish
from nexusquant_cache.serving.errors import BusyError, ServingError
from nexusquant_cache.serving.meter import Meter
from nexusquant_cache.serving.model_thread import ModelThread
from nexusquant_cache.serving.plain import PlainChatModel
from nexusquant_cache.serving.side import Side, Told, Watch

_LOGGER = logging.getLogger(__name__)
COMPRESSED, PLAIN = "compressed cache", "plain cache"
_STOPPED = "Stopped."


@dataclass(frozen=True)
class View:
    """What a user sees.

    Attributes:
        compressed: Messages of the chat through the compressed cache.
        plain: Messages of the chat through the plain cache.
        meters: What the caches hold, by their names.
        document: What is said of the document; empty without one.
        status: What is being done, or what went wrong.
        is_error: Whether something went wrong.
    """

    compressed: tuple[Message, ...]
    plain: tuple[Message, ...]
    meters: dict[str, Meter | None]
    document: str = ""
    status: str = ""
    is_error: bool = False


_Work = Callable[[Told, Callable[[], bool]], str]
"""Called with whom to tell what is being done, and with what tells whether to stop; returns what is said in the end."""


class SideBySide:
    """The two chats of one user, who asks both the same.

    Any thread may call it; the chats live in the thread that owns the model.  Errors become views.

    Args:
        loaded: The model.
        thread: The thread that owns it.
        preset: Of the compressed cache, as for `NexusQuantCache`.
        wish: How answers shall be.
        most_tokens: Most tokens of a chat with its answer; None: what the model was made for.

    Raises:
        ServingError: If the model has no chat template.
        OptionError: If there is no such preset.
        UnsupportedError: If the preset does not suit the model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        thread: ModelThread,
        preset: str | CacheConfig = "balanced",
        *,
        wish: Wish,
        most_tokens: int | None = None,
    ) -> None:
        """Begin two chats."""
        self._thread = thread
        self._compressed = Side(COMPRESSED, ChatModel(loaded, preset), wish, most_tokens)
        self._plain = Side(PLAIN, PlainChatModel(loaded), wish, most_tokens)
        self._document = ""
        self._left = threading.Event()

    def ask(self, text: str, *, with_plain: bool = True) -> Iterator[View]:
        """Ask both sides, one after the other.

        Args:
            text: The question.
            with_plain: Whether the plain side is asked too.  When it is asked again, it takes over what it has missed.
        """
        return self._stream(lambda told, is_left: self._ask(text.strip(), told, is_left, with_plain=with_plain))

    def read(self, text: str, *, with_plain: bool = True) -> Iterator[View]:
        """Begin a new chat about a document.

        Args:
            text: The document.
            with_plain: Whether the plain side reads it now; otherwise it does when it is asked.
        """
        return self._stream(lambda told, is_left: self._read(text, told, is_left, with_plain=with_plain))

    def use_preset(self, name: str) -> Iterator[View]:
        """Use another preset from the next question on."""

        def use(_: Told, _is_left: Callable[[], bool]) -> str:
            self._compressed.use_preset(name)
            again = "; the next question has everything read again" if self._compressed.shown or self._document else ""
            return f"Preset {name}{again}."

        return self._stream(use)

    def reset(self) -> Iterator[View]:
        """Begin a new chat, without a document."""

        def reset(_: Told, _is_left: Callable[[], bool]) -> str:
            self._document = ""
            self._compressed.reset()
            self._plain.reset()
            return "A new chat."

        return self._stream(reset)

    def stop(self) -> None:
        """Stop what is being read or said."""
        self._left.set()

    def release(self) -> None:
        """Let go of the caches, since nobody looks: the next question has everything read again."""
        self.stop()

        def release() -> None:
            self._compressed.release()
            self._plain.release()

        with contextlib.suppress(BusyError):  # then it is all over
            self._thread.submit(release)

    def view(self, status: str = "", *, is_error: bool = False) -> View:
        """Return what there is to see."""
        document = ""
        if self._document:
            document = (
                f"A document of {len(self._document):,} characters. Each question goes to a copy of the cache that has "
                "read it: none knows of another."
            )
        return View(
            self._compressed.shown,
            self._plain.shown,
            {side.name: side.meter for side in (self._compressed, self._plain)},
            document,
            status,
            is_error,
        )

    # In the thread that owns the model

    def _ask(self, text: str, told: Told, is_left: Callable[[], bool], *, with_plain: bool) -> str:
        if not text:
            msg = "type a question first"
            raise ServingError(msg)
        if with_plain:
            self._plain.catch_up(self._compressed.shown, self._document)
        cut = []
        for side in (self._compressed, self._plain)[: 1 + with_plain]:
            answer = side.ask(self._document, text, Watch(side.name, told, is_left))
            if answer.ended == "left":
                return _STOPPED
            if answer.ended == "length":
                cut.append(side.name)
        return f"Cut off at the longest answer, or the longest chat, that is allowed: {', '.join(cut)}." if cut else ""

    def _read(self, text: str, told: Told, is_left: Callable[[], bool], *, with_plain: bool) -> str:
        if not text.strip():
            msg = "the document is empty: paste a text, or upload a file"
            raise ServingError(msg)
        if not self._compressed.read(text, Watch(COMPRESSED, told, is_left)):
            return f"{_STOPPED} The document was not read."
        self._document = text
        self._plain.reset()
        if with_plain and not self._plain.read(text, Watch(PLAIN, told, is_left)):
            return f"{_STOPPED} The plain cache reads the document with the next question."
        return "The document has been read: ask about it."

    def _stream(self, work: _Work) -> Iterator[View]:
        self._left = left = threading.Event()

        def do(post: Callable[[View], None]) -> None:
            post(self._outcome(work, post, left))

        try:
            yield from self._thread.stream(do)
        except NexusQuantError as error:  # the thread was closed
            yield self._failure(str(error))
        finally:
            left.set()

    def _outcome(self, work: _Work, post: Callable[[View], None], left: threading.Event) -> View:
        try:
            return self.view(
                work(lambda status: post(self.view(status)), lambda: left.is_set() or self._thread.is_over)
            )
        except NexusQuantError as error:
            return self._failure(str(error))
        except (MemoryError, torch.OutOfMemoryError):
            _LOGGER.exception("out of memory")
            return self._failure("out of memory: take a shorter text, or switch the plain cache off")
        except Exception:
            _LOGGER.exception("an answer failed")
            return self._failure("that failed; the log of the program says why")

    def _failure(self, text: str) -> View:
        sentence = text[:1].upper() + text[1:]
        return self.view(sentence if sentence.endswith((".", "?")) else f"{sentence}.", is_error=True)


class Users:
    """Who uses a page: each has chats of their own.

    Args:
        new: Makes the chats of somebody who has just come.
        most: So many are remembered; of the others, those who came back least lately are forgotten.
    """

    def __init__(self, new: Callable[[], SideBySide], most: int = 64) -> None:
        """Know nobody yet."""
        self._new, self._most = new, most
        self._known: OrderedDict[str, SideBySide] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str | None) -> SideBySide:
        """Return the chats of a user.

        Args:
            key: Who it is.  Whoever has none is new, and not remembered: nobody else may get these chats.
        """
        if not key:
            return self._new()
        with self._lock:
            found = self._known.pop(key, None) or self._new()
            self._known[key] = found
            while len(self._known) > self._most:
                self._known.popitem(last=False)[1].stop()
        return found

    def leave(self, key: str | None) -> None:
        """Let go of what somebody's caches hold, who has gone; texts stay, should they come back."""
        with self._lock:
            found = self._known.get(key or "")
        if found is not None:
            found.release()
