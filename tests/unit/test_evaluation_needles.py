import re

import pytest
import torch
from transformers import DynamicCache
from unit.evaluation_tiny import PROSE, KeepAll, build_tokenizer, tiny

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.evaluation import KINDS, Candidate, EvaluationError
from nexusquant_cache.evaluation.caches import prefill
from nexusquant_cache.evaluation.kinds import Needle
from nexusquant_cache.evaluation.needle import ask, make_needle, needle_grid, prefill_needle
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.releases import CACHE

SECRET = Needle("single", "Find it.", ("The code is 123456.",), "What is the code?", ("123456",))
RIVALRY = Needle("multikey", "", (), "", ("123456",), rivals=("654321", "111111"))
PAIR = Needle("two_part", "", (), "", ("123456", "654321"))


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.fixture(scope="module")
def window(loaded):
    return token_windows(loaded.tokenizer, PROSE, length=1200, count=1)[0]


def text_of(loaded, ids):
    return loaded.tokenizer.decode(ids[0])


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_needles_differ_by_seed_and_repeat(self, kind):
        needles = [Needle.draw(kind, seed) for seed in range(50)]
        assert needles == [Needle.draw(kind, seed) for seed in range(50)]
        assert len({needle.expected for needle in needles}) == 50
        assert len({needle.question for needle in needles}) > 15
        numbers = [number for needle in needles for number in (*needle.expected, *needle.rivals)]
        assert all(re.fullmatch("[1-9][0-9]{5}", number) for number in numbers)

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_expected_is_hidden_and_not_in_the_question(self, kind):
        needle = Needle.draw(kind, 3)
        hidden = " ".join(needle.sentences)
        assert needle.kind == kind
        for number in (*needle.expected, *needle.rivals):
            assert hidden.count(number) == 1
            assert number not in needle.request + needle.question

    def test_a_single_fact_is_asked_for_in_its_own_words(self):
        needle = Needle.draw("single", 0)
        place = re.fullmatch(r"What is the access code of (.*)\?", needle.question)[1]
        assert needle.sentences == (f"The access code of {place} is {needle.expected[0]}.",)

    def test_of_several_keys_the_first_is_asked_for(self):
        needle = Needle.draw("multikey", 0)
        place = re.fullmatch(r"What is the access code of (.*)\?", needle.question)[1]
        assert needle.sentences[0] == f"The access code of {place} is {needle.expected[0]}."
        assert len(set(needle.sentences)) == 3
        assert all(place not in other for other in needle.sentences[1:])
        assert [number in text for number, text in zip(needle.rivals, needle.sentences[1:], strict=True)] == [True] * 2

    def test_both_parts_are_expected(self):
        needle = Needle.draw("two_part", 0)
        place = re.fullmatch(r"What are the access codes of (.*)\?", needle.question)[1]
        assert needle.sentences == (f"The access codes of {place} are {' and '.join(needle.expected)}.",)
        assert len(needle.expected) == 2

    def test_a_paraphrase_shares_only_names_with_the_fact(self):
        common = {"the", "of", "is", "in", "at", "on", "near", "where", "a"}
        for seed in range(200):
            needle = Needle.draw("paraphrase", seed)
            fact, question = (set(re.findall(r"\w+", text)) for text in (needle.sentences[0], needle.question))
            shared = {word for word in fact & question if word.lower() not in common}
            assert all(word[0].isupper() for word in shared), (needle.sentences, needle.question)

    def test_only_a_later_question_comes_later(self):
        assert [kind for kind in KINDS if Needle.draw(kind, 0).comes_later] == ["later"]

    def test_an_unknown_kind_names_the_nearest(self):
        with pytest.raises(EvaluationError, match="Did you mean 'multikey'"):
            Needle.draw("multi_key", 0)

    @pytest.mark.parametrize("answer", ["It is 123456.", "123 456", "123,456!", "1 2 3 4 5 6"])
    def test_found_in_any_grouping(self, answer):
        assert SECRET.is_found_in(answer)

    @pytest.mark.parametrize("answer", ["", "12345", "It is 123457.", "123 or 456"])
    def test_half_a_number_is_none(self, answer):
        assert not SECRET.is_found_in(answer)

    @pytest.mark.parametrize(
        ("answer", "found"),
        [("123456", True), ("654321", False), ("123456, or 654321", False), ("111 111 and 123456", False)],
    )
    def test_another_number_spoils_the_answer(self, answer, found):
        assert RIVALRY.is_found_in(answer) == found

    @pytest.mark.parametrize(
        ("answer", "found"),
        [("123456 and 654321", True), ("654321,123456", True), ("123456", False), ("654321", False)],
    )
    def test_one_part_of_two_is_not_enough(self, answer, found):
        assert PAIR.is_found_in(answer) == found


class TestTasks:
    @pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_needle_stands_between_sentences_at_its_depth(self, loaded, window, kind, depth):
        needle = Needle.draw(kind, 1)
        task = make_needle(loaded.tokenizer, window, needle, depth=depth)
        reading = text_of(loaded, task.context_ids)
        text = reading[reading.index("\n\n") + 2 :]
        starts = [text.index(sentence) for sentence in needle.sentences]
        assert starts[0] / len(text) == pytest.approx(depth, abs=0.15)
        for start, sentence in zip(starts, needle.sentences, strict=True):
            before, after = text[:start], text[start + len(sentence) :]
            assert start == 0 or before[-2:] == ". " or not after
            assert not after or after[0] == " "
        parts = len(starts)
        expected = sorted((depth + index / parts) % 1 if index else depth for index in range(parts))
        assert sorted(start / len(text) for start in starts) == pytest.approx(expected, abs=0.2)

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_prompt_has_its_length_and_ends_with_the_question(self, loaded, window, kind):
        needle = Needle.draw(kind, 1)
        task = make_needle(loaded.tokenizer, window, needle, depth=0.5)
        assert task.length == 1200
        assert task.prompt_ids.shape[1] == pytest.approx(1200, abs=4)
        assert needle.question in text_of(loaded, task.question_ids)
        assert needle.question not in text_of(loaded, task.context_ids)
        assert text_of(loaded, task.prompt_ids).startswith(f"<user>{needle.request}\n\n")
        assert text_of(loaded, task.prompt_ids).endswith(f"{needle.question}<assistant>")

    def test_a_later_question_is_a_turn_of_its_own(self, loaded, window):
        task = make_needle(loaded.tokenizer, window, Needle.draw("later", 1), depth=0.5)
        assert re.fullmatch(r"<assistant>[^<]+<user>What [^<]+\?<assistant>", text_of(loaded, task.question_ids))

    def test_the_text_goes_on_where_the_context_ends(self, loaded, window):
        task = make_needle(loaded.tokenizer, window, SECRET, depth=0.5)
        whole = text_of(loaded, window)
        assert whole[: task.text_tokens].rstrip().endswith(text_of(loaded, task.context_ids)[-20:])

    @pytest.mark.parametrize("kind", ["single", "later"])
    def test_without_a_chat_template(self, window, kind):
        tokenizer = build_tokenizer(chat_template=None)
        task = make_needle(tokenizer, window, Needle.draw(kind, 1), depth=0.5)
        assert tokenizer.decode(task.question_ids[0]) == f"\n\nQuestion: {task.needle.question}\nAnswer:"

    def test_refuses_what_cannot_be_hidden(self, loaded, window):
        with pytest.raises(EvaluationError, match="depth must be"):
            make_needle(loaded.tokenizer, window, SECRET, depth=1.5)
        with pytest.raises(EvaluationError, match="fact and question alone"):
            make_needle(loaded.tokenizer, window[:, :50], SECRET, depth=0.5)


class TestGrid:
    def grid(self, loaded, **options):
        options = {"lengths": [500, 700], "depths": [0.0, 0.5, 1.0], **options}
        return needle_grid(loaded.tokenizer, {"a": PROSE, "b": PROSE[5:]}, **options)

    def test_goes_through_lengths_depths_and_texts(self, loaded):
        tasks = self.grid(loaded)
        assert [task.depth for task in tasks] == [0.0, 0.5, 1.0] * 2
        assert [task.length for task in tasks] == [500] * 3 + [700] * 3
        assert [re.search(r": (\w),", task.name)[1] for task in tasks] == ["a", "b", "a", "b", "a", "b"]
        assert len({task.needle.expected for task in tasks}) == 6

    def test_goes_through_kinds_and_repeats(self, loaded):
        tasks = self.grid(loaded, kinds=KINDS, repeats=2)
        assert len({task.name for task in tasks}) == len(tasks) == 60
        assert {(task.needle.kind, task.name.partition(":")[0]) for task in tasks} == {(kind, kind) for kind in KINDS}
        assert len({task.needle.expected for task in tasks}) == 60

    def test_may_grow_without_changing_what_it_had(self, loaded):
        small = {task.name: task for task in self.grid(loaded)}
        large = self.grid(
            loaded, lengths=[500, 700, 600], depths=[0.0, 0.5, 1.0, 0.2], kinds=["later", "single"], repeats=2
        )
        same = [task for task in large if task.name in small]
        assert len(same) == 6
        assert all(torch.equal(task.prompt_ids, small[task.name].prompt_ids) for task in same)

    def test_another_seed_gives_other_needles_in_other_windows(self, loaded):
        for first, second in zip(self.grid(loaded), self.grid(loaded, seed=1), strict=True):
            assert first.name == second.name
            assert first.needle != second.needle
            assert not torch.equal(first.context_ids, second.context_ids)

    def test_a_short_text_is_named(self, loaded):
        with pytest.raises(EvaluationError, match="note is too short: it has 300 tokens"):
            needle_grid(loaded.tokenizer, {"note": "x" * 300}, lengths=[400], depths=[0.5])

    def test_unknown_kinds_are_refused(self, loaded):
        with pytest.raises(EvaluationError, match="unknown kind of needle 'many'"):
            self.grid(loaded, kinds=["many"])


class TestAsk:
    @pytest.mark.parametrize("kind", KINDS)
    def test_answers_are_those_of_generate(self, loaded, window, kind):
        """Filling the cache from one prefill changes nothing: the tokens are those of a plain generation."""
        task = make_needle(loaded.tokenizer, window, Needle.draw(kind, 1), depth=0.5)
        plain = prefill_needle(loaded.model, task)
        before = plain.cache.get_seq_length()
        result = ask(loaded, task, plain, PLAIN_CANDIDATE, max_new_tokens=8)
        prompt = task.prompt_ids
        output = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False
        )
        expected = loaded.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert result.answer == expected
        assert (result.kind, result.expected, result.length) == (kind, task.needle.expected, 1200)
        assert not result.found
        assert plain.cache.get_seq_length() == before

    @pytest.mark.parametrize("kind", KINDS)
    def test_found_if_the_answer_says_so(self, loaded, window, kind, monkeypatch):
        task = make_needle(loaded.tokenizer, window, Needle.draw(kind, 1), depth=0.5)
        plain = prefill_needle(loaded.model, task)
        given = {}

        def generate(*, input_ids, **options):
            given.update(options, seen=options[CACHE].get_seq_length())
            answer = loaded.tokenizer("It is " + " and ".join(task.needle.expected), return_tensors="pt").input_ids
            return torch.cat([input_ids, answer], dim=1)

        monkeypatch.setattr(loaded.model, "generate", generate, raising=False)
        assert ask(loaded, task, plain, PLAIN_CANDIDATE).found
        assert given["max_new_tokens"] == task.needle.answer_tokens

    @pytest.mark.parametrize("kind", KINDS)
    def test_compressed_before_the_end_of_the_question_is_fed(self, loaded, window, kind):
        """All but a token; a later question has not been seen at all when the cache is compressed."""
        caches = []

        def factory():
            caches.append(KeepAll())
            return caches[-1]

        task = make_needle(loaded.tokenizer, window, Needle.draw(kind, 1), depth=0.5)
        ask(loaded, task, prefill_needle(loaded.model, task), Candidate("kept", factory), max_new_tokens=2)
        context, prompt = task.context_ids.shape[1], task.prompt_ids.shape[1]
        assert caches[0].compressed_at == [context if kind == "later" else prompt - 1]
        assert caches[0].get_seq_length() == prompt + 1

    @pytest.mark.parametrize("kind", ["single", "later"])
    def test_what_is_held_is_what_was_compressed(self, loaded, window, kind):
        task = make_needle(loaded.tokenizer, window, Needle.draw(kind, 1), depth=0.5)
        plain = prefill_needle(loaded.model, task)
        short = Candidate("max", lambda: NexusQuantCache("max", config=loaded.model.config))
        result = ask(loaded, task, plain, short, max_new_tokens=4)
        assert result.footprint.seen_tokens == plain.ids.shape[1]
        assert result.footprint.kept_tokens < result.footprint.seen_tokens / 2
        assert result.compress_seconds > 0

    @pytest.mark.parametrize("kind", ["single", "later"])
    def test_the_prefill_can_go_on_from_the_context(self, loaded, window, kind):
        task = make_needle(loaded.tokenizer, window, Needle.draw(kind, 1), depth=0.5)
        context = prefill(loaded.model, task.context_ids)
        continued = prefill_needle(loaded.model, task, context=context)
        assert context.cache.get_seq_length() == task.context_ids.shape[1]
        whole = prefill_needle(loaded.model, task)
        assert torch.equal(continued.ids, whole.ids)
        expected = whole.cache.layers[1].values
        torch.testing.assert_close(continued.cache.layers[1].values, expected, rtol=1e-3, atol=1e-4)

    def test_a_plain_dynamic_cache_is_a_candidate_like_any(self, loaded, window):
        task = make_needle(loaded.tokenizer, window, SECRET, depth=0.5)
        plain = prefill_needle(loaded.model, task)
        first = ask(loaded, task, plain, PLAIN_CANDIDATE, max_new_tokens=4)
        again = ask(loaded, task, plain, Candidate("again", DynamicCache), max_new_tokens=4)
        assert first == again
