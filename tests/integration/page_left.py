"""Somebody asks something on a page, and closes it: a program that `test_page` runs, and that fails if caches are held.

In a process of its own, because Gradio leaves sockets and event loops behind, which pytest would report.
"""

import threading
import time

import gradio_client
import uvicorn
from unit.serving_tiny import ascii_tiny

from nexusquant_cache.serving.chat_model import Wish
from nexusquant_cache.serving.chat_page import Page, create_page
from nexusquant_cache.serving.model_thread import ModelThread
from nexusquant_cache.serving.side_by_side import SideBySide, Users, View

PATIENCE = 120  # seconds


def wait_for(condition):
    """Wait until something is so."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask_and_leave(users: Users, url: str) -> tuple[View, View]:
    """Return what is there before somebody closes the page, and behind."""
    client = gradio_client.Client(url, verbose=False, analytics_enabled=False)
    client.predict(question="What is a lattice?", with_plain=True, api_name="/ask")
    (pair,) = users._known.values()
    before = pair.view()
    client.close()
    wait_for(lambda: not any(pair.view().meters.values()))
    return before, pair.view()


def main():
    """Run the page, and leave it."""
    thread = ModelThread()
    users = Users(lambda: SideBySide(ascii_tiny(), thread, wish=Wish(8)))
    app, let_go = create_page(Page(users, "tiny", "balanced"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    running = threading.Thread(target=server.run)
    running.start()
    try:
        wait_for(lambda: server.started)
        before, after = ask_and_leave(users, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
    finally:
        server.should_exit = True
        let_go()
        running.join()
        thread.close()
    assert all(meter.held_bytes for meter in before.meters.values())
    assert len(before.compressed) == 2
    assert after.compressed == before.compressed  # should they come back


if __name__ == "__main__":
    main()
