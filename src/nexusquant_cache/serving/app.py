"""The server: HTTP in front of a `Worker`."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jaxtyping import Int
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from torch import Tensor

from nexusquant_cache.serving.chat_model import Answer, ChatModel, Message, Wish
from nexusquant_cache.serving.errors import BusyError, TemplateError
from nexusquant_cache.serving.jobs import Event, Failure, Job
from nexusquant_cache.serving.metrics import Metrics
from nexusquant_cache.serving.wire import ApiError, ChatRequest, Completion, model_card, usage
from nexusquant_cache.serving.worker import LEAST_SHARED, Worker

MOST_BODY = 16 * 2**20
"""Bytes of a request."""
_LOOK = 0.25  # seconds between two looks whether the client is still there
_RETRY = 1  # seconds
_GONE = 499  # nobody sees it


@dataclass(frozen=True)
class Limits:
    """What requests may ask for.

    Attributes:
        tokens: Of a prompt with its answer.
        answer_tokens: Of an answer, if the request does not say.
    """

    tokens: int
    answer_tokens: int


class ChatServer:
    """Answers requests.

    Args:
        name: What the model is called.
        model: The model; used from here for tokens only.
        worker: Who answers.
        limits: What requests may ask for.
        api_key: What clients have to know; None lets everyone in.
        shares: Whether long system messages are read by themselves.
    """

    def __init__(  # noqa: PLR0913 - what a server is made of
        self,
        name: str,
        model: ChatModel,
        worker: Worker,
        limits: Limits,
        *,
        api_key: str | None = None,
        shares: bool = False,
    ) -> None:
        """Serve nothing yet."""
        self.name, self.worker = name, worker
        self.metrics = Metrics(worker)
        self._model, self._limits, self._shares = model, limits, shares
        self._api_key = None if api_key is None else api_key.encode()
        self._tokenizing = asyncio.Lock()
        self._since = int(time.time())

    async def check_key(self, request: Request) -> None:
        """Refuse whoever does not know the key."""
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._api_key):
            msg = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
            raise ApiError(401, msg, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    # Endpoints

    async def complete(self, request: Request) -> Response:
        """Answer messages."""
        start = time.perf_counter()
        asked = ChatRequest.parse(await _read_body(request))
        if asked.model != self.name:
            msg = f"there is no model {asked.model!r} here, only {self.name!r}"
            raise ApiError(404, msg, code="model_not_found", param="model")
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def post(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # of a loop that is closed: nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = await self._job(asked, post)
        try:
            self.worker.submit(job)
        except BusyError as error:
            raise ApiError(503, str(error), code="busy", headers={"Retry-After": str(_RETRY)}) from error
        said = self._events(request, job, events, start)
        completion, prompt_tokens = Completion(self.name), len(job.prompt)
        if asked.stream:
            lines = _stream(said, completion, prompt_tokens, with_usage=asked.stream_options.include_usage)
            return StreamingResponse(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await _whole(said, completion, prompt_tokens)

    def models(self) -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [model_card(self.name, self._since)]}

    def model_named(self, name: str) -> dict[str, Any]:
        """Return the model of that name."""
        if name != self.name:
            raise ApiError(404, f"there is no model {name!r} here, only {self.name!r}", code="model_not_found")
        return model_card(name, self._since)

    def health(self) -> Response:
        """Say whether prompts are answered."""
        is_alive = self.worker.is_alive
        return JSONResponse({"status": "ok" if is_alive else "the worker is gone"}, 200 if is_alive else 503)

    # How a request becomes a job, and events an answer

    async def _job(self, asked: ChatRequest, post: Any) -> Job:  # noqa: ANN401 - see Job
        messages: list[Message] = [message.plain() for message in asked.messages]
        try:
            async with self._tokenizing:  # one after the other: tokenizers are not made for several threads
                prompt = await asyncio.to_thread(self._model.tokenize, messages)
                shared = await asyncio.to_thread(self._shared, messages, prompt)
        except TemplateError as error:
            raise ApiError(400, str(error), code="invalid_value", param="messages") from error
        most = self._answer_tokens(asked, len(prompt))
        wish = Wish(most, asked.temperature, asked.top_p, asked.seed, asked.stop)
        return Job(prompt, wish, post, shared=shared)

    def _answer_tokens(self, asked: ChatRequest, prompt_tokens: int) -> int:
        """Return how long the answer may be."""
        room, wanted = self._limits.tokens - prompt_tokens, asked.most_tokens
        if room < (wanted or 1):
            msg = f"the prompt has {prompt_tokens:,} tokens"
            if room > 0:
                msg += f" and the answer may have {wanted:,}"
            msg += f"; together they may have {self._limits.tokens:,}"
            raise ApiError(400, msg, code="context_length_exceeded", param="messages" if room < 1 else "max_tokens")
        return wanted or min(self._limits.answer_tokens, room)

    def _shared(self, messages: list[Message], prompt: Int[Tensor, " n"]) -> int:
        """Return how many tokens of a prompt are a long system message, after which others part."""
        if not self._shares or messages[0]["role"] != "system":
            return 0
        with contextlib.suppress(TemplateError):
            ids = self._model.tokenize(messages[:1], asks=False)
            if LEAST_SHARED <= len(ids) < len(prompt) and ids.equal(prompt[: len(ids)]):
                return len(ids)
        return 0

    async def _events(
        self, request: Request, job: Job, events: asyncio.Queue[Event], start: float
    ) -> AsyncIterator[Event]:
        """Yield what becomes of a job; take it back if the client goes away, which ends this."""
        looked, has_spoken, is_over = time.monotonic(), False, False
        try:
            while not is_over:
                event = None
                with contextlib.suppress(asyncio.TimeoutError):
                    event = await asyncio.wait_for(events.get(), _LOOK)
                if time.monotonic() - looked > _LOOK:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        return
                if event is None:
                    continue
                if isinstance(event, Answer) and event.ended == "left":  # and the client is still there
                    event = Failure("the server is about to stop")
                if not has_spoken:
                    has_spoken = True
                    self.metrics.first_token.observe(time.perf_counter() - start)
                if not isinstance(event, str):
                    is_over = True
                    self.metrics.count(len(job.prompt), event, time.perf_counter() - start)
                yield event
        finally:
            self.worker.withdraw(job)
            if not is_over:
                self.metrics.answers.labels("left").inc()


def create_app(server: ChatServer, hosts: list[str] | None = None) -> FastAPI:
    """Return the application, which starts the server's worker, and stops it at its end.

    Args:
        server: Who answers.
        hosts: Names that requests may call this server by; None: every name.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.worker.start()
        yield
        await asyncio.to_thread(server.worker.stop)

    app = FastAPI(title="nexusquant_cache", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    guarded = [Depends(server.check_key)]
    app.post("/v1/chat/completions", dependencies=guarded)(server.complete)
    app.get("/v1/models", dependencies=guarded)(server.models)
    app.get("/v1/models/{name:path}", dependencies=guarded)(server.model_named)
    app.get("/health")(server.health)

    @app.get("/metrics", dependencies=guarded)
    def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    def refuse(error: ApiError) -> Response:
        server.metrics.refusals.labels(str(error.status)).inc()
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return refuse(error)

    @app.exception_handler(HTTPException)
    async def no_such_place(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}: {error.detail}"
        return refuse(ApiError(error.status_code, what, headers=dict(error.headers or {})))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=_GONE)

    @app.exception_handler(Exception)
    async def failed(_: Request, _error: Exception) -> Response:  # which the log has
        return refuse(ApiError(500, "the server failed; its log says why"))

    return app


async def _read_body(request: Request) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: If it is not said to be JSON, which a page in a browser cannot say without being asked, or too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, got {kind or 'none'}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BODY:
            raise ApiError(413, f"a request may have {MOST_BODY:,} bytes", headers={"Connection": "close"})
    return bytes(body)


async def _whole(said: AsyncIterator[Event], completion: Completion, prompt_tokens: int) -> Response:
    """Return an answer when it is over."""
    text = ""
    async for event in said:
        if isinstance(event, str):
            text += event
        elif isinstance(event, Failure):
            raise ApiError(500, event.message)
        else:
            return JSONResponse(completion.whole(text, event, usage(prompt_tokens, event)))
    return Response(status_code=_GONE)


async def _stream(
    said: AsyncIterator[Event], completion: Completion, prompt_tokens: int, *, with_usage: bool
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events."""
    async with contextlib.aclosing(said) as events:  # type: ignore[type-var]  # it is a generator
        yield _line(completion.piece({"role": "assistant", "content": ""}))
        async for event in events:
            if isinstance(event, str):
                yield _line(completion.piece({"content": event}))
            elif isinstance(event, Failure):
                yield _line(ApiError(500, event.message).body)
                return
            else:
                yield _line(completion.piece({}, event.ended))
                if with_usage:
                    yield _line(completion.last(usage(prompt_tokens, event)))
    yield "data: [DONE]\n\n"


def _line(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
