"""OpenAI's chat completions on the wire: requests, answers and errors, as far as they are served here."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from secrets import token_hex
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from nexusquant_cache.serving.chat_model import Answer

# Fields that say nothing about the answer.
_LABELS = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"}
# Fields whose effect is not served, with the values that ask for none.
_WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_MOST_STOPS = 4
_LARGEST = 2**63 - 1


@dataclass
class ApiError(Exception):
    """An answer that says what is wrong.

    Attributes:
        status: The HTTP status.
        message: For a person.
        code: For a program; None if the message is all.
        param: The field of the request that is to blame.
        headers: Headers of the answer.
    """

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"  # noqa: PLR2004 - of HTTP
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    """What has fields that are not known here is refused: they might change the answer."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, given: object) -> object:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class WireMessage(_Strict):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, given: object) -> object:
        """Let clients send back what they were sent, in which lists of nothing may be."""
        return {name: value for name, value in given.items() if value != []} if isinstance(given, dict) else given

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, given: object) -> object:
        if not isinstance(given, list):
            return given
        for part in given:
            if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text":
                msg = "every part must be text, {'type': 'text', 'text': ...}: nothing else is served"
                raise ValueError(msg)
            if not isinstance(part["text"], str):
                msg = "the text of every part must be a string"
                raise ValueError(msg)  # noqa: TRY004 - pydantic takes no other
        return "".join(part["text"] for part in given)

    def plain(self) -> dict[str, str]:
        """Return what chat templates take."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool = False
    include_obfuscation: bool = False  # nothing is obfuscated, which the option allows for


class ChatRequest(_Strict):
    """A request for a chat completion."""

    model: str
    messages: Annotated[list[WireMessage], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-_LARGEST - 1, le=_LARGEST)] | None = None
    stop: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        return {
            name: value
            for name, value in given.items()
            if name not in _LABELS and value not in _WITHOUT_EFFECT.get(name, ())
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, given: object) -> object:
        stops: list[object] = given if isinstance(given, list) else [given]
        if len(stops) > _MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
            msg = f"must be a text, or up to {_MOST_STOPS} of them, and none of them empty"
            raise ValueError(msg)
        return tuple(stops)

    @property
    def most_tokens(self) -> int | None:
        """The longest answer, by either of its names; None if the request does not say."""
        return self.max_completion_tokens or self.max_tokens

    @classmethod
    def parse(cls, body: bytes) -> "ChatRequest":
        """Return the request in a body.

        Raises:
            ApiError: If there is none, or it asks for what is not served; the first fault is named.
        """
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"])) or None
        if first["type"] == "extra_forbidden":
            message = f"{name} is not supported by this server: leave it out"
            raise ApiError(400, message, code="unsupported_parameter", param=name)
        message = f"{name}: {first['msg']}" if name else first["msg"]
        raise ApiError(400, message, code="invalid_value" if name else "invalid_json", param=name)


def usage(prompt_tokens: int, answer: Answer) -> dict[str, Any]:
    """Return what an answer took; tokens that a cache knew are counted as cached."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": prompt_tokens + answer.tokens,
        "prompt_tokens_details": {"cached_tokens": answer.known_tokens},
    }


class Completion:
    """The answers to one request, whole or in pieces.

    Args:
        model: What the model is called.
    """

    def __init__(self, model: str) -> None:
        """Give it a name."""
        self._head = {"id": f"chatcmpl-{token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, text: str, answer: Answer, used: Mapping[str, Any]) -> dict[str, Any]:
        """Return all at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.ended}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": dict(used)}

    def piece(self, delta: Mapping[str, str], ended: str | None = None) -> dict[str, Any]:
        """Return a piece."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": ended}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], "usage": None}

    def last(self, used: Mapping[str, Any]) -> dict[str, Any]:
        """Return what comes behind the last piece if the client wants to know what it took."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": dict(used)}


def model_card(name: str, since: int) -> dict[str, Any]:
    """Return how a model is listed."""
    return {"id": name, "object": "model", "created": since, "owned_by": "nexusquant_cache"}
