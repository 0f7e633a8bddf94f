"""The laws of the block code: a bijection onto a piece of the mirrored E8, and its nearest-codeword search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lattice import is_member, mirror
from torch import Tensor

import oracles
import strategies
from nexusquant_cache.codec.blocks import decode_blocks, nearest, nearest_codes
from nexusquant_cache.codec.layout import BLOCK, CodeLayout, block_code
from nexusquant_cache.codec.packing import pack
from nexusquant_cache.codec.tables import covered_stages, decode_heads, decode_rows

BITS = (1, 2, 3, 4)
EPS = torch.finfo(torch.float32).eps


def some_codes(bits: int, count: int = 1 << 16) -> Tensor:
    """Return all codes where there are few, else random ones of the whole range with both ends."""
    size = 1 << BLOCK * bits
    if size <= count:
        return torch.arange(size)
    return torch.cat([torch.tensor([0, size - 1]), torch.randint(0, size, (count,))])


def encode(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and codewords of row-major blocks ``[n, 8]``."""
    codes, values = nearest_codes(x.T.contiguous()[None], bits)
    return codes[0], values[0].T


def many_blocks(elements: st.SearchStrategy[float] | None = None) -> st.SearchStrategy[Tensor]:
    """Draw a few awkward blocks among Gaussian ones near and beyond the levels."""
    hand = st.lists(strategies.vectors(elements), min_size=1, max_size=4).map(torch.stack)
    scale = st.sampled_from([1e-3, 0.3, 1.0, 3.0, 30.0])
    return st.builds(lambda a, b, c: torch.cat([a, b * c]), hand, strategies.normal(20, 8), scale)


@st.composite
def holes(draw: st.DrawFn, bits: int) -> Tensor:
    """Draw blocks whose channels all lie where a choice changes: at or half-way between nearby levels."""
    k = range(-(1 << bits - 1), 1 << bits - 1)
    ladder = torch.tensor(
        [oracles.magnitude(2 * i, bits) if i >= 0 else -oracles.magnitude(-2 * i - 1, bits) for i in k]
    )
    step = draw(st.sampled_from([0, 1, 2] if bits > 1 else [0, 1]))  # 2: where the second choice changes
    places = draw(st.sampled_from([1.0, -1.0])) * (ladder[step:] + ladder[: len(ladder) - step]) / 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    noise = draw(st.sampled_from([0.0, 0.003, 0.03])) * torch.randn(100, BLOCK, generator=generator)
    two = torch.randint(0, len(places), (100, 2), generator=generator)  # so that outer levels decide somewhere
    return places[two.gather(1, torch.randint(0, 2, (100, BLOCK), generator=generator))] + noise


@pytest.mark.parametrize("bits", BITS)
def test_decode_is_the_definition(bits: int) -> None:
    """Every code decodes to (-1)^(t + s) magnitude(t), in float32."""
    codes = some_codes(bits, 1 << (16 if bits < 3 else 11))
    expected = torch.tensor([oracles.decode_code(code, bits) for code in codes.tolist()])
    assert torch.equal(decode_blocks(codes, bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_encode_after_decode_is_the_identity(bits: int) -> None:
    """code(nearest(decode(c))) = c and the error is 0: for every code at 1 and 2 bits, random ones above."""
    codes = some_codes(bits)
    points = decode_blocks(codes, bits)
    found, values = encode(points, bits)
    assert torch.equal(found, codes)
    assert torch.equal(values, points)


@pytest.mark.parametrize("bits", [1, 2])
def test_codewords_are_distinct(bits: int) -> None:
    """No bit is wasted: 2^(8 b) codes are 2^(8 b) codewords."""
    assert len(decode_blocks(some_codes(bits), bits).unique(dim=0)) == 1 << BLOCK * bits


def level_indices(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the level indices ``k`` and the coset ``s`` of each code, as `codec.layout` defines them."""
    shifts, weights = torch.tensor(block_code(bits).field_shifts), 1 << torch.arange(bits)
    fields = ((codes[..., None, None] >> shifts & 1) * weights).sum(-1)
    k = torch.where(fields % 2 == 0, fields >> 1, -(fields >> 1) - 1)
    return k, k.sum(-1) & 1


@pytest.mark.parametrize("bits", BITS)
def test_points_lie_in_the_mirrored_lattice(bits: int) -> None:
    """(-1)^s (k + 1/4) - 1/4 is a point of the mirror image of E8, and k fills 2^b levels."""
    k, s = level_indices(some_codes(bits), bits)
    sign = (1 - 2 * s)[:, None]
    assert is_member(mirror(sign * (k + 0.25) - 0.25)).all()
    assert k.min() == -(1 << bits - 1)
    assert k.max() == (1 << bits - 1) - 1


@pytest.mark.parametrize("bits", BITS)
def test_values_have_the_order_of_the_uniform_points(bits: int) -> None:
    """Companding keeps signs and order: value = (-1)^s sign(k + 1/4) magnitude(t)."""
    codes = some_codes(bits)
    k, s = level_indices(codes, bits)
    uniform = (1 - 2 * s)[:, None] * (k + 0.25)
    values = decode_blocks(codes, bits)
    assert torch.equal(values.sign(), uniform.sign())
    magnitudes = torch.tensor(block_code(bits).magnitudes)
    assert torch.equal(values.abs(), magnitudes[torch.where(k >= 0, 2 * k, -2 * k - 1)])


@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
def test_no_codeword_is_nearer(bits: int, data: st.DataObject) -> None:
    """|x - nearest(x)| is the least over the whole codebook (exact search by dynamic programming)."""
    x = data.draw(st.one_of(many_blocks(), holes(bits)))
    _, values = encode(x, bits)
    found = (x.double() - values.double()).square().sum(-1)
    least = oracles.least_squared_distance(x, bits)
    # Sums of eight squares in float32, twice: the margin of a tie grows with the distance itself.
    assert (found <= least + 16 * EPS * (1 + least)).all()
    assert (found >= least - 16 * EPS * (1 + least)).all()


@pytest.mark.parametrize("bits", [1, 2])
@given(x=many_blocks(strategies.coordinates(limit=4)))
def test_code_is_that_of_the_brute_force_nearest_codeword(bits: int, x: Tensor) -> None:
    """The code is the nearest of all 2^(8 b), unless two are equally near to rounding."""
    codes, _ = encode(x, bits)
    distances = oracles.squared_distances_to_codebook(x, bits)
    best = distances.topk(2, largest=False)
    first, second = best.values.unbind(-1)
    margin = 16 * EPS * (1 + first)
    chosen = distances.gather(1, codes[:, None])[:, 0]
    assert (chosen <= first + margin).all()
    clear = second > first + 2 * margin
    assert torch.equal(codes[clear], best.indices[clear, 0])
    torch.testing.assert_close(first, oracles.least_squared_distance(x, bits))  # the oracles agree


@given(strategies.bits_per_channel, many_blocks())
def test_codes_decode_to_the_values_returned(bits: int, x: Tensor) -> None:
    """decode(code(x)) = nearest(x) bit for bit, with and without the code."""
    codes, values = encode(x, bits)
    assert torch.equal(decode_blocks(codes, bits), values)
    assert torch.equal(nearest(x.T.contiguous()[None], bits)[0][0].T, values)
    assert codes.min() >= 0
    assert codes.max() < 1 << BLOCK * bits


@given(strategies.bits_per_channel, many_blocks())
def test_nearest_is_idempotent(bits: int, x: Tensor) -> None:
    """nearest(nearest(x)) = nearest(x), with the same code."""
    codes, values = encode(x, bits)
    again, same = encode(values, bits)
    assert torch.equal(again, codes)
    assert torch.equal(same, values)


@given(strategies.bits_per_channel, st.sampled_from(strategies.RAGGED_ROWS), st.data())
def test_each_block_is_encoded_alone(bits: int, rows: int, data: st.DataObject) -> None:
    """The code of a block does not depend on the blocks beside it, in either axis."""
    x = data.draw(strategies.normal(3, BLOCK, rows))
    codes, values = nearest_codes(x, bits)
    for cut in {0, 1, rows // 2, rows - 1}:
        alone, value = nearest_codes(x[1:2, :, cut : cut + 1].contiguous(), bits)
        assert torch.equal(alone[0], codes[1, cut : cut + 1])
        assert torch.equal(value[0], values[1, :, cut : cut + 1])


@given(strategies.bits_per_channel, many_blocks(), st.integers(1, 40))
def test_ties_are_decided_by_the_values_alone(bits: int, x: Tensor, copies: int) -> None:
    """Equal blocks get equal codes wherever they stand."""
    codes, _ = encode(x, bits)
    repeated, _ = encode(x.repeat(copies, 1), bits)
    assert torch.equal(repeated, codes.repeat(copies))


@pytest.mark.parametrize("bits", [1, 2])
def test_among_equal_channels_the_first_is_moved(bits: int) -> None:
    """Where any channel could repair the parity at the same cost, the first one does."""
    x = torch.linspace(-3, 3, 401)[:, None].expand(-1, BLOCK)
    k, _ = level_indices(encode(x, bits)[0], bits)
    moved = (k != k[:, -1:]).sum(-1)
    assert set(moved.tolist()) == {0, 1}
    assert (k[moved == 1, 0] != k[moved == 1, 1]).all()


def test_a_tie_between_the_cosets_goes_to_coset_0() -> None:
    """Half-way between +M0 and +M1, the other channels at 0: k = 0 in coset 0, k = -1 in coset 1."""
    low, high = torch.tensor(block_code(1).magnitudes)
    middle = (low + high) / 2
    assert middle - low == high - middle  # exactly, in float32
    x = torch.zeros(1, BLOCK)
    x[0, 3] = middle
    distances, _ = oracles.squared_distances_to_codebook(x, 1).topk(2, largest=False)
    assert distances[0, 0] == pytest.approx(float(distances[0, 1]), rel=1e-6)
    codes, _ = encode(x, 1)
    _, s = level_indices(codes, 1)
    assert s.item() == 0


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.35), (2, 0.100), (3, 0.028), (4, 0.0075)])
def test_distortion_on_a_gaussian(bits: int, limit: float) -> None:
    """E (x - q)^2 per channel of N(0, 1), at unit scale and without any gain."""
    x = torch.randn(4, BLOCK, 10_000)
    error = (x - nearest(x, bits)[0]).square().mean((0, 1))
    sigma = float(error.std()) / len(error) ** 0.5
    assert float(error.mean()) + 2 * sigma < limit


@pytest.mark.parametrize("bits", BITS)
def test_encodes_no_rows(bits: int) -> None:
    codes, values = nearest_codes(torch.zeros(2, BLOCK, 0), bits)
    assert codes.shape == (2, 0)
    assert values.shape == (2, BLOCK, 0)


def by_definition(codes: Tensor, layout: CodeLayout) -> Tensor:
    """Decode every block of ``codes [rows, blocks]``; blocks of 0 bits are zeros."""
    blocks = [
        decode_blocks(codes[:, i], bits) if bits else torch.zeros(len(codes), BLOCK)
        for i, bits in enumerate(layout.block_bits)
    ]
    return torch.cat(blocks, -1)


def butterflies(x: Tensor, first_stride: int) -> Tensor:
    """Apply the Hadamard stages of strides 1, 2, ... below ``first_stride``, channel by channel."""
    stride = 1
    while stride < first_stride:
        index = torch.arange(x.shape[-1])
        partner, upper = x[:, index ^ stride], (index & stride) != 0
        x = torch.where(upper, partner - x, x + partner)
        stride *= 2
    return x


@given(strategies.bit_plans(), strategies.ragged_rows(), st.sampled_from([1, 2, 4, 8]), st.data())
def test_tables_are_the_definition(plan: tuple[int, ...], rows: int, stride: int, data: st.DataObject) -> None:
    """decode_rows(pack(codes)) = the decoded blocks after the first Hadamard stages, bit for bit."""
    codes = data.draw(strategies.codes_of(plan, rows))
    layout = strategies.layout_of(plan)
    stride = min(stride, covered_stages(8))
    found = decode_rows(pack(codes, layout), layout, stride)
    assert torch.equal(found, butterflies(by_definition(codes, layout), stride))


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", BITS)
def test_tables_hold_every_code(bits: int, stride: int) -> None:
    """The same for all codes at 1 and 2 bits, and every first stride a table may cover."""
    layout = CodeLayout.uniform(16, bits)
    if stride > covered_stages(16):
        stride = 1
    codes = some_codes(bits)
    codes = codes[: len(codes) // 2 * 2].view(-1, 2)
    found = decode_rows(pack(codes, layout), layout, stride)
    assert torch.equal(found, butterflies(by_definition(codes, layout), stride))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_tables_decode_any_single_row(bits: int, blocks: int) -> None:
    """A row decodes the same alone as among others, wherever it starts in memory."""
    layout = CodeLayout.uniform(BLOCK * blocks, bits)
    words = torch.randint(0, 256, (4, layout.bytes_per_vector), dtype=torch.uint8)
    together = decode_rows(words, layout)
    for i in range(4):
        assert torch.equal(decode_rows(words[i : i + 1], layout), together[i : i + 1])


@given(st.data())
def test_heads_with_plans_of_their_own(data: st.DataObject) -> None:
    """decode_heads = decode_rows of each head with its layout."""
    plans = data.draw(st.lists(st.permutations([4, 3, 2, 1, 0, 1]), min_size=1, max_size=3))
    layouts = tuple(CodeLayout(48, tuple(plan)) for plan in plans)
    heads = data.draw(st.lists(st.integers(0, len(layouts) - 1), min_size=1, max_size=4))
    tokens = data.draw(st.sampled_from([0, 1, 3, 17]))
    words = torch.randint(0, 256, (len(heads), tokens, layouts[0].bytes_per_vector), dtype=torch.uint8)
    stride = data.draw(st.sampled_from([1, 2, 4]))
    found = decode_heads(words, layouts, tuple(heads), stride)
    expected = [decode_rows(rows, layouts[head], stride) for rows, head in zip(words, heads, strict=True)]
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize(("order", "expected"), [(16, 4), (4, 4), (2, 2), (1, 1)])
def test_covered_stages(order: int, expected: int) -> None:
    """Tables hold four channels; never beyond the Sylvester factor."""
    assert covered_stages(order) == expected
