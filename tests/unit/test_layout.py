"""Hand-computed examples and the messages of `nexusquant_cache.layout`."""

import itertools

import pytest

import oracles
from nexusquant_cache.errors import OptionError, ShapeError
from nexusquant_cache.layout import BLOCK, BlockCode, CodeLayout, block_code

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
