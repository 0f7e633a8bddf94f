"""One user's chat: messages, and a conversation that has read them."""

import copy
from dataclasses import replace
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.cache.report import MemoryReport
from nexusquant_cache.presets import PRESETS, preset_name
from nexusquant_cache.serving.chat_model import Answer, ChatModel, Listener, Message, Wish
from nexusquant_cache.serving.errors import LengthError, ServingError
from nexusquant_cache.serving.saved import Talk, load_conversation, save_conversation


class ChatSession:
    """A chat with one user.

    The messages are the truth; the conversation knows what has been read of them.  So nothing is lost when a cache is:
    the next question has the messages read again.

    Args:
        model: Who answers.
        wish: How answers shall be.
        system: What the model is told before the first turn; nothing if empty.
        most_tokens: Most tokens of a chat with its answer; None: what the model was made for.
    """

    def __init__(self, model: ChatModel, wish: Wish, system: str = "", most_tokens: int | None = None) -> None:
        """Begin a chat."""
        self.model, self.wish, self.most_tokens = model, wish, most_tokens
        self._beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Begin a new chat."""
        self.messages = list(self._beginning)
        self.conversation = self.model.new_conversation()

    def fork(self) -> "ChatSession":
        """Return a copy that goes its own way: what it is asked is not known to this one."""
        forked = copy.copy(self)
        forked.messages, forked.conversation = list(self.messages), copy.deepcopy(self.conversation)
        return forked

    def ask(self, text: str, listener: Listener) -> Answer:
        """Ask something; the answer becomes part of the messages, as far as it was said.

        If it was stopped before its first token, or fails, the messages are as before.

        Raises:
            LengthError: If the model was not made for so many tokens, or the chat may not have them.
            TemplateError: If the model's chat template refuses these messages.
        """
        said = _Said(listener)
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.model.tokenize(messages)
        wish = replace(self.wish, tokens=min(self.wish.tokens, self._room(prompt)))
        answer = self.model.answer(self.conversation, prompt, wish, said)
        if answer.tokens:
            self.messages = [*messages, {"role": "assistant", "content": said.text}]
        return answer

    def read(self, text: str, listener: Listener) -> bool:
        """Give the model a text to read, for questions that come later; tell whether it has read all.

        Raises:
            LengthError: As for `ask`.
            TemplateError: Likewise.
        """
        told = {"role": "user", "content": f"Read this text.\n\n{text}"}
        messages = [*self.messages, told, {"role": "assistant", "content": "I have read the text."}]
        ids = self.model.tokenize(messages, asks=False)
        self._room(ids)
        if not self.model.read(self.conversation, ids, listener):
            return False
        self.messages = messages
        return True

    def _room(self, prompt: Int[Tensor, " n"]) -> int:
        """Return how many tokens an answer may have."""
        made_for = self.model.most_tokens
        limits = [most for most in (self.most_tokens, made_for) if most is not None]
        if not limits:
            return self.wish.tokens
        most = min(limits)
        if len(prompt) >= most:
            why = f"{self.model.name} was made for {most:,}" if most == made_for else f"it may have {most:,}"
            msg = f"the chat would have {len(prompt):,} tokens, and {why}: begin a new one, or take a shorter text"
            raise LengthError(msg)
        return most - len(prompt)

    def use_preset(self, name: str) -> None:
        """Use another preset: codes of the present one are dropped, and the next question has the messages read again.

        Raises:
            OptionError: If there is no such preset.
        """
        self.model.preset = preset_name(name)
        self.conversation = self.model.new_conversation()

    def report(self) -> MemoryReport:
        """Return what the cache holds."""
        return self.conversation.cache.memory_report()

    def save(self, path: Path) -> int:
        """Write the chat to a file; return its bytes.

        Raises:
            ServingError: If there is nothing to save, or something else has that name.
            OSError: If the file cannot be written.
        """
        if not len(self.conversation.ids):
            msg = "there is nothing to save yet: ask something first"
            raise ServingError(msg)
        talk = Talk(self.model.name, tuple(self.messages), self.conversation.answer_from)
        return save_conversation(path, self.conversation, talk)

    def load(self, path: Path) -> Talk:
        """Take up the chat in a file in place of the present one, with its preset; return what it says of itself.

        Raises:
            FormatError: If the file holds no chat, is damaged, or belongs to another model.
            OSError: If it cannot be read.
        """
        conversation, talk = load_conversation(path, self.model)
        self.conversation, self.messages = conversation, list(talk.messages)
        cache = conversation.cache
        self.model.preset = cache.preset if cache.preset in PRESETS else cache.cache_config
        return talk


class _Said(Listener):
    """Keeps what was said."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.text = ""

    def read(self, done: int, total: int) -> None:
        self._listener.read(done, total)

    def say(self, text: str) -> None:
        self.text += text
        self._listener.say(text)

    @property
    def wants_no_more(self) -> bool:
        return self._listener.wants_no_more
