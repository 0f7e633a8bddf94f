"""One 8-bit logarithmic scale per vector."""

from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

STEPS_PER_OCTAVE = 16
CANDIDATES = (0.92, 1.1, 1.3)
"""Scales to try, relative to a vector's root mean square, unless others are asked for."""
_CENTRE = 128


@lru_cache(maxsize=16)
def _levels(device: torch.device) -> Float[Tensor, "256"]:
    exponent = (torch.arange(256, dtype=torch.float64, device="cpu") - _CENTRE) / STEPS_PER_OCTAVE
    levels = exponent.exp2()
    levels[0] = 0.0
    return levels.float().to(device)


@lru_cache(maxsize=16)
def _cuts(device: torch.device) -> Float[Tensor, "254"]:
    exponent = (torch.arange(1, 255, dtype=torch.float64, device="cpu") + 0.5 - _CENTRE) / STEPS_PER_OCTAVE
    return exponent.exp2().float().to(device)


def encode_scales(scales: Float[Tensor, "b h n"], reference: Float[Tensor, "b h 1"]) -> UInt8[Tensor, "b h n"]:
    """Return the byte of each scale: the nearest of a grid of 16 steps per octave around ``reference``.

    Byte ``c`` stands for ``reference * 2 ** ((c - 128) / 16)``, and 0 for a vector of zeros.  The grid reaches from
    1/245 to 245 times the reference; scales beyond it take its end.  Scales are compared with exact thresholds, so
    that the byte does not depend on a platform's ``log2``.
    """
    relative = scales / reference
    nearest = torch.bucketize(relative.contiguous(), _cuts(scales.device)) + 1
    return torch.where(relative > 0, nearest, 0).to(torch.uint8)


def decode_scales(stored: UInt8[Tensor, "b h n"], reference: Float[Tensor, "b h 1"]) -> Float[Tensor, "b h n"]:
    """Return the scale of each byte (see `encode_scales`)."""
    return _levels(stored.device).index_select(0, stored.flatten().int()).view(stored.shape) * reference
