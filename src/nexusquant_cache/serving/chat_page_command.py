"""Setting up the page and running it; only here it shows whether the packages that it needs are installed."""

import importlib.util
import logging
import os
import socket
import threading
import webbrowser
from dataclasses import dataclass, replace
from pathlib import Path

from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.serving.chat_model import ChatModel, Wish
from nexusquant_cache.serving.command import is_local, most_tokens, own_names
from nexusquant_cache.serving.errors import ServingError
from nexusquant_cache.serving.model_thread import ModelThread
from nexusquant_cache.serving.side_by_side import SideBySide, Users

_LOGGER = logging.getLogger("uvicorn.error")  # the one that is shown
_PACKAGES = ("gradio", "uvicorn")
_GRACE = 3  # seconds that pages have when the program is told to stop
_HALF_BYTES = 2  # of a number in 16 bit


@dataclass(frozen=True)
class PageOptions:
    """What the command `app` takes.

    Attributes:
        preset: Of the compressed cache, at first.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        tokens: Most tokens of a chat with its answer; None: what the model was made for.
        answer_tokens: Longest answer.
        browser: Whether to open the page in a browser.
    """

    preset: str = "balanced"
    host: str = "127.0.0.1"
    port: int = 7860
    tokens: int | None = None
    answer_tokens: int = 512
    browser: bool = False


def check_page() -> None:
    """Check that the packages of the extra ``app`` are installed.

    Raises:
        ServingError: If one is not.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        msg = f'the page needs {" and ".join(missing)}: pip install "nexusquant-cache[app]"'
        raise ServingError(msg)


def run_page(loaded: LoadedModel, options: PageOptions) -> None:
    """Show a page about a model until the process is told to stop.

    Raises:
        ServingError: If the model cannot chat, or was not made for so many tokens.
        UnsupportedError: If the preset does not suit the model.
    """
    # Before it is imported.  The history would be kept in the browser.
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    import uvicorn  # noqa: PLC0415 - an optional package, like that of the next one

    from nexusquant_cache.serving.chat_page import Page, create_page  # noqa: PLC0415

    name = Path(loaded.name).absolute().name.removesuffix(".gguf")
    loaded = replace(loaded, name=name)  # messages on the page show no folders
    most = most_tokens(ChatModel(loaded, options.preset), options.tokens)
    thread, wish = ModelThread(), Wish(options.answer_tokens)
    users = Users(lambda: SideBySide(loaded, thread, options.preset, wish=wish, most_tokens=most))
    app, let_go = create_page(Page(users, name, options.preset, _note(loaded)), own_names(options.host))
    if not is_local(options.host):
        _LOGGER.warning("everyone who reaches %s can use this page, without a password", options.host)
    config = uvicorn.Config(app, host=options.host, port=options.port, timeout_graceful_shutdown=_GRACE)

    class Server(uvicorn.Server):
        """A server that opens a browser when it is ready, and in the end waits for nobody who only looks."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started and options.browser:
                place = page_address(options.host, self.servers[0].sockets[0].getsockname()[1])
                # In a thread: a browser in a terminal would not come back before it is left.
                threading.Thread(target=webbrowser.open, args=(place,), daemon=True).start()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            thread.stop()
            let_go()
            await super().shutdown(sockets)

    try:
        Server(config).run()
    finally:
        thread.close()


def page_address(host: str, port: int) -> str:
    """Return the address of a page for a browser on this machine."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - what was asked for
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _note(loaded: LoadedModel) -> str:
    """Return why the plain cache holds more than 16 bit, if it does."""
    dtype = loaded.model.dtype
    if dtype.itemsize <= _HALF_BYTES:
        return ""
    return f"This model runs in {str(dtype).removeprefix('torch.')}, so its plain cache is larger than one in 16 bit."
