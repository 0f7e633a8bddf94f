"""What it costs that states are tensors which know their layer: microseconds of a CPU per layer and forward.

python benchmarks/states.py

The attention functions of transformers are called with the states of a layer and with plain tensors, both of so few
numbers that calls are all that takes time.  At a generation step what is computed from the codes is taken out of the
one, and torch's attention is taken off the other: what is left are the calls around it, and the difference is what the
states add.  At a prompt both compute the same.  That states are made, seen and followed is counted; that an update
stores its tokens, which any cache does, is not.
"""

from __future__ import annotations

import argparse
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from _common import RESULTS
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.evaluation.results import environment, write_json
from nexusquant_cache.layer.reading import states
from nexusquant_cache.states import answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LONG, SHORT = 64, 4  # tokens of a prompt that is compressed, and of one that is timed
SCALING = HEAD_DIM**-0.5
TARGET = 50.0  # microseconds
SETTINGS: dict[str, Any] = {"residual_length": 8, "sink_tokens": 2, "min_tokens": 16}


@dataclass(frozen=True)
class Case:
    """A forward of one layer.

    Attributes:
        name: What it is called in the results.
        attention: Implementation: "sdpa" or "eager".
        is_step: Whether it is a generation step on a compressed layer, else the prompt.
        is_masked: Whether the model has made a mask: eager attention always has one, sdpa where rows are padded.
    """

    name: str
    attention: str
    is_step: bool
    is_masked: bool


CASES = (
    Case("step, sdpa", "sdpa", is_step=True, is_masked=False),
    Case("step, sdpa with a mask", "sdpa", is_step=True, is_masked=True),
    Case("step, eager", "eager", is_step=True, is_masked=True),
    Case("prompt, sdpa", "sdpa", is_step=False, is_masked=False),
    Case("prompt, sdpa with a mask", "sdpa", is_step=False, is_masked=True),
    Case("prompt, eager", "eager", is_step=False, is_masked=True),
)


@contextmanager
def attention_taken_out(ready: Mapping[str, Tensor]) -> Iterator[None]:
    """Let what would be computed from codes be there already."""
    kept = {name: getattr(answer, name) for name in ready}
    for name, result in ready.items():
        setattr(answer, name, lambda *_, result=result: result)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(answer, name, function)


@torch.no_grad()
def measure(case: Case, rounds: int, repeats: int) -> dict[str, Any]:
    """Time one case."""
    torch.manual_seed(0)
    module: Any = SimpleNamespace(num_key_value_groups=QUERY_HEADS // KV_HEADS, training=False, is_causal=True)
    forward = sdpa_attention_forward if case.attention == "sdpa" else eager_attention_forward
    layer, queries, given = _layer(case, partial(forward, module, scaling=SCALING))
    fresh, seen = queries.shape[2], layer.state.seen
    mask = _mask(fresh, seen) if case.is_masked else None
    dense = tuple(torch.randn(2, 1, KV_HEADS, seen, HEAD_DIM))
    logits, out = torch.randn(1, QUERY_HEADS, fresh, seen), torch.randn_like(queries)

    def with_states() -> object:
        own = states(layer.source(fresh), given=given, was_shown=case.is_step)
        return forward(module, queries, *own, mask, scaling=SCALING)

    def plain() -> object:
        return forward(module, queries, *dense, mask, scaling=SCALING)

    with attention_taken_out({"attend": out, "logits": logits, "weighted_values": out}):
        calls = {"states": with_states, "plain": plain}
        if case.is_step:
            calls["plain_attention"] = (
                _sdpa(queries, dense, mask) if case.attention == "sdpa" else _products(queries, dense)
            )
        spent = microseconds(calls, rounds, repeats)
    least = {name: min(taken) for name, taken in spent.items()}
    around = least["plain"] - least.get("plain_attention", 0.0)
    return {"case": case.name, "microseconds": least["states"] - around, "calls": least}


def _layer(case: Case, attend: Callable[..., object]) -> tuple[Any, Tensor, tuple[Tensor, Tensor] | None]:
    """Return a layer after a prompt, or after a step; the queries; and what the update was given, if it is all."""
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        hidden_size=QUERY_HEADS * HEAD_DIM,
    )
    cache = NexusQuantCache(config=config, **SETTINGS)
    tokens = LONG if case.is_step else SHORT
    keys, values = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM)
    queries = torch.randn(1, QUERY_HEADS, tokens, HEAD_DIM)
    attend(queries, *cache.update(keys, values, 0), _mask(tokens, tokens))
    if not case.is_step:
        return cache.layers[0], queries, (keys, values)
    queries = queries[:, :, :1]
    attend(queries, *cache.update(*torch.randn(2, 1, KV_HEADS, 1, HEAD_DIM), 0), _mask(1, tokens + 1))
    return cache.layers[0], queries, None


def _mask(queries: int, tokens: int) -> Tensor:
    visible = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    return torch.zeros(1, 1, queries, tokens).masked_fill(~visible, torch.finfo(torch.float32).min)


def _sdpa(queries: Tensor, states: Sequence[Tensor], mask: Tensor | None) -> Callable[[], object]:
    return lambda: F.scaled_dot_product_attention(queries, *states, attn_mask=mask, scale=SCALING, enable_gqa=True)


def _products(queries: Tensor, states: Sequence[Tensor]) -> Callable[[], object]:
    keys, values = (x.repeat_interleave(QUERY_HEADS // KV_HEADS, 1) for x in states)
    weights = (queries @ keys.mT).softmax(-1)
    return lambda: (torch.matmul(queries, keys.mT), torch.matmul(weights, values))


def microseconds(calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return the CPU time of each call, by round; what else the machine does makes some of them longer."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(repeats):  # until everything is loaded and cached
            call()
    for turn in range(rounds):
        for name in calls if turn % 2 == 0 else reversed(calls):
            start = time.thread_time_ns()
            for _ in range(repeats):
                calls[name]()
            spent[name].append((time.thread_time_ns() - start) / repeats / 1000)
    return spent


def main() -> None:
    """Measure and write ``results/states.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="rounds; the least counts")
    parser.add_argument("--repeats", type=int, default=10, help="calls per round")
    parser.add_argument("--output", type=Path, default=RESULTS / "states.json", help="result file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(case, given.rounds, given.repeats) for case in CASES]
    settings = {
        "query_heads": QUERY_HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "prompt": LONG,
        "timed_prompt": SHORT,
        "target_microseconds": TARGET,
        "rounds": given.rounds,
        "repeats": given.repeats,
    }
    write_json(given.output, {"environment": environment(), "settings": settings, "rows": rows})
    for row in rows:
        shown = ", ".join(f"{name} {taken:.1f}" for name, taken in row["calls"].items())
        print(f"{row['case']:>26}: {row['microseconds']:6.1f} us ({shown})")


if __name__ == "__main__":
    main()
