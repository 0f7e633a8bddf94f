"""The page: what stands where, and what calls what.  Everything else is in `SideBySide`."""

import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as Event

from nexusquant_cache.errors import NexusQuantError
from nexusquant_cache.evaluation.texts import read_text
from nexusquant_cache.presets import PRESETS, preset_name, with_alias
from nexusquant_cache.serving.chat_model import Message
from nexusquant_cache.serving.meter import meter_html
from nexusquant_cache.serving.side_by_side import Users, View

MOST_UPLOADED = 16 * 2**20
"""Bytes of a file."""
_WAITING = 16  # questions of all users
_HOUR = 3600  # seconds
# Whatever a model says, and whatever Gradio would like to load: a browser asks nobody but this program.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'self'"
# Those of the system: Gradio's own lack letters in bold.
_FONTS, _MONO_FONTS = ("ui-sans-serif", "system-ui", "sans-serif"), ("ui-monospace", "Consolas", "monospace")
_CSS = """
.gradio-container .meter { width: 100%; margin: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
.gradio-container .meter, .gradio-container .meter * { border: none !important; }
.gradio-container .meter tbody tr { border-top: 1px solid var(--border-color-primary) !important; }
.gradio-container .meter th, .gradio-container .meter td { padding: 5px 10px; text-align: right; white-space: nowrap; }
.gradio-container .meter thead th { font-weight: normal; opacity: 0.7; }
.gradio-container .meter th:first-child, .gradio-container .meter :last-child { text-align: left; }
.gradio-container .meter td:nth-child(5) { width: 35%; }
.meter .bar { height: 12px; border-radius: 3px; background: var(--border-color-primary); }
.meter .bar div { height: 100%; border-radius: 3px; background: var(--color-accent); min-width: 1px; }
.status { min-height: 1.5em; }
.error { color: #b91c1c; font-weight: 600; }
.dark .error { color: #fca5a5; }
"""


class Page:
    """What stands on the page of a model.

    Args:
        users: Who uses it.
        name: What the model is called.
        preset: Which preset is chosen at first.
        note: A sentence under the memory meter.
    """

    def __init__(self, users: Users, name: str, preset: str, note: str = "") -> None:
        """Lay it out."""
        self._users, self._note = users, note
        with gr.Blocks(title="nexusquant_cache", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as self.blocks:
            gr.Markdown(f"## {name}\nThe same chat through the compressed cache, and through the plain one.")
            with gr.Row():
                choices = [(with_alias(each), each) for each in PRESETS]
                label = "Preset of the compressed cache"
                self._preset = gr.Dropdown(choices, value=preset_name(preset), label=label)
                self._with_plain = gr.Checkbox(
                    value=True, label="Ask the plain cache too", info="It answers second, which takes as long again."
                )
            with gr.Accordion("A document to ask about", open=False):
                self._text = gr.Textbox(
                    label="Document", placeholder="Paste a text, or upload a file", lines=6, max_lines=6
                )
                with gr.Row():
                    self._upload = gr.UploadButton("Upload a .txt file", file_types=[".txt"])
                    self._read = gr.Button("Read the document", variant="primary", elem_id="read")
            self._document = gr.HTML(elem_id="document")
            self._meter = gr.HTML(self._meter_of(users.find(None).view()), elem_id="meter")
            self._status = gr.HTML(_status("Ask something, or give a document to ask about."), elem_id="status")
            with gr.Row():
                self._compressed = _chatbot("Compressed cache", "compressed")
                self._plain = _chatbot("Plain cache", "plain")
            with gr.Row():
                self._question = gr.Textbox(show_label=False, placeholder="Ask something", scale=8, elem_id="question")
                self._send = gr.Button("Ask", variant="primary", min_width=90, elem_id="send")
                self._stop = gr.Button("Stop", min_width=90, elem_id="stop")
                self._reset = gr.Button("New chat", min_width=140, elem_id="reset")
            self._connect()
            self.blocks.queue(max_size=_WAITING)

    def _connect(self) -> None:
        """Say what calls what.  All that needs the model waits in one queue; stopping does not wait."""
        shown = [self._compressed, self._plain, self._meter, self._document, self._status]
        turn: dict[str, Any] = {
            "concurrency_id": "model",
            "concurrency_limit": 1,
            "show_progress": "minimal",
            "show_progress_on": self._status,
        }
        gr.on(
            [self._send.click, self._question.submit],
            self._ask,
            [self._question, self._with_plain],
            [*shown, self._question],
            api_name="ask",
            **turn,
        )
        self._read.click(self._read_document, [self._text, self._with_plain], shown, api_name="read", **turn)
        self._preset.input(self._use_preset, self._preset, shown, api_name="preset", **turn)
        self._stop.click(self._leave_off, queue=False, api_name="stop")
        new_chat = [self._reset.click, self._compressed.clear, self._plain.clear]
        gr.on(new_chat, self._leave_off, queue=False, api_visibility="private").then(
            self._begin_anew, None, [*shown, self._text], api_name="reset", **turn
        )
        self._upload.upload(self._take_file, self._upload, [self._text, self._status], api_name="upload")
        self.blocks.unload(self._go)

    # What the page calls; Gradio sees by its type that `request` is who asks

    def _ask(self, question: str, with_plain: bool, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Ask; the question leaves its box, unless it has to be asked again."""
        box: Any = ""
        for view in self._users.find(request.session_hash).ask(question, with_plain=with_plain):
            yield (*self._shown(view), question if view.is_error else box)
            box = gr.skip()  # by now the next question may be in it

    def _read_document(self, text: str, with_plain: bool, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        for view in self._users.find(request.session_hash).read(text, with_plain=with_plain):
            yield self._shown(view)

    def _use_preset(self, name: str, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        for view in self._users.find(request.session_hash).use_preset(name):
            yield self._shown(view)

    def _begin_anew(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        for view in self._users.find(request.session_hash).reset():
            yield (*self._shown(view), "")

    def _leave_off(self, request: gr.Request) -> None:
        self._users.find(request.session_hash).stop()

    def _take_file(self, file: str) -> tuple[Any, str]:
        try:
            return read_text(file, Path(file).name), ""
        except NexusQuantError as error:
            return gr.skip(), _status(f"{error}.", is_error=True)

    def _go(self, request: gr.Request) -> None:
        self._users.leave(request.session_hash)

    # How it looks

    def _shown(self, view: View) -> tuple[Any, ...]:
        return (
            _texts(view.compressed),
            _texts(view.plain),
            self._meter_of(view),
            html.escape(view.document),
            _status(view.status, is_error=view.is_error),
        )

    def _meter_of(self, view: View) -> str:
        return meter_html(view.meters) + (f"<small>{html.escape(self._note)}</small>" if self._note else "")


def _chatbot(label: str, name: str) -> Any:  # noqa: ANN401 - no types without Gradio
    return gr.Chatbot(label=label, elem_id=name, height=360, buttons=[], render_markdown=False)


def _texts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    """Return messages as they are: to be compared letter by letter, and to load nothing whatever a model says."""
    return [{**message, "content": html.escape(message["content"], quote=False)} for message in messages]


def _status(text: str, *, is_error: bool = False) -> str:
    return f"<div class='status{' error' if is_error else ''}'>{html.escape(text)}</div>"


class _OnlyHere:
    """Has browsers load nothing from elsewhere.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the policy to every answer."""

        async def send_with_policy(event: Event) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event.get("headers", ()), (b"content-security-policy", _POLICY)]
            await send(event)

        await self._app(scope, receive, send_with_policy)


def create_page(page: Page, hosts: list[str] | None = None) -> tuple[FastAPI, Callable[[], None]]:
    """Return the application that shows a page, and what lets go of the browsers that look at it, before its end.

    Args:
        page: The page.
        hosts: Names that browsers may call its place by; None: every name.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_OnlyHere)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        theme=gr.themes.Default(font=_FONTS, font_mono=_MONO_FONTS),
        css=_CSS,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=MOST_UPLOADED,
    )
    mounted: Any
    (mounted,) = (route.app for route in app.routes if isinstance(route, Mount))
    return app, mounted.stop_event.set  # it waits for browsers to leave, otherwise
