"""The result file of `gpu.py`: what it ran on, rows written one by one, what was left out, and the targets."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from _common import ROOT
from rich.markup import escape

from nexusquant_cache.evaluation.results import environment, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_CODE = ("src/nexusquant_cache/**/*.py", "benchmarks/gpu.py", "benchmarks/_gpu_*.py")
_ABOUT_THE_CARD = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
_UNDER_LOAD = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


class Budget:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def why_not(self, seconds: float) -> str | None:
        """Return why something that takes so long is left out; None if it fits."""
        if seconds <= self.left:
            return None
        return f"about {seconds:.0f} s needed, {max(self.left, 0):.0f} s left"


def smi(fields: Sequence[str]) -> dict[str, str]:
    """Return what nvidia-smi says of the card; empty without it, and without what it does not know."""
    program = shutil.which("nvidia-smi")
    if program is None or not torch.cuda.is_available():
        return {}
    index = torch.cuda.current_device()
    command = [program, f"--id={index}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603 - found above
    except (OSError, subprocess.TimeoutExpired):
        return {}
    told = [each.strip() for each in run.stdout.strip().split(",")]
    if run.returncode or len(told) != len(fields):
        return {}
    return {name: value for name, value in zip(fields, told, strict=True) if "N/A" not in value}


def under_load() -> dict[str, str]:
    """Return clocks, power and temperature right after a measurement."""
    return smi(_UNDER_LOAD)


def machine() -> dict[str, Any]:
    """Return hardware and versions, and a checksum of the code that is measured."""
    found = environment() | {"triton": triton.__version__, "cuda": torch.version.cuda, "code": _checksum()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties()
        found |= {
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "memory_bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
            "nvidia_smi": smi(_ABOUT_THE_CARD),
        }
    return found


def _checksum() -> str:
    code = hashlib.sha256()
    for path in sorted(path for pattern in _CODE for path in ROOT.glob(pattern)):
        code.update(path.read_bytes())
    return code.hexdigest()[:16]


class Record:
    """The content of the result file, written after every measurement.

    Attributes:
        content: What is written.
        say: Shows a line.
    """

    def __init__(
        self,
        path: Path,
        parts: Sequence[str],
        settings: Mapping[str, Any],
        say: Callable[[str], None],
        *,
        fresh: bool,
    ) -> None:
        """Take over what an earlier run on the same card, with the same versions, code and settings, has measured."""
        self._path = path
        self.say = say
        self.content: dict[str, Any] = {
            "environment": machine(),
            "settings": json.loads(json.dumps(settings)),
            "complete": [],
            **{part: [] for part in parts},
            "skipped": [],
            "targets": [],
        }
        earlier = {} if fresh else read_json(path)
        if all(earlier.get(key) == self.content[key] for key in ("environment", "settings")):
            self.content |= {key: earlier[key] for key in ("complete", *parts)}

    def is_done(self, part: str, unit: str) -> bool:
        """Tell whether an earlier run has measured a unit: what is compared with each other, in one run."""
        return [part, unit] in self.content["complete"]

    def begin(self, part: str, unit: str) -> None:
        """Forget what an interrupted run has measured of a unit."""
        self.content[part] = [row for row in self.content[part] if row["unit"] != unit]

    def add(self, part: str, unit: str, row: Mapping[str, Any]) -> None:
        """Add a row and write the file."""
        self.content[part].append({"unit": unit, **row})
        self.write()

    def finish(self, part: str, unit: str) -> None:
        """Mark a unit as measured, so that a later run leaves it alone."""
        self.content["complete"].append([part, unit])
        self.write()

    def skip(self, part: str, what: str, why: str) -> None:
        """Say that something is left out."""
        self.content["skipped"].append({"part": part, "what": what, "why": why})
        self.say(escape(f"left out: {part}: {what}: {why}"))
        self.write()

    def write(self) -> None:
        """Write the file."""
        self.content["targets"] = [target.judged(self.content) for target in TARGETS]
        write_json(self._path, self.content)


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        what: What is asked for.
        wanted: The number.
        find: Returns all numbers that have to reach it.
        at_most: Whether smaller is better.
    """

    what: str
    wanted: float
    find: Callable[[Mapping[str, Any]], Sequence[float]]
    at_most: bool = False

    def judged(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the worst number found, and whether it is good enough; None where nothing was measured."""
        found = self.find(content)
        worst = (max if self.at_most else min)(found, default=None)
        met = None if worst is None else (worst <= self.wanted if self.at_most else worst >= self.wanted)
        return {
            "what": self.what,
            "wanted": self.wanted,
            "at_most": self.at_most,
            "found": worst,
            "verdict": "not measured" if met is None else "met" if met else "missed",
        }


def _ratios(batch: int, context: int, *keys: str) -> Callable[[Mapping[str, Any]], list[float]]:
    """Return what finds the ratios to SDPA of ``balanced`` codes with heads of 128 channels."""
    wanted = {"batch": batch, "context": context, "head_dim": 128, "preset": "balanced"}

    def find(content: Mapping[str, Any]) -> list[float]:
        rows = [row for row in content["attention"] if wanted.items() <= row.items() and row["keys"] in keys]
        return [row["ratio"] for row in rows]

    return find


def _steps(content: Mapping[str, Any], *, batch: int = 0) -> list[float]:
    """Return how many times faster than with `DynamicCache` a step on codes is."""
    rows = [row for row in content["end_to_end"] if row.get("on_codes") and row["context"] >= 4096]
    return [row["ratio"] for row in rows if batch in (0, row["batch"])]


def _prefills(content: Mapping[str, Any], size: str) -> list[float]:
    rows = [row for row in content["end_to_end"] if row["what"] == "prefill" and row["context"] == 131_072]
    return [row[size] for row in rows if row.get(size) is not None]


TARGETS = (
    Target("attention, post-RoPE codes, 1 x 32k: times SDPA", 2.3, _ratios(1, 32_768, "post-RoPE")),
    Target("attention, post-RoPE codes, 1 x 128k: times SDPA", 3.0, _ratios(1, 131_072, "post-RoPE")),
    Target("attention, post-RoPE codes, 32 x 8k: times SDPA", 4.0, _ratios(32, 8192, "post-RoPE")),
    Target("attention, pre-RoPE codes, 1 x 128k: times SDPA", 2.0, _ratios(1, 131_072, "pre-RoPE")),
    Target("the same with evicted tokens", 2.0, _ratios(1, 131_072, "pre-RoPE, evicted")),
    Target(
        "encode, vectors of 128 per second",
        1e9,
        lambda content: [row["vectors_per_s"] for row in content["encode"] if row["head_dim"] == 128],
    ),
    Target("end to end from 4k up: times DynamicCache", 1.0, _steps),
    Target("end to end, 8 x 32k: times DynamicCache", 1.5, lambda content: _steps(content, batch=8)),
    Target(
        "peak of a 128k prefill without the weights, of DynamicCache's",
        1 / 8,
        lambda content: _prefills(content, "peak_share"),
        at_most=True,
    ),
    Target(
        "peak of the cache alone in a 128k prefill, of DynamicCache's",
        1 / 8,
        lambda content: _prefills(content, "cache_peak_share"),
        at_most=True,
    ),
)
"""What the kernels shall reach on a card like the H200."""
