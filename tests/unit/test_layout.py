"""Hand-computed examples and the messages of `nexusquant_cache.codec.layout`."""

import itertools

import pytest
import torch

import oracles
from nexusquant_cache.codec.blocks import nearest
from nexusquant_cache.codec.layout import (
    BLOCK,
    DISTORTION,
    BlockCode,
    CodeLayout,
    block_code,
    fill_with_bits,
    sloped_layouts,
    whole_bits,
)
from nexusquant_cache.errors import OptionError, ShapeError

BITS = (1, 2, 3, 4)


class TestBlockCode:
    @pytest.mark.parametrize("bits", BITS)
    def test_magnitudes_are_those_of_the_format(self, bits) -> None:
        expected = [oracles.magnitude(t, bits) for t in range(2**bits)]
        assert list(BlockCode(bits).magnitudes) == expected

    def test_magnitudes_by_hand(self) -> None:
        # Bit patterns 384, 1152, 1920 and 2688.  Below 2048 (subnormal, or exponent 1) the value is pattern x 2^-24;
        # 2688 = 0x0A80 has exponent 2 and mantissa 0x280: (1024 + 640) x 2.
        units = [384, 1152, 1920, 3328]
        assert BlockCode(2).magnitudes == pytest.approx([u * 5.7576e-4 for u in units], rel=1e-12)

    @pytest.mark.parametrize("bits", BITS)
    def test_magnitudes_are_strictly_increasing(self, bits) -> None:
        levels = BlockCode(bits).magnitudes
        assert levels[0] > 0
        assert all(a < b for a, b in itertools.pairwise(levels))

    @pytest.mark.parametrize("bits", BITS)
    def test_every_bit_belongs_to_one_field(self, bits) -> None:
        used = [shift for field in BlockCode(bits).field_shifts for shift in field]
        assert sorted(used) == list(range(BLOCK * bits))
        assert all(len(field) == bits for field in BlockCode(bits).field_shifts)

    def test_three_bit_fields_cross_the_word_only_in_the_last_channel(self) -> None:
        shifts = BlockCode(3).field_shifts
        assert shifts[4] == (12, 13, 14)
        assert shifts[5] == (16, 17, 18)
        assert shifts[7] == (22, 23, 15)

    @pytest.mark.parametrize(
        ("bits", "mask"), [(1, 0xFF), (2, 0xFFFF), (3, 0b11_011_011_0_011_011_011_011_011), (4, 0x33333333)]
    )
    def test_parity_mask_covers_the_lowest_two_bits_of_each_field(self, bits, mask) -> None:
        assert BlockCode(bits).parity_mask == mask

    def test_is_shared(self) -> None:
        assert block_code(2) is block_code(2)
        assert block_code(2) == BlockCode(2)

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("bits", [0, 5, -1, True, 2.5, 2.0, "2", None])
    def test_refuses_other_rates(self, bits) -> None:
        with pytest.raises(OptionError, match=f"1 to 4 whole bits per channel, got {bits!r}"):
            BlockCode(bits)


class TestCodeLayout:
    def test_uniform(self) -> None:
        layout = CodeLayout.uniform(64, 3)
        assert layout.block_bits == (3,) * 8
        assert (layout.blocks, layout.bytes_per_vector, layout.bits_per_channel) == (8, 24, 3.0)
        assert layout.is_uniform

    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128, 192, 256])
    def test_words_take_exactly_their_bits(self, head_dim, bits) -> None:
        assert 8 * CodeLayout.uniform(head_dim, bits).bytes_per_vector == bits * head_dim

    def test_mixed_plan(self) -> None:
        layout = CodeLayout(40, (3, 0, 1, 2, 4))
        assert (layout.blocks, layout.bytes_per_vector, layout.bits_per_channel) == (5, 10, 2.0)
        assert not layout.is_uniform
        # Words of blocks 0, 3 and 4 in block order, then the odd bytes of blocks 0 and 2.
        words = [(0, 0), (0, 8), (3, 0), (3, 8), (4, 0), (4, 8), (4, 16), (4, 24)]
        assert layout.byte_sources == (*words, (0, 16), (2, 0))

    def test_a_plan_of_zeros_stores_nothing(self) -> None:
        layout = CodeLayout(16, (0, 0))
        assert layout.bytes_per_vector == 0
        assert layout.byte_sources == ()
        assert not layout.is_uniform

    def test_equal_layouts_are_one_key(self) -> None:
        assert len({CodeLayout.uniform(64, 2), CodeLayout(64, (2,) * 8)}) == 1

    @pytest.mark.parametrize("head_dim", [0, -8, 4, 12, 100])
    def test_refuses_head_dims_that_are_no_multiple_of_8(self, head_dim) -> None:
        with pytest.raises(ShapeError, match=rf"positive multiple of 8, got {head_dim}: .* cannot be compressed"):
            CodeLayout.uniform(head_dim, 2)

    def test_refuses_a_plan_of_another_length(self) -> None:
        with pytest.raises(ShapeError, match="head_dim 64 has 8 blocks, the plan has 7"):
            CodeLayout(64, (2,) * 7)

    @pytest.mark.parametrize("bits", [5, -1])
    def test_refuses_impossible_bits(self, bits) -> None:
        with pytest.raises(OptionError, match=f"got {bits}"):
            CodeLayout(16, (2, bits))


class TestFlat:
    def test_whole_bits_are_uniform(self) -> None:
        assert CodeLayout.flat(64, 3) == CodeLayout.flat(64, 3.0) == CodeLayout.uniform(64, 3)

    def test_a_fraction_goes_to_the_first_blocks(self) -> None:
        # 8 blocks at 2.25 bits have 18 bits: two blocks get a third one.
        assert CodeLayout.flat(64, 2.25).block_bits == (3, 3, 2, 2, 2, 2, 2, 2)
        assert CodeLayout.flat(16, 0.5).block_bits == (1, 0)
        assert CodeLayout.flat(64, 1 / 8).block_bits == (1, 0, 0, 0, 0, 0, 0, 0)

    def test_a_mean_between_bytes_is_rounded(self) -> None:
        # 5 blocks at 2.625 bits would have 13.125 bits; a single block has whole bits only.
        assert CodeLayout.flat(40, 2.625).block_bits == (3, 3, 3, 2, 2)
        assert CodeLayout.flat(8, 2.6).block_bits == (3,)

    @pytest.mark.parametrize(("head_dim", "bits", "total"), [(64, 0.05, 0), (8, 0.5, 0), (64, 4.1, 33), (16, -1, -2)])
    def test_refuses_what_blocks_cannot_hold(self, head_dim, bits, total) -> None:
        blocks = head_dim // BLOCK
        with pytest.raises(OptionError, match=f"give {total} bits to {blocks} blocks; from 1 to {4 * blocks} are"):
            CodeLayout.flat(head_dim, bits)

    def test_refuses_head_dims_that_are_no_multiple_of_8(self) -> None:
        for head_dim in (0, -8, 12):
            with pytest.raises(ShapeError, match=f"positive multiple of 8, got {head_dim}"):
                CodeLayout.flat(head_dim, 2)


class TestFillWithBits:
    def test_by_hand(self) -> None:
        # What the next bit saves of a unit of variance: 0.6594, 0.2420, 0.0709, 0.0203.
        # Variance 4 gains 2.638, 0.968, 0.284 and variance 1 gains 0.659, 0.242: the order is 4, 4, 1, 4, 1.
        plans = [fill_with_bits([4.0, 1.0], total) for total in range(6)]
        assert plans == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (3, 2)]

    def test_ties_go_first(self) -> None:
        assert fill_with_bits([1.0] * 3, 4) == (2, 1, 1)
        assert fill_with_bits([0.0] * 3, 4) == (4, 0, 0)

    def test_a_full_block_leaves_the_rest_to_others(self) -> None:
        assert fill_with_bits([1e9, 1.0], 6) == (4, 2)

    @pytest.mark.parametrize("total", range(1, 17))
    def test_no_other_plan_has_less_distortion(self, total) -> None:
        """Greedy is optimal, since every further bit of a block saves less than the one before."""
        variances = [3.0, 1.0, 0.4, 0.02]

        def error(plan: tuple[int, ...]) -> float:
            return sum(v * DISTORTION[bits] for v, bits in zip(variances, plan, strict=True))

        plans = [plan for plan in itertools.product(range(5), repeat=4) if sum(plan) == total]
        assert error(fill_with_bits(variances, total)) == pytest.approx(min(map(error, plans)), rel=1e-12)


class TestSlopedLayouts:
    @pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 96, 128, 256])
    @pytest.mark.parametrize("bits", [0.5, 1, 1.75, 2.25, 2.625, 3, 4])
    def test_family(self, head_dim, bits) -> None:
        """One size, no plan twice, bits that never rise, and the flat one first."""
        if head_dim * bits < BLOCK:
            pytest.skip("less than a bit in one block")
        flat = CodeLayout.flat(head_dim, bits)
        family = sloped_layouts(head_dim, flat.bytes_per_vector)
        assert family[0] == flat
        assert len(set(family)) == len(family)
        for layout in family:
            assert (layout.head_dim, layout.bytes_per_vector) == (head_dim, flat.bytes_per_vector)
            assert list(layout.block_bits) == sorted(layout.block_bits, reverse=True)

    def test_get_steeper(self) -> None:
        """Each gives the first block at least as many bits as the one before it, and the last at most as many."""
        family = [layout.block_bits for layout in sloped_layouts(128, 32)]
        assert len(family) == 5
        for flat, steep in itertools.pairwise(family):
            assert steep[0] >= flat[0]
            assert steep[-1] <= flat[-1]
        assert family[-1][0] == 4
        assert family[-1][-1] == 0

    def test_there_is_one_way_to_fill_all_or_one_block(self) -> None:
        assert len(sloped_layouts(64, 32)) == 1
        assert len(sloped_layouts(8, 2)) == 1


def test_whole_bits() -> None:
    assert whole_bits(8, 2.25) == 18
    assert whole_bits(5, 2.625) == 13
    with pytest.raises(OptionError, match=r"0\.01 bits per channel give 0 bits to 8 blocks; from 1 to 32 are possible"):
        whole_bits(8, 0.01)


@pytest.mark.parametrize("bits", BITS)
def test_distortion_is_that_of_the_codes(bits: int) -> None:
    """Measured on 20 000 blocks of a unit Gaussian: within 3 percent, some five standard errors."""
    x = torch.randn(BLOCK, 20_000)
    values, _ = nearest(x, bits)
    assert float((x - values).square().mean()) == pytest.approx(DISTORTION[bits], rel=0.03)
