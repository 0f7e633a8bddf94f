"""Setting up a server and running it; only here it shows whether the packages that it needs are installed."""

import importlib.util
import ipaddress
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.serving.chat_model import ChatModel
from nexusquant_cache.serving.errors import ServingError
from nexusquant_cache.serving.pool import ConversationPool
from nexusquant_cache.serving.worker import Worker
from nexusquant_cache.store.store import PrefixStore

_LOGGER = logging.getLogger("uvicorn.error")  # the one that is shown
_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
_DEFAULT_TOKENS = 4096  # where the model does not say what it was made for
_GRACE = 5  # seconds that running answers have when the server is told to stop


@dataclass(frozen=True)
class ServerOptions:
    """What the command `serve` takes.

    Attributes:
        preset: How far to compress.
        name: What clients call the model; None: by its folder or file.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_key: What clients have to know; None lets everyone in.
        store: Folder of a prefix store; None: no store.
        store_bytes: What the store may take; None: no limit.
        idle_bytes: What caches may hold between two requests.
        tokens: Most tokens of a prompt with its answer; None: what the model was made for.
        answer_tokens: Longest answer where a request does not say.
        waiting: Requests that may wait.
    """

    preset: str = "balanced"
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    store: Path | None = None
    store_bytes: int | None = None
    idle_bytes: int = 2 * 10**9
    tokens: int | None = None
    answer_tokens: int = 1024
    waiting: int = 16


def check_server() -> None:
    """Check that the packages of the extra ``serve`` are installed.

    Raises:
        ServingError: If one is not.
    """
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        msg = f'the server needs {" and ".join(missing)}: pip install "nexusquant-cache[serve]"'
        raise ServingError(msg)


def make_app(loaded: LoadedModel, options: ServerOptions) -> Any:  # noqa: ANN401 - FastAPI, an optional package
    """Return the application that serves a model, for whatever runs ASGI applications.

    It listens nowhere itself, so ``options.port`` has no meaning here.  ``options.host`` has: where it is an address of
    this machine alone, which it is by default, and there is no key, only names of this machine are answered
    (`own_names`).  Give the address that the application is reached by.

    Raises:
        ServingError: If the model cannot chat, or was not made for so many tokens.
        NexusQuantError: If the store cannot be used, see `PrefixStore`.
    """
    from nexusquant_cache.serving.app import ChatServer, Limits, create_app  # noqa: PLC0415 - optional packages

    model = ChatModel(loaded, options.preset)
    name = options.name or Path(loaded.name).absolute().name.removesuffix(".gguf")
    limits = Limits(most_tokens(model, options.tokens), options.answer_tokens)
    store = None
    if options.store is not None:
        store = PrefixStore(options.store, options.store_bytes, namespace=loaded.name)
    worker = Worker(model, ConversationPool(options.idle_bytes), options.waiting, store)
    server = ChatServer(name, model, worker, limits, api_key=options.api_key, shares=store is not None)
    if options.api_key is None and not is_local(options.host):
        _LOGGER.warning("everyone who reaches %s may ask: --api-key lets only some", options.host)
    # Whoever knows the key is let in by whatever name, as a proxy in front may pass on.
    hosts = own_names(options.host) if options.api_key is None else None
    return create_app(server, hosts)


def run_server(loaded: LoadedModel, options: ServerOptions) -> None:
    """Serve a model until the process is told to stop; errors are those of `make_app`."""
    import uvicorn  # noqa: PLC0415 - an optional package

    app = make_app(loaded, options)
    config = uvicorn.Config(app, host=options.host, port=options.port, timeout_graceful_shutdown=_GRACE)
    uvicorn.Server(config).run()


def most_tokens(model: ChatModel, wanted: int | None) -> int:
    """Return how many tokens a prompt and its answer may have.

    Args:
        model: The model.
        wanted: What ``--tokens`` says.

    Raises:
        ServingError: If the model was not made for so many.
    """
    most = model.most_tokens or wanted or _DEFAULT_TOKENS
    if wanted is not None and wanted > most:
        msg = f"--tokens is {wanted:,}, and {model.name} was made for {most:,}"
        raise ServingError(msg)
    return wanted or most


def own_names(host: str) -> list[str] | None:
    """Return the names that a browser on this machine has for a place that only this machine reaches.

    A web page from elsewhere may have its own name stand for this machine (DNS rebinding), and then talk to us as if we
    had sent it.  Its browser still says that name.

    Args:
        host: The address to listen on.

    Returns:
        Names for Starlette's `TrustedHostMiddleware`; None if others reach the address, by names that we cannot know.
    """
    # Releases of Starlette differ in what they take for the name in "[::1]:80".  Neither begins a name of DNS.
    return [host, "localhost", "127.0.0.1", "[::1]", "::1", "["] if is_local(host) else None


def is_local(host: str) -> bool:
    """Tell whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host.lower() == "localhost"
