"""The page as a process, driven by Gradio's own client: no browser is needed."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from integration.pages import DOCUMENT, RunningPage
from unit.serving_tiny import ascii_tiny
from unit.test_serving_chat import QUESTION, said, user

from nexusquant_cache.serving.chat_model import ChatModel
from nexusquant_cache.serving.plain import PlainChatModel

gradio_client = pytest.importorskip("gradio_client", reason="the extra app is not installed")
pytest.importorskip("gradio", reason="the extra app is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    browser = place / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > "{place}/opened"\n')
    browser.chmod(0o755)
    running = RunningPage(place, "--browser", browser=browser)
    yield running
    assert (place / "opened").read_text() == f"{running.url}\n"
    assert list(running.uploads.rglob("letters.txt"))
    assert running.stop() in {0, -signal.SIGTERM}
    assert not list(running.uploads.rglob("letters.txt"))
    log = running.log.read_text()
    # What Gradio itself refuses.  From Python 3.13 on, the line of code that says so stands there too, indented.
    assert log.count("Traceback") == len(re.findall(r"^\S.* is not in the list of choices", log, re.MULTILINE))


@pytest.fixture
def new_client(page):
    clients = []

    def connect():
        clients.append(gradio_client.Client(page.url, verbose=False, analytics_enabled=False))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def client(new_client):
    return new_client()


def texts(messages):
    """Return what the messages of a chat say."""
    return ["".join(part["text"] for part in message["content"]) for message in messages]


def answers(kind):
    model = ChatModel(ascii_tiny(), "quant") if kind is ChatModel else kind(ascii_tiny())
    return said(model, model.new_conversation(), [user()], tokens=24)[0]


def test_both_sides_answer_and_the_meter_tells(client):
    compressed, plain, meter, _, status, _ = client.predict(question=QUESTION, with_plain=True, api_name="/ask")
    assert texts(compressed) == [QUESTION, answers(ChatModel)]
    assert texts(plain) == [QUESTION, answers(PlainChatModel)]
    prompt = ascii_tiny().tokenizer.apply_chat_template([user()], add_generation_prompt=True, return_dict=False)
    seen = len(prompt) + 23  # the last token has been said, and not been read
    assert meter.count(f"<td>{seen}</td>") == 4  # both sides have seen all and kept all
    assert "24 tokens in" in meter
    assert "This model runs in float32" in meter
    assert "Cut off at the longest answer" in status


def test_answers_stream(client):
    job = client.submit(question=QUESTION, with_plain=True, api_name="/ask")
    job.result()
    lengths = [len(texts(output[0])[-1]) for output in job.outputs() if len(output[0]) == 2]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3


def test_a_document_is_asked_about(client, tmp_path):
    file = tmp_path / "letters.txt"
    file.write_text(DOCUMENT)
    text, status = client.predict(gradio_client.handle_file(file), api_name="/upload")
    assert text == DOCUMENT
    assert "error" not in status
    _, _, meter, document, status = client.predict(text=text, with_plain=True, api_name="/read")
    assert f"{len(DOCUMENT):,} characters" in document
    assert "document read in" in meter
    first = client.predict(question="One?", with_plain=False, api_name="/ask")
    again = client.predict(question="One?", with_plain=False, api_name="/ask")
    assert texts(again[0]) == texts(first[0]) * 2  # no question knows of another
    assert client.predict(api_name="/reset")[3] == ""


def test_what_goes_wrong_is_said(client, tmp_path):
    file = tmp_path / "letters.txt"
    file.write_bytes(("Grüße " * 9).encode("latin-1"))
    upload = client.predict(gradio_client.handle_file(file), api_name="/upload")
    asked = client.predict(question="x" * 5000, with_plain=False, api_name="/ask")
    empty = client.predict(text="  ", with_plain=False, api_name="/read")
    for status, message in (
        (upload[1], "letters.txt is not UTF-8 text (byte 2); convert it first."),
        (asked[4], "and tiny was made for 4,096"),
        (empty[4], "The document is empty: paste a text, or upload a file."),
    ):
        assert "status error" in status
        assert message in status
    assert asked[5] == "x" * 5000  # to be mended
    assert texts(client.predict(question="Hello", with_plain=False, api_name="/ask")[0])[0] == "Hello"


def test_presets_are_those_that_there_are(client):
    shown = client.predict("max", api_name="/preset")
    assert "Preset max." in shown[4]
    with pytest.raises(gradio_client.exceptions.AppError, match="not in the list of choices"):
        client.predict("balnced", api_name="/preset")


def test_two_people_at_once_have_chats_of_their_own(new_client):
    ours, theirs = new_client(), new_client()
    seen = {}

    def chat(client, name):
        for turn in range(2):
            seen[name] = client.predict(question=f"{name} {turn}", with_plain=True, api_name="/ask")

    both = [threading.Thread(target=chat, args=given) for given in ((ours, "ours"), (theirs, "theirs"))]
    for each in both:
        each.start()
    for each in both:
        each.join()
    for name, (compressed, plain, *_) in seen.items():
        for messages in (compressed, plain):
            assert texts(messages)[::2] == [f"{name} 0", f"{name} 1"]


def test_nothing_is_loaded_from_elsewhere(page):
    """Browsers are told so, and the page names nothing that a browser would load."""
    got = httpx.get(page.url)
    assert got.headers["content-security-policy"].startswith("default-src 'self' 'unsafe-inline'")
    loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"([^\"]+)", got.text)
    assert loaded
    assert [place for place in loaded if "//" in place and not place.startswith(page.url)] == []
    assert '"analytics_enabled":false' in got.text.replace(" ", "")


@pytest.mark.parametrize(("name", "status"), [("localhost", 200), ("[::1]", 200), ("elsewhere.example", 400)])
def test_it_answers_to_names_of_this_machine_only(page, name, status):
    """A web page elsewhere may have its name stand for this machine."""
    for place in ("/", "/gradio_api/info"):
        answer = httpx.get(page.url + place, headers={"host": f"{name}:{httpx.URL(page.url).port}"}, timeout=60)
        assert answer.status_code == status


def test_whoever_closes_the_page_holds_no_cache():
    program = Path(__file__).with_name("page_left.py")
    paths = os.pathsep.join([str(program.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(  # noqa: S603 - our own
        [sys.executable, program], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
