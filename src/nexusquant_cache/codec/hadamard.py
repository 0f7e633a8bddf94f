"""Orthogonal +-1 rotations for every head dimension that is a multiple of 8.

The Hadamard matrix of order ``d = p * 2 ** k`` is the Kronecker product of a Paley matrix of order ``p``
(1 for powers of two) with Sylvester's matrix of order ``2 ** k``.  Nothing is padded: zero padding would
spend rate on zeros.

Both directions work on vectors in place of matrices: ``k`` stages of sums and differences, then ``p``
terms per channel.  All operations are elementwise, so that a vector's result does not depend on the
vectors beside it.

References:
    Paley (1933), "On orthogonal matrices", J. Math. and Physics 12, 311-320 (both constructions).
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nexusquant_cache.codec.layout import BLOCK
from nexusquant_cache.errors import ShapeError

_FLOATS: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))


def _paley(order: int) -> Float[Tensor, "order order"] | None:
    """Return a Hadamard matrix of this order by Paley's constructions over prime fields, if there is one."""

    def jacobsthal(q: int) -> Tensor:
        squares = {i * i % q for i in range(1, q)}
        character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], **_FLOATS)
        index = torch.arange(q, device="cpu")
        return character[(index[:, None] - index) % q]

    def bordered(core: Tensor, sign: float) -> Tensor:
        q = core.shape[0]
        matrix = torch.zeros(q + 1, q + 1, **_FLOATS)
        matrix[0, 1:] = 1.0
        matrix[1:, 0] = sign
        matrix[1:, 1:] = core
        return matrix

    q = order - 1
    if q % 4 == 3 and _is_prime(q):  # noqa: PLR2004 - the residue of the theorem
        return torch.eye(order, **_FLOATS) + bordered(jacobsthal(q), -1.0)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        symmetric = bordered(jacobsthal(q), 1.0)
        plus, minus = (
            torch.tensor([[1.0, 1.0], [1.0, -1.0]], **_FLOATS),
            torch.tensor([[1.0, -1.0], [-1.0, -1.0]], **_FLOATS),
        )
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(q + 1, **_FLOATS), minus)
    return None


@lru_cache(maxsize=32)
def hadamard_factors(head_dim: int) -> tuple[Float[Tensor, "p p"], int]:
    """Return the Paley factor and the order ``2 ** k`` of the Sylvester factor of this dimension.

    The Sylvester factor is taken as large as a construction allows: its stages are the cheap part.

    Raises:
        ShapeError: If ``head_dim`` is not a multiple of 8 or no construction is known.
    """
    if head_dim <= 0 or head_dim % BLOCK:
        msg = f"head_dim must be a positive multiple of {BLOCK}, got {head_dim}"
        raise ShapeError(msg)
    sylvester = head_dim & -head_dim
    while sylvester >= 1:
        outer = head_dim // sylvester
        if outer == 1:
            return torch.ones(1, 1, **_FLOATS), sylvester
        matrix = _paley(outer)
        if matrix is not None:
            return matrix, sylvester
        sylvester //= 2
    msg = f"no Hadamard matrix of order {head_dim} is known to this package; please report the model"
    raise ShapeError(msg)


@lru_cache(maxsize=32)
def hadamard_matrix(head_dim: int) -> Float[Tensor, "d d"]:
    """Return the unnormalised +-1 matrix ``H`` with ``H @ H.T = d * I`` as float32, for tests and compiled code."""
    outer, order = hadamard_factors(head_dim)
    sylvester = torch.ones(1, 1, **_FLOATS)
    while sylvester.shape[0] < order:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], **_FLOATS), sylvester)
    return torch.kron(outer, sylvester)


@lru_cache(maxsize=64)
def random_signs(head_dim: int, seed: int, device: torch.device) -> Float[Tensor, "d"]:
    """Return ``head_dim`` signs that depend on the seed alone, on every platform and version.

    The bits are those of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
    generators", OOPSLA), because stored codes outlive the generators of any library.
    """
    mask = (1 << 64) - 1
    signs: list[float] = []
    state = seed & mask
    while len(signs) < head_dim:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        signs += [1.0 - 2.0 * (z >> bit & 1) for bit in range(64)]
    return torch.tensor(signs[:head_dim], dtype=torch.float32, device=device)


def apply_hadamard(x: Float[Tensor, "d rows"], *, transpose: bool = False) -> Float[Tensor, "d rows"]:
    """Multiply channel-major vectors by the unnormalised Hadamard matrix of their dimension."""
    outer, order = hadamard_factors(x.shape[0])
    y = hadamard_stages(x, 1, order, rows=x.shape[1])
    return _apply_outer(y, outer, order * x.shape[1], transpose=transpose)


def apply_hadamard_rows(
    x: Float[Tensor, "rows d"], *, first_stride: int = 1, transpose: bool = False
) -> Float[Tensor, "rows d"]:
    """Multiply row-major vectors by the Hadamard matrix, starting after the stages below ``first_stride``.

    The stages below a stride of 8 stay inside a block, so a look-up table of codewords can hold their
    result; the sums are the same ones in the same order.
    """
    outer, order = hadamard_factors(x.shape[1])
    y = hadamard_stages(x, first_stride, order)
    return _apply_outer(y, outer, order, transpose=transpose)


def hadamard_stages(x: Tensor, first: int, order: int, rows: int = 1) -> Tensor:
    """Apply the butterfly stages of strides ``first, 2 * first, ... < order`` along the channels.

    Args:
        x: Contiguous vectors; never written to.
        first: First stride, a power of two.
        order: Order of the Sylvester factor.
        rows: 1 if the channels are the last axis, else the length of the axes behind them.
    """
    source, spare = x.contiguous(), None
    if x.numel() == 0:
        return source
    stride = first
    while stride < order:
        target = torch.empty_like(source) if spare is None else spare
        a, b = source.view(-1, 2, stride * rows).unbind(1)
        out = target.view(-1, 2, stride * rows)
        torch.add(a, b, out=out[:, 0])
        torch.sub(a, b, out=out[:, 1])
        # The caller's tensor is never written to; from the second stage on two buffers take turns.
        spare = None if stride == first else source
        source = target
        stride *= 2
    return source


def _apply_outer(x: Tensor, outer: Tensor, inner: int, *, transpose: bool) -> Tensor:
    p = outer.shape[0]
    if p == 1 or x.numel() == 0:
        return x
    matrix = (outer.T if transpose else outer).to(x.device)
    terms = x.view(-1, p, inner)
    result = terms[:, :1] * matrix[:, 0, None]
    for j in range(1, p):
        result.addcmul_(terms[:, j : j + 1], matrix[:, j, None])
    return result.view(x.shape)
