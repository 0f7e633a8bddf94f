"""Slow truths that the fast code is compared with."""

import itertools

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
