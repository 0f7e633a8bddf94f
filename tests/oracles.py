"""Slow truths that the fast code is compared with."""

import itertools
import struct
from functools import lru_cache

import torch
from torch import Tensor


def e8_roots() -> Tensor:
    """Return the 240 shortest nonzero vectors of E8 (length sqrt 2), from their textbook description."""
    signs = itertools.product((-1.0, 1.0), repeat=2)
    integer = [
        [sign * (i == a) + other * (i == b) for i in range(8)]
        for sign, other in signs
        for a, b in itertools.combinations(range(8), 2)
    ]
    half = [point for point in itertools.product((-0.5, 0.5), repeat=8) if sum(point) % 2 == 0]
    return torch.tensor(integer + [list(point) for point in half], dtype=torch.float64)


def e8_candidates(x: Tensor) -> Tensor:
    """Return lattice points ``[points, 8]`` among which one is nearest to the vector ``x``.

    A nearest point lies within distance 1, so each coordinate is one of the two neighbours of ``x_i`` in
    its coset, or exactly one away from it: then the neighbour on the other side is as near and as even.
    """
    cosets = []
    for offset in (0.0, 0.5):
        low = (x.double() - offset).floor()
        corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)), dtype=torch.float64)
        cosets.append(low + corners + offset)
    points = torch.cat(cosets)
    return points[points.sum(-1) % 2 == 0]


def distances_to_e8(x: Tensor) -> tuple[float, float, Tensor]:
    """Return the distance from ``x`` to E8, the distance to the second candidate and the nearest one."""
    points = e8_candidates(x)
    distance = (points - x.double()).square().sum(-1).sqrt()
    nearest, second = distance.topk(2, largest=False).values.tolist()
    return nearest, second, points[distance.argmin()]


# Format constants, restated: codes that are stored must decode the same for ever.  Step and offset of the
# float16 bit patterns, and the length of 2 ** -24 for a channel of unit variance.
COMPANDER = {
    1: (512, 384, 1.2476e-3),
    2: (768, 384, 5.7576e-4),
    3: (384, 192, 6.3753e-4),
    4: (224, 112, 5.2328e-4),
}


def magnitude(field: int, bits: int) -> float:
    """Return the magnitude of a field: the float16 whose bit pattern is affine in it, in level units."""
    step, offset, unit = COMPANDER[bits]
    return struct.unpack("<e", (step * field + offset).to_bytes(2, "little"))[0] * 2**24 * unit


def code_fields(code: int, bits: int) -> list[int]:
    """Return the 8 fields of a code, lowest channel first."""
    if bits == 3:  # five fields and the top bit of the last one fill the 16-bit word
        word, byte = code & 0xFFFF, code >> 16
        return [word >> 3 * i & 7 for i in range(5)] + [byte & 7, byte >> 3 & 7, (byte >> 6) | (word >> 15) << 2]
    return [code >> bits * i & (1 << bits) - 1 for i in range(8)]


def decode_code(code: int, bits: int) -> list[float]:
    """Decode one block code by the text of `nexusquant_cache.codec.layout`, in Python integers and floats."""
    fields = code_fields(code, bits)
    s = sum(field.bit_count() if bits == 1 else (field & 3).bit_count() for field in fields) % 2
    return [(-1) ** (field + s) * magnitude(field, bits) for field in fields]


@lru_cache(maxsize=2)
def codebook(bits: int) -> Tensor:
    """Return all codewords at 1 or 2 bits per channel, float64 ``[2 ** (8 * bits), 8]``."""
    return torch.tensor([decode_code(code, bits) for code in range(1 << 8 * bits)], dtype=torch.float64)


def squared_distances_to_codebook(x: Tensor, bits: int) -> Tensor:
    """Return the squared distance of every vector ``[n, 8]`` to every codeword at 1 or 2 bits, in float64."""
    channels = zip(x.double().unbind(-1), codebook(bits).unbind(-1), strict=True)
    return sum((a[:, None] - b).square() for a, b in channels)


def least_squared_distance(x: Tensor, bits: int) -> Tensor:
    """Return the squared distance of every vector ``[n, 8]`` to the nearest codeword, in float64.

    Any rate: dynamic programming over the channels.  For either sign ``s`` and either parity of the sum of
    level indices so far, it keeps the least cost, and ends with those whose parity is ``s``.
    """
    levels = [(field // 2 if field % 2 == 0 else -(field + 1) // 2, magnitude(field, bits)) for field in range(2**bits)]
    best = []
    for s in (0, 1):
        cost = [torch.zeros(len(x), dtype=torch.float64), torch.full((len(x),), torch.inf, dtype=torch.float64)]
        for channel in x.double().unbind(-1):
            step = [torch.full_like(channel, torch.inf) for _ in (0, 1)]
            for k, size in levels:
                value = size if (k >= 0) == (s == 0) else -size
                step[k % 2] = torch.minimum(step[k % 2], (channel - value).square())
            cost = [torch.minimum(cost[0] + step[p], cost[1] + step[1 - p]) for p in (0, 1)]
        best.append(cost[s])
    return torch.minimum(*best)


def pack_row(codes: list[int], block_bits: tuple[int, ...]) -> bytes:
    """Pack the codes of one vector by the text of `nexusquant_cache.codec.layout`."""
    words, tail = b"", b""
    for code, bits in zip(codes, block_bits, strict=True):
        whole = bits // 2
        words += (code & (1 << 16 * whole) - 1).to_bytes(2 * whole, "little")
        tail += (code >> 16 * whole).to_bytes(bits % 2, "little")
    return words + tail
