"""How each model type of the installed transformers is served by the one-line call.

python benchmarks/sweep.py

Every causal model, and every model that reads images and writes text, is built small and random from its config class,
reads a prompt, and makes a few steps: with the plain cache, with ours and codes that lose nothing (which must give the
same logits), and with ours as it is used, evicting (which must give those of the plain cache under a mask that hides
what was evicted, where such a mask can be laid over the model from outside).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _common import RESULTS, ROOT
from _small_models import VARIANTS, VOCABULARY, build, model_types
from rich.progress import track
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.evaluation.results import environment, write_json
from nexusquant_cache.layer.parts import compressed
from nexusquant_cache.releases import CACHE, cache_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from multiprocessing.connection import Connection

    from torch import Tensor
    from transformers import PreTrainedModel

sys.path.insert(0, str(ROOT / "tests"))
from integration.tiny import SMALL, LosslessCache

ATTENTIONS = ("sdpa", "eager")
PROMPT, STEPS = 48, 6
PRESET = "balanced"
MOST_SECONDS = 300
# Relative to the largest logit.  A wrong token or a wrong place is far beyond.
TOLERANCE = 1e-3
# They want all ids at each step, and leave those out themselves that are in the cache.
WANT_ALL = {"cpmant", "xlm"}


def main() -> None:
    """Run every model type and write ``results/sweep.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=model_types(), help="some model types only")
    parser.add_argument("--output", type=Path, default=RESULTS / "sweep.json", help="result file")
    given = parser.parse_args()
    transformers_logging.set_verbosity(logging.CRITICAL)  # sizes that do not fit are told as errors
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [
        {"type": name, "attention": attention, **judge_apart(name, attention)}
        for name in track(given.types, description="model types")
        for attention in ATTENTIONS
    ]
    settings = {"prompt": PROMPT, "steps": STEPS, "preset": PRESET, "overrides": SMALL, "tolerance": TOLERANCE}
    write_json(given.output, {"environment": environment(), "settings": settings, "rows": rows})
    for attention in ATTENTIONS:
        counts = Counter(row["verdict"] for row in rows if row["attention"] == attention)
        print(f"{attention}: " + ", ".join(f"{count} x {verdict}" for verdict, count in counts.most_common()))


def judge_apart(model_type: str, attention: str) -> dict[str, Any]:
    """Judge one model type in a process of its own, which may crash or take too long."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(model_type, attention, theirs))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv() if ours.poll(MOST_SECONDS) else {"verdict": "not built", "why": "too slow"}
    except EOFError:
        found = {"verdict": "not built", "why": "the process ended"}
    process.kill()
    process.join()
    return found


def _work(model_type: str, attention: str, answer: Connection) -> None:
    try:
        answer.send(judge(model_type, attention))
    except BaseException as error:  # noqa: BLE001 - any error is a result
        answer.send({"verdict": "raises", "why": _told(error)})


@torch.no_grad()
def judge(model_type: str, attention: str) -> dict[str, Any]:
    """Build a model and run it with each cache.

    Returns:
        ``verdict``: "codes" (every layer of ours was answered from the codes), "whole" (at least one was not, and keeps
        all tokens), "nothing to compress" (all layers are transformers' own), "refuses", "differs", "raises"; or, where
        nothing could be learnt, "no such attention", "no cache" (the model takes none), "plain raises", "not built".
        ``why`` says more, ``class`` is that of the model.
        ``evicting``: the same of the preset, "agrees" where its logits could be checked too.
    """
    errors: dict[str, str] = {}
    for options in VARIANTS:
        verdict = "not built"
        try:
            model = build(model_type, attention, options)
            if model.config.is_encoder_decoder:
                return {"verdict": "refuses", "why": "an encoder-decoder model"}
            if not cache_names(model):
                return {"verdict": "no cache"}
            verdict = "plain raises"
            plain = run(model, DynamicCache(config=model.config))
        except Exception as error:  # noqa: BLE001 - sizes that do not fit
            if "does not support an attention implementation" in str(error):
                return {"verdict": "no such attention"}
            errors.setdefault(verdict, _told(error))
        else:
            return _judge_ours(model, plain)
    verdict = "plain raises" if "plain raises" in errors else "not built"  # what came furthest tells most
    return {"verdict": verdict, "why": errors[verdict]}


def _judge_ours(model: PreTrainedModel, plain: Tensor) -> dict[str, Any]:
    try:
        cache = LosslessCache("quant", config=model.config, **SMALL)
        logits = run(model, cache)
    except Exception as error:  # noqa: BLE001 - a result
        return {"verdict": "raises", "why": _told(error)}
    found = {"verdict": served(cache), "class": type(model).__name__, **layers_of(cache)}
    if not agree(logits, plain):
        found |= {"verdict": "differs", "why": f"by {distance(logits, plain):.1e}"}
    return found | _judge_evicting(model)


def _judge_evicting(model: PreTrainedModel) -> dict[str, Any]:
    kept: list[dict[int, Tensor]] = []
    try:
        cache = LosslessCache(PRESET, config=model.config, **SMALL)
    except Exception as error:  # noqa: BLE001 - a result
        return {"evicting": f"refuses: {_told(error)}"}
    try:
        logits = run(model, cache, kept=kept)
    except Exception as error:  # noqa: BLE001 - a result
        return {"evicting": f"raises: {_told(error)}"}
    if all(part.state.seen == part.state.kept for part in compressed(cache.parts())):
        return {"evicting": "evicts nothing"}
    expected = run_hidden(model, kept)
    if expected is None:
        return {"evicting": "runs"}
    return {"evicting": "agrees" if agree(logits, expected) else f"differs by {distance(logits, expected):.1e}"}


def run(model: PreTrainedModel, cache: Any, *, kept: list[dict[int, Tensor]] | None = None) -> Tensor:
    """Read the prompt and make steps; return the logits of the prompt's last token and of each step.

    Args:
        model: The model.
        cache: The cache.
        kept: Gets, for each step, the original positions of the tokens that each layer of ours keeps.
    """
    found = []
    for ids in _inputs(model):
        found.append(_forward(model, ids, cache))
        if kept is not None and len(found) > 1:
            kept.append(
                {each.index: each.held().columns for each in compressed(cache.parts()) if each.layer.is_initialized}
            )
    return torch.cat(found)


def _inputs(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the ids of the prompt, and of each step."""
    ids = torch.randint(3, VOCABULARY - 8, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    yield ids[:, :PROMPT]
    for step in range(PROMPT, PROMPT + STEPS):
        yield ids[:, 0 if model.config.model_type in WANT_ALL else step : step + 1]


def _forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    torch.manual_seed(0)  # some draw what they begin from
    name = next(iter(cache_names(model)), CACHE)
    logits: Tensor = model(input_ids=ids, use_cache=True, **{name: cache}).logits
    return logits[0, -1:].float()


def run_hidden(model: PreTrainedModel, kept: list[dict[int, Tensor]]) -> Tensor | None:
    """Do the same with a plain cache and masks that hide, at each step, what ours had evicted; None if they cannot."""
    prompt, *steps = _inputs(model)
    cache = DynamicCache(config=model.config)
    found = [_forward(model, prompt, cache)]
    for step, (ids, columns) in enumerate(zip(steps, kept, strict=True)):
        with hiding(model, columns, PROMPT + step + 1) as hidden:
            found.append(_forward(model, ids, cache))
        if hidden != set(columns):
            return None
    return torch.cat(found)


@contextmanager
def hiding(model: PreTrainedModel, columns: Mapping[int, Tensor], seen: int) -> Iterator[set[int]]:
    """Lay a mask over the attention of each of these layers; yield the layers that it has reached, -1 for others."""
    reached: set[int] = set()
    modules: list[Any] = list(model.modules())
    # Layers that hold nothing themselves read what the last one before them of their kind has put out for them.
    lenders = {each.layer_type: each.layer_idx for each in modules if getattr(each, "store_full_length_kv", False)}

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        index = lenders[module.layer_type] if getattr(module, "is_kv_shared_layer", False) else module.layer_idx
        if index not in columns or "attention_mask" not in kwargs:
            return None
        if kwargs.get("hidden_states", *args[:1]).shape[1] > 1:  # what else reads the cache is left as it is
            reached.add(-1)
            return None
        kept = columns[index].expand(1, *columns[index].shape[-2:]) if columns[index].ndim > 1 else columns[index]
        visible = torch.zeros(*kept.shape[:-1], seen, dtype=torch.bool).scatter_(-1, kept, value=True)
        if visible.ndim > 1:
            heads = int(model.config.get_text_config(decoder=True).num_attention_heads)
            visible = visible.repeat_interleave(heads // visible.shape[1], 1)[:, :, None]
        mask = torch.zeros(()).masked_fill(~visible, torch.finfo(torch.float32).min)
        given = kwargs["attention_mask"]
        if given is not None and given.dtype != torch.bool:
            mask = mask + given  # a bias by distance may be in it
        reached.add(index)
        return args, kwargs | {
            "attention_mask": mask.expand(1, -1, 1, -1) if mask.ndim > 1 else mask.expand(1, 1, 1, -1)
        }

    handles = [
        module.register_forward_pre_hook(hook, with_kwargs=True)
        for module in modules
        if isinstance(getattr(module, "layer_idx", None), int) and "ttention" in type(module).__name__
    ]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def served(cache: NexusQuantCache) -> str:
    """Return how the layers of ours were served."""
    states = [part.state for part in compressed(cache.parts()) if part.layer.is_initialized]
    if not states:
        return "nothing to compress"
    return "codes" if all(state.is_shown for state in states) else "whole"


def layers_of(cache: NexusQuantCache) -> dict[str, int]:
    """Return how many layers there are, and how many of them are packed."""
    packed = [part for part in compressed(cache.parts()) if part.state.body is not None]
    return {"layers": len(cache.layers), "packed_layers": len(packed)}


def agree(logits: Tensor, expected: Tensor) -> bool:
    """Tell whether logits are the same but for rounding."""
    return distance(logits, expected) <= TOLERANCE


def distance(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest logit."""
    return float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    main()
