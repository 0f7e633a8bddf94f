"""The server as a process, asked by OpenAI's own client, and by some that mean no good."""

import re
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest
import torch
from unit.serving_tiny import ascii_tiny

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.releases import CACHE
from nexusquant_cache.serving.app import MOST_BODY

KEY = "a key of the tests"
TEXT = "This is a sentence of some length, and there are more of its kind. " * 14
IDLE_BYTES = 250_000  # a few conversations
PATIENCE = 120  # seconds, on a machine that is busy


class Server:
    """A server in a process of its own."""

    def __init__(self, folder, place, *options):
        self.log, self.clients = place / "log", {}
        command = [sys.executable, "-c", "from nexusquant_cache.cli import main; main()", "serve", str(folder)]
        options = ("--port=0", "--name=tiny", f"--api-key={KEY}", f"--idle-bytes={IDLE_BYTES}", *options)
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log)  # noqa: S603 - our own
        found = self.wait_for(lambda: re.search(r"running on (http://\S+)", self.log.read_text()))
        self.url = found[1]

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return found

    def client(self, key=KEY, timeout=PATIENCE):
        if (key, timeout) not in self.clients:
            self.clients[key, timeout] = openai.OpenAI(
                base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=timeout
            )
        return self.clients[key, timeout]

    def post(self, body, path="/v1/chat/completions", **headers):
        given = {"authorization": f"Bearer {KEY}", "content-type": "application/json"} | headers
        return httpx.post(self.url + path, content=body, headers=given, timeout=PATIENCE)

    def metric(self, name):
        """Return the value of a metric; 0 if it has never been counted."""
        text = httpx.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE).text
        found = re.search(rf"^{re.escape('nexusquant_' + name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            for client in self.clients.values():
                client.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    ascii_tiny().model.save_pretrained(path)
    ascii_tiny().tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    running = Server(folder, tmp_path_factory.mktemp("server"), "--waiting=1", "--answer-tokens=16")
    yield running
    assert running.stop() in {0, -signal.SIGTERM}
    assert "Traceback" not in running.log.read_text()


def ask(client, messages, **options):
    settings = {"model": "tiny", "temperature": 0, "max_tokens": 16} | options
    return client.chat.completions.create(messages=messages, **settings)


def user(text):
    return {"role": "user", "content": text}


def test_two_turns_are_those_of_one_cache(server):
    """The second one, not streamed, goes on with the cache of the first, which was streamed."""
    client = server.client()
    messages = [user(TEXT)]
    pieces = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    first = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "length"
    assert len({piece.id for piece in pieces}) == 1
    used = pieces[-1].usage
    assert (used.completion_tokens, used.prompt_tokens_details.cached_tokens) == (16, 0)

    messages += [{"role": "assistant", "content": first}, user("Go on.")]
    second = ask(client, messages)
    known = used.total_tokens - 1
    assert second.usage.prompt_tokens_details.cached_tokens == known
    assert second.usage.total_tokens == second.usage.prompt_tokens + 16

    loaded = ascii_tiny()
    cache = NexusQuantCache(config=loaded.model.config)
    for messages_so_far, said in ((messages[:1], first), (messages, second.choices[0].message.content)):
        ids = loaded.tokenizer.apply_chat_template(
            messages_so_far, add_generation_prompt=True, return_dict=False, return_tensors="pt"
        )
        options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **options)
        assert said == loaded.tokenizer.decode(output[0, ids.shape[1] :])
    assert cache.memory_report().kept_tokens < cache.get_seq_length()


def test_answers_end_where_they_are_told_to(server):
    client = server.client()
    whole = ask(client, [user("Hello")]).choices[0].message.content
    cut = ask(client, [user("Hello")], stop=[whole[3:5]]).choices[0]
    assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(whole[3:5])], "stop")
    free = [ask(client, [user("Hello")], temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert free[0] == free[1] != free[2]
    assert ask(client, [user("Hello")], max_tokens=openai.NOT_GIVEN).usage.completion_tokens == 16


def test_who_may_ask(server):
    for key in ("wrong", ""):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(server.client(key or "x" * 5000), [user("Hello")])
        assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{server.url}/metrics").status_code == 401
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_the_model_is_listed_and_no_other(server):
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'large'"):
        ask(client, [user("Hello")], model="large")
    with pytest.raises(openai.NotFoundError, match="there is no model 'large'"):
        client.models.retrieve("large")
    assert server.post(b"{}", path="/v1/embeddings").json()["error"]["message"].endswith("Not Found")


def test_what_is_refused(server):
    client = server.client()
    for options, param, message in (
        ({"logprobs": True}, "logprobs", "logprobs is not supported"),
        ({"extra_body": {"top_k": 3}}, "top_k", "top_k is not supported"),
        ({"max_tokens": 5000}, "max_tokens", "together they may have 4,096"),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as caught:
            ask(client, [user("Hello")], **options)
        assert caught.value.param == param
    with pytest.raises(openai.BadRequestError, match="the prompt has") as caught:
        ask(client, [user("x" * 5000)], max_tokens=openai.NOT_GIVEN)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"", {}, 400),
        (b"{" * 10_000, {}, 400),
        (b"\x00\xff", {}, 400),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\udc00"}]}', {}, 400),
        (b"x" * (MOST_BODY + 1), {}, 413),
        (b"{}", {"content-type": "text/plain"}, 415),
    ],
)
def test_hostile_bodies(server, body, headers, status):
    outcome = server.post(body, **headers)
    assert outcome.status_code == status
    assert set(outcome.json()["error"]) == {"message", "type", "param", "code"}


class TestClientsThatHangUp:
    def long_stream(self, server, text):
        stream = ask(server.client(), [user(text)], stream=True, max_tokens=3000)
        for piece in stream:
            if piece.choices[0].delta.content:  # it has begun
                return stream
        raise AssertionError

    def test_end_their_answers_and_make_place_for_others(self, server):
        """One is answered and one waits; a third is told to come again."""
        left = server.metric('answers_total{ended="left"}')
        first = self.long_stream(server, "Tell me a long story.")
        second = ask(server.client(), [user("Another one.")], stream=True)  # accepted, and waits
        with pytest.raises(openai.InternalServerError, match="1 prompts wait already") as caught:
            ask(server.client(), [user("And one more.")])
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
        first.close()
        assert [piece.choices[0].finish_reason for piece in second][-1] == "length"
        server.wait_for(lambda: server.metric('answers_total{ended="left"}') == left + 1)
        assert server.metric("waiting_prompts") == 0

    def test_also_when_nothing_is_streamed(self, server):
        left = server.metric('answers_total{ended="left"}')
        with pytest.raises(openai.APITimeoutError):
            ask(server.client(timeout=1.0), [user("Tell me a long story.")], max_tokens=3000)
        server.wait_for(lambda: server.metric('answers_total{ended="left"}') == left + 1)
        assert ask(server.client(), [user("Hello")]).usage.completion_tokens == 16

    def test_what_is_held_stays_within_its_limit(self, server):
        for number in range(6):
            self.long_stream(server, f"{number} {TEXT}").close()
            ask(server.client(), [user(f"{number} again {TEXT}")])
            assert 0 < server.metric("idle_bytes") <= IDLE_BYTES
        assert server.metric("idle_conversations") < 12


def test_a_store_outlives_the_server(folder, tmp_path):
    """Conversations and long system messages come back after a restart; a running answer does not hold it up."""
    system = {"role": "system", "content": TEXT}
    messages = [system, user("Hello")]
    options = (f"--store={tmp_path / 'store'}", "--preset=max")
    server = Server(folder, tmp_path, *options)
    text = ask(server.client(), messages).choices[0].message.content
    stream = ask(server.client(), [user("Tell me a long story.")], stream=True, max_tokens=3000)
    next(iter(stream))
    assert server.stop() in {0, -signal.SIGTERM}
    stream.close()

    server = Server(folder, tmp_path, *options)
    try:
        again = ask(server.client(), [*messages, {"role": "assistant", "content": text}, user("Go on.")])
        other = ask(server.client(), [system, user("Something else.")])
    finally:
        server.stop()
    read = len(ascii_tiny().tokenizer(f"<system>{TEXT}")["input_ids"])
    assert again.usage.prompt_tokens_details.cached_tokens > read
    assert other.usage.prompt_tokens_details.cached_tokens == read
