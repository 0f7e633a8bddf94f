"""Tasks of lm-evaluation-harness that need no network: RULER, hidden codes, and the continuation of texts.

pip install "lm-eval[ruler]"                           # or: nox -s lm_eval
python benchmarks/lm_eval_tasks.py                     # SmolLM2-135M-Instruct
python benchmarks/lm_eval_tasks.py --model gemma3      # Gemma 3 270M, a base model

Every prompt is given to lm-eval's own model ``hf``, whose cache is the plain one, and to ``nexusquant`` with each
preset.

- RULER's tasks are lm-eval's, as they are: six of thirteen make their texts themselves.  Two read a needle in repeated
  sentences (``niah_single_1``) or among needles like it (``niah_multikey_2``, ``niah_multikey_3``), one follows
  variables (``ruler_vt``), two count words (``ruler_cwe``, ``ruler_fwe``).  A score is the part of what is asked for
  that is in the answer.
- ``choose_code`` and ``say_code`` are those of `examples/lm_eval_codes.py`, of longer texts.
- ``continue_text``: the log-likelihood of the next words of a text, behind a context that is compressed.

A task of which ``hf`` gets less than a quarter on its first prompts is left at those: what the model does not do with
all keys and values tells nothing about caches.

Writes ``benchmarks/results/lm_eval_MODEL.json``; every prompt is written as soon as it is answered.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import random
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # before anything reads them

import numpy as np
import torch
from _common import MODELS, RESULTS, ROOT, load_measured, preset_argument, shown_steps

from nexusquant_cache.evaluation import python_topics
from nexusquant_cache.evaluation.presets import nexusquant_candidate
from nexusquant_cache.evaluation.results import Results, environment, fingerprint, model_id
from nexusquant_cache.evaluation.steps import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from nexusquant_cache.evaluation import LoadedModel
    from nexusquant_cache.evaluation.steps import Report

PLAIN = "hf"
RULER = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
CONTINUE = "continue_text"
METRICS = {"choose_code": "acc", "say_code": "exact_match", CONTINUE: "perplexity"}
"""What lm-eval calls the score of a prompt, by task; RULER calls it by the length of its prompts.

A prompt's ``perplexity`` is its log-likelihood: how prompts are put together decides what the name means.
"""
TASKS = (*RULER, *METRICS)

PROBE = 4
"""First prompts of a task, by which it is judged whether the model can do it."""
ENOUGH = 0.25
"""Least mean score of those for a task to go on."""

_SPARE = 100  # tokens of a prompt that are none of its text
_NEXT = 300  # characters of a continuation
_ANSWER = 200  # characters of an answer in the file
_CONTINUATION = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{next}}}}"
metric_list: [{{metric: perplexity, aggregation: mean, higher_is_better: true}}]
"""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what lm-eval prints: bars for each prompt, lengths, the failed download of what is not needed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def write_continuations(folder: Path, count: int, characters: int) -> None:
    """Write texts with what follows, and the task that has it predicted."""
    words = " ".join(python_topics().split())
    rows = []
    for number in range(count):
        text = words[number * (characters + _NEXT) :][: characters + _NEXT]
        place = text.rindex(" ", 0, characters)
        rows.append({"text": text[:place], "next": text[place + 1 :]})
    data = folder / f"{CONTINUE}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    content = _CONTINUATION.format(name=CONTINUE, data=data)
    (folder / f"{CONTINUE}.yaml").write_text(content, encoding="utf-8")


def load_tasks(loaded: LoadedModel, names: Sequence[str], samples: int, length: int, folder: Path) -> dict[str, Any]:
    """Return tasks of lm-eval by name, the same prompts in every process.

    Args:
        loaded: The model, whose tokenizer tells how long texts are.
        names: Of `TASKS`.
        samples: Texts of our own tasks; RULER always makes five hundred.
        length: Tokens of a prompt.
        folder: Where files of tasks are written, and the tokenizer, which RULER loads from a folder.
    """
    from lm_eval.tasks import TaskManager  # noqa: PLC0415 - an optional package

    sys.path.append(str(ROOT / "examples"))
    codes = importlib.import_module("lm_eval_codes")
    loaded.tokenizer.save_pretrained(folder)
    text = python_topics()
    characters = int((length - _SPARE) * len(text) / len(loaded.tokenizer(text).input_ids))
    codes.write_tasks(folder, samples, characters)
    write_continuations(folder, samples, characters)
    manager = TaskManager(include_path=str(folder), metadata={"max_seq_lengths": [length], "tokenizer": str(folder)})
    found = {}
    for name in names:
        random.seed(0)  # RULER draws from both
        np.random.seed(0)  # noqa: NPY002
        with _quiet():
            found.update(manager.load([name])["tasks"])
    return found


def models(loaded: LoadedModel, presets: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Return what makes a model of lm-eval for each cache."""
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415 - an optional package

    from nexusquant_cache.evaluation.lm_eval import NexusQuantLM  # noqa: PLC0415 - imports lm-eval

    options: dict[str, Any] = {
        "pretrained": loaded.model,
        "tokenizer": loaded.tokenizer,
        "batch_size": 1,
        "softmax_dtype": "float32",  # hf's own would be the model's, too coarse for sums
    }
    ours = {name: lambda name=name: NexusQuantLM(preset=name, **options) for name in presets}
    return {PLAIN: lambda: HFLM(**options), **ours}


def ask(model: Any, task: Any, index: int, metric: str) -> dict[str, Any]:
    """Return the score of one prompt, with what the cache held of it.

    Args:
        model: A model of lm-eval.
        task: A task of lm-eval.
        index: Which of the task's prompts.
        metric: What lm-eval calls the score.
    """
    from lm_eval import evaluate  # noqa: PLC0415 - an optional package

    name = task.config.task
    started = time.perf_counter()
    with _quiet():
        found = evaluate(model, {name: task}, samples={name: [index]}, bootstrap_iters=0)
    (sample,) = found["samples"][name]
    context, wanted = sample["arguments"][0]
    row = {"score": float(sample[metric]), "prompt_tokens": len(model.tok_encode(context))}
    if task.OUTPUT_TYPE == "generate_until":
        row["answer"] = sample["resps"][0][0][:_ANSWER]
    elif task.OUTPUT_TYPE == "loglikelihood":
        row["scored_tokens"] = len(model.tok_encode(context + wanted)) - row["prompt_tokens"]
    held = model.get_model_info().get("nexusquant", {})
    return {**row, **held, "seconds": time.perf_counter() - started}


class Work:
    """Asks for the prompts that are missing.

    Args:
        loaded: The model.
        tasks: Tasks of lm-eval by name.
        makers: What makes a model of lm-eval for each cache; the plain one stands first.
        given: The command line.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        tasks: Mapping[str, Any],
        makers: Mapping[str, Callable[[], Any]],
        given: argparse.Namespace,
    ) -> None:
        """Take over the rows of an earlier run."""
        self._tasks = tasks
        self._samples = given.samples
        self._length = given.length
        self._makers = makers
        config = loaded.model.config
        settings = {name: {} if name == PLAIN else nexusquant_candidate(name, name, config).settings for name in makers}
        model = model_id(loaded)
        wanted = {
            _row_task(name, index): {
                cache: fingerprint(model, dict(task.eval_docs[index]), settings[cache]) for cache in makers
            }
            for name, task in tasks.items()
            for index in range(given.samples)
        }
        told = {"model": model["name"], "dtype": model["dtype"], "checksum": model["checksum"], **_settings(given)}
        head = {"environment": environment(), "settings": told, "caches": settings}
        self.results = Results(given.output, head, {"quality": wanted, "needles": {}}, fresh=given.fresh)

    def run(self, report: Report) -> None:
        """Ask, the plain cache first."""
        started = time.monotonic()
        for done, (name, cache, index) in enumerate(self._missing()):
            left = sum(1 for _ in self._missing())
            seconds = (time.monotonic() - started) * left / done if done else None
            report(Step("asking", done, done + left, f"{name} {index + 1}: {cache}", seconds))
            metric = METRICS.get(name, str(self._length))
            with _quiet():
                model = self._makers[cache]()
            row = ask(model, self._tasks[name], index, metric)
            self.results.add("quality", _row_task(name, index), cache, {"name": name, "index": index, **row})
        self.results.write()

    def _missing(self) -> Iterator[tuple[str, str, int]]:
        for name in self._tasks:
            for cache in self._makers:
                for index in range(self._samples):
                    if (cache != PLAIN or index >= PROBE) and self._is_beyond(name):
                        continue
                    if cache in self.results.missing("quality", _row_task(name, index)):
                        yield name, cache, index

    def _is_beyond(self, name: str) -> bool:
        """Tell whether a task is beyond the model, by its first prompts."""
        if name == CONTINUE:
            return False
        rows = [row for row in self.results.content["quality"] if row["name"] == name and row["cache"] == PLAIN]
        scores = [row["score"] for row in rows if row["index"] < PROBE]
        return len(scores) == PROBE and mean(scores) < ENOUGH


def _row_task(name: str, index: int) -> str:
    return f"{name} {index + 1}"


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    return {"tasks": given.task, "samples": given.samples, "length": given.length, "lm_eval": version("lm-eval")}


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="%(default)s")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS, help="only these; all by default")
    parser.add_argument(
        "--preset", nargs="+", type=preset_argument, default=["quant", "balanced", "max"], help="presets"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the model (%(default)s)"
    )
    parser.add_argument("--samples", type=int, default=6, help="prompts of each task (%(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--output", type=Path, help="result file; results/lm_eval_MODEL.json by default")
    given = parser.parse_args()
    given.output = given.output or RESULTS / f"lm_eval_{given.model}.json"
    return given


def main() -> None:
    """Ask for what is missing and write the result file."""
    given = arguments()
    loaded = load_measured(given.model)
    loaded.model.to(getattr(torch, given.dtype))
    with tempfile.TemporaryDirectory() as folder, shown_steps() as report:
        report(Step("making prompts"))
        tasks = load_tasks(loaded, given.task, given.samples, given.length, Path(folder))
        Work(loaded, tasks, models(loaded, given.preset), given).run(report)


if __name__ == "__main__":
    main()
