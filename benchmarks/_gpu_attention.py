"""Time of decode attention on codes against SDPA with FlashAttention in float16, and of encoding."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from _gpu_clock import copies_for, free_memory, time_calls
from _gpu_record import under_load
from _gpu_tokens import (
    KEYS,
    Keys,
    Shape,
    correlated,
    fitted,
    on_device,
    operand_of,
    packed_bytes,
    random_held,
    rope_of,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.held import CodedSide
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.softmax import Softmax

if TYPE_CHECKING:
    from collections.abc import Callable

    from _gpu_clock import Timing
    from _gpu_record import Budget, Record
    from torch import Tensor

    from nexusquant_cache.codec.held import HeldTokens, Side
    from nexusquant_cache.codec.transform import VectorTransform

_SPARE = 1 << 30  # bytes left free
_FIRST_GUESS = 12.0  # seconds for a shape, before any was measured
_MODEL_DTYPE = torch.float16


@dataclass(frozen=True)
class Unit:
    """What is measured side by side: SDPA, and codes of some kinds, of one shape."""

    shape: Shape
    codes: tuple[tuple[str, Keys], ...]


def units(*, smoke: bool) -> list[Unit]:
    """Return all shapes, those with a target first."""
    if smoke:
        return [Unit(Shape(1, 100, 1, 2, 64), (("balanced", "pre-RoPE, evicted"), ("quant", "post-RoPE")))]
    balanced: tuple[tuple[str, Keys], ...] = tuple(("balanced", keys) for keys in KEYS)
    both: tuple[tuple[str, Keys], ...] = (*balanced, ("quant", "post-RoPE"))
    first = [(1, 32_768), (1, 131_072), (32, 8192)]
    others = [(1, 8192), (8, 8192), (8, 32_768), (8, 131_072), (1, 1_048_576), (32, 32_768), (32, 131_072)]
    small = [Shape(batch, tokens, 4, 16, 64) for batch, tokens in ((1, 32_768), (32, 8192))]
    return [
        *(Unit(Shape(*each), both) for each in first),
        *(Unit(Shape(*each), balanced) for each in others),
        *(Unit(shape, balanced[::2]) for shape in small),
    ]


@torch.no_grad()
def measure(record: Record, budget: Budget, device: torch.device, done: Callable[[], None], *, smoke: bool) -> None:
    """Measure every shape that fits in memory and in the time left."""
    guess = _FIRST_GUESS
    for unit in units(smoke=smoke):
        name = unit.shape.name
        if not record.is_done("attention", name):
            why = budget.why_not(guess) or _too_large(unit.shape, device)
            if why is not None:
                record.skip("attention", name, why)
            else:
                start = time.monotonic()
                record.begin("attention", name)
                try:
                    _measure_unit(record, unit, device)
                    record.finish("attention", name)
                except torch.OutOfMemoryError as error:
                    record.skip("attention", name, str(error).partition("\n")[0])
                guess = max(time.monotonic() - start, guess / 2)
        done()


def _too_large(shape: Shape, device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    needed, free = shape.fp16_bytes * copies_for(shape.fp16_bytes, device) + _SPARE, free_memory()
    return None if needed <= free else f"{needed / 2**30:.0f} GiB for float16, {free / 2**30:.0f} GiB are free"


def _measure_unit(record: Record, unit: Unit, device: torch.device) -> None:
    shape = unit.shape
    about = {"batch": shape.batch, "context": shape.tokens} | {
        key: value for key, value in asdict(shape).items() if key not in {"batch", "tokens"}
    }
    plain = _time_sdpa(shape, device)
    row = about | {"what": "sdpa", "preset": None, "keys": None} | _numbers(plain, shape.fp16_bytes)
    record.add("attention", shape.name, row | {"nvidia_smi": under_load()})
    record.say(f"{shape.name}: SDPA {plain.milliseconds:.3f} ms")
    for preset, keys in unit.codes:
        whole, kernel, nbytes = _time_codes(shape, preset, keys, device)
        row = about | {"what": "codes", "preset": preset, "keys": keys} | _numbers(whole, nbytes)
        row |= {
            "kernel_ms": kernel.milliseconds,
            "kernel_gb_per_s": nbytes / kernel.milliseconds / 1e6,
            "ratio": plain.milliseconds / whole.milliseconds,
            "kernel_ratio": plain.milliseconds / kernel.milliseconds,
            "launched_ratio": plain.launched_milliseconds / whole.launched_milliseconds,
            "bytes_ratio": shape.fp16_bytes / nbytes,
        }
        record.add("attention", shape.name, row | {"nvidia_smi": under_load()})
        record.say(
            f"{shape.name}: {preset}, {keys} {whole.milliseconds:.3f} ms, [bold]{row['ratio']:.2f}x[/] "
            f"(kernel alone {row['kernel_ratio']:.2f}x), {row['gb_per_s']:.0f} GB/s"
        )


def _numbers(timing: Timing, nbytes: int) -> dict[str, Any]:
    return asdict(timing) | {"bytes": nbytes, "gb_per_s": nbytes / timing.milliseconds / 1e6}


def _query(shape: Shape, device: torch.device) -> Tensor:
    return torch.randn(shape.batch, shape.query_heads, 1, shape.head_dim, dtype=_MODEL_DTYPE, device=device)


def _time_sdpa(shape: Shape, device: torch.device) -> Timing:
    size = (shape.batch, shape.kv_heads, shape.tokens, shape.head_dim)
    query = _query(shape, device)
    pairs = [
        tuple(torch.randn(size, dtype=_MODEL_DTYPE, device=device) for _ in range(2))
        for _ in range(copies_for(shape.fp16_bytes, device))
    ]
    backend = SDPBackend.FLASH_ATTENTION if device.type == "cuda" else SDPBackend.MATH
    with sdpa_kernel(backend):
        return time_calls([lambda pair=pair: _sdpa(query, *pair) for pair in pairs], device)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def _time_codes(shape: Shape, preset: str, keys: Keys, device: torch.device) -> tuple[Timing, Timing, int]:
    """Return the time of a layer's attention to all it holds, of the kernel that reads codes, and the bytes of these.

    The first includes positions of kept tokens, sinks and tail, and the joining of both.
    """
    from nexusquant_cache.codec.triton.attend import attend  # noqa: PLC0415 - imports triton
    from nexusquant_cache.codec.triton.kernels_attend import attend_packed  # noqa: PLC0415 - imports triton

    held = [random_held(shape, keys, preset, _MODEL_DTYPE, device)]
    nbytes = packed_bytes(held[0])
    held += [random_held(shape, keys, preset, _MODEL_DTYPE, device) for _ in range(copies_for(nbytes, device) - 1)]
    query, options = _query(shape, device), Softmax(shape.head_dim**-0.5)
    whole = time_calls([lambda each=each: attend(query, each, None, options) for each in held], device)

    def kernel(each: HeldTokens) -> Callable[[], object]:
        assert each.keys is not None
        assert each.values is not None
        operands = operand_of(each.keys), operand_of(each.values)
        rope, places = rope_of(each)
        return lambda: attend_packed(query, *operands, Softmax(options.scaling), rope=rope, places=places)

    return whole, time_calls([kernel(each) for each in held], device), nbytes


# Encoding


def encodings(*, smoke: bool) -> list[tuple[str, Side, int, int]]:
    """Return what is encoded: preset or ``"hadamard"``, side, KV heads, tokens."""
    if smoke:
        return [("balanced", "keys", 1, 32)]
    return [("balanced", "keys", 8, 131_072), ("balanced", "values", 8, 131_072), ("hadamard", "values", 8, 131_072)]


@torch.no_grad()
def measure_encoding(
    record: Record, budget: Budget, device: torch.device, done: Callable[[], None], *, smoke: bool
) -> None:
    """Measure how many vectors of 128 channels are encoded in a second."""
    head_dim = 64 if smoke else 128
    for name, side, heads, tokens in encodings(smoke=smoke):
        unit = f"{name}, {side}"
        if not record.is_done("encode", unit):
            why = budget.why_not(_FIRST_GUESS)
            if why is not None:
                record.skip("encode", unit, why)
            else:
                record.begin("encode", unit)
                codec, transform = _encoder(name, side, heads, head_dim)
                row = _time_encoding(codec, on_device(transform, 1, device), (1, heads, tokens, head_dim), device)
                record.add("encode", unit, {"preset": name, "side": side, "head_dim": head_dim} | row)
                record.finish("encode", unit)
                record.say(f"encode {unit}: [bold]{row['vectors_per_s']:.3g}[/] vectors/s")
        done()


def _encoder(name: str, side: Side, heads: int, head_dim: int) -> tuple[E8Codec, VectorTransform]:
    if name != "hadamard":
        return fitted(name, side, heads, head_dim)
    codec = E8Codec(CodeLayout.flat(head_dim, 2), impl="triton")
    return codec, codec.fit(correlated(heads, 1024, head_dim))


def _time_encoding(
    codec: E8Codec, transform: VectorTransform, size: tuple[int, ...], device: torch.device
) -> dict[str, Any]:
    """Return the time of the kernel, and of the codec, which makes the kernel's tables each time."""
    from nexusquant_cache.codec.triton import kernels_encode as kernel  # noqa: PLC0415 - imports triton

    batch, heads, tokens, head_dim = size
    nbytes = batch * heads * tokens * (2 * head_dim + codec.bytes_per_vector)
    vectors = [torch.randn(size, dtype=torch.bfloat16, device=device) for _ in range(copies_for(nbytes, device))]
    rows = (batch, heads, tokens)
    words = torch.empty(*rows, codec.layout.bytes_per_vector, dtype=torch.uint8, device=device)
    out = operand_of(CodedSide(codec, PackedVectors(words, words.new_empty(rows)), transform))
    unit = torch.eye(head_dim, device=device).expand(batch, heads, -1, -1)
    rotation = transform.rotation
    given = kernel.encode_operand(out.plan, rotation.rotate(unit), transform.reference, rotation.block_variances)

    def call(each: Tensor) -> Callable[[], object]:
        return lambda: kernel.encode(each, given, codec.candidates, out)

    timing = time_calls([call(each) for each in vectors], device)
    codec.encode(vectors[0], transform)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    codec.encode(vectors[0], transform)
    if device.type == "cuda":
        torch.cuda.synchronize()
    whole = time.perf_counter() - start
    count = batch * heads * tokens
    return _numbers(timing, nbytes) | {
        "vectors": count,
        "vectors_per_s": 1000 * count / timing.milliseconds,
        "codec_ms": 1000 * whole,
        "codec_vectors_per_s": count / whole,
        "nvidia_smi": under_load(),
    }
