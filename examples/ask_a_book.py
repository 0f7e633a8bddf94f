"""Read a book once, keep it compressed on the disk, and answer questions about it, each from a loaded copy.

python examples/ask_a_book.py                                      # Python's help topics, ten questions
python examples/ask_a_book.py --book frankenstein.txt "Who wrote the letters?" "To whom?"

The first run reads the book, which takes a while; later ones find it in the store.  The time before a question is that
to the first token of its answer.  Answers are those of a small model, SmolLM2-135M-Instruct unless another is named:
what they show is the time they take.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.generation.streamers import BaseStreamer

from nexusquant_cache import NexusQuantCache, PrefixStore
from nexusquant_cache.cli.progress import progress_bars
from nexusquant_cache.evaluation import EvaluationError, LoadedModel, load_model, python_topics, read_text
from nexusquant_cache.evaluation.steps import Report, Step
from nexusquant_cache.evaluation.texts import tokenize
from nexusquant_cache.releases import CACHE

QUESTIONS = (
    "What is an assert statement for?",
    "What does an assignment statement do?",
    "What is an assignment expression?",
    "What is a coroutine function?",
    "What is name mangling?",
    "What happens when a name that is not bound is evaluated?",
    "How are attributes of an object accessed?",
    "Which method is called when the attribute of an object is not found?",
    "What is an augmented assignment?",
    "What does the await expression do?",
)
CHUNK = 512  # tokens read at once
_PLACE = "{question}"


@dataclass
class Answer:
    """An answer, how many tokens of its prompt came from the store, and the seconds it took."""

    text: str
    known: int
    first_token: float
    seconds: float


class Stopwatch(BaseStreamer):
    """Notes when the first token comes."""

    def __init__(self) -> None:
        """Start."""
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then token after token."""
        del value
        self.times.append(time.perf_counter() - self.start)

    def end(self) -> None:
        """Take note of the end, which is that of the last token."""


def make_prompt(loaded: LoadedModel, book: str, tokens: int) -> tuple[torch.Tensor, str]:
    """Return the ids of the prompt up to the end of the book's first tokens, and the text that follows with a place."""
    tokenizer = loaded.tokenizer
    ids = tokenize(tokenizer, book)[0, :tokens]
    book = str(tokenizer.decode(ids)).strip()
    turns = [("user", f"Read this text.\n\n{book}"), ("assistant", "I have read the text."), ("user", _PLACE)]
    if tokenizer.chat_template:
        messages = [{"role": role, "content": content} for role, content in turns]
        prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    else:
        prompt = f"{book}\n\nQuestion: {_PLACE}\nAnswer:"
    end = prompt.index(book) + len(book)
    return tokenize(tokenizer, prompt[:end]), prompt[end:]


@torch.no_grad()
def read_book(loaded: LoadedModel, store: PrefixStore, ids: torch.Tensor, preset: str, report: Report) -> int:
    """See to it that the store has the book; return how many tokens had to be read."""
    model = loaded.model
    found = store.get(ids, config=model.config, preset=preset, device=model.device, leave=0)
    cache, known = found or (NexusQuantCache(preset, config=model.config, when="post_prefill"), 0)
    if known == ids.shape[1]:
        return 0
    chunks = ids[:, known:].to(model.device).split(CHUNK, dim=1)
    for done, chunk in enumerate(chunks):
        report(Step("reading the book", done, len(chunks)))
        model(input_ids=chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    store.put(cache, ids)
    return ids.shape[1] - known


def answer(loaded: LoadedModel, store: PrefixStore, ids: torch.Tensor, preset: str, new_tokens: int) -> Answer:
    """Answer a prompt that begins with the book."""
    watch = Stopwatch()
    model, tokenizer = loaded.model, loaded.tokenizer
    found = store.get(ids, config=model.config, preset=preset, device=model.device)
    cache, known = found or (NexusQuantCache(preset, config=model.config), 0)
    prompt = ids.to(model.device)
    generate: Any = model.generate
    output = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE: cache},  # cache=cache; before transformers 5.24, past_key_values=cache
        max_new_tokens=new_tokens,
        do_sample=False,
        streamer=watch,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    said = str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    return Answer(" ".join(said.split()), known, watch.times[1], watch.times[-1])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=list(QUESTIONS), help="questions about the book")
    parser.add_argument("--book", type=Path, help="a text file in UTF-8; Python's help topics by default")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of the book to read (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=32, help="longest answer (%(default)s)")
    parser.add_argument("--model", help="a folder or a name on the model hub")
    parser.add_argument("--preset", default="balanced", help="how far to compress (%(default)s)")
    parser.add_argument("--store", type=Path, default=Path("book_store"), help="the store's folder (%(default)s)")
    parser.add_argument("--max-bytes", type=int, default=1 << 30, help="bytes that the store may take (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, loaded: LoadedModel | None = None) -> None:
    """Read the book if the store does not have it, and answer the questions."""
    options = parse(arguments)
    try:
        book = read_text(options.book) if options.book else python_topics()
        with progress_bars(Console(stderr=True)) as report:
            report(Step("loading the model"))
            loaded = loaded or load_model(options.model)
    except EvaluationError as error:
        raise SystemExit(f"error: {error}") from error
    # Models that differ in their weights alone look alike to the store.
    store = PrefixStore(options.store, options.max_bytes, namespace=loaded.name)
    ids, rest = make_prompt(loaded, book, options.tokens)

    start = time.perf_counter()
    with progress_bars(Console(stderr=True)) as report:
        read = read_book(loaded, store, ids, options.preset, report)
    seconds = time.perf_counter() - start
    what = f"read {read:,} tokens" if read else f"found {ids.shape[1]:,} tokens in the store"
    print(f"{seconds:6.1f} s  {what}; the store takes {store.total_bytes / 1e6:,.2f} MB\n")

    for question in options.questions:
        asked = tokenize(loaded.tokenizer, rest.replace(_PLACE, question))
        said = answer(loaded, store, torch.cat([ids, asked], dim=1), options.preset, options.new_tokens)
        print(f"{said.first_token:6.1f} s  {question}  ({said.known:,} tokens from the store)")
        print(f"          {said.text}  ({said.seconds:.1f} s)\n")


if __name__ == "__main__":
    main()
