"""Time per token and peak memory of a model shaped like Llama 3 8B, with random weights and random tokens."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from _gpu_clock import free_memory
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache

from nexusquant_cache import PRESETS, NexusQuantCache, attention
from nexusquant_cache.evaluation.caches import update
from nexusquant_cache.evaluation.clock import now
from nexusquant_cache.releases import CACHE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _gpu_record import Budget, Record
    from torch import Tensor

EIGHT_B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "vocab_size": 32_000,
    "max_position_embeddings": 1 << 20,
}
_TINY: dict[str, Any] = EIGHT_B | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 128,
}
_UNCHECKED = 1e9  # of `most_code_error`: random tokens say nothing about it
_HALF_BYTES = 2
_QUANTIZED = {"quanto": "optimum.quanto", "hqq": "hqq"}
_LONG = 32_768  # tokens from which other compressed caches are measured


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        model: Of the config.
        dtype: Of the model.
        shapes: Batches and contexts.
        presets: Measured with attention on codes; beyond the first shape, and in prefills, the first one.
        decoded: Measured with attention on decoded tokens, too.
        compiled: Contexts for which `StaticCache` is compiled, with one row.
        warm: Tokens before that.
        steps: Tokens of a round, as many as a compressed cache encodes together (`CacheConfig.flush_length`).
        rounds: Rounds, of which the median counts.
        prefills: Prompts.
        chunk: Tokens that a prefill reads at once.
        capacity: Two contexts whose bytes say what a token takes.
    """

    model: dict[str, Any]
    dtype: torch.dtype
    shapes: tuple[tuple[int, int], ...]
    presets: tuple[str, ...]
    decoded: tuple[str, ...]
    compiled: tuple[int, ...]
    warm: int
    steps: int
    rounds: int
    prefills: tuple[int, ...]
    chunk: int
    capacity: tuple[int, int]


FULL = Sizes(
    model=EIGHT_B,
    dtype=torch.bfloat16,
    shapes=((1, 32_768), (8, 32_768), (1, 131_072), (1, 4096)),
    presets=("balanced", "quant", "max"),
    decoded=("balanced",),
    compiled=(32_768, 131_072),
    warm=3,
    steps=16,
    rounds=3,
    prefills=(32_768, 131_072),
    chunk=2048,
    capacity=(8192, 32_768),
)
SMOKE = Sizes(
    model=_TINY,
    dtype=torch.float32,
    shapes=((1, 165),),
    presets=("max",),
    decoded=("max",),
    compiled=(165,),
    warm=2,
    steps=1,
    rounds=1,
    prefills=(165,),
    chunk=165,
    capacity=(165, 190),
)


@dataclass(frozen=True)
class Rival:
    """A cache to measure.

    Attributes:
        name: For tables.
        make: Makes an empty one for a context.
        seconds: How long filling and measuring it will take, by experience or guess.
        on_codes: Whether attention reads codes.
        compiled: Whether the model is compiled for it.
    """

    name: str
    make: Callable[[int], Cache]
    seconds: float
    on_codes: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class _Run:
    """What all measurements of a model share."""

    record: Record
    budget: Budget
    model: LlamaForCausalLM
    sizes: Sizes


def build(sizes: Sizes, device: torch.device) -> LlamaForCausalLM:
    """Return the model, its weights drawn on the device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(sizes.dtype)
    try:
        with device:
            return LlamaForCausalLM(LlamaConfig(**sizes.model)).eval()
    finally:
        torch.set_default_dtype(default)


def weight_bytes(sizes: Sizes) -> int:
    """Return the bytes of the model in 16 bit."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes.model))
    return sum(_HALF_BYTES * weight.numel() for weight in model.parameters())


def fill(cache: Cache, batch: int, tokens: int, sizes: Sizes, device: torch.device) -> None:
    """Let a cache see random keys and values, and compress them where it can, one layer after the other."""
    config = sizes.model
    size = (batch, config["num_key_value_heads"], tokens, config["head_dim"])
    for layer in range(config["num_hidden_layers"]):
        keys, values = (torch.randn(size, dtype=sizes.dtype, device=device) for _ in range(2))
        update(cache, keys, values, layer)
        del keys, values
        if isinstance(cache, NexusQuantCache):
            cache.layers[layer].compress()


def compressed(preset: str, config: LlamaConfig, **options: Any) -> NexusQuantCache:
    """Return one of our caches, which uses kernels or says why it cannot."""
    settings = replace(PRESETS[preset], most_code_error=_UNCHECKED, impl="triton")
    return NexusQuantCache(settings, config=config, **options)


@torch.no_grad()
def measure(record: Record, budget: Budget, device: torch.device, done: Callable[[], None], sizes: Sizes) -> None:
    """Measure generation steps, then prefills, as long as there is time."""
    if device.type == "cuda":
        needed, free = weight_bytes(sizes) + (4 << 30), free_memory()
        if free < needed:
            record.skip("end_to_end", "everything", f"{needed / 2**30:.0f} GiB needed, {free / 2**30:.0f} GiB free")
            return
    for package in _QUANTIZED.values():
        if not _is_installed(package):
            record.skip("end_to_end", f"QuantizedCache on {package}", "not installed")
    run = _Run(record, budget, build(sizes, device), sizes)
    for batch, context in sizes.shapes:
        _measure_shape(run, batch, context)
        done()
    for tokens in sizes.prefills:
        _measure_prefill(run, tokens)
        done()
    # What takes longest, for want of better: compilation of all layers.
    for context in sizes.compiled:
        _measure_compiled(run, context)
        done()
    del run
    _free(device)


def steps_in(sizes: Sizes) -> int:
    """Return how often `measure` says that something is done."""
    return len(sizes.shapes) + len(sizes.prefills) + len(sizes.compiled)


def _rivals(batch: int, context: int, config: LlamaConfig, sizes: Sizes) -> Iterator[Rival]:
    millions = batch * context / 1e6
    yield Rival("DynamicCache", lambda _: DynamicCache(), 5 + 20 * millions)
    for preset in sizes.presets if (batch, context) == sizes.shapes[0] else sizes.presets[:1]:
        yield Rival(preset, lambda _, name=preset: compressed(name, config), 10 + 80 * millions, on_codes=True)
    for preset in sizes.decoded:
        yield Rival(preset, lambda _, name=preset: compressed(name, config), 15 + 80 * millions)
    for backend, package in _QUANTIZED.items():
        if context >= _LONG and _is_installed(package):
            yield Rival(f"QuantizedCache, {backend}", partial(_quantized, backend, config), 20 + 200 * millions)


def _quantized(backend: str, config: LlamaConfig, context: int) -> Cache:
    del context
    return QuantizedCache(backend, config, nbits=4)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _measure_shape(run: _Run, batch: int, context: int) -> None:
    record, budget, model, sizes = run.record, run.budget, run.model, run.sizes
    unit = f"{batch} x {context:,}"
    if record.is_done("end_to_end", unit):
        return
    record.begin("end_to_end", unit)
    plain: float | None = None
    pace, in_time = 1.0, True
    for rival in _rivals(batch, context, model.config, sizes):
        what = f"{unit}: {rival.name}{', on codes' if rival.on_codes else ''}"
        why = budget.why_not(pace * rival.seconds)
        if why is None:
            start = time.monotonic()
            row, why = _attempt(lambda rival=rival: _time(model, rival, batch, context, sizes))
            pace = max(pace, (time.monotonic() - start) / rival.seconds)
        else:
            in_time = False
        if why is not None:
            record.skip("end_to_end", what, why)
            if rival.name == "DynamicCache":
                return  # nothing to compare with
            continue
        assert row is not None
        plain = row["milliseconds"] if rival.name == "DynamicCache" else plain
        ratio = None if plain is None else plain / row["milliseconds"]
        record.add("end_to_end", unit, {"what": "steps", "batch": batch, "context": context} | row | {"ratio": ratio})
        record.say(f"{what}: {row['milliseconds']:.1f} ms per token, [bold]{ratio:.2f}x[/] DynamicCache")
    if in_time:
        record.finish("end_to_end", unit)


def _attempt(action: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any] | None, str | None]:
    """Return what an action does, or why it cannot; a cache that fails is no reason to lose the others."""
    try:
        return action(), None
    except Exception as error:  # noqa: BLE001 - told as the reason
        why = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
    return None, why


def _time(model: LlamaForCausalLM, rival: Rival, batch: int, context: int, sizes: Sizes) -> dict[str, Any]:
    """Fill a cache and generate."""
    device, weights = model.device, _bytes_now(model.device)
    cache = rival.make(context)
    (attention.enable if rival.on_codes else attention.disable)(model)
    try:
        start = now()
        fill(cache, batch, context, sizes, device)
        filled = now() - start
        compiles = rival.compiled and device.type == "cuda"
        step = _stepper(torch.compile(model, mode="reduce-overhead") if compiles else model, compiled=compiles)
        token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        start = now()
        for _ in range(sizes.warm):  # the first step decodes, the kernels are compiled, or the model is
            token = step(token, cache)
        warmed = now() - start
        _reset_peak(device)
        rounds, issued = [], []
        for _ in range(sizes.rounds):
            start = now()
            for _ in range(sizes.steps):
                token = step(token, cache)
            issued.append(1000 * (time.perf_counter() - start) / sizes.steps)
            rounds.append(1000 * (now() - start) / sizes.steps)
        return {
            "cache": rival.name,
            "on_codes": rival.on_codes,
            "compiled": rival.compiled,
            "milliseconds": statistics.median(rounds),
            "rounds": rounds,
            # Equal to the time per token where the GPU waits for Python.
            "issued_milliseconds": statistics.median(issued),
            "fill_seconds": filled,
            "first_steps_seconds": warmed,
            "peak_bytes": _peak(device),
            "peak_beside_weights": _peak(device) - weights,
            "held_bytes": cache.memory_report().held_bytes if isinstance(cache, NexusQuantCache) else None,
        }
    finally:
        attention.disable(model)
        del cache
        _free(device)


def _stepper(model: Any, *, compiled: bool) -> Callable[[Tensor, Cache], Tensor]:
    def step(token: Tensor, cache: Cache) -> Tensor:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        logits = model(input_ids=token, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    return step


def _measure_compiled(run: _Run, context: int) -> None:
    record, budget, model, sizes = run.record, run.budget, run.model, run.sizes
    unit = f"1 x {context:,}, StaticCache"
    if record.is_done("end_to_end", unit):
        return
    room = context + sizes.warm + sizes.rounds * sizes.steps

    def make(_: int) -> Cache:
        return StaticCache(config=model.config, max_cache_len=-(-room // 64) * 64)

    rival = Rival("StaticCache", make, 130 if model.device.type == "cuda" else 1, compiled=True)
    row, why = None, budget.why_not(rival.seconds)
    if why is None:
        row, why = _attempt(lambda: _time(model, rival, 1, context, sizes))
    if row is None:
        record.skip("end_to_end", unit, why or "")
        return
    plain = [
        each["milliseconds"]
        for each in record.content["end_to_end"]
        if each["what"] == "steps"
        and each["cache"] == "DynamicCache"
        and (each["batch"], each["context"]) == (1, context)
    ]
    ratio = plain[0] / row["milliseconds"] if plain else None
    record.add("end_to_end", unit, {"what": "steps", "batch": 1, "context": context} | row | {"ratio": ratio})
    record.finish("end_to_end", unit)
    record.say(f"{unit}: {row['milliseconds']:.1f} ms per token")
    if model.device.type == "cuda":
        torch.compiler.reset()


def _measure_prefill(run: _Run, tokens: int) -> None:
    """Compare the peaks of two prefills in chunks."""
    record, budget, model, sizes = run.record, run.budget, run.model, run.sizes
    unit = f"prefill of {tokens:,} in chunks of {sizes.chunk:,}"
    if record.is_done("end_to_end", unit):
        return
    makers = {
        "DynamicCache": DynamicCache,
        f"{sizes.presets[0]}, during_prefill": lambda: compressed(
            sizes.presets[0], model.config, when="during_prefill"
        ),
    }
    record.begin("end_to_end", unit)
    plain: dict[str, Any] | None = None
    for name, make in makers.items():
        why = budget.why_not(10 if model.device.type == "cuda" else 1)
        row = None
        if why is None:
            row, why = _attempt(lambda make=make: _prefill(run, make(), tokens))
        if row is None:
            record.skip("end_to_end", f"{unit}: {name}", why or "")
            return
        if plain is not None:
            row["peak_share"] = _share(row["peak_beside_weights"], plain["peak_beside_weights"])
            row["cache_peak_share"] = _share(row["cache_peak_bytes"], plain["cache_peak_bytes"])
        plain = plain or row
        record.add("end_to_end", unit, {"what": "prefill", "cache": name, "batch": 1, "context": tokens} | row)
        record.say(f"{unit}: {name}: {row['seconds']:.1f} s, peak {row['peak_beside_weights'] / 2**30:.2f} GiB")
    record.finish("end_to_end", unit)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


class _OutOfTimeError(RuntimeError):
    """A prefill would not end in time."""


def _prefill(run: _Run, cache: Cache, tokens: int) -> dict[str, Any]:
    model, sizes = run.model, run.sizes
    device, weights = model.device, _bytes_now(model.device)
    (attention.enable if isinstance(cache, NexusQuantCache) else attention.disable)(model)
    try:
        ids = torch.randint(0, sizes.model["vocab_size"], (1, tokens), device=device)
        _reset_peak(device)
        start = now()
        for end in range(sizes.chunk, tokens + sizes.chunk, sizes.chunk):
            chunk = ids[:, end - sizes.chunk : end]
            model(input_ids=chunk, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            spent = now() - start
            # At least, since later chunks take longer.
            if run.budget.left < spent * (tokens - end) / end:
                msg = f"no time after {end:,} tokens in {spent:.0f} s"
                raise _OutOfTimeError(msg)
        model(input_ids=ids[:, -1:], **{CACHE: cache}, use_cache=True)
        dense = 2 * _HALF_BYTES * sizes.model["num_hidden_layers"] * sizes.model["num_key_value_heads"]
        dense *= sizes.model["head_dim"] * tokens
        report = cache.memory_report() if isinstance(cache, NexusQuantCache) else None
        return {
            "seconds": now() - start,
            "peak_bytes": _peak(device),
            "peak_beside_weights": _peak(device) - weights,
            "cache_peak_bytes": dense if report is None else report.peak_bytes,
            "held_bytes": dense if report is None else report.held_bytes,
        }
    finally:
        attention.disable(model)
        del cache
        _free(device)


def _bytes_now(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# Capacity


def capacities(sizes: Sizes) -> tuple[str, ...]:
    """Return the presets whose capacity is computed."""
    return tuple(PRESETS) if sizes is FULL else sizes.presets


@torch.no_grad()
def measure_capacity(
    record: Record, budget: Budget, device: torch.device, done: Callable[[], None], sizes: Sizes
) -> None:
    """Compute how many tokens of one conversation fit beside the model, from the bytes that caches hold."""
    config = LlamaConfig(**sizes.model)
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 80 << 30
    weights = weight_bytes(sizes)
    left, layers = total - weights, sizes.model["num_hidden_layers"]
    dense = 2 * _HALF_BYTES * sizes.model["num_key_value_heads"] * sizes.model["head_dim"] * layers
    about = {"card_bytes": total, "weight_bytes": weights, "how": "computed"}
    if not record.is_done("capacity", "DynamicCache"):
        row = {"cache": "DynamicCache", "bytes_per_token": dense, "fixed_bytes": 0, "tokens": left // dense}
        record.add("capacity", "DynamicCache", about | row)
        record.finish("capacity", "DynamicCache")
    done()
    for preset in capacities(sizes):
        why = budget.why_not(6)
        if record.is_done("capacity", preset):
            pass
        elif why is not None:
            record.skip("capacity", preset, why)
        else:
            row, why = _attempt(lambda preset=preset: _capacity(preset, config, left, sizes, device))
            if row is None:
                record.skip("capacity", preset, why or "")
            else:
                record.add("capacity", preset, about | row)
                record.finish("capacity", preset)
                record.say(f"capacity of {preset}: [bold]{row['tokens']:,}[/] tokens")
        done()


def _capacity(preset: str, config: LlamaConfig, left: int, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Return what a token takes, by a line through the bytes that one layer holds at two contexts."""
    size = (1, config.num_key_value_heads, config.head_dim)
    held = []
    for tokens in sizes.capacity:
        cache = compressed(preset, config)
        keys, values = (torch.randn(*size[:2], tokens, size[2], dtype=sizes.dtype, device=device) for _ in range(2))
        update(cache, keys, values, 0)
        cache.layers[0].compress()
        report = cache.memory_report().layers[0]
        # In 16 bit, whatever the dtype here.
        exact = report.exact_bytes * _HALF_BYTES // keys.element_size()
        held.append(report.code_bytes + report.other_bytes + exact)
    first, second = sizes.capacity
    per_token = (held[1] - held[0]) / (second - first)
    fixed = held[0] - per_token * first
    layers = config.num_hidden_layers
    return {
        "cache": preset,
        "bytes_per_token": per_token * layers,
        "fixed_bytes": fixed * layers,
        "tokens": int((left - fixed * layers) / (per_token * layers)),
    }
