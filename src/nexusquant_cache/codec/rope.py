"""Rotary position embeddings, taken off and put back: each pair of channels turns by position x frequency.

Putting the phase back runs for every layer at every generation step, so it must cost less than the
attention it serves.  Two observations make it cheap:

* A sine per angle is far too slow, and a table of all positions weighs too much, because tables count
  as bytes held.  Writing ``position = 256 * high + low``, the phase is the complex product of a row of a
  ``high`` and a row of a ``low`` table, both a few dozen kilobytes, with angles computed in float64.
* Where many vectors share a range of positions, it is cheaper to multiply the tables out once and to
  gather from the (temporary) result than to gather twice and multiply for each vector.

Both ways do the same arithmetic on the same rows, one row of channels at a time, so the result for a
token does not depend on what is processed beside it.

What happens once for each token, such as taking the phase off, has sines of its own and no table.  So a cache
whose attention computes its own sines, as compiled functions for CPUs do, holds none.

References:
    Su et al. (2021), "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nexusquant_cache.errors import DtypeError, ShapeError

_LOW_BITS = 8
_LOW = 1 << _LOW_BITS  # positions per row of the `high` table
_CHUNK = 4096  # rows gathered at once, so that temporaries stay in the processor's cache


@dataclass(frozen=True, eq=False)
class RotaryPhase:
    """The rotation that a model's rotary embedding applies to keys, and its inverse.

    Only the rotation: a constant factor on the rotated channels (yarn's and longrope's attention
    scaling) stays in the keys.

    Attributes:
        inv_freq: Radians per position of each pair of channels, float32.  Negative ones turn backwards.
        interleaved: Pair ``i`` is channels ``(2 i, 2 i + 1)`` if true, else ``(i, i + pairs)``.
    """

    inv_freq: Float[Tensor, " pairs"]
    interleaved: bool = False
    _tables: dict[tuple[torch.device, torch.dtype], "_PhaseTables"] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def rotary_dim(self) -> int:
        """Number of leading channels that turn."""
        return 2 * self.inv_freq.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held: the frequencies and the tables built so far."""
        return self.inv_freq.nbytes + sum(table.nbytes for table in self._tables.values())

    def matches(self, other: "RotaryPhase | None") -> bool:
        """Tell whether ``other`` is the same rotation, so that layers can share one object and its tables."""
        return (
            other is not None
            and self.interleaved == other.interleaved
            and torch.equal(self.inv_freq.cpu(), other.inv_freq.cpu())
        )

    def rotate(
        self,
        x: Float[Tensor, "b h n d"],
        positions: Int[Tensor, "*shared_or_per_head n"],
        inverse: bool = False,
        out: Float[Tensor, "b h n d"] | None = None,
        *,
        by_tables: bool = False,
    ) -> Float[Tensor, "b h n d"]:
        """Turn the first `rotary_dim` channels of each vector by its position; the others pass through.

        Args:
            x: Vectors of any floating dtype.  Computed in float64 if ``x`` is float64, else in float32.
            positions: Positions from 0: ``[n]`` for all heads, or ``[b, h, n]``.
            inverse: Turn backwards.  Undoes the rotation to the rounding of the dtype.
            out: Where to write, in any floating dtype and with any strides; must not overlap ``x``.
            by_tables: Whether to take phases from tables, which are kept: for what is done at every step.

        Returns:
            ``out``, or a new tensor like ``x``.

        Raises:
            ShapeError: If ``d`` is below `rotary_dim`, or ``positions`` fit neither form.
            DtypeError: If ``positions`` are not whole numbers.
            ValueError: If a position is negative.
        """
        self._check(x, positions)
        if out is None:
            out = torch.empty_like(x)
        if x.numel() == 0:
            return out
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        phase = self._tables_for(x.device, dtype).gather(positions) if by_tables else self._fresh(positions, dtype)
        channels = x if x.dtype == dtype else x[..., : self.rotary_dim].to(dtype)
        self._turn(channels, phase, -1 if inverse else 1, out)
        out[..., self.rotary_dim :].copy_(x[..., self.rotary_dim :])
        return out

    def tables(
        self, device: torch.device, positions: int
    ) -> tuple[Float[Tensor, "256 channels"], Float[Tensor, "rows channels"]]:
        """Return rows ``(cos | sin)`` for compiled code, in float32: of positions 0 to 255, and of 0, 256, 512, ...

        The phase of position ``256 * high + low`` is the complex product of a row of each.

        Args:
            device: Where they are wanted.
            positions: How many positions, from 0 on, have to be covered.
        """
        return self._tables_for(device, torch.float32).covering(positions)

    def _fresh(self, positions: Int[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape channels"]:
        """Return the phase of each position, from a sine of its own."""
        flat = positions.reshape(-1)
        smallest, largest = (int(x) for x in torch.aminmax(flat))
        if smallest < 0:
            raise ValueError(f"positions start at 0, got {smallest}")
        inv_freq = self.inv_freq.to(positions.device).double()
        if largest - smallest < 2 * flat.numel():
            rows = _phases(torch.arange(smallest, largest + 1, device=flat.device), inv_freq, dtype)
            rows = rows.index_select(0, flat - smallest)
        else:
            rows = _phases(flat, inv_freq, dtype)
        return rows.view(*positions.shape, -1)

    def _turn(self, x: Tensor, phase: Tensor, sign: int, out: Tensor) -> None:
        """Write the rotated channels of ``x`` into ``out``."""
        cos, sin = phase.chunk(2, dim=-1)
        first, second = self._pairs(x)
        out_first, out_second = self._pairs(out)
        if out.dtype == x.dtype:
            torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
            torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
        else:  # rounded once, at the end
            out_first.copy_((first * cos).addcmul_(second, sin, value=-sign))
            out_second.copy_((second * cos).addcmul_(first, sin, value=sign))

    def _pairs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of the first and second channel of every pair."""
        pairs = self.inv_freq.shape[0]
        if self.interleaved:
            return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
        return x[..., :pairs], x[..., pairs : 2 * pairs]

    def _tables_for(self, device: torch.device, dtype: torch.dtype) -> "_PhaseTables":
        if (device, dtype) not in self._tables:
            self._tables[device, dtype] = _PhaseTables(self.inv_freq.to(device), dtype)
        return self._tables[device, dtype]

    def _check(self, x: Tensor, positions: Tensor) -> None:
        if x.shape[-1] < self.rotary_dim:
            raise ShapeError(f"vectors of {x.shape[-1]} channels cannot hold {self.rotary_dim} rotary ones")
        if positions.shape not in (x.shape[2:3], x.shape[:3]):
            raise ShapeError(
                f"positions are [n] or [b, h, n] for vectors [b, h, n, d]; got {tuple(positions.shape)} "
                f"for {tuple(x.shape)}"
            )
        if positions.dtype not in (torch.int64, torch.int32):
            raise DtypeError(f"positions are int64, got {positions.dtype}")


class _PhaseTables:
    """Rows ``(cos | sin)`` for ``position = 256 * high + low`` on one device, in one dtype."""

    def __init__(self, inv_freq: Float[Tensor, " pairs"], dtype: torch.dtype) -> None:
        self._inv_freq = inv_freq.double()
        self._dtype = dtype
        self._low = self._rows(torch.arange(_LOW, device=inv_freq.device))
        self._high = self._low[:0]

    @property
    def nbytes(self) -> int:
        return self._inv_freq.nbytes + self._low.nbytes + self._high.nbytes

    def gather(self, positions: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape channels"]:
        """Return the phase of each position."""
        flat = positions.reshape(-1)
        smallest, largest = torch.aminmax(flat)
        if smallest < 0:
            raise ValueError(f"positions start at 0, got {int(smallest)}")
        used = (int(largest) >> _LOW_BITS) + 1
        self._grow(used)
        if used * _LOW <= 2 * flat.numel():
            product = self._low.new_empty(used, *self._low.shape)
            _complex_product(self._high[:used, None], self._low, product)
            rows = product.flatten(0, 1).index_select(0, flat)
        else:
            rows = self._low.new_empty(flat.numel(), self._low.shape[1])
            for part, index in zip(rows.split(_CHUNK), flat.split(_CHUNK), strict=True):
                high = self._high.index_select(0, index >> _LOW_BITS)
                _complex_product(high, self._low.index_select(0, index & (_LOW - 1)), part)
        return rows.view(*positions.shape, -1)

    def covering(self, positions: int) -> tuple[Tensor, Tensor]:
        """Return both tables, the second long enough for so many positions."""
        self._grow((max(positions, 1) - 1 >> _LOW_BITS) + 1)
        return self._low, self._high

    def _grow(self, rows: int) -> None:
        if rows > self._high.shape[0]:
            # To a power of two, so that a cache that grows token by token rarely rebuilds the table.
            count = 1 << (rows - 1).bit_length()
            self._high = self._rows(torch.arange(count, device=self._low.device) * _LOW)

    def _rows(self, positions: Int[Tensor, " rows"]) -> Float[Tensor, "rows channels"]:
        return _phases(positions, self._inv_freq, self._dtype)


def _phases(
    positions: Int[Tensor, " rows"], inv_freq: Float[Tensor, " pairs"], dtype: torch.dtype
) -> Float[Tensor, "rows channels"]:
    """Return ``(cos | sin)`` of each position, from angles in float64."""
    angle = positions[:, None] * inv_freq
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


def _complex_product(
    a: Float[Tensor, "*#shape channels"], b: Float[Tensor, "*#shape channels"], out: Float[Tensor, "*shape channels"]
) -> None:
    """Multiply rows ``(real | imaginary)`` into ``out``, broadcasting the other axes."""
    (a_real, a_imag), (b_real, b_imag) = a.chunk(2, dim=-1), b.chunk(2, dim=-1)
    real, imag = out.chunk(2, dim=-1)
    torch.mul(a_real, b_real, out=real).addcmul_(a_imag, b_imag, value=-1)
    torch.mul(a_real, b_imag, out=imag).addcmul_(a_imag, b_real)
