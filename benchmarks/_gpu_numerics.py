"""Are the kernels right on this device: against float64 on the CPU, and one decoder against the other, bit for bit."""

from __future__ import annotations

import math
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from _gpu_tokens import (
    KEYS,
    Keys,
    Shape,
    attended,
    correlated,
    decoded,
    fitted,
    on_cpu,
    on_device,
    operand_of,
    random_held,
    rope_of,
    turned,
)

from nexusquant_cache.codec.base import PackedVectors
from nexusquant_cache.codec.blocks import decode_blocks
from nexusquant_cache.codec.held import CodedSide
from nexusquant_cache.codec.layout import COMPANDER, CodeLayout, block_code
from nexusquant_cache.codec.operands import side_plan
from nexusquant_cache.codec.packing import pack
from nexusquant_cache.codec.softmax import Softmax

if TYPE_CHECKING:
    from torch import Tensor

    from nexusquant_cache.codec.held import HeldTokens

# Operands are rounded to float16 and outputs to the dtype: a few roundings of each.
_ATTENTION = {torch.float16: 4e-3, torch.bfloat16: 8e-3}
_DECODE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}
_ALIKE = 0.995  # of the rows; the others are at a tie
_WORST_TIE = 1e-3
_BEYOND_INT32 = 1 << 31
_TILE = 512


_NONE = Shape(1, 1)


@dataclass(frozen=True)
class Check:
    """One comparison; what is compiled for it is what makes it slow.

    Attributes:
        kind: ``"half-words"``, ``"attention"``, ``"decode"`` or ``"encode"``.
        shape: Of the layer; `Shape.query_heads` is what ``groups`` say.
        keys: How keys are coded.
        dtype: Of queries and output, or of vectors.
        groups: Query heads for each KV head, one after the other.
        preset: Whose rates.
        far_apart: Whether heads lie so far apart that 32 bits cannot tell the distance.
    """

    kind: str
    shape: Shape = _NONE
    keys: Keys = "post-RoPE"
    dtype: torch.dtype = torch.bfloat16
    groups: tuple[int, ...] = (4,)
    preset: str = "balanced"
    far_apart: bool = False

    @property
    def name(self) -> str:
        """For messages."""
        shape, dtype = self.shape, str(self.dtype).removeprefix("torch.")
        if self.kind == "half-words":
            return "half-words: all of every rate"
        far = ", heads far apart" if self.far_apart else ""
        return f"{self.kind}: {shape.batch} x {shape.tokens} x {shape.head_dim}, {self.keys}, {dtype}{far}"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: What was compared.
        error: How far apart they are.
        allowed: How far they may be.
        where: The worst place.
    """

    what: str
    error: float
    allowed: float
    where: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is small enough; an error that is no number is not."""
        return self.error <= self.allowed


def checks(*, smoke: bool) -> list[Check]:
    """Return all checks, slow ones first."""
    if smoke:
        shape = Shape(1, 150, 1, 2, 64)
        return [
            Check("half-words"),
            Check("attention", shape, "pre-RoPE, evicted", torch.bfloat16, (2,)),
            Check("decode", shape, "pre-RoPE", torch.float32),
            Check("encode", Shape(1, 40, 1, 1, 64)),
        ]
    found = [Check("encode", Shape(2, 3001, 2, 2, head_dim)) for head_dim in (256, 128, 96, 64)]
    found.append(Check("encode", Shape(2, 3001, 2, 2, 128), dtype=torch.float16, preset="quant"))
    for head_dim in (256, 128, 96, 64):
        shape = Shape(2, 1001, 2, 2, head_dim)
        for keys in KEYS:
            found += [Check("attention", shape, keys, dtype, (1, 4, 8)) for dtype in _ATTENTION]
            found.append(Check("decode", shape, keys, torch.bfloat16))
        found.append(Check("decode", shape, "pre-RoPE", torch.float32))
    long = Shape(1, 70_001, 2, 2, 128)
    for keys in KEYS:
        found.append(Check("attention", long, keys, groups=(4,)))
        found.append(Check("attention", long, keys, groups=(4,), preset="quant"))
        found.append(Check("attention", Shape(1, 1001, 2, 2, 128), keys, groups=(4,), far_apart=True))
    found += [Check("decode", Shape(1, 1001, 2, 2, 128), "pre-RoPE", far_apart=True), Check("half-words")]
    return found


def run_all(wanted: list[Check], device: torch.device, jobs: int, done: Callable[[], None]) -> list[dict[str, Any]]:
    """Return the findings of all checks, made by several processes, since most of the time compiles kernels."""
    rows = []
    for check, found in _results(wanted, device, jobs):
        done()
        for finding in found:
            what = {"check": check.name, "preset": check.preset}
            rows.append(what | asdict(finding) | {"passed": finding.passed, "error": _plain(finding.error)})
    return rows


def _results(wanted: list[Check], device: torch.device, jobs: int) -> Iterator[tuple[Check, list[Finding]]]:
    if jobs == 1:
        yield from ((check, run_check(check, device.type)) for check in wanted)
        return
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), **one_thread) as pool:
        tasks = {pool.submit(run_check, check, device.type): check for check in wanted}
        for task in as_completed(tasks):
            error = task.exception()
            # A process that was killed takes the others with it.
            yield tasks[task], task.result() if error is None else [_failure(error)]


def run_check(check: Check, device: str) -> list[Finding]:
    """Return what a check finds; what it raises is a failure like any other."""
    torch.manual_seed(0)
    try:
        return list(_KINDS[check.kind](check, torch.device(device)))
    except Exception as error:  # noqa: BLE001 - told with the other findings
        return [_failure(error)]


def _failure(error: BaseException) -> Finding:
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = "".join(f"{os.path.basename(each.filename)}:{each.lineno}: " for each in last)  # noqa: PTH119 - a name
    return Finding(f"{place}{type(error).__name__}: {error}"[:600], math.inf, 0.0)


def _plain(error: float) -> float | str:
    """Return what JSON can say."""
    return error if math.isfinite(error) else str(error)


def _half_words(check: Check, device: torch.device) -> Iterator[Finding]:
    """Decode every half-word of every rate, beside others of both parities, and rows of odd length and all rates."""
    del check
    for bits in (1, 2, 3, 4):
        layout = CodeLayout.uniform(64, bits)
        count = 1 << 4 * bits
        half = torch.arange(count).repeat(max(1, 64 // count))
        if device.type == "cpu":
            half = half[:: max(1, len(half) // 512)]  # the interpreter takes its time
        fields = torch.stack([half, half[torch.randperm(len(half))]])
        numbers = _codes_of((fields[..., None] >> torch.arange(4) * bits & (1 << bits) - 1).permute(1, 0, 2), bits)
        yield from _planes(layout, numbers.view(-1, layout.blocks), device)
    for plan in ((4, 3, 0, 1, 2, 0, 1, 2), (2, 2, 2, 1, 1, 1, 1, 1), (0, 4, 3, 1, 3, 2, 2, 1, 4, 0, 0, 3)):
        layout = CodeLayout(8 * len(plan), plan)
        numbers = torch.stack([torch.randint(0, 1 << 8 * bits if bits else 1, (777,)) for bits in plan], 1)
        yield from _planes(layout, numbers, device)


def _codes_of(fields: Tensor, bits: int) -> Tensor:
    """Return the codes of blocks of two times four fields, by the definition."""
    eight = fields.flatten(1)
    codes = torch.zeros(len(eight), dtype=torch.int64)
    for field, shifts in zip(eight.unbind(1), block_code(bits).field_shifts, strict=True):
        for bit, shift in enumerate(shifts):
            codes |= (field >> bit & 1) << shift
    return codes


def _planes(layout: CodeLayout, numbers: Tensor, device: torch.device) -> Iterator[Finding]:
    """Compare both decoders, for keys and for values, with the definition."""
    from _gpu_planes import planes_kernel  # noqa: PLC0415 - imports triton

    unit = torch.zeros(1, 1, layout.head_dim, layout.head_dim, dtype=torch.int8, device=device)
    plan = side_plan(torch.ones(1, 1, 1, device=device), unit, torch.ones(layout.head_dim), None, (layout,), None)
    words, rows = pack(numbers, layout).to(device), len(numbers)
    even = layout.bytes_per_vector % 2 == 0
    shape = (plan.padded_blocks, layout.bytes_per_vector, plan.rates, even)
    bits = layout.block_bits
    units = [COMPANDER[each][2] if each else 0.0 for each in bits for _ in range(8)]
    nothing = torch.zeros(rows, 8)
    expected = torch.cat([decode_blocks(numbers[:, i], b) if b else nothing for i, b in enumerate(bits)], 1)
    for keys in (True, False):
        for asm in (False, True) if device.type == "cuda" else (False,):
            out = torch.full((rows, 8 * plan.padded_blocks), torch.nan, dtype=torch.float16, device=device)
            planes_kernel[(-(-rows // _TILE),)](
                words, plan.numbers, out, rows, TILE=_TILE, SHAPE=shape, KEYS=keys, ASM=asm
            )
            levels = out[:, : layout.head_dim].cpu().double() * 2.0**24
            found = (levels * torch.tensor(units, dtype=torch.float64)).float()
            wrong = (found != expected).nonzero()
            where = ""
            if len(wrong):
                row, channel = wrong[0].tolist()
                where = f"row {row}, channel {channel}: {found[row, channel]} in place of {expected[row, channel]}"
            what = f"{'keys' if keys else 'values'}, bits {bits}, {'PTX' if asm else 'plain'} decoder, wrong channels"
            yield Finding(what, float(len(wrong)), 0.0, where)


def _attention(check: Check, device: torch.device) -> Iterator[Finding]:
    """Compare attention to packed and exact tokens; a captured step gives the same bits."""
    held = random_held(check.shape, check.keys, check.preset, check.dtype, device)
    if check.far_apart:
        held = _far_apart(held)
    batch, heads, head_dim = check.shape.batch, check.shape.kv_heads, check.shape.head_dim
    options = Softmax(head_dim**-0.5)
    for group in check.groups:
        query = torch.randn(batch, heads * group, 1, head_dim, device=device).to(check.dtype)
        found = _attend(query, held, options)
        expected = attended(query, held, options.scaling)
        yield _distance(f"attention, {group} queries for each head", found, expected, _ATTENTION[check.dtype])
        if device.type == "cuda":
            again = _replayed(query, held, options)
            yield Finding("a captured step, different numbers", float((again != found).sum()), 0.0)


def _attend(query: Tensor, held: HeldTokens, options: Softmax) -> Tensor:
    from nexusquant_cache.codec.triton.attend import attend  # noqa: PLC0415 - imports triton

    found = attend(query, held, None, options)
    assert found is not None
    return found[0]


def _replayed(query: Tensor, held: HeldTokens, options: Softmax) -> Tensor:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _attend(query, held, options)
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return out


def _far_apart(held: HeldTokens) -> HeldTokens:
    """Return the same codes in buffers whose second head lies more than 2 ** 31 bytes behind the first."""
    assert held.keys is not None
    assert held.values is not None
    return replace(held, keys=_apart(held.keys), values=_apart(held.values))


def _apart(side: CodedSide) -> CodedSide:
    def moved(stored: Tensor) -> Tensor:
        batch, heads, tokens, *rest = stored.shape
        room = _BEYOND_INT32 // math.prod(rest) // 16 * 16 + 1024
        buffer = torch.empty((batch, heads, room, *rest), dtype=stored.dtype, device=stored.device)
        buffer[:, :, :tokens] = stored
        return buffer[:, :, :tokens]

    # Scales would need as much room again, and their distances are computed alike.
    return replace(side, packed=PackedVectors(moved(side.packed.words), side.packed.scales))


def _decode(check: Check, device: torch.device) -> Iterator[Finding]:
    """Compare decoded keys, with their phase, and decoded values."""
    from nexusquant_cache.codec.triton import kernels_decode as dense  # noqa: PLC0415 - imports triton

    held = random_held(check.shape, check.keys, check.preset, torch.float16, device)
    if check.far_apart:
        held = _far_apart(held)
    assert held.keys is not None
    assert held.values is not None
    rope, places = rope_of(held)
    expected = {"keys": turned(decoded(held.keys), held), "values": decoded(held.values)}
    for name, side in (("keys", held.keys), ("values", held.values)):
        out = torch.full(expected[name].shape, torch.nan, dtype=check.dtype, device=device)
        given = {"rope": rope, "places": places} if name == "keys" else {}
        dense.decode(operand_of(side), out, **given)
        yield _distance(f"decoded {name}", out, expected[name], _DECODE[check.dtype])


def _encode(check: Check, device: torch.device) -> Iterator[Finding]:
    """Compare codes with those of the torch encoder: the same, or as good where two codewords are equally near."""
    shape = check.shape
    for side in ("keys", "values"):
        codec, transform = fitted(check.preset, side, shape.kv_heads, shape.head_dim)
        vectors = torch.cat(
            [correlated(shape.kv_heads, shape.tokens, shape.head_dim, seed) for seed in range(shape.batch)]
        ).to(check.dtype)
        found = codec.encode(vectors.to(device), on_device(transform, shape.batch, device))
        there = CodedSide(codec, found, on_device(transform, shape.batch, device))
        plain = on_cpu(there)
        expected = plain.codec.encode(vectors, plain.transform)
        words, scales = found.words.cpu(), found.scales.cpu()
        same = (words == expected.words).all(-1) & (scales == expected.scales)
        yield Finding(f"{side}: rows unlike those of the torch encoder", 1 - same.double().mean().item(), 1 - _ALIKE)
        ties = [
            (decoded(replace(plain, packed=each)) - vectors.double()).norm(dim=-1)[~same]
            for each in (PackedVectors(words, scales), expected)
        ]
        worse = ((ties[0] - ties[1]) / ties[1]).max().item() if len(ties[0]) else 0.0
        yield Finding(f"{side}: error of those rows, relative to the torch encoder's", worse, _WORST_TIE)


def _distance(what: str, found: Tensor, expected: Tensor, allowed: float) -> Finding:
    """Return the distance of the worst row, relative to its length (or to the mean length, if that is more)."""
    apart = (found.double().cpu() - expected).norm(dim=-1)
    lengths = expected.norm(dim=-1)
    errors = (apart / lengths.clamp_min(lengths.mean())).nan_to_num(torch.inf)
    place = [int(each) for each in torch.unravel_index(errors.argmax(), errors.shape)]
    return Finding(what, errors.max().item(), allowed, f"worst at {place} of {list(errors.shape)}")


_KINDS: dict[str, Callable[[Check, torch.device], Iterator[Finding]]] = {
    "half-words": _half_words,
    "attention": _attention,
    "decode": _decode,
    "encode": _encode,
}
