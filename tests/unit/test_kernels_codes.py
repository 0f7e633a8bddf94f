"""Half-words are decoded as the layout says, bit for bit, in the interpreter of triton."""

import os

import pytest
import torch

from nexusquant_cache.codec.blocks import decode_blocks
from nexusquant_cache.codec.layout import COMPANDER, CodeLayout, block_code
from nexusquant_cache.codec.operands import PackedOperand, side_plan
from nexusquant_cache.codec.packing import pack
from nexusquant_cache.errors import ShapeError

triton = pytest.importorskip("triton", reason="triton is for Linux")
tl = pytest.importorskip("triton.language")
codes = pytest.importorskip("nexusquant_cache.codec.triton.kernels_codes")

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton must be chosen before torch is imported",
)


def plan_of(*layouts, plans=None, heads=(1, 1)):
    head_dim = layouts[0].head_dim
    axes = torch.zeros(1, 1, head_dim, head_dim, dtype=torch.int8)
    return side_plan(torch.ones(*heads, 1), axes, torch.ones(head_dim), None, layouts, plans)


@triton.jit
def planes_kernel(  # noqa: PLR0917 - a kernel
    words, numbers, out, rows, tile: tl.constexpr, shape: tl.constexpr, asm: tl.constexpr, keys: tl.constexpr
):
    """Store the planes of a tile as channels; keys lie, values stand."""
    first = tl.program_id(0) * tile
    words += first * shape[1]
    row = first + tl.arange(0, tile)
    if keys:
        p0, p1, p2, p3 = codes.key_planes(words, rows - 1 - first, numbers, tile, shape, asm)
        channel = 4 * tl.arange(0, 2 * shape[0])[None, :]
        out += row[:, None] * (8 * shape[0]) + channel
        inside = (row < rows)[:, None] & (channel >= 0)
    else:
        p0, p1, p2, p3 = codes.value_planes(words, rows - 1 - first, numbers, tile, shape, asm)
        channel = codes.value_channels(shape[0])[:, None]
        out += row[None, :] * (8 * shape[0]) + channel
        inside = (row < rows)[None, :] & (channel >= 0)
    tl.store(out, p0, mask=inside)
    tl.store(out + 1, p1, mask=inside)
    tl.store(out + 2, p2, mask=inside)
    tl.store(out + 3, p3, mask=inside)


def bits_set(code, constraints, args, **_):
    """Compute what the instruction does: the interpreter has no inline assembly."""
    assert code == "popc.b32 $0, $1;"
    assert constraints == "=r,r"
    (x,) = args
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


def decode(words, layout, *, keys, asm=False, even=None):
    """Decode rows by the device functions, for channels of unit variance."""
    plan = plan_of(layout)
    rows, tile = words.shape[0], 512
    even = layout.bytes_per_vector % 2 == 0 if even is None else even
    shape = (plan.padded_blocks, layout.bytes_per_vector, plan.rates, even)
    out = torch.full((rows, 8 * plan.padded_blocks), torch.nan, dtype=torch.float16)
    grid = (-(-rows // tile),)
    planes_kernel[grid](words, plan.numbers, out, rows, tile=tile, shape=shape, asm=asm, keys=keys)
    units = [COMPANDER[bits][2] if bits else 0.0 for bits in layout.block_bits for _ in range(8)]
    return (out[:, : layout.head_dim].double() * 2.0**24 * torch.tensor(units, dtype=torch.float64)).float()


def expected(numbers, layout):
    zero = torch.zeros(len(numbers), 8)
    blocks = zip(numbers.unbind(1), layout.block_bits, strict=True)
    return torch.cat([decode_blocks(block, bits) if bits else zero for block, bits in blocks], 1)


def emulated(monkeypatch):
    monkeypatch.setattr(tl, "inline_asm_elementwise", bits_set)


@interpreted
@pytest.mark.parametrize("asm", [False, True], ids=["plain", "asm"])
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_all_half_words_of_a_rate(bits, keys, asm, monkeypatch):
    if asm:
        emulated(monkeypatch)
    count = 1 << 4 * bits
    half = torch.arange(count).repeat(max(1, 64 // count))
    # Each half-word stands with others of both parities beside it, in its block and in the next token.
    fields = torch.stack([half, half[torch.randperm(len(half))]])
    shifts = torch.arange(4) * bits
    eight = (fields[..., None] >> shifts & (1 << bits) - 1).permute(1, 0, 2).flatten(1)
    numbers = field_codes(eight, bits).view(-1, 8)
    layout = CodeLayout.uniform(64, bits)
    words = pack(numbers, layout)
    assert torch.equal(decode(words, layout, keys=keys, asm=asm), expected(numbers, layout))


def field_codes(fields, bits):
    """Return the code of eight fields by `layout.BlockCode.field_shifts`."""
    code = torch.zeros(len(fields), dtype=torch.int64)
    for field, shifts in zip(fields.unbind(1), block_code(bits).field_shifts, strict=True):
        for bit, shift in enumerate(shifts):
            code |= (field >> bit & 1) << shift
    return code


def random_codes(layout, rows):
    return torch.stack([torch.randint(0, 1 << 8 * bits if bits else 1, (rows,)) for bits in layout.block_bits], 1)


@interpreted
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize(
    "plan",
    [
        (4, 3, 0, 1, 2, 0, 1, 2),
        (0, 4, 3, 1, 3, 2, 2, 1, 4, 0),  # blocks padded to 16
        (2, 2, 2, 1, 1, 1, 1, 1),  # an odd row
        (1, 0, 0, 0),  # a single byte
        (0, 2),
        (4, 4, 2, 2, 4, 2, 2, 4),
        (3, 3, 4, 3),
        (0, 0, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("asm", [False, True], ids=["plain", "asm"])
def test_any_plan(plan, keys, asm, monkeypatch):
    if asm:
        emulated(monkeypatch)
    layout = CodeLayout(8 * len(plan), plan)
    numbers = random_codes(layout, 77)
    assert torch.equal(decode(pack(numbers, layout), layout, keys=keys, asm=asm), expected(numbers, layout))


@interpreted
@pytest.mark.parametrize("keys", [True, False], ids=["keys", "values"])
def test_rows_at_odd_addresses(keys):
    layout = CodeLayout(32, (3, 4, 1, 2))
    numbers = random_codes(layout, 9)
    room = torch.full((9 * layout.bytes_per_vector + 1,), 0xFF, dtype=torch.uint8)
    words = room[1:].view(9, -1)
    words.copy_(pack(numbers, layout))
    assert torch.equal(decode(words, layout, keys=keys, even=False), expected(numbers, layout))


def test_a_plan_knows_the_rates_of_its_heads_only():
    layouts = (CodeLayout(16, (2, 2)), CodeLayout(16, (3, 1)), CodeLayout(16, (4, 0)))
    plans = torch.tensor([[0, 2]], dtype=torch.uint8)
    plan = plan_of(*layouts, plans=plans, heads=(1, 2))
    assert plan.rates == 1 << 2 | 1 << 4
    assert plan.plans.tolist() == [[0, 2]]
    assert plan.padded_blocks == 8
    assert plan.step[0, 1, 8:].tolist() == [0.0] * 8


def test_layouts_of_different_sizes_are_refused():
    with pytest.raises(ShapeError, match="one size"):
        plan_of(CodeLayout(16, (2, 2)), CodeLayout(16, (3, 2)))


def test_rows_apart_are_refused():
    plan = plan_of(CodeLayout(16, (2, 2)))
    words = torch.zeros(1, 1, 3, 5, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="one behind the other"):
        PackedOperand(plan, words[..., :4], torch.zeros(1, 1, 3, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="one scale per row"):
        PackedOperand(plan, words[:, :, :, :4].contiguous(), torch.zeros(1, 1, 6, dtype=torch.uint8)[..., ::2])


def test_rows_are_even_where_all_strides_are():
    plan = plan_of(CodeLayout(16, (2, 2)), heads=(1, 2))
    room = torch.zeros(50, dtype=torch.uint8)
    for offset, even in ((0, True), (1, False)):
        words = room[offset : offset + 24].view(1, 2, 3, 4)
        scales = torch.zeros(1, 2, 3, dtype=torch.uint8)
        assert PackedOperand(plan, words, scales).even == even
