"""The server's parts: the pool of conversations, the worker, what requests may say, and who may say it."""

import asyncio
import gc
import importlib.util
import json
import queue
import weakref

import httpx
import pytest
import torch
import uvicorn
from typer.testing import CliRunner
from unit.serving_tiny import ascii_tiny, small_chat
from unit.test_serving_chat import QUESTION, assistant, said, user

from nexusquant_cache import PrefixStore
from nexusquant_cache.cli.app import app
from nexusquant_cache.serving.chat_model import Answer, Wish
from nexusquant_cache.serving.command import ServerOptions, run_server
from nexusquant_cache.serving.errors import BusyError, ServingError
from nexusquant_cache.serving.jobs import Failure, Job
from nexusquant_cache.serving.pool import ConversationPool
from nexusquant_cache.serving.wire import ApiError, ChatRequest
from nexusquant_cache.serving.worker import Worker

SYSTEM = {"role": "system", "content": "Rules to be obeyed. " * 20}


@pytest.fixture(scope="module")
def model():
    return small_chat()


class TestPool:
    def conversation(self, model, text=QUESTION, tokens=2):
        found = model.new_conversation()
        said(model, found, [user(text)], tokens=tokens)
        return found

    def test_the_longest_shared_beginning_wins(self, model):
        """Two conversations go on alike, and one of them has been cut short."""
        pool = ConversationPool(10**9)
        short, long = self.conversation(model), self.conversation(model, tokens=6)
        other = self.conversation(model, "Something else.")
        for conversation in (long, short, other):
            assert pool.put(conversation) == []
        prompt = model.tokenize([user(), assistant(model.tokenizer.decode(long.ids[long.answer_from :])), user("x")])
        assert pool.take(prompt) is long
        assert pool.take(prompt) is short
        assert pool.take(prompt) is None
        assert len(pool) == 1

    def test_what_was_used_longest_ago_goes_first(self, model):
        first, second, third = (self.conversation(model, text * 9) for text in ("one ", "two ", "six "))
        size = first.held_bytes
        pool = ConversationPool(2 * size + size // 2)
        assert pool.put(first) == pool.put(second) == []
        assert pool.take(torch.cat([first.ids, first.ids[:1]])) is first
        assert pool.put(first) == []
        assert pool.put(third) == [second]

    def test_bytes_are_those_held(self, model):
        pool = ConversationPool(10**9)
        conversation = self.conversation(model)
        pool.put(conversation)
        assert pool.held_bytes == conversation.held_bytes > 0
        assert pool.clear() == [conversation]
        assert (len(pool), pool.held_bytes) == (0, 0)

    def test_one_that_is_larger_than_the_pool_is_not_kept(self, model):
        pool = ConversationPool(10)
        conversation = self.conversation(model)
        assert pool.put(conversation) == [conversation]
        assert pool.held_bytes == 0


class Events(queue.Queue):
    def rest(self):
        """Return the text and the end."""
        text = ""
        while isinstance(event := self.get(timeout=60), str):
            text += event
        return text, event


def job(model, messages, tokens=5, shared=0):
    events = Events()
    return Job(model.tokenize(messages), Wish(tokens), events.put, shared=shared), events


@pytest.fixture
def work(model):
    """Make workers that are stopped in the end."""
    workers = []

    def make(max_bytes=10**9, most_waiting=4, store=None):
        workers.append(Worker(model, ConversationPool(max_bytes), most_waiting, store))
        workers[-1].start()
        return workers[-1]

    yield make
    for worker in workers:
        worker.stop()
        assert not worker.is_alive


def ask(worker, model, messages, **options):
    asked, events = job(model, messages, **options)
    worker.submit(asked)
    return events.rest()


class Gate:
    """Holds a worker in its first answer, until it is opened."""

    def __init__(self, worker, model, monkeypatch):
        self.asked, self.events = job(model, [user()])
        self.open, entered = queue.Queue(), queue.Queue()
        answer = model.answer

        def wait(*arguments):
            monkeypatch.undo()
            entered.put(None)
            self.open.get(timeout=60)
            return answer(*arguments)

        monkeypatch.setattr(model, "answer", wait)
        worker.submit(self.asked)
        entered.get(timeout=60)


class TestWorker:
    def test_conversations_go_on_whatever_comes_between(self, model, work):
        worker = work()
        text, first = ask(worker, model, [user()])
        ask(worker, model, [user("Something else.")])
        messages = [user(), assistant(text), user("Go on.")]
        again, second = ask(worker, model, messages)
        assert (first.known_tokens, second.known_tokens) == (0, len(model.tokenize([user()])) + 4)
        conversation = model.new_conversation()
        said(model, conversation, [user()], tokens=5)
        assert again == said(model, conversation, messages, tokens=5)[0]
        assert len(worker.pool) == 2

    def test_what_waits_is_limited_and_can_be_taken_back(self, model, work, monkeypatch):
        worker = work(most_waiting=2)
        gate = Gate(worker, model, monkeypatch)
        waiting = [job(model, [user(str(number))]) for number in range(3)]
        worker.submit(waiting[0][0])
        worker.submit(waiting[1][0])
        with pytest.raises(BusyError, match="2 prompts wait already"):
            worker.submit(waiting[2][0])
        worker.withdraw(waiting[0][0])
        assert worker.waiting == 1
        worker.submit(waiting[2][0])
        gate.open.put(None)
        for events in (gate.events, waiting[1][1], waiting[2][1]):
            assert events.rest()[1].tokens == 5
        assert waiting[0][1].empty()

    def test_with_no_room_to_wait_one_is_answered(self, model, work, monkeypatch):
        worker = work(most_waiting=0)
        gate = Gate(worker, model, monkeypatch)
        with pytest.raises(BusyError):
            worker.submit(job(model, [user()])[0])
        gate.open.put(None)
        assert gate.events.rest()[1].tokens == 5

    def test_an_answer_that_nobody_waits_for_ends(self, model, work, monkeypatch):
        worker = work()
        gate = Gate(worker, model, monkeypatch)
        worker.withdraw(gate.asked)
        gate.open.put(None)
        assert gate.events.rest() == ("", Answer(0, 0, "left"))
        assert len(worker.pool) == 0

    def test_a_failure_is_told_and_harms_nobody_else(self, model, work, monkeypatch, caplog):
        worker = work()
        text, _ = ask(worker, model, [user()])

        def fail(*_):
            msg = "secret"
            raise ValueError(msg)

        with monkeypatch.context() as patch:
            patch.setattr(model, "answer", fail)
            assert ask(worker, model, [user("Something else.")])[1] == Failure(
                "the answer failed; the server's log says why"
            )
        assert "secret" in caplog.text
        assert ask(worker, model, [user(), assistant(text), user("x")])[1].known_tokens > 0

    def test_nothing_is_held_where_nothing_may_be(self, model, work):
        worker = work(max_bytes=0)
        made = []
        new = model.new_conversation

        def note():
            conversation = new()
            made.append(weakref.ref(conversation.cache))
            return conversation

        model.new_conversation = note
        try:
            for number in range(3):
                ask(worker, model, [user(f"{number} {QUESTION}")])
            worker.stop()
        finally:
            del model.new_conversation
        gc.collect()
        assert worker.pool.held_bytes == 0
        assert [reference() for reference in made] == [None] * 3

    def test_what_has_no_place_comes_back_from_the_store(self, model, work, tmp_path):
        """So do conversations that were idle when the worker stopped; answers are the same."""
        store = PrefixStore(tmp_path)
        messages = [user()]
        text, _ = ask(work(max_bytes=0, store=store), model, messages)
        messages += [assistant(text), user("Go on.")]
        worker = work(store=store)
        again, answer = ask(worker, model, messages)
        assert answer.known_tokens > len(QUESTION)
        conversation = model.new_conversation()
        said(model, conversation, [user()], tokens=5)
        assert again == said(model, conversation, messages, tokens=5)[0]
        before = len(store)
        worker.stop()
        assert len(store) == before + 1

    def test_a_long_system_message_is_read_once(self, model, work, tmp_path):
        shared = len(model.tokenize([SYSTEM], asks=False))
        worker = work(max_bytes=0, store=PrefixStore(tmp_path))
        known = [
            ask(worker, model, [SYSTEM, user(f"Question {number}?")], shared=shared)[1].known_tokens
            for number in range(2)
        ]
        assert known == [shared, shared]

    def test_a_store_that_cannot_be_used_is_done_without(self, model, work, tmp_path, caplog):
        store = PrefixStore(tmp_path)
        worker = work(max_bytes=0, store=store)
        (tmp_path / "index.sqlite3").write_bytes(b"not a database" * 100)
        assert ask(worker, model, [user()])[1].tokens == 5
        assert "the prefix store cannot be used" in caplog.text


def request(**fields):
    content = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return ChatRequest.parse(json.dumps(content).encode())


class TestRequest:
    def test_what_it_may_say(self):
        given = request(
            messages=[
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
            ],
            max_completion_tokens=5,
            temperature=0,
            stop="x",
            seed=1,
            user="me",
            n=1,
            presence_penalty=0.0,
            logit_bias=None,
            tools=[],
            response_format={"type": "text"},
        )
        assert [message.plain() for message in given.messages] == [
            {"role": "system", "content": "ab"},
            {"role": "assistant", "content": "c"},
        ]
        assert (given.most_tokens, given.temperature, given.top_p, given.stop) == (5, 0, 1, ("x",))

    @pytest.mark.parametrize(
        ("fields", "param", "message"),
        [
            ({"top_k": 1}, "top_k", "top_k is not supported by this server"),
            ({"n": 2}, "n", "n is not supported"),
            ({"logprobs": True}, "logprobs", "logprobs is not supported"),
            ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
            ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
            ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
            ({"temperature": "hot"}, "temperature", "valid number"),
            ({"top_p": 0}, "top_p", "greater than 0"),
            ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
            ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
            ({"seed": 2**64}, "seed", "less than"),
            ({"stop": ["a"] * 5}, "stop", "up to 4"),
            ({"stop": ""}, "stop", "none of them empty"),
            ({"messages": []}, "messages", "at least 1 item"),
            ({"messages": "Hi"}, "messages", "valid array"),
            ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages.0.role", "'system', 'developer'"),
            ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
            ({"messages": [{"role": "user", "content": "Hi", "name": "x"}]}, "messages.0.name", "not supported"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
                "messages.0.content",
                "nothing else is served",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
                "messages.0.content",
                "string",
            ),
            ({"model": None}, "model", "required"),
            ({"stream_options": {"x": 1}}, "stream_options.x", "not supported"),
        ],
    )
    def test_what_it_may_not_say(self, fields, param, message):
        with pytest.raises(ApiError, match=r".") as caught:
            request(**fields)
        error = caught.value.body["error"]
        assert (caught.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
        assert message in error["message"]

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[]",
            b"null",
            b'"text"',
            b"[" * 100_000,
            b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
            b'{"model": "tiny", "temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
        ],
    )
    def test_bodies_that_are_no_requests(self, body):
        with pytest.raises(ApiError, match=r".") as caught:
            ChatRequest.parse(body)
        assert caught.value.status == 400


def test_the_command_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else found(name))
    outcome = CliRunner().invoke(app, ["serve", "no such model"])
    assert outcome.exit_code == 2
    assert outcome.stderr == 'error: the server needs fastapi: pip install "nexusquant-cache[serve]"\n'


def test_more_tokens_than_the_model_was_made_for():
    with pytest.raises(ServingError, match="--tokens is 5,000, and tiny was made for 4,096"):
        run_server(ascii_tiny(), ServerOptions(preset="quant", tokens=5000))


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, {"elsewhere.example", "127.0.0.1.elsewhere.example"}),
        ({"host": "127.0.0.9"}, {"elsewhere.example", "127.0.0.1.elsewhere.example"}),
        ({"host": "LOCALHOST"}, {"elsewhere.example", "127.0.0.1.elsewhere.example"}),
        ({"api_key": "a key"}, set()),  # a web page elsewhere does not know it
        ({"host": "0.0.0.0"}, set()),  # noqa: S104 - others reach it, by names that we do not know
    ],
)
def test_a_server_of_this_machine_alone_goes_by_its_names(options, refused, monkeypatch):
    """A web page elsewhere may have its name stand for this machine; its browser still says that name."""
    apps = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: apps.append(server.config.app))
    run_server(ascii_tiny(), ServerOptions(**{"preset": "quant"} | options))
    own = {options.get("host", "127.0.0.1"), "localhost", "127.0.0.1", "[::1]"}
    names = own | {"elsewhere.example", "127.0.0.1.elsewhere.example"}

    async def statuses():
        transport = httpx.ASGITransport(apps[0])
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return {name: (await client.get("/health", headers={"host": f"{name}:8000"})).status_code for name in names}

    found = asyncio.run(statuses())
    assert {name for name, status in found.items() if status == 400} == refused
    assert {status for name, status in found.items() if name not in refused} == {503}  # the worker has not been started
