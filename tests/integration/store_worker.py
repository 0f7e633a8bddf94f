"""A process that others may kill while it uses a `PrefixStore`.

The script itself only forks: it imports everything once, reads jobs (JSON, one a line) from its standard input, and
answers each with the process id of a child that does it.  ``{"wait": PID}`` answers with the exit code of a child,
negative for a signal.

A child logs what it is about to do and what it has done, a line each: ``start KIND TOKENS``, ``put TOKENS``,
``get TOKENS FOUND``; at last ``end LINES``, the lines run if those are counted.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.codec.cpu import support
from nexusquant_cache.files import writer
from nexusquant_cache.store import index, store

LENGTHS = range(40, 64, 2)  # prefixes of one text: the longest that is stored is the one to be found
_SMALL = {"sink_tokens": 2, "residual_length": 8, "flush_length": 4, "min_tokens": 16, "min_kept": 0}


def token_ids(tokens: int) -> list[int]:
    """Return the first ids of the text."""
    return [(7 * index + index**3) % 251 for index in range(tokens)]


@functools.cache
def build(tokens: int) -> NexusQuantCache:
    """Return a cache that has seen so many tokens, alike in every process; nobody changes it."""
    generator = torch.Generator().manual_seed(tokens)
    cache = NexusQuantCache("balanced", **_SMALL)
    for layer in range(2):
        keys, values = torch.randn(2, 1, 2, tokens, 16, generator=generator)
        F.scaled_dot_product_attention(keys, *cache.update(keys, values, layer))
    cache.compress()
    return cache


def same(one: NexusQuantCache, other: NexusQuantCache) -> bool:
    """Tell whether two caches show attention the same."""
    pairs = zip(one.layers, other.layers, strict=True)
    return all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs)


def work(job: dict[str, Any]) -> None:
    """Use a store until killed, or for ``steps`` steps."""
    warnings.simplefilter("error")
    store.GRACE_SECONDS = job["grace"]
    choose = random.Random(job["seed"])  # noqa: S311 - to vary, not to hide
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    lines = itertools.count(1)
    if job.get("line"):
        kill_at_line(job["line"], lines)
    kept = store.PrefixStore(job["folder"], job["max_bytes"])
    for _ in range(job["steps"]) if job["steps"] else itertools.count():
        kind, tokens = choose.choice(job["kinds"]), choose.choice(job.get("lengths", LENGTHS))
        os.write(log, f"start {kind} {tokens}\n".encode())
        if kind == "put":
            kept.put(build(tokens), token_ids(tokens))
            os.write(log, f"put {tokens}\n".encode())
        else:
            found = kept.get(token_ids(tokens), leave=0)
            assert found is None or same(found[0], build(found[1])), found
            os.write(log, f"get {tokens} {found[1] if found else 0}\n".encode())
    os.write(log, f"end {next(lines)}\n".encode())


def kill_at_line(number: int, lines: Iterator[int]) -> None:
    """Have this process kill itself before it runs so many lines of the store and of what writes files."""
    watched = {index.__file__, store.__file__, writer.__file__}

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in watched:
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def main() -> None:
    """Fork a child for every job."""
    support.is_wanted = lambda _device: False  # plain torch, as in the tests: see conftest.py
    torch.set_num_threads(1)
    for tokens in LENGTHS:
        build(tokens)  # once for all children, who then do little but what is tested
    children: set[int] = set()
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)  # noqa: T201
            children.remove(job["wait"])
            continue
        child = os.fork()
        if child == 0:
            try:
                work(job)
            except BaseException:  # noqa: BLE001 - a forked child must not go on as its parent would
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.add(child)
        print(child, flush=True)  # noqa: T201
    for child in children:  # of a test that has failed
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
