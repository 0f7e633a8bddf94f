"""Answers, conversations that go on, and what becomes of them when something goes wrong."""

import copy
import os
import signal

import pytest
import torch
from integration.tiny import fingerprint
from typer.testing import CliRunner
from unit.evaluation_tiny import build_tokenizer, tiny
from unit.serving_tiny import SMALL, Heard, ascii_tiny, small_chat

from nexusquant_cache import FormatError, NexusQuantCache, OptionError
from nexusquant_cache.cli.app import app
from nexusquant_cache.cli.chat import ChatLoop
from nexusquant_cache.evaluation import LoadedModel
from nexusquant_cache.releases import CACHE
from nexusquant_cache.serving.answer_text import AnswerText
from nexusquant_cache.serving.chat_model import ChatModel, Wish
from nexusquant_cache.serving.errors import LengthError, ServingError, TemplateError
from nexusquant_cache.serving.session import ChatSession

QUESTION = "What does the first sentence of this rather long text say, and what does the second one say?"


def user(text=QUESTION):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def said(model, conversation, messages, tokens=12, **wish):
    heard = Heard()
    answer = model.answer(conversation, model.tokenize(messages), Wish(tokens, **wish), heard)
    return heard.text, answer


def by_hand(model, cache, prompt, tokens=12):
    """What `generate` itself answers through a cache."""
    ids = prompt[None]
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    output = model.model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **options)
    return output[0, len(prompt) :]


class TestAnswerText:
    def pieces(self, ids, stop=()):
        text = AnswerText(build_tokenizer(), stop)
        found = []
        for token in ids:
            found.append(text.add(token))
            if text.is_stopped:
                break
        return [*found, text.end()]

    @pytest.mark.parametrize("text", ["plain", "Grüße, 世界 🙂.", "a\ufffdb", "  spaces \n\t"])
    def test_pieces_are_whole_characters_and_add_up(self, text):
        ids = build_tokenizer()(text)["input_ids"]
        pieces = self.pieces(ids)
        assert "".join(pieces) == text
        assert all(piece == piece.encode(errors="strict").decode() for piece in pieces)
        assert "🙂" not in text or "🙂" in pieces

    def test_broken_characters_come_out_as_the_tokenizer_shows_them(self):
        tokenizer = build_tokenizer()
        ids = tokenizer("🙂🙂")["input_ids"]
        for broken in (ids[:3], ids[1:], [*ids[:2], *tokenizer("x")["input_ids"]]):
            assert "".join(self.pieces(broken)) == tokenizer.decode(broken)

    @pytest.mark.parametrize(
        ("text", "stop", "left"),
        [
            ("one STOP two", ["STOP"], "one "),
            ("one STO two", ["STOP"], "one STO two"),
            ("aab", ["ab"], "a"),
            ("ends with STO", ["STOP"], "ends with STO"),
            ("one END two STOP", ["STOP", "END"], "one "),
            ("no", ["n"], ""),
            ("Grüße", ["üß"], "Gr"),
        ],
    )
    def test_stop_strings_end_it_and_do_not_belong_to_it(self, text, stop, left):
        pieces = self.pieces(build_tokenizer()(text)["input_ids"], stop)
        assert "".join(pieces) == left


class TestConversation:
    def test_turns_are_those_of_one_cache_that_saw_the_same_tokens(self):
        model = small_chat()
        conversation, cache = model.new_conversation(), NexusQuantCache(SMALL, config=model.model.config)
        messages, seen = [], 0
        for turn in range(3):
            messages.append(user(f"{turn} {QUESTION}"))
            prompt = model.tokenize(messages)
            expected = by_hand(model, cache, prompt)
            text, answer = said(model, conversation, messages)
            assert text == model.tokenizer.decode(expected)
            assert (answer.known_tokens, answer.tokens, answer.ended) == (seen, 12, "length")
            assert fingerprint(conversation.cache) == fingerprint(cache)
            messages.append(assistant(text))
            seen = len(prompt) + 11  # the last token has been said, and not been read
        assert conversation.cache.memory_report().kept_tokens < seen

    def test_a_rewritten_answer_is_cut_off(self):
        """Here its second half: the codes of the first are still of use."""
        model = small_chat()
        conversation = model.new_conversation()
        text, _ = said(model, conversation, [user()])
        cache, before = copy.deepcopy(conversation.cache), len(model.tokenize([user()]))
        again, answer = said(model, conversation, [user(), assistant(text[:6]), user("Go on.")])
        assert answer.known_tokens == before + 6
        cache.crop(-5)
        prompt = model.tokenize([user(), assistant(text[:6]), user("Go on.")])
        assert again == model.tokenizer.decode(by_hand(model, cache, prompt))

    @pytest.mark.parametrize(
        "messages",
        [
            [user()],  # nothing is left to read
            [user(QUESTION + "!")],
            [user("Another question.")],
        ],
    )
    def test_what_parts_before_the_answer_begins_anew(self, messages):
        model = small_chat()
        conversation = model.new_conversation()
        said(model, conversation, [user()])
        text, answer = said(model, conversation, messages)
        assert answer.known_tokens == 0
        assert (text, conversation.cache.get_seq_length()) == (
            said(model, model.new_conversation(), messages)[0],
            len(model.tokenize(messages)) + 11,
        )

    def test_layers_that_cannot_go_back_begin_anew(self, monkeypatch):
        model = small_chat()
        conversation = model.new_conversation()
        text, _ = said(model, conversation, [user()])

        def refuse(_cache, _tokens):
            msg = "`crop` was called, but the current layer does not track past states"
            raise RuntimeError(msg)

        monkeypatch.setattr(NexusQuantCache, "crop", refuse)
        messages = [user(), assistant(text[:6]), user("Go on.")]
        again, answer = said(model, conversation, messages)
        assert answer.known_tokens == 0
        assert again == said(model, model.new_conversation(), messages)[0]

    def test_reading_in_pieces_can_be_stopped_and_leaves_no_trace(self):
        model = small_chat()
        conversation = model.new_conversation()
        text, _ = said(model, conversation, [user()])
        before, ids = fingerprint(conversation.cache), conversation.ids
        messages = [user(), assistant(text), user("x" * 1900)]
        heard = Heard(most_reads=2)
        answer = model.answer(conversation, model.tokenize(messages), Wish(5), heard)
        assert [done for done, _ in heard.reads] == [0, 512, 1024]
        assert (answer.tokens, answer.ended) == (0, "left")
        assert fingerprint(conversation.cache) == before
        assert conversation.ids.equal(ids)

    def test_an_answer_can_be_stopped_and_gone_on_from(self):
        model = small_chat()
        conversation = model.new_conversation()
        whole, _ = said(model, model.new_conversation(), [user()])
        heard = Heard(most=7)
        answer = model.answer(conversation, model.tokenize([user()]), Wish(20), heard)
        assert (heard.text, answer.tokens, answer.ended) == (whole[:7], 7, "left")
        _, later = said(model, conversation, [user(), assistant(whole[:7]), user("Go on.")])
        assert later.known_tokens == len(model.tokenize([user()])) + 6

    @pytest.mark.parametrize("broken_layer", [0, 1])
    def test_a_forward_that_fails_is_taken_back(self, broken_layer):
        """Whether all layers of the cache have its tokens or not."""
        model = small_chat()
        conversation = model.new_conversation()
        text, _ = said(model, conversation, [user()])
        messages = [user(), assistant(text), user("Go on.")]
        before, ids = fingerprint(conversation.cache), conversation.ids

        def fail(*_):
            raise MemoryError

        hook = model.model.model.layers[broken_layer].mlp.register_forward_pre_hook(fail)
        try:
            with pytest.raises(MemoryError):
                said(model, conversation, messages)
        finally:
            hook.remove()
        assert fingerprint(conversation.cache) == before
        assert conversation.ids.equal(ids)
        assert said(model, conversation, messages)[1].known_tokens == len(ids)

    def test_what_fails_behind_the_compression_of_a_turn_is_taken_back(self):
        """Of what stood before the turn nothing was evicted."""
        model = small_chat()
        conversation = model.new_conversation()
        text, _ = said(model, conversation, [user()])
        messages, known = [user(), assistant(text), user(QUESTION)], conversation.ids

        class Failing(Heard):
            def say(self, text):
                super().say(text)
                if len(self.pieces) == 3:
                    raise MemoryError

        with pytest.raises(MemoryError):
            model.answer(conversation, model.tokenize(messages), Wish(5), Failing())
        assert conversation.ids.equal(known)
        assert len(known) == conversation.cache.get_seq_length()
        assert said(model, conversation, messages)[1].known_tokens == len(known)

    def test_an_answer_ends_with_the_model_or_with_a_stop_string(self):
        model = small_chat()
        whole, _ = said(model, model.new_conversation(), [user()])
        stop = whole[5:7]
        text, answer = said(model, model.new_conversation(), [user()], stop=(stop,))
        assert (text, answer.ended) == (whole[: whole.index(stop)], "stop")
        end = model.tokenizer.convert_tokens_to_ids(whole[4])
        model.model.generation_config.eos_token_id = end
        try:
            text, answer = said(model, model.new_conversation(), [user()])
        finally:
            model.model.generation_config.eos_token_id = None
        assert (answer.tokens, answer.ended) == (whole.index(whole[4]) + 1, "stop")

    def test_a_seed_decides_and_leaves_the_random_state_alone(self):
        model = small_chat()
        state = torch.get_rng_state()
        texts = [said(model, model.new_conversation(), [user()], temperature=2.0, seed=seed)[0] for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]
        assert torch.get_rng_state().equal(state)
        likeliest = said(model, model.new_conversation(), [user()])[0]
        for wish in ({"temperature": 2.0, "top_p": 1e-6}, {"temperature": 1e-300}):
            assert said(model, model.new_conversation(), [user()], seed=1, **wish)[0] == likeliest

    def test_after_one_token_nothing_waits(self):
        model = small_chat()
        conversation = model.new_conversation()
        said(model, conversation, [user()], tokens=1)
        assert conversation.cache.memory_report().kept_tokens < len(model.tokenize([user()]))

    def test_messages_that_the_template_refuses(self):
        tokenizer = build_tokenizer("{{ raise_exception('roles must alternate') }}")
        model = small_chat(LoadedModel("strict", tiny().model, tokenizer))
        with pytest.raises(TemplateError, match="strict refuses these messages: roles must alternate"):
            model.tokenize([user()])

    def test_a_model_without_a_template(self):
        with pytest.raises(ServingError, match="base has no chat template"):
            ChatModel(LoadedModel("base", tiny().model, build_tokenizer(None)))


@pytest.fixture
def session():
    return ChatSession(small_chat(), Wish(12))


class TestSession:
    def test_a_saved_chat_goes_on_as_if_it_had_never_ended(self, session, tmp_path):
        path = tmp_path / "chat"
        session.ask(QUESTION, Heard())
        session.save(path)
        expected, other = Heard(), Heard()
        session.ask("Go on.", expected)
        session.reset()
        session.ask("Something else.", Heard())
        assert session.load(path).model == "tiny"
        answer = session.ask("Go on.", other)
        assert other.text == expected.text
        assert answer.known_tokens > 0
        assert session.model.preset == SMALL
        session.save(path)  # over its own file

    def test_what_cannot_be_loaded_leaves_the_chat_as_it_was(self, session, tmp_path, monkeypatch):
        session.ask(QUESTION, Heard())
        session.save(tmp_path / "good")
        session.conversation.cache.save(tmp_path / "cache")
        session.conversation.cache.save(tmp_path / "odd", metadata={"conversation": "[]", "token_ids": ""})
        (tmp_path / "text").write_text("text")
        before = (session.messages, session.conversation)
        for name, message in (
            ("cache", "holds a cache, and no conversation"),
            ("odd", "cannot be read: it is no object"),
            ("text", "no safetensors file"),
        ):
            with pytest.raises(FormatError, match=message):
                session.load(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            session.load(tmp_path / "nothing")
        with monkeypatch.context() as patch:
            patch.setattr(session.model.model.config, "rms_norm_eps", 0.5)
            with pytest.raises(FormatError, match="belongs to another model: rms_norm_eps"):
                session.load(tmp_path / "good")
        assert (session.messages, session.conversation) == before

    def test_saving_replaces_nothing_but_chats(self, session, tmp_path):
        with pytest.raises(ServingError, match="nothing to save yet"):
            session.save(tmp_path / "chat")
        session.ask(QUESTION, Heard())
        (tmp_path / "text").write_text("text")
        with pytest.raises(ServingError, match="holds no conversation: choose another name"):
            session.save(tmp_path / "text")
        assert (tmp_path / "text").read_text() == "text"

    def test_a_preset_is_changed_by_reading_again(self, session):
        session.ask(QUESTION, Heard())
        with pytest.raises(OptionError, match="Did you mean 'max'"):
            session.use_preset("mx")
        session.use_preset("quant")
        answer = session.ask("Go on.", Heard())
        assert answer.known_tokens == 0
        assert session.report().preset == "quant"
        assert session.report().seen_tokens > len(QUESTION)

    def test_a_text_is_read_once(self, session):
        assert session.read("x " * 600, Heard())
        kept = session.report().kept_tokens
        assert kept < 800 < session.report().seen_tokens
        answer = session.ask("What was it?", Heard())
        assert answer.known_tokens > 1200

    def test_a_text_that_was_not_read_to_its_end_is_forgotten(self, session):
        assert not session.read("x " * 600, Heard(most_reads=1))
        assert (session.messages, session.report().seen_tokens) == ([], 0)

    def test_too_long(self, session):
        with pytest.raises(LengthError, match=r"would have 4,\d\d\d tokens, and tiny was made for 4,096"):
            session.ask("x" * 4096, Heard())
        assert session.messages == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    ascii_tiny().model.save_pretrained(path)
    ascii_tiny().tokenizer.save_pretrained(path)
    return path


def test_through_pipes(folder, tmp_path):
    """Messages and commands in, answers out; what goes wrong is said beside, and shows in the exit code."""
    chat = tmp_path / "chat"
    lines = ["Hello", "", f"/save {chat}", "Again", "/nothing", "/save", "/reset", f"/load {chat}", "Again"]
    lines += ["/preset max", "//x", "/report", "/quit", "not reached"]
    outcome = CliRunner().invoke(app, ["chat", str(folder), "--answer-tokens", "8"], input="\n".join(lines))
    answers = outcome.stdout.splitlines()[:4]
    assert [len(answer) for answer in answers] == [8, 8, 8, 8]
    assert answers[1] == answers[2] != answers[3]
    assert "preset max" in outcome.stdout
    shown = outcome.stderr
    for text in (
        "[preset balanced, 29 tokens seen",
        "error: there is no command /nothing. Allowed: help, load",
        "error: /save needs more: /save FILE",
        "loaded, questions so far: 1",
    ):
        assert text in shown
    assert outcome.exit_code == 1


def test_a_wrong_model_or_preset_is_one_line(tmp_path):
    for arguments, message in (
        (["chat", "--preset", "balnced"], "Did you mean 'balanced'?"),
        (["chat", str(tmp_path / "no.gguf")], "there is no such file"),
        (["chat", str(tmp_path)], "cannot load the model"),
    ):
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == 2
        assert message in outcome.stderr.splitlines()[-1]


def test_an_interrupt_stops_an_answer_and_not_the_chat(session, capsys, monkeypatch):
    """A second one does not wait for the end of a forward."""
    loop = ChatLoop(session)
    sent = []
    write = AnswerText.add

    def add(text, token):
        sent.append(token)
        for _ in range({5: 1, 8: 2}.get(len(sent), 0)):
            os.kill(os.getpid(), signal.SIGINT)
        return write(text, token)

    monkeypatch.setattr(AnswerText, "add", add)
    before = signal.getsignal(signal.SIGINT)
    loop.take(QUESTION)
    assert len(sent) == 5
    assert len(session.messages[-1]["content"]) == 5
    loop.take("And now?")
    assert len(session.messages) == 2
    monkeypatch.undo()
    loop.take("And now?")
    assert len(session.messages[-1]["content"]) == 12
    shown = capsys.readouterr()
    assert "stopped" in shown.err
    assert "error: interrupted" in shown.err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_does_not_control_the_terminal(session, capsys, monkeypatch):
    monkeypatch.setattr(AnswerText, "add", lambda _self, _token: "\x1b[2J\ttab\n")
    ChatLoop(session).take("Hello")
    assert capsys.readouterr().out.startswith("\\x1b[2J\ttab\n")
