"""The page in a real browser without a screen: `nox -s app` runs it."""

import shutil
import signal
from urllib.parse import urlsplit

import pytest
from integration.pages import DOCUMENT, PATIENCE, RunningPage

pytest.importorskip("gradio", reason="the extra app is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
QUESTION, OTHER = "What is a lattice, said in one sentence?", "And what is a code?"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    page = RunningPage(tmp_path_factory.mktemp("page"))
    yield page
    assert page.stop() in {0, -signal.SIGTERM}
    assert "Traceback" not in page.log.read_text()


@pytest.fixture(scope="module")
def driver():
    with playwright.sync_playwright() as started:
        yield started


@pytest.fixture
def visit(driver, running, tmp_path):
    """Return what opens the page in a new browser; in the end none has asked another machine or met an error."""
    browsers, asked, errors = [], [], []

    def open_page(url=running.url):
        folder = tmp_path / f"browser {len(browsers)}"
        browser = driver.chromium.launch_persistent_context(
            folder, executable_path=CHROMIUM, headless=True, args=FLAGS, viewport={"width": 1200, "height": 1000}
        )
        browsers.append(browser)
        browser.set_default_timeout(PATIENCE * 1000)
        page = browser.pages[0]
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.locator("#meter tbody tr").first.wait_for()
        return Screen(page)

    yield open_page
    for browser in browsers:
        browser.close()
    places = {urlsplit(url) for url in asked}
    assert {place.hostname for place in places if place.scheme.startswith("http")} == {"127.0.0.1"}
    assert errors == []


class Screen:
    """What a user does, and sees."""

    def __init__(self, page):
        self.page = page
        self.status = page.locator("#status")
        self.meter = page.locator("#meter tbody tr")

    def ask(self, text):
        self.page.locator("#question textarea").fill(text)
        self.page.locator("#send").click()

    def wait_for_status(self, text):
        playwright.expect(self.status).to_contain_text(text, timeout=PATIENCE * 1000)

    def said(self, side, role="bot"):
        return self.page.locator(f"#{side} .message.{role}").all_inner_texts()

    def open_document(self):
        self.page.get_by_role("button", name="A document to ask about").click()

    def upload(self, file):
        with self.page.expect_file_chooser() as chooser:
            self.page.get_by_role("button", name="Upload a .txt file").click()
        chooser.value.set_files(file)

    @property
    def cells(self):
        """The memory meter's cells, row by row."""
        return [self.meter.nth(row).locator("td").all_inner_texts() for row in range(2)]


def test_a_chat_side_by_side(visit):
    screen = visit()
    assert screen.cells[0][:2] == ["-", "-"]
    screen.ask(QUESTION)
    screen.wait_for_status("Cut off at the longest answer")
    for side in ("compressed", "plain"):
        assert [text.strip() for text in screen.said(side, "user")] == [QUESTION]
        assert len(screen.said(side)[0].strip()) > 10
    first = screen.cells
    assert first[0][0] == first[1][0]
    assert int(first[0][0]) > len(QUESTION)
    assert first[1][4] == "2.0x larger"  # float32
    assert screen.page.locator("#question textarea").input_value() == ""

    screen.page.get_by_label("Ask the plain cache too").uncheck()
    screen.ask(OTHER)
    screen.page.locator("#compressed .message.bot").nth(1).wait_for()
    screen.wait_for_status("Cut off at the longest answer")
    assert len(screen.said("plain")) == 1
    assert int(screen.cells[0][0]) > int(first[0][0]) + len(OTHER)
    assert screen.cells[1] == first[1]

    screen.page.locator("#reset").click()
    screen.wait_for_status("A new chat.")
    assert screen.said("compressed") == screen.said("plain") == []
    assert screen.cells[0][:2] == ["-", "-"]


def test_a_document(visit, tmp_path):
    screen, file = visit(), tmp_path / "letters.txt"
    screen.open_document()
    screen.page.locator("#read").click()
    screen.wait_for_status("The document is empty: paste a text, or upload a file.")
    file.write_bytes("Grüße".encode("latin-1"))
    screen.upload(file)
    screen.wait_for_status("letters.txt is not UTF-8 text (byte 2); convert it first.")
    file.write_text(DOCUMENT)
    screen.upload(file)
    playwright.expect(screen.page.get_by_label("Document", exact=True)).to_have_value(DOCUMENT)
    screen.page.locator("#read").click()
    screen.wait_for_status("The document has been read")
    playwright.expect(screen.page.locator("#document")).to_contain_text(f"{len(DOCUMENT):,} characters")
    ours, plain = screen.cells
    assert ours[0] == plain[0]
    assert float(ours[2].split()[0]) < float(plain[2].split()[0])

    for turn in (1, 2):
        screen.ask(QUESTION)
        screen.page.locator("#plain .message.bot").nth(turn - 1).wait_for()
        screen.wait_for_status("Cut off at the longest answer")
    for side in ("compressed", "plain"):
        first, second = screen.said(side)
        assert first == second  # each question goes to a copy

    screen.page.get_by_label("Preset of the compressed cache").click()
    screen.page.get_by_role("option", name="max").click()
    screen.wait_for_status("Preset max; the next question has everything read again.")
    assert screen.cells[0][:2] == ["-", "-"]


def test_what_is_too_long_stays_in_its_box(visit):
    screen = visit()
    screen.ask("x" * 5000)
    screen.wait_for_status("and tiny was made for 4,096: begin a new one, or take a shorter text.")
    assert screen.page.locator("#question textarea").input_value() == "x" * 5000
    assert screen.said("compressed", "user") == []
    assert "Traceback" not in screen.page.content()


def test_answers_are_no_html(visit):
    """What is typed, and what a model says, is text."""
    screen = visit()
    text = "<img src=x onerror='document.title=1'> <b>bold</b> **bold** ![](http://example.org/x.png)"
    screen.ask(text)
    screen.wait_for_status("Cut off at the longest answer")
    assert screen.said("compressed", "user") == screen.said("plain", "user") == [text]
    assert screen.page.title() == "nexusquant_cache"
    assert screen.page.locator("#compressed img, #compressed b, #compressed strong").count() == 0


def test_two_people_at_once(visit):
    ours, theirs = visit(), visit()
    ours.ask("Ours, and a long one.")
    theirs.ask("Theirs, and longer.")
    for screen, own in ((ours, "Ours, and a long one."), (theirs, "Theirs, and longer.")):
        screen.wait_for_status("Cut off at the longest answer")
        for side in ("compressed", "plain"):
            assert [text.strip() for text in screen.said(side, "user")] == [own]


def test_whoever_comes_back_to_a_new_page_begins_anew(visit):
    screen = visit()
    screen.ask(QUESTION)
    screen.wait_for_status("Cut off at the longest answer")
    screen.page.reload()
    screen.page.locator("#question textarea").wait_for()
    assert screen.said("compressed") == []
    screen.ask(OTHER)
    screen.wait_for_status("Cut off at the longest answer")
    assert [text.strip() for text in screen.said("compressed", "user")] == [OTHER]
    screen.page.locator("#plain").get_by_label("Clear").click()  # Gradio's own button does what ours does
    screen.wait_for_status("A new chat.")
    assert screen.said("compressed") == screen.said("plain") == []


def test_a_long_answer_can_be_stopped(visit, tmp_path):
    """What was said stays, the plain cache is not asked, and a new chat does not wait for the end of an answer."""
    page = RunningPage(tmp_path, "--answer-tokens=3500")
    try:
        screen = visit(page.url)
        screen.ask(QUESTION)
        screen.wait_for_status("compressed cache: answering ...")
        screen.page.locator("#stop").click()
        screen.wait_for_status("Stopped.")
        assert 0 < len(screen.said("compressed")[0]) < 3500
        assert screen.said("plain") == []
        screen.ask(OTHER)
        screen.wait_for_status("compressed cache: answering ...")
        screen.page.locator("#reset").click()
        screen.wait_for_status("A new chat.")
        assert screen.said("compressed") == screen.said("plain") == []
    finally:
        page.stop()
    assert "Traceback" not in page.log.read_text()
