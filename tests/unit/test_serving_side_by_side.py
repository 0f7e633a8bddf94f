"""Two chats side by side, about nothing or about a document, and what becomes of them when something goes wrong."""

import importlib.util
import itertools
import threading

import pytest
import torch
from transformers import DynamicCache
from typer.testing import CliRunner
from unit.evaluation_tiny import tiny
from unit.serving_tiny import SMALL, Heard, ascii_tiny, small_chat
from unit.test_serving_chat import QUESTION, assistant, by_hand, said, user

from nexusquant_cache import OptionError
from nexusquant_cache.cli.app import app
from nexusquant_cache.evaluation import LoadedModel
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.texts import read_text
from nexusquant_cache.serving.chat_model import ChatModel, Wish
from nexusquant_cache.serving.chat_page_command import PageOptions, page_address, run_page
from nexusquant_cache.serving.errors import BusyError, LengthError, ServingError
from nexusquant_cache.serving.meter import Meter, meter_html
from nexusquant_cache.serving.model_thread import ModelThread
from nexusquant_cache.serving.plain import PlainChatModel
from nexusquant_cache.serving.session import ChatSession
from nexusquant_cache.serving.side_by_side import COMPRESSED, PLAIN, SideBySide, Users

DOCUMENT = "This is a sentence of some length, and there are more of its kind. " * 14


@pytest.fixture(scope="module")
def thread():
    running = ModelThread()
    yield running
    running.close()


@pytest.fixture
def pair(thread):
    return new_pair(thread)


def new_pair(thread, **options):
    return SideBySide(ascii_tiny(), thread, SMALL, **{"wish": Wish(12)} | options)


def last(views):
    return list(views)[-1]


def texts(messages):
    return [message["content"] for message in messages]


def plain_answer(messages, tokens=12):
    """What `generate` itself answers through transformers' own cache."""
    model = small_chat()
    cache = DynamicCache(config=model.model.config)
    return model.tokenizer.decode(by_hand(model, cache, model.tokenize(messages), tokens))


def compressed_answer(messages, tokens=12):
    return said(small_chat(), small_chat().new_conversation(), messages, tokens)[0]


class TestModelThread:
    def test_the_newest_and_the_last_are_passed_on(self):
        thread, goes_on = ModelThread(), threading.Event()

        def work(post):
            post(1)
            goes_on.wait(60)
            for number in range(2, 100):
                post(number)

        stream = thread.stream(work)
        assert next(stream) == 1
        goes_on.set()
        rest = list(stream)
        assert rest[-1] == 99
        assert rest == sorted(set(rest))
        thread.close()

    def test_one_thing_after_the_other(self):
        thread, running, most = ModelThread(), [], []

        def work():
            running.append(1)
            most.append(len(running))
            threading.Event().wait(0.01)
            running.pop()

        for future in [thread.submit(work) for _ in range(8)]:
            future.result()
        assert most == [1] * 8
        thread.close()

    def test_what_goes_wrong_is_raised_behind_what_was_posted(self):
        thread = ModelThread()

        def work(post):
            post(1)
            msg = "that went wrong"
            raise KeyError(msg)

        stream = thread.stream(work)
        assert next(stream) == 1
        with pytest.raises(KeyError, match="that went wrong"):
            next(stream)
        thread.close()
        assert thread.is_over
        with pytest.raises(BusyError, match="about to stop"):
            thread.submit(lambda: None)


class TestPlainChatModel:
    def test_it_says_what_transformers_own_cache_says_and_holds_what_that_holds(self):
        model, messages = PlainChatModel(ascii_tiny()), [user()]
        conversation = model.new_conversation()
        first, _ = said(model, conversation, messages)
        assert first == plain_answer(messages)
        cache = DynamicCache(config=model.model.config)
        by_hand(model, cache, model.tokenize(messages))
        report = conversation.cache.memory_report()
        assert report.kept_tokens == report.seen_tokens == cache.get_seq_length()
        assert report.held_bytes == sum(
            x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values)
        )
        assert report.dense_bytes * 2 == report.held_bytes  # the tiny model runs in float32

    def test_turns_go_on_and_rewritten_answers_are_cut_off(self):
        model = PlainChatModel(ascii_tiny())
        conversation = model.new_conversation()
        first, _ = said(model, conversation, [user()])
        messages = [user(), assistant(first[:6]), user("Go on.")]
        again, answer = said(model, conversation, messages)
        assert answer.known_tokens == len(model.tokenize([user()])) + 6
        assert again == plain_answer(messages)


class TestSession:
    def test_a_fork_goes_its_own_way(self):
        session = ChatSession(small_chat(), Wish(12))
        session.read(DOCUMENT, Heard())
        before, held = list(session.messages), session.report().held_bytes
        forked = session.fork()
        assert forked.ask("What was it?", Heard()).known_tokens == session.report().seen_tokens
        assert (session.messages, session.report().held_bytes) == (before, held)
        assert len(forked.messages) == len(before) + 2

    def test_a_chat_may_be_shorter_than_the_model_was_made_for(self):
        session = ChatSession(small_chat(), Wish(12), most_tokens=100)
        with pytest.raises(LengthError, match=r"would have 2\d\d tokens, and it may have 100: begin a new one"):
            session.ask("x" * 200, Heard())
        assert session.ask("x" * 76, Heard()).tokens == 7  # with the roles, 93 are taken


class TestChat:
    def test_both_sides_answer_as_their_caches_do(self, pair):
        views = list(pair.ask(QUESTION))
        seen = views[-1]
        assert seen.compressed == (user(), assistant(compressed_answer([user()])))
        assert seen.plain == (user(), assistant(plain_answer([user()])))
        assert (seen.status, seen.is_error) == (
            f"Cut off at the longest answer, or the longest chat, that is allowed: {COMPRESSED}, {PLAIN}.",
            False,
        )
        ours, plain = seen.meters[COMPRESSED], seen.meters[PLAIN]
        assert ours.kept_tokens < ours.seen_tokens == plain.seen_tokens == plain.kept_tokens
        assert ours.held_bytes < plain.held_bytes
        assert (ours.dense_bytes, plain.factor) == (plain.dense_bytes, 0.5)
        assert ours.last.startswith("12 tokens in ")

    def test_answers_grow(self, pair):
        views = list(pair.ask(QUESTION))
        for side, name in (("compressed", COMPRESSED), ("plain", PLAIN)):
            growing = [texts(getattr(view, side))[1] for view in views if len(getattr(view, side)) == 2]
            assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(growing))
            assert any(view.status == f"{name}: answering ..." for view in views)

    def test_a_second_turn_goes_on(self, pair):
        first = last(pair.ask(QUESTION))
        second = last(pair.ask("Go on."))
        assert texts(second.plain)[3] == plain_answer([*first.plain, user("Go on.")])
        assert second.meters[COMPRESSED].seen_tokens > first.meters[COMPRESSED].seen_tokens + 12

    def test_the_plain_side_can_be_left_out_and_takes_over_what_it_missed(self, pair):
        first = last(pair.ask(QUESTION, with_plain=False))
        assert (first.plain, first.meters[PLAIN]) == ((), None)
        second = last(pair.ask("Go on."))
        assert second.plain[:2] == first.compressed
        assert texts(second.plain)[3] == plain_answer([*first.compressed, user("Go on.")])

    def test_another_preset_has_everything_read_again(self, pair):
        first = last(pair.ask(QUESTION))
        chosen = last(pair.use_preset("quant"))
        assert (chosen.status, chosen.meters[COMPRESSED]) == (
            "Preset quant; the next question has everything read again.",
            None,
        )
        assert chosen.meters[PLAIN] == first.meters[PLAIN]
        second = last(pair.ask("Go on."))
        model = ChatModel(ascii_tiny(), "quant")
        messages = [*first.compressed, user("Go on.")]
        assert texts(second.compressed)[3] == said(model, model.new_conversation(), messages)[0]
        assert second.meters[COMPRESSED].kept_tokens == second.meters[COMPRESSED].seen_tokens

    def test_a_new_chat_knows_nothing(self, pair):
        first = last(pair.ask(QUESTION))
        assert last(pair.reset()) == pair.view("A new chat.")
        assert pair.view().compressed == pair.view().plain == ()
        assert texts(last(pair.ask(QUESTION)).compressed) == texts(first.compressed)

    def test_stopped_in_the_middle(self, thread):
        """What was said stays; the plain side is not asked, and takes the turn over later."""
        pair = new_pair(thread, wish=Wish(2000))
        views = pair.ask(QUESTION)
        for view in views:
            if view.status.endswith("answering ..."):
                pair.stop()
        assert view.status == "Stopped."
        assert 0 < len(texts(view.compressed)[1]) < 2000
        assert view.plain == ()
        assert view.meters[COMPRESSED].seen_tokens > 0

    def test_whoever_looks_no_more_stops_it(self, thread):
        pair = new_pair(thread, wish=Wish(3000))
        views = pair.ask(QUESTION)
        while not next(views).status.endswith("answering ..."):
            pass
        views.close()
        thread.submit(lambda: None).result()  # waits for the answer
        assert len(texts(pair.view().compressed)[1]) < 3000

    def test_released_caches_are_read_again(self, pair, thread):
        first = last(pair.ask(QUESTION))
        pair.release()
        thread.submit(lambda: None).result()
        assert pair.view().meters == {COMPRESSED: None, PLAIN: None}
        assert pair.view().compressed == first.compressed
        second = last(pair.ask("Go on."))
        assert texts(second.compressed)[3] == compressed_answer([*first.compressed, user("Go on.")])


class TestDocument:
    def test_it_is_read_once_and_every_question_goes_to_a_copy(self, thread, monkeypatch):
        pair, other = new_pair(thread), new_pair(thread)
        view = last(pair.read(DOCUMENT))
        assert (view.status, view.compressed) == ("The document has been read: ask about it.", ())
        assert f"{len(DOCUMENT):,} characters" in view.document
        ours, plain = view.meters[COMPRESSED], view.meters[PLAIN]
        assert ours.kept_tokens < ours.seen_tokens == plain.seen_tokens
        assert ours.last.startswith("document read in ")

        reads = []
        read = ChatSession.read
        monkeypatch.setattr(ChatSession, "read", lambda *args: reads.append(args) or read(*args))
        first, second = last(pair.ask("One?")), last(pair.ask("Two?"))
        assert reads == []
        assert texts(second.compressed)[::2] == ["One?", "Two?"]
        for side in (COMPRESSED, PLAIN):
            assert (
                second.meters[side].seen_tokens == first.meters[side].seen_tokens < view.meters[side].seen_tokens + 90
            )

        last(other.read(DOCUMENT))
        alone = last(other.ask("Two?"))
        assert texts(alone.compressed)[1] == texts(second.compressed)[3]
        assert texts(alone.plain)[1] == texts(second.plain)[3]

    def test_the_plain_side_reads_it_when_it_is_asked(self, pair):
        view = last(pair.read(DOCUMENT, with_plain=False))
        assert view.meters[PLAIN] is None
        last(pair.ask("One?", with_plain=False))
        view = last(pair.ask("Two?"))
        told = [user(f"Read this text.\n\n{DOCUMENT}"), assistant("I have read the text.")]
        assert texts(view.plain)[3] == plain_answer([*told, user("Two?")])
        assert texts(view.plain)[:2] == texts(view.compressed)[:2]

    @pytest.mark.parametrize("let_go", ["release", "use_preset"])
    def test_it_is_read_again_where_the_cache_is_gone(self, pair, let_go):
        last(pair.read(DOCUMENT, with_plain=False))
        before = last(pair.ask("One?", with_plain=False))
        if let_go == "release":
            pair.release()
        else:
            last(pair.use_preset("quant"))
        after = last(pair.ask("One?", with_plain=False))
        assert not after.is_error
        assert after.meters[COMPRESSED].seen_tokens == before.meters[COMPRESSED].seen_tokens
        if let_go == "release":
            assert texts(after.compressed)[3] == texts(before.compressed)[1]

    def test_a_new_document_begins_a_new_chat(self, pair):
        last(pair.read(DOCUMENT))
        first = last(pair.ask("One?"))
        view = last(pair.read("Another text, and a short one."))
        assert view.compressed == view.plain == ()
        assert view.meters[COMPRESSED].seen_tokens < 110 < first.meters[COMPRESSED].seen_tokens
        assert last(pair.reset()).document == ""

    def test_stopped_while_it_is_read(self, pair):
        """All is as before."""
        before = last(pair.ask(QUESTION))
        for view in pair.read("x" * 3000):
            if view.status.endswith("tokens ..."):
                pair.stop()
        assert view.status == "Stopped. The document was not read."
        assert (view.compressed, view.meters, view.document) == (before.compressed, before.meters, "")


class TestErrors:
    @pytest.mark.parametrize(
        ("act", "message"),
        [
            (lambda pair: pair.ask("  \n"), "Type a question first."),
            (lambda pair: pair.read(" \n "), "The document is empty: paste a text, or upload a file."),
            (lambda pair: pair.ask("x" * 4096), "The chat would have 4,"),
            (
                lambda pair: pair.read("x" * 4096),
                "and tiny was made for 4,096: begin a new one, or take a shorter text.",
            ),
            (lambda pair: pair.use_preset("balnced"), "Did you mean 'balanced'?"),
        ],
    )
    def test_what_is_given_is_refused_in_words_and_changes_nothing(self, pair, act, message):
        before = last(pair.ask(QUESTION, with_plain=False))
        view = last(act(pair))
        assert view.is_error
        assert message in view.status
        assert (view.compressed, view.meters, view.document) == (before.compressed, before.meters, "")
        assert not last(pair.ask("Go on.", with_plain=False)).is_error

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (RuntimeError("a secret"), "That failed; the log of the program says why."),
            (torch.OutOfMemoryError("a secret"), "Out of memory: take a shorter text, or switch the plain cache off."),
            (MemoryError(), "Out of memory: take a shorter text, or switch the plain cache off."),
        ],
    )
    def test_what_fails_is_logged_and_the_chat_goes_on(self, pair, monkeypatch, caplog, error, message):
        last(pair.ask(QUESTION))
        with monkeypatch.context() as patch:

            def fail(*_):
                raise error

            patch.setattr(PlainChatModel, "answer", fail)
            view = last(pair.ask("Go on."))
        assert (view.status, view.is_error) == (message, True)
        assert caplog.records[-1].exc_info[1] is error
        assert (len(view.compressed), len(view.plain)) == (4, 2)  # ours had answered already
        assert len(last(pair.ask("And now?")).plain) == 6

    def test_after_the_end(self):
        thread = ModelThread()
        pair = new_pair(thread)
        thread.close()
        assert last(pair.ask(QUESTION)) == pair.view("The program is about to stop.", is_error=True)
        pair.release()

    def test_at_the_end_an_answer_stops(self):
        thread = ModelThread()
        pair = new_pair(thread, wish=Wish(3000))
        views = pair.ask(QUESTION)
        next(views)
        thread.close()
        assert last(views).status == "Stopped."

    def test_models_and_presets_that_cannot_be_used(self, thread):
        silent = build_silent()
        with pytest.raises(ServingError, match="tiny has no chat template"):
            SideBySide(silent, thread, wish=Wish(12))
        with pytest.raises(OptionError, match="Did you mean 'max'"):
            SideBySide(ascii_tiny(), thread, "maxx", wish=Wish(12))


def build_silent():
    loaded = tiny()
    tokenizer = type(loaded.tokenizer)(tokenizer_object=loaded.tokenizer.backend_tokenizer)
    return LoadedModel("tiny", loaded.model, tokenizer)


class TestUsers:
    def test_each_has_chats_of_their_own(self, thread):
        users = Users(lambda: new_pair(thread))
        ours, theirs = users.find("a"), users.find("b")
        both = [ours.ask("One?", with_plain=False), theirs.ask("Two?", with_plain=False)]
        for views in both:  # the second waits for the first one in the thread
            last(views)
        assert texts(ours.view().compressed)[::2] == ["One?"]
        assert texts(theirs.view().compressed)[::2] == ["Two?"]
        assert users.find("a") is ours

    def test_whoever_has_no_key_gets_what_nobody_else_gets(self, thread):
        users = Users(lambda: new_pair(thread))
        assert users.find(None) is not users.find(None)
        assert users.find("") is not users.find("")
        assert len(users) == 0

    def test_those_who_came_least_lately_are_forgotten(self, thread):
        users = Users(lambda: new_pair(thread), most=2)
        first, second = users.find("a"), users.find("b")
        assert users.find("a") is first
        users.find("c")
        assert users.find("a") is first
        assert users.find("b") is not second

    def test_who_leaves_holds_no_cache(self, thread):
        users = Users(lambda: new_pair(thread))
        pair = users.find("a")
        last(pair.ask(QUESTION))
        users.leave("a")
        users.leave("never here")
        thread.submit(lambda: None).result()
        assert users.find("a") is pair
        assert pair.view().meters == {COMPRESSED: None, PLAIN: None}
        assert len(pair.view().compressed) == 2


class TestMeter:
    def test_the_table(self):
        ours, plain = Meter(3000, 1200, 2**20, 20 * 2**20, "a < b"), Meter(3000, 3000, 40 * 2**20, 20 * 2**20, "")
        shown = meter_html({"ours": ours, "plain": plain, "<none>": None})
        for cell in (
            "3,000",
            "1,200",
            "1.00 MiB",
            "40.00 MiB",
            "20.0x smaller",
            "2.0x larger",
            "a &lt; b",
            "&lt;none&gt;",
        ):
            assert cell in shown
        assert "width: 2.5%" in shown
        assert "width: 100.0%" in shown

    def test_empty(self):
        assert Meter(0, 0, 0, 0, "").factor == 1
        assert "<td>-</td>" in meter_html({"ours": None})
        assert "0.00 MiB" in meter_html({"ours": Meter(0, 0, 0, 0, "")})


def test_a_file_is_called_by_the_name_that_it_was_given(tmp_path):
    file = tmp_path / "x"
    file.write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"^letters.txt is not UTF-8 text \(byte 2\); convert it first$"):
        read_text(file, "letters.txt")


class TestCommand:
    def test_it_says_what_to_install(self, monkeypatch):
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name))
        outcome = CliRunner().invoke(app, ["app", "no such model"])
        assert outcome.exit_code == 2
        assert outcome.stderr == 'error: the page needs gradio: pip install "nexusquant-cache[app]"\n'

    def test_options_that_are_wrong(self):
        outcome = CliRunner().invoke(app, ["app", "--preset", "balnced"])
        assert outcome.exit_code == 2
        assert "Did you mean 'balanced'?" in outcome.stderr

    def test_options_reach_the_page(self, monkeypatch):
        given = []
        monkeypatch.setattr("nexusquant_cache.cli.app.check_page", lambda: None)
        monkeypatch.setattr("nexusquant_cache.cli.app.load_model", lambda name: name)
        monkeypatch.setattr("nexusquant_cache.cli.app.run_page", lambda *args: given.append(args))
        options = ["--preset", "max", "--host", "::1", "--port", "0", "--tokens", "100", "--answer-tokens", "9"]
        assert CliRunner().invoke(app, ["app", "a model", *options, "--browser"]).exit_code == 0
        assert given == [("a model", PageOptions("max", "::1", 0, 100, 9, browser=True))]

    @pytest.mark.parametrize(
        ("host", "place"),
        [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "localhost"), ("::1", "[::1]"), ("::", "localhost"), ("box", "box")],  # noqa: S104
    )
    def test_the_address_for_a_browser_here(self, host, place):
        assert page_address(host, 7860) == f"http://{place}:7860"

    def test_more_tokens_than_the_model_was_made_for(self):
        pytest.importorskip("gradio")
        with pytest.raises(ServingError, match="--tokens is 5,000, and tiny was made for 4,096"):
            run_page(ascii_tiny(), PageOptions(tokens=5000))
