"""A conversation in the file of its cache: messages and token ids stand in the file's metadata."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.errors import FormatError, NexusQuantError
from nexusquant_cache.files import inspect_file
from nexusquant_cache.files.ids import TOKEN_IDS, unpacked_ids
from nexusquant_cache.serving.chat_model import ChatModel, Message
from nexusquant_cache.serving.conversation import Conversation
from nexusquant_cache.serving.errors import ServingError

_TALK = "conversation"


@dataclass(frozen=True)
class Talk:
    """What a file says of a conversation besides its cache.

    Attributes:
        model: Name of the model.
        messages: Of all turns.
        answer_from: See `Conversation`.
    """

    model: str
    messages: tuple[Message, ...]
    answer_from: int


def save_conversation(path: Path, conversation: Conversation, talk: Talk) -> int:
    """Write a conversation to a file; return its bytes.

    Raises:
        ServingError: If something else has that name.
        OSError: If the file cannot be written.
        NexusQuantError: If the cache cannot be saved, see `NexusQuantCache.save`.
    """
    if path.exists() and not _is_saved(path):
        msg = f"{path} is there already and holds no conversation: choose another name"
        raise ServingError(msg)
    texts = {_TALK: json.dumps(asdict(talk))}
    saved = conversation.cache.save(path, token_ids=conversation.ids, keep_token_ids=True, metadata=texts)
    return saved.total_bytes


def _is_saved(path: Path) -> bool:
    try:
        return _TALK in inspect_file(path).meta.user
    except (NexusQuantError, OSError):
        return False


def load_conversation(path: Path, model: ChatModel) -> tuple[Conversation, Talk]:
    """Return the conversation in a file, whose cache is checked to be of this model and of these tokens.

    Raises:
        FormatError: If the file holds none, is damaged, or belongs to another model.
        OSError: If it cannot be read.
    """
    meta = inspect_file(path).meta
    try:
        talk = _talk(json.loads(meta.user[_TALK]))
        ids = unpacked_ids(meta.user[TOKEN_IDS], meta.tokens_seen)[0]
    except KeyError as error:
        msg = f"{path} holds a cache, and no conversation: it was not saved by a chat"
        raise FormatError(msg) from error
    except (ValueError, TypeError, RecursionError) as error:
        msg = f"the conversation in {path} cannot be read: {error}"
        raise FormatError(msg) from error
    cache = NexusQuantCache.load(
        path, config=model.model.config, token_ids=ids, device=model.model.device, dtype=model.model.dtype
    )
    return Conversation(cache, ids, talk.answer_from), talk


def _talk(content: object) -> Talk:
    if not isinstance(content, dict):
        msg = "it is no object"
        raise TypeError(msg)
    messages, model, answer_from = (content[name] for name in ("messages", "model", "answer_from"))
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        msg = "its messages are not texts with roles"
        raise TypeError(msg)
    if not isinstance(model, str) or type(answer_from) is not int or answer_from < 1:
        msg = "it does not say where the answer begins, or by which model it is"
        raise TypeError(msg)
    return Talk(model, tuple(messages), answer_from)


def _is_message(given: object) -> bool:
    return (
        isinstance(given, Mapping)
        and set(given) == {"role", "content"}
        and all(isinstance(x, str) for x in given.values())
    )
