"""Find the companded levels of blocks: the constants in `nexusquant_cache.codec.layout`.

For each rate, candidates of (step, offset) of the float16 bit patterns are tried with an encoder of its own
(float64, written from the definition), each at the level unit that distorts a Gaussian least.  Writes
``benchmarks/results/levels.json``.  Takes a few minutes on one core.
"""

import argparse

import numpy as np
import torch
from _common import RESULTS
from torch import Tensor

from nexusquant_cache.evaluation.results import environment, write_json

# Candidates per rate.  Steps divisible by a high power of two let a kernel multiply a field where it lies.
CANDIDATES = {
    1: [(512, 384), (512, 320), (512, 256), (640, 448), (768, 512)],
    2: [(640, 320), (704, 352), (768, 384), (832, 416)],
    3: [(352, 176), (384, 192), (416, 208), (448, 224)],
    4: [(192, 96), (208, 104), (224, 112), (240, 120), (256, 128)],
}


def ladder(step: int, offset: int, bits: int) -> Tensor:
    """Return the ascending levels of coset 0 in units of 2**-24, float64."""
    patterns = (np.arange(1 << bits) * step + offset).astype(np.uint16)
    magnitudes = torch.from_numpy(patterns.view(np.float16).astype(np.float64) * 2.0**24)
    return torch.cat([-magnitudes[1::2].flip(0), magnitudes[::2]])


def quantize(x: Tensor, levels: Tensor) -> Tensor:
    """Return the nearest codeword of each block ``[n, 8]``, by the definition in `layout`."""
    half, best, least = len(levels) // 2, x, torch.full(x.shape[:1], torch.inf, dtype=x.dtype)
    for coset, sign in ((0, 1.0), (1, -1.0)):
        z = sign * x
        index = torch.bucketize(z, (levels[1:] + levels[:-1]) / 2)
        error = (z - levels[index]).square()
        up, down = (index + 1).clamp_max(len(levels) - 1), (index - 1).clamp_min(0)
        cost_up = torch.where(up > index, (z - levels[up]).square(), torch.inf)
        cost_down = torch.where(down < index, (z - levels[down]).square(), torch.inf)
        other = torch.where(cost_up < cost_down, up, down)
        channel = (torch.minimum(cost_up, cost_down) - error).argmin(-1, keepdim=True)
        repaired = index.scatter(-1, channel, other.gather(-1, channel))
        wrong = (index - half).sum(-1) % 2 != coset
        point = sign * levels[torch.where(wrong[:, None], repaired, index)]
        distance = (x - point).square().sum(-1)
        best = torch.where((distance < least)[:, None], point, best)
        least = torch.minimum(least, distance)
    return best


def search(x: Tensor, levels: Tensor) -> tuple[float, float]:
    """Return the unit with the least distortion on unit-variance samples, and that distortion."""
    rms = levels.square().mean().sqrt().item()
    trials = []
    for relative in np.arange(0.8, 2.2, 0.02):
        unit = float(relative) / rms
        trials.append(((x - quantize(x / unit, levels) * unit).square().mean().item(), unit))
    distortion, unit = min(trials)
    return unit, distortion


def main() -> None:
    """Run the search and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="8-channel blocks per trial")
    given = parser.parse_args()
    x = torch.randn(given.samples, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = []
    for bits, candidates in CANDIDATES.items():
        for step, offset in candidates:
            unit, distortion = search(x, ladder(step, offset, bits))
            rows.append({"bits": bits, "step": step, "offset": offset, "unit": unit, "distortion": distortion})
            print(f"{bits} bits  step {step:4d}  offset {offset:4d}  unit {unit:.4e}  distortion {distortion:.5f}")
    write_json(RESULTS / "levels.json", {"environment": environment(), "samples": given.samples, "rows": rows})


if __name__ == "__main__":
    main()
