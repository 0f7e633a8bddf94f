import importlib
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from unit.evaluation_tiny import PROSE, KeepAll, build_tokenizer, tiny

from nexusquant_cache.evaluation import Candidate, EvaluationError, EvaluationOptions, evaluate, write_report
from nexusquant_cache.evaluation import fact_summaries as summed
from nexusquant_cache.evaluation.asking import (
    LATER,
    PLACES,
    PROMPT,
    FactQuestion,
    answer_log_prob,
    ask_all,
    fact_texts,
    make_fact_text,
)
from nexusquant_cache.evaluation.caches import prefill
from nexusquant_cache.evaluation.facts import CONTENT, FACTS, PASSAGES, Fact
from nexusquant_cache.evaluation.intervals import mean_interval
from nexusquant_cache.evaluation.presets import PLAIN_CANDIDATE
from nexusquant_cache.evaluation.results import read_json
from nexusquant_cache.evaluation.summary import HIDDEN, OWN, fact_kinds
from nexusquant_cache.evaluation.texts import token_windows, tokenize

WORDS = re.compile(r"\w+")
HARP = next(fact for fact in PASSAGES if fact.answer == "harp")
BROKEN = HARP.sentences[0].replace("delighted to", "delighted\n   to")
OPTIONS = EvaluationOptions(windows=1, prefix=300, continuation=4, lengths=(700,), kinds=(), facts=2, seed=1)
ASKED = 2 * 2  # each fact in two places; a window of 700 tokens has room for four


@pytest.fixture(scope="module")
def loaded():
    return tiny()


@pytest.fixture(scope="module")
def window(loaded):
    return token_windows(loaded.tokenizer, PROSE, length=2600, count=1)[0]


@pytest.fixture(scope="module")
def text(loaded, window):
    return make_fact_text(loaded.tokenizer, window, FACTS[:8], wordings=2)


def words_of(text):
    return [word.casefold() for word in WORDS.findall(text)]


def string_of(loaded, ids):
    return loaded.tokenizer.decode(ids[0])


class TestFacts:
    def test_there_are_enough_of_every_kind(self):
        kinds = [fact.kind for fact in FACTS]
        assert len(FACTS) >= 40
        assert {kinds.count(kind) for kind in kinds} == {len(FACTS) // 8}
        assert kinds[:8] == kinds[8:16]
        assert {fact.kind for fact in PASSAGES} == {CONTENT}

    def test_the_answer_is_in_the_sentences_and_nowhere_else(self):
        for fact in (*FACTS, *PASSAGES):
            said, asked = (words_of(" ".join(texts)) for texts in (fact.sentences, (*fact.questions, fact.lead)))
            counted = [part for part, counts in fact.parts if counts]
            assert all(set(words_of(part)) <= set(said) for part in counted), fact
            assert not any(set(words_of(part)) <= set(asked) for part in counted), fact
            assert fact.is_found_in(f"It is {fact.answer}.")
            assert not any(fact.is_found_in(part) for part in counted[1:])

    def test_words_in_brackets_do_not_count(self):
        fact = Fact("several", (), (), "", "an owl [and his sister a] sleigh")
        assert fact.parts == (("an owl", True), ("and his sister a", False), ("sleigh", True))

    def test_questions_have_two_wordings_and_answers_differ(self):
        every = (*FACTS, *PASSAGES)
        assert {len(set(fact.questions)) for fact in every} == {2}
        assert len({fact.answer for fact in every}) == len(every)
        assert len({question for fact in every for question in fact.questions}) == 2 * len(every)

    def test_several_parts_are_needed_where_several_are_hidden(self):
        assert {len(fact.sentences) for fact in FACTS if fact.kind == "several"} == {2}
        assert {len(fact.sentences) for fact in FACTS if fact.kind != "several"} == {1}

    def test_nothing_can_be_hidden_within_a_passage(self):
        assert not [fact for fact in PASSAGES if re.search(r"[.!?][\"”)]?\s", fact.sentences[0])]

    @pytest.mark.parametrize(
        ("said", "found"),
        [("An OWL, and a  sleigh!", True), ("A sleigh.", False), ("Owls and a sleigh", False), ("", False)],
    )
    def test_found_are_whole_words_in_any_case(self, said, found):
        assert Fact("several", (), (), "", "owl [and a] sleigh").is_found_in(said) == found


class TestTexts:
    def test_facts_are_spread_over_the_text_between_sentences(self, loaded, text):
        reading = string_of(loaded, text.context_ids)
        reading = reading[reading.index("\n\n") + 2 :]
        starts = {sentence: reading.index(sentence) for fact in FACTS[:8] for sentence in fact.sentences}
        firsts = sorted(starts[fact.sentences[0]] / len(reading) for fact in FACTS[:8])
        assert firsts == pytest.approx([(index + 0.5) / 8 for index in range(8)], abs=0.04)
        first, second = (starts[sentence] / len(reading) for sentence in FACTS[7].sentences)
        assert abs(first - second) == pytest.approx(0.5, abs=0.04)
        for sentence, start in starts.items():
            assert reading.count(sentence) == 1
            assert start == 0 or reading[start - 2 : start] == ". "

    def test_the_other_context_is_the_same_without_them(self, loaded, text):
        full, without = (string_of(loaded, ids) for ids in (text.context_ids, text.without_ids))
        for fact in FACTS[:8]:
            for sentence in fact.sentences:
                full = full.replace(f"{sentence} ", "").replace(f" {sentence}", "")
        assert full == without

    def test_every_question_is_asked_in_both_places(self, loaded, text):
        asked = [(question.fact, question.place) for question in text.questions]
        assert asked == [(fact, place) for place in (LATER, PROMPT) for fact in FACTS[:8] for _ in range(2)]
        assert len({question.name for question in text.questions}) == 8 * 2 * 2
        for question in text.questions:
            wanted = question.fact.questions[int(question.name.split("wording ")[1][0]) - 1]
            later = question.place == LATER
            turn = f"<assistant>I have read the text.<user>{wanted}" if later else f"\n\nQuestion: {wanted}"
            assert string_of(loaded, question.question_ids) == f"{turn}<assistant>"
            assert question.read_ids.shape[1] == (0 if later else question.question_ids.shape[1] - 1)
            assert string_of(loaded, question.lead_ids) == question.fact.lead
            parts = question.fact.parts
            assert string_of(loaded, question.answer_ids) == "".join(f" {part}" for part, _ in parts)
            assert question.scored.sum() == sum(len(part) + 1 for part, counts in parts if counts)

    def test_prompts_have_their_length(self, text):
        lengths = [text.context_ids.shape[1] + question.question_ids.shape[1] for question in text.questions]
        assert 2500 < min(lengths) <= max(lengths) <= 2604

    def test_without_a_chat_template_the_lead_goes_on_after_a_space(self, window):
        tokenizer = build_tokenizer(chat_template=None)
        question = make_fact_text(tokenizer, window, FACTS[:1]).questions[0]
        assert tokenizer.decode(question.question_ids[0]).endswith("\nAnswer:")
        assert tokenizer.decode(question.lead_ids[0]) == f" {FACTS[0].lead}"

    def test_a_passage_of_the_text_is_asked_about(self, loaded):
        prose = f"{PROSE[:6000]} {BROKEN} {PROSE[6000:]}"
        (text,) = fact_texts(loaded.tokenizer, {"novel": prose}, lengths=[2500], count=2)
        full, without = (string_of(loaded, ids) for ids in (text.context_ids, text.without_ids))
        assert BROKEN in full
        assert "harp" not in without
        assert [question.place for question in text.questions if question.fact == HARP] == [LATER, PROMPT]

    def test_a_passage_that_is_not_there_is_not_asked_about(self, text):
        assert CONTENT not in {question.fact.kind for question in text.questions}

    def test_facts_go_through_texts_and_lengths(self, loaded):
        texts = fact_texts(loaded.tokenizer, {"a": PROSE, "b": PROSE[5:]}, lengths=[1400, 2800], count=10, repeats=2)
        names = [text.name.partition(", facts")[0] for text in texts]
        assert sorted(names) == [f"{text}, {length} tokens" for text in "ab" for length in (1400, 1400, 2800)]
        hidden = [question.fact for text in texts for question in text.questions]
        assert all(hidden.count(fact) == 2 * 2 * len(PLACES) for fact in FACTS[:10])

    def test_a_grid_may_grow_without_changing_what_it_had(self, loaded):
        small, large = (
            fact_texts(loaded.tokenizer, {"a": PROSE}, lengths=[1400], count=count, wordings=wordings)
            for count, wordings in ((8, 1), (12, 2))
        )
        assert torch.equal(small[0].context_ids, large[0].context_ids)
        assert {question.name for question in small[0].questions} < {question.name for question in large[0].questions}

    def test_what_does_not_fit_is_refused(self, loaded, window):
        with pytest.raises(EvaluationError, match="facts and question alone take"):
            make_fact_text(loaded.tokenizer, window[:, :300], FACTS[:8])
        with pytest.raises(EvaluationError, match="note is too short: it has 300 tokens"):
            fact_texts(loaded.tokenizer, {"note": "x" * 300}, lengths=[1000], count=1)
        with pytest.raises(EvaluationError, match=f"facts must be from 0 to {len(FACTS)}, got 1000"):
            EvaluationOptions(facts=1000)
        with pytest.raises(EvaluationError, match="wordings must be from 1 to 2, got 3"):
            EvaluationOptions(wordings=3)


def repeat(input_ids, **_options):
    """After each token it is as likely to say the same again as to say anything else."""
    logits = torch.zeros(1, input_ids.shape[1], 257)
    return SimpleNamespace(logits=logits.scatter(2, input_ids[..., None], math.log(256)))


class TestScores:
    def test_by_hand(self, loaded, monkeypatch):
        """Half for a repeated letter, a 512th for any other; neither the lead nor the last letter counts here."""
        question = FactQuestion(
            name="",
            fact=FACTS[0],
            place=LATER,
            length=0,
            question_ids=tokenize(loaded.tokenizer, "aaaa"),
            lead_ids=tokenize(loaded.tokenizer, "bbbb"),
            answer_ids=tokenize(loaded.tokenizer, "bbcd"),
            scored=torch.tensor([True, True, True, False]),
        )
        monkeypatch.setattr(loaded.model, "forward", repeat)
        expected = (2 * math.log(1 / 2) + math.log(1 / 512)) / 3
        assert answer_log_prob(loaded, question, DynamicCache()) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("place", PLACES)
    def test_as_in_one_forward_over_everything(self, loaded, text, place):
        context = prefill(loaded.model, text.context_ids)
        questions = [question for question in text.questions if question.place == place][:2]
        answers = ask_all(loaded, context, PLAIN_CANDIDATE, questions)
        for question, answer in zip(questions, answers, strict=True):
            parts = (text.context_ids, question.question_ids, question.lead_ids, question.answer_ids)
            ids = torch.cat(parts, dim=1)
            count = question.answer_ids.shape[1]
            with torch.no_grad():
                logits = loaded.model(input_ids=ids[:, :-1], logits_to_keep=count).logits[0]
            targets = torch.where(question.scored, ids[0, -count:], -100)
            expected = -torch.nn.functional.cross_entropy(logits, targets)
            assert answer.log_prob == pytest.approx(float(expected), rel=1e-3)
            assert (answer.kind, answer.place, answer.expected) == (question.fact.kind, place, question.fact.answer)
        assert context.cache.get_seq_length() == text.context_ids.shape[1]

    def test_greedy_words_are_those_of_generate_after_the_lead(self, loaded, text, monkeypatch):
        context = prefill(loaded.model, text.context_ids)
        question = text.questions[0]
        prompt = torch.cat([text.context_ids, question.question_ids, question.lead_ids], dim=1)
        longest = question.answer_ids.shape[1] + 4
        output = loaded.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=longest, do_sample=False
        )
        (answer,) = ask_all(loaded, context, PLAIN_CANDIDATE, [question])
        assert answer.answer == loaded.tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert not answer.found

        def generate(*, input_ids, **_options):
            return torch.cat([input_ids, tokenize(loaded.tokenizer, " old Pear tree.")], dim=1)

        monkeypatch.setattr(loaded.model, "generate", generate, raising=False)
        (answer,) = ask_all(loaded, context, PLAIN_CANDIDATE, [question])
        assert (answer.answer, answer.found) == ("old Pear tree.", True)

    def test_a_text_is_compressed_once_for_all_later_questions(self, loaded, text):
        made = []

        def factory():
            made.append(KeepAll())
            return made[-1]

        context = prefill(loaded.model, text.context_ids)
        list(ask_all(loaded, context, Candidate("kept", factory), text.questions[14:18]))
        length = text.context_ids.shape[1]
        asked = [length + question.read_ids.shape[1] for question in text.questions[16:18]]
        assert [cache.compressed_at for cache in made] == [[length], *([tokens] for tokens in asked)]
        assert made[0].get_seq_length() == length


def answered(task, cache, log_prob, *, expected=None, kind="place", place=PROMPT, found=False):
    return {
        "task": task,
        "cache": cache,
        "kind": kind,
        "place": place,
        "expected": expected or task,
        "log_prob": log_prob,
        "found": found,
    }


MEASURED = {
    "caches": {"x": {}},
    "facts": [
        *(answered(task, "plain", -1.0, found=True) for task in "abc"),
        answered("a", "x", -2.4, found=True),
        answered("b", "x", -2.6),
        answered("c", "x", -1.0),
        *(answered(task, "absent", -9.0) for task in "abc"),
        *(answered("d", cache, -1.0, kind=CONTENT, place=LATER) for cache in ("plain", "x")),
        answered("not yet asked through plain", "x", -1.0),
    ],
}


class TestSummaries:
    def test_lost_is_more_than_one_and_a_half_nats_below_plain(self):
        groups = summed(MEASURED)
        assert list(groups) == ["plain", "absent", "x"]
        lost = {name: group[HIDDEN, PROMPT].lost for name, group in groups.items()}
        assert lost == {"plain": 0, "absent": 3, "x": 1}
        ours = groups["x"][HIDDEN, PROMPT]
        assert (ours.asked, ours.found, ours.log_prob) == (3, 1, pytest.approx(-2.0))
        assert ours.against_plain == mean_interval([-2.4 + 1, -2.6 + 1, 0.0])

    def test_what_the_text_says_itself_is_apart(self):
        groups = summed(MEASURED)
        assert set(groups["x"]) == {(HIDDEN, PROMPT), (OWN, LATER)}
        assert set(groups["absent"]) == {(HIDDEN, PROMPT)}
        assert groups["x"][OWN, LATER].against_plain.mean == 0

    def test_wordings_of_one_fact_are_one_sample(self):
        rows = [
            answered(f"{fact} {wording}", cache, log_prob * wording, expected=fact)
            for fact, log_prob in (("a", -1.0), ("b", -2.0))
            for wording in (1, 2)
            for cache, log_prob in (("plain", 0.0), ("x", log_prob))
        ]
        ours = summed({"caches": {"x": {}}, "facts": rows})["x"][HIDDEN, PROMPT]
        assert ours.against_plain == mean_interval([-1.5, -3.0])
        assert (ours.asked, ours.lost) == (4, 3)

    def test_by_kind(self):
        assert {kind: fact.lost for kind, fact in fact_kinds(MEASURED, PROMPT)["x"].items()} == {"place": 1}
        assert set(fact_kinds(MEASURED, LATER)["x"]) == {CONTENT}

    def test_the_tables_of_the_documents(self, monkeypatch):
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        tables = importlib.import_module("tables")
        where, kinds = (make({**MEASURED, "quality": []}) for make in (tables.facts_table, tables.fact_kinds_table))
        assert where.startswith(
            "| cache | factor | dPPL, % | KL, nats | hidden facts, in the prompt | the text's own, "
        )
        assert "| plain, facts absent |  |  |  | -8.00 (-8.00 to -8.00); 3 lost, 0 found of 3 |  |\n" in where
        assert "-1.00 (-3.17 to +1.17); 1 lost, 1 found of 3 | +0.00; 0 lost, 0 found of 1 |\n" in where
        assert "| `x` | 0 of 1 |\n" in kinds

    def test_the_report(self, tmp_path, monkeypatch):
        monkeypatch.setattr("nexusquant_cache.evaluation.plots.pictures", lambda *_: [])
        held = {"seen_tokens": 10, "kept_tokens": 5, "held_bytes": 10, "dense_bytes": 40}
        row = {"text": "t", "nll": 1.0, "plain_nll": 0.9, "kl": 0.1, "top1": 1.0, "footprint": held}
        settings = {"model": "m", "prefix": 10, "lengths": [], "depths": []}
        quality = [{"task": "t", "cache": cache, **row} for cache in ("plain", "x")]
        content = {**MEASURED, "settings": settings, "environment": {}, "quality": quality, "needles": []}
        page = write_report(content, tmp_path).read_text(encoding="utf-8")
        assert "<th>hidden facts, prompt</th>" in page
        assert "-1.00<small>-3.17 to +1.17</small><br>of 3: 1 lost, 1 found" in page
        assert "<dt>facts</dt>" in page
        assert "<dt>facts</dt>" not in write_report({**content, "facts": []}, tmp_path).read_text(encoding="utf-8")

    def test_a_file_of_before_has_none(self):
        assert summed({"caches": {"x": {}}}) == {}


class TestEvaluate:
    def test_goes_on_after_an_interruption(self, loaded, tmp_path):
        made = []

        def factory():
            made.append(1)
            if len(made) == 4:
                raise KeyboardInterrupt
            return DynamicCache()

        candidate, output = Candidate("x", factory), tmp_path / "results.json"
        with pytest.raises(KeyboardInterrupt):
            evaluate(loaded, [candidate], {"a": PROSE}, OPTIONS, output=output)
        # predictions, the text for all later questions, and the first question at the end of the prompt
        written = read_json(output)["facts"]
        assert [row["cache"] for row in written] == ["plain"] * ASKED + ["absent"] * ASKED + ["x"] * 3
        steps = []
        content = evaluate(loaded, [candidate], {"a": PROSE}, OPTIONS, output=output, report=steps.append)
        assert len(made) == 4 + 1
        assert steps[-1].total == 1
        assert content["facts"][: len(written)] == written
        assert {(row["task"], row["cache"]) for row in content["facts"]} == {
            (row["task"], cache) for row in written for cache in ("plain", "absent", "x")
        }
        groups = summed(content)
        assert [groups[name][HIDDEN, place].asked for name in groups for place in PLACES] == [2] * 6
        assert groups["x"][HIDDEN, LATER].against_plain.mean == pytest.approx(0, abs=1e-4)
        assert groups["absent"][HIDDEN, LATER].against_plain.mean != pytest.approx(0, abs=1e-4)

    def test_none_are_asked_for_without_facts(self, loaded):
        assert evaluate(loaded, [], {"a": PROSE}, replace(OPTIONS, facts=0))["facts"] == []

    def test_the_name_of_what_can_be_guessed_is_taken(self, loaded):
        with pytest.raises(EvaluationError, match="'absent' are taken"):
            evaluate(loaded, [Candidate("absent", DynamicCache)], {"a": PROSE}, OPTIONS)
