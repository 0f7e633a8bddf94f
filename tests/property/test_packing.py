"""The laws of packing: bits only, all of them, in the order of the layout."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
import strategies
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.packing import pack, unpack
from nexusquant_cache.errors import ShapeError


@given(strategies.bit_plans(), strategies.ragged_rows(), st.data())
def test_unpack_inverts_pack(plan: tuple[int, ...], rows: int, data: st.DataObject) -> None:
    """unpack(pack(codes)) = codes, for every plan and number of rows."""
    layout = strategies.layout_of(plan)
    codes = data.draw(strategies.codes_of(plan, rows))
    words = pack(codes, layout)
    assert words.dtype == torch.uint8
    assert words.shape == (rows, sum(plan))
    assert torch.equal(unpack(words, layout), codes)


@given(strategies.bit_plans(), strategies.ragged_rows(), st.data())
def test_pack_inverts_unpack(plan: tuple[int, ...], rows: int, data: st.DataObject) -> None:
    """pack(unpack(words)) = words: every row of bytes is the code of something, no bit is unused."""
    layout = strategies.layout_of(plan)
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 256, (rows, layout.bytes_per_vector), dtype=torch.uint8, generator=generator)
    assert torch.equal(pack(unpack(words, layout), layout), words)


@given(strategies.bit_plans(), st.data())
def test_bytes_are_those_of_the_format(plan: tuple[int, ...], data: st.DataObject) -> None:
    """A row is its little-endian 16-bit words in block order, then the odd bytes."""
    layout = strategies.layout_of(plan)
    codes = data.draw(strategies.codes_of(plan, 5))
    expected = [oracles.pack_row(row, plan) for row in codes.tolist()]
    assert [bytes(row.tolist()) for row in pack(codes, layout)] == expected


@given(strategies.bit_plans(), st.integers(1, 3), st.integers(0, 3), st.integers(0, 9), st.data())
def test_leading_axes_are_only_rows(
    plan: tuple[int, ...], batch: int, heads: int, tokens: int, data: st.DataObject
) -> None:
    """Packing [b, h, n, blocks] is packing its rows."""
    layout = strategies.layout_of(plan)
    codes = data.draw(strategies.codes_of(plan, batch * heads * tokens))
    shape = (batch, heads, tokens)
    words = pack(codes.view(*shape, layout.blocks), layout)
    assert torch.equal(words, pack(codes, layout).view(*shape, layout.bytes_per_vector))
    assert torch.equal(unpack(words, layout), codes.view(*shape, layout.blocks))


@pytest.mark.parametrize(
    ("plan", "codes", "row"),
    [
        ((1, 1), [0xA5, 0x3C], "a5 3c"),
        ((2, 2), [0x1234, 0xABCD], "34 12 cd ab"),
        ((3, 3), [0x123456, 0xABCDEF], "56 34 ef cd 12 ab"),
        ((4, 4), [0x12345678, 0x9ABCDEF0], "78 56 34 12 f0 de bc 9a"),
        ((3, 0, 1, 2, 4), [0x123456, 0, 0x99, 0xBEEF, 0x01020304], "56 34 ef be 04 03 02 01 12 99"),
    ],
)
def test_byte_order_by_hand(plan: tuple[int, ...], codes: list[int], row: str) -> None:
    layout = CodeLayout(8 * len(plan), plan)
    words = pack(torch.tensor([codes]), layout)
    assert bytes(words[0].tolist()).hex(" ") == row
    assert unpack(words, layout).tolist() == [codes]


def test_codes_of_empty_blocks_are_ignored() -> None:
    layout = CodeLayout(16, (0, 2))
    assert unpack(pack(torch.tensor([[77, 5]]), layout), layout).tolist() == [[0, 5]]


def test_refuses_rows_of_another_length() -> None:
    layout = CodeLayout.uniform(64, 3)
    with pytest.raises(ShapeError, match=r"expected 8 codes per vector for this layout, got shape \(2, 7\)"):
        pack(torch.zeros(2, 7, dtype=torch.int64), layout)
    with pytest.raises(ShapeError, match=r"expected 24 bytes per vector for this layout, got shape \(2, 16\)"):
        unpack(torch.zeros(2, 16, dtype=torch.uint8), layout)
