"""Blocks and their codes in plain torch: decode by definition, encode in closed form.

`decode_blocks` is the definition of `layout` written out.  `nearest_codes` finds the nearest codeword
exactly: the distance is separable, so each coset needs only the nearest level of every channel and, if
the parity of the level indices is wrong, the cheapest single move to a neighbouring level.

Between consecutive thresholds the candidates of a channel do not change: `Cells` lists them, so that
encoding is one search, a few small look-ups and one comparison per block.  Arithmetic is elementwise
and sums over channels have a fixed order: the code of a vector does not depend on what is encoded
beside it.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from nexusquant_cache.codec.layout import BLOCK, block_code


def decode_blocks(codes: Int[Tensor, "*rows"], bits: int) -> Float[Tensor, "*rows 8"]:
    """Return the codeword of each code, for channels of unit variance, in float32.

    Args:
        codes: Codes of blocks, ``8 * bits`` bits each, int64.
        bits: Bits per channel, 1 to 4.
    """
    code = block_code(bits)
    fields = _fields(codes, bits)
    parity = (fields & 3).sum(-1, keepdim=True)
    parity = (parity ^ (fields >> 1 & 1).sum(-1, keepdim=True)) & 1
    magnitudes = torch.tensor(code.magnitudes, dtype=torch.float32, device=codes.device)
    return torch.where((fields + parity) % 2 == 0, 1.0, -1.0).float() * magnitudes[fields]


def _fields(codes: Int[Tensor, "*rows"], bits: int) -> Int[Tensor, "*rows 8"]:
    shifts = torch.tensor(block_code(bits).field_shifts, device=codes.device)
    weights = 1 << torch.arange(bits, device=codes.device)
    return ((codes[..., None, None] >> shifts & 1) * weights).sum(-1)


@dataclass(frozen=True)
class Cells:
    """The candidates of a channel between consecutive thresholds.

    Rows of ``values``, ``codes``: first and second choice in coset 0, then in coset 1.
    """

    thresholds: tuple[float, ...]
    values: Float[Tensor, "4 cells"]
    odd: UInt8[Tensor, "cells"]  # parity of k of the first choice: coset 0 in bit 0, coset 1 in bit 4
    codes: Int[Tensor, "8 4*cells"]  # the field of the choice at its place in the code, by channel


@lru_cache(maxsize=64)
def cells_of(bits: int, device: torch.device) -> Cells:
    """Return the cells of a rate, made once for each device."""
    magnitudes = torch.tensor(block_code(bits).magnitudes, dtype=torch.float32, device="cpu").double()
    half = 1 << (bits - 1)
    k = torch.arange(-half, half, device="cpu")
    fields = torch.where(k >= 0, 2 * k, -2 * k - 1)
    levels = torch.where(k >= 0, 1.0, -1.0).float() * magnitudes[fields]
    ladders = [(k, fields, levels), (k.flip(0), fields.flip(0), -levels.flip(0))]

    # The first choice changes half-way between levels, the second half-way between a level's neighbours.
    cuts = [torch.cat([(x[1:] + x[:-1]) / 2, (x[2:] + x[:-2]) / 2]) for _, _, x in ladders]
    thresholds = torch.cat(cuts).sort().values
    edges = torch.cat([thresholds[:1] - 1, thresholds, thresholds[-1:] + 1])
    inside = (edges[1:] + edges[:-1]) / 2

    values, odd, chosen = [], [], []
    for index, field, ladder in ladders:
        distance = (inside[:, None] - ladder).abs()
        first = distance.argmin(-1)
        step = (torch.arange(len(ladder), device="cpu") - first[:, None]).abs()
        second = distance.masked_fill(step != 1, torch.inf).argmin(-1)
        values += [ladder[first], ladder[second]]
        chosen += [field[first], field[second]]
        odd.append(index[first] & 1)
    shifts = torch.tensor(block_code(bits).field_shifts, device="cpu")
    code_bits = (torch.cat(chosen)[None, :, None] >> torch.arange(bits, device="cpu") & 1) << shifts[:, None, :]
    return Cells(
        thresholds=tuple(thresholds.tolist()),
        values=torch.stack(values).float().to(device),
        odd=(odd[0] + (odd[1] << 4)).to(torch.uint8).to(device),
        codes=code_bits.sum(-1).to(device),
    )


def _tree_sum(x: Tensor) -> Tensor:
    """Sum the 8 channels (axis -2) in a fixed order."""
    x = x[..., :4, :] + x[..., 4:, :]
    x = x[..., :2, :] + x[..., 2:, :]
    return x[..., 0, :] + x[..., 1, :]


def _cheapest(
    cost: Float[Tensor, "*blocks 8 rows"],
) -> tuple[Float[Tensor, "*blocks rows"], UInt8[Tensor, "*blocks rows"]]:
    """Return the least cost over the 8 channels and the first channel that has it."""
    least, channel = cost[..., 0, :], torch.zeros_like(cost[..., 0, :], dtype=torch.uint8)
    for i in range(1, BLOCK):
        better = cost[..., i, :] < least
        least = torch.minimum(least, cost[..., i, :])
        channel = channel.masked_fill(better, i)
    return least, channel


def nearest(
    x: Float[Tensor, "*blocks 8 rows"], bits: int
) -> tuple[Float[Tensor, "*blocks 8 rows"], UInt8[Tensor, "*blocks 8 rows"]]:
    """Return the codeword nearest to each block and the choice that each channel makes in it.

    `codes_of` turns choices into codes; a search over scales does so for its winner only.

    Args:
        x: Channels of unit variance, float32, finite.  Axis -2 holds the 8 channels of a block: the
            channel-major order keeps every operation vectorized over vectors.
        bits: Bits per channel, 1 to 4.

    Returns:
        The values of the codeword with the least Euclidean distance, and the choices.  Of two equally near
        codewords one in coset 0 is chosen before one in coset 1.

    References:
        Conway & Sloane (1982), "Fast quantizing and decoding algorithms for lattice quantizers and
        codes", IEEE Trans. Inf. Theory 28(2), section III (decoding D_n by one repair, and unions of
        cosets); here with unequal levels and a finite number of them.
    """
    cells = cells_of(bits, x.device)
    cell = torch.zeros_like(x, dtype=torch.uint8)
    for threshold in cells.thresholds:
        cell += x > threshold
    index = cell.long()
    odd = _tree_sum(cells.odd.take(index))  # low half: coset 0, high half: coset 1

    best: tuple[Tensor, ...] | None = None
    for coset in (0, 1):
        first, second = (cells.values[2 * coset + i].take(index) for i in (0, 1))
        error = (x - first).square_()
        least, channel = _cheapest((x - second).square_().sub_(error))
        # Coset 0 wants an even sum of k, coset 1 an odd one.
        repair = (odd >> (4 * coset)) & 1 != coset
        total = _tree_sum(error) + repair * least
        channel = channel.masked_fill(~repair, BLOCK)  # BLOCK: no channel takes its second choice
        if best is None:
            best = (total, first, second, channel)
    assert best is not None
    coset1 = total < best[0]  # a tie goes to coset 0
    channel = torch.where(coset1, channel, best[3])
    order = torch.arange(BLOCK, dtype=torch.uint8, device=x.device)[:, None]
    moved = order == channel[..., None, :]
    wide = coset1[..., None, :]
    values = torch.where(moved, torch.where(wide, second, best[2]), torch.where(wide, first, best[1]))
    count = len(cells.thresholds) + 1
    steps = torch.tensor([2 * count, count], dtype=torch.uint8, device="cpu").unbind()
    return values, cell + wide * steps[0] + moved * steps[1]


def codes_of(choices: UInt8[Tensor, "*blocks 8 rows"], bits: int) -> Int[Tensor, "*blocks rows"]:
    """Return the code (int64) of each block from the choices of `nearest`."""
    cells = cells_of(bits, choices.device)
    return _tree_sum(torch.stack([cells.codes[i].take(choices[..., i, :].long()) for i in range(BLOCK)], -2))


def nearest_codes(
    x: Float[Tensor, "*blocks 8 rows"], bits: int
) -> tuple[Int[Tensor, "*blocks rows"], Float[Tensor, "*blocks 8 rows"]]:
    """Return the code (int64) and the values of the codeword nearest to each block (see `nearest`)."""
    values, choices = nearest(x, bits)
    return codes_of(choices, bits), values
