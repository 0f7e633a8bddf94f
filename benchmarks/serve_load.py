"""The server under load: clients that converse at the same time, some of which hang up.

python benchmarks/serve_load.py

Starts ``nexusquant-cache serve`` as a process, on SmolLM2-135M-Instruct unless ``--model`` names another.  Each client
has its conversation, whose first message holds a text; it asks turn after turn, and comes again when the server is
busy.  Every fourth answer is left after its first words.  When a client is through, it says the first turn of another
conversation, so that more caches are made than may be kept.

What is written: answers by how they ended, seconds to the first text and to the end of an answer, tokens of prompts and
how many of them a cache knew, refusals, and the bytes of idle caches and of the process, at the beginning (after one
answer) and in the end.  Seconds are those that a client waits, so they hold the answers of others before it.
Writes ``benchmarks/results/serve_load.json``.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import urlopen

import openai
from _common import RESULTS, read_texts, shown_steps

from nexusquant_cache.evaluation.results import environment, write_json
from nexusquant_cache.evaluation.steps import Report, Step

PATIENCE = 600  # seconds
LEAVES = 4  # every fourth answer
QUESTIONS = (
    "What is this about?",
    "Say it in other words.",
    "And what follows from that?",
    "Thank you. Anything else?",
)


@dataclass
class Log:
    """What clients have seen."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    asked: int = 0
    answers: int = 0
    left: int = 0
    busy: int = 0
    prompt_tokens: int = 0
    known_tokens: int = 0
    first_text: list[float] = field(default_factory=list)
    whole_answer: list[float] = field(default_factory=list)


@dataclass
class Load:
    """One run.

    Attributes:
        url: Where the server is.
        model: What it calls its model.
        words: The text, word by word.
        given: The options.
        log: What clients see.
    """

    url: str
    model: str
    words: list[str]
    given: argparse.Namespace
    log: Log = field(default_factory=Log)

    def converse(self, number: int, turns: int) -> None:
        """Have one conversation."""
        start = number * self.given.words % max(len(self.words) - self.given.words, 1)
        text = " ".join(self.words[start : start + self.given.words])
        messages = [{"role": "user", "content": f"{text}\n\n{QUESTIONS[0]}"}]
        for turn in range(turns):
            answer = self.ask(messages)
            messages.append({"role": "assistant", "content": answer})
            messages.append({"role": "user", "content": QUESTIONS[(turn + 1) % len(QUESTIONS)]})

    def ask(self, messages: list[dict[str, str]]) -> str:
        """Ask until the server has time; return the answer, or what was heard of it."""
        with self.log.lock:
            self.log.asked += 1
            leaves = self.log.asked % LEAVES == 0
        start = time.perf_counter()
        while (stream := self.answered(messages)) is None:
            time.sleep(1)
        return self.hear(stream, start, leaves=leaves)

    def answered(self, messages: list[dict[str, str]]) -> Any:
        """Return an answer as a stream; None if the server is busy."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        try:
            return client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]  # plain dictionaries do
                max_tokens=self.given.answer_tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        except openai.InternalServerError:
            with self.log.lock:
                self.log.busy += 1
            return None

    def hear(self, stream: Any, start: float, *, leaves: bool) -> str:
        """Listen to an answer, or leave it."""
        text, first = "", None
        for piece in stream:
            if piece.choices and piece.choices[0].delta.content:
                text += piece.choices[0].delta.content
                first = first or time.perf_counter() - start
                if leaves:
                    stream.close()
                    with self.log.lock:
                        self.log.left += 1
                    return text
            if piece.usage is not None:
                with self.log.lock:
                    self.log.answers += 1
                    self.log.prompt_tokens += piece.usage.prompt_tokens
                    self.log.known_tokens += piece.usage.prompt_tokens_details.cached_tokens
                    self.log.whole_answer.append(time.perf_counter() - start)
                    if first is not None:
                        self.log.first_text.append(first)
        return text


def metrics(url: str) -> dict[str, float]:
    """Return the metrics that show what is held."""
    with urlopen(f"{url}/metrics") as answer:  # noqa: S310 - a server of our own
        text = answer.read().decode()
    names = {
        "idle_bytes": "nexusquant_idle_bytes",
        "idle_conversations": "nexusquant_idle_conversations",
        "waiting_prompts": "nexusquant_waiting_prompts",
        "process_bytes": "process_resident_memory_bytes",
        "left": 'nexusquant_answers_total{ended="left"}',
    }
    found = {short: re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE) for short, name in names.items()}
    return {short: float(match[1]) for short, match in found.items() if match is not None}


def wait_for_start(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return where the server listens."""
    while (match := re.search(r"running on (http://\S+)", log.read_text())) is None:
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.1)
    return match[1]


def run(load: Load, report: Report) -> dict[str, Any]:
    """Let all clients converse; return what came of it."""
    given = load.given
    load.converse(0, 1)
    before = metrics(load.url)
    load.log = Log()
    start = time.perf_counter()
    with ThreadPoolExecutor(given.clients) as clients:
        numbers = range(1, given.clients + 1)
        running = [clients.submit(load.converse, number, given.turns) for number in numbers]
        running += [clients.submit(load.converse, number + given.clients, 1) for number in numbers]
        while not all(future.done() for future in running):
            report(Step("asking", load.log.answers + load.log.left, given.clients * (given.turns + 1)))
            time.sleep(0.5)
        for future in running:
            future.result()
    seconds = time.perf_counter() - start
    deadline = time.monotonic() + PATIENCE
    while (after := metrics(load.url)).get("left", 0) < load.log.left or after["waiting_prompts"]:
        if time.monotonic() > deadline:
            raise SystemExit("answers that were left did not end")
        time.sleep(0.1)
    log = load.log
    return {
        "answers": log.answers,
        "left": log.left,
        "busy": log.busy,
        "prompt_tokens": log.prompt_tokens,
        "known_tokens": log.known_tokens,
        "seconds": seconds,
        "first_text": {"median": median(log.first_text), "most": max(log.first_text)},
        "whole_answer": {"median": median(log.whole_answer), "most": max(log.whole_answer)},
        "before": before,
        "after": after,
    }


def main() -> None:
    """Measure and write ``results/serve_load.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a GGUF file; SmolLM2-135M-Instruct by default")
    parser.add_argument("--preset", default="balanced", help="how far to compress (%(default)s)")
    parser.add_argument("--clients", type=int, default=3, help="clients at the same time (%(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="turns of a conversation (%(default)s)")
    parser.add_argument("--words", type=int, default=300, help="words of a text (%(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=8, help="longest answer (%(default)s)")
    parser.add_argument("--waiting", type=int, default=2, help="requests that may wait (%(default)s)")
    parser.add_argument("--idle-bytes", type=int, default=25_000_000, help="for idle caches (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_load.json", help="result file")
    given = parser.parse_args()
    words = next(iter(read_texts([]).values())).split()
    command = [sys.executable, "-c", "from nexusquant_cache.cli import main; main()", "serve"]
    options = [f"--preset={given.preset}", f"--waiting={given.waiting}", f"--idle-bytes={given.idle_bytes}"]
    command += [*([given.model] if given.model else []), "--name=model", "--port=0", *options]
    with tempfile.TemporaryDirectory() as folder, shown_steps() as report:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file)  # noqa: S603 - our own
        try:
            report(Step("starting the server"))
            result = run(Load(wait_for_start(process, log), "model", words, given), report)
        finally:
            process.terminate()
            process.wait(PATIENCE)
    names = ("preset", "clients", "turns", "words", "answer_tokens", "waiting", "idle_bytes")
    settings = {name: getattr(given, name) for name in names}
    settings["model"] = Path(given.model).name if given.model else "SmolLM2-135M-Instruct"
    write_json(given.output, {"environment": environment(), "settings": settings, "result": result})
    for name, value in result.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
