"""Instructions of the compiled kernels, for each row they read or vector they encode; needs no GPU.

Every kernel is compiled for two generations of GPUs and disassembled with the tool that triton brings.  What counts is
the longest loop, for attention a tile of tokens, or all of a kernel without a loop; of the encoder it is all, with its
loop as often as it runs.  Clocks and bounds are a model on top of these counts, no measurement.

python benchmarks/instructions.py           # writes results/instructions.json, with a budget for each kernel
python benchmarks/instructions.py --check   # fails where a kernel has grown beyond its budget
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from _common import RESULTS
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from nexusquant_cache.codec.triton import kernels_attend as attention
from nexusquant_cache.codec.triton import kernels_decode as dense
from nexusquant_cache.codec.triton import kernels_encode as encode
from nexusquant_cache.codec.triton import kernels_greatest as greatest
from nexusquant_cache.evaluation.results import environment, read_json, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from nexusquant_cache.codec.triton.compile_case import CompileCase

RESULT = RESULTS / "instructions.json"
CAPABILITIES = (80, 90)
SLACK = 1.05  # of a budget above the count
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# An address, perhaps a predicate, the operation, its operands.
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_TARGET = re.compile(r"0x([0-9a-f]+)")
_CLASSES = {
    "matrix": "HMMA IMMA BMMA QMMA HGMMA IGMMA WARPGROUP",
    "half": "HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2",
    "float": "FFMA FMUL FADD",
    "multiply": "IMAD",
    "special": "MUFU POPC I2F F2I F2F FRND I2FP FLO BREV",
    "shared": "LDS STS LDSM STSM ATOMS MOVM",
    "global": "LDG STG LDGSTS LD ST RED ATOMG",
    "local": "LDL STL",
    "shuffle": "SHFL",
    "control": "BAR BRA BSSY BSYNC CALL DEPBAR EXIT FENCE LDGDEPBAR MEMBAR NOP RET SYNCS WARPSYNC YIELD ELECT",
    "other": "LDC S2R S2UR CS2R R2UR",
}
_CLASS = {operation: name for name, operations in _CLASSES.items() for operation in operations.split()}

# The model: what one multiprocessor of an H200 does in a clock, in instructions of a warp.
_BYTES_PER_CLOCK = 4.3e12 / (132 * 1.98e9)  # bytes of memory, at the rate it reaches
_ISSUE, _ALU, _FMA, _MULTIPLY, _SPECIAL = 4.0, 2.0, 4.0, 2.0, 0.5
_CLOCKS_PER_MATRIX_INSTRUCTION = 1.6  # at 62 % of the peak


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU: its instructions (address, operation, operands) and what it occupies."""

    instructions: list[tuple[int, str, str]]
    registers: int
    stack: int
    shared: int


def compile_cases() -> list[CompileCase]:
    """Return every specialisation to compile."""
    return [*attention.compile_cases(), *dense.compile_cases(), *encode.compile_cases(), *greatest.compile_cases()]


def compile_case(case: CompileCase, capability: int) -> Compiled:
    """Compile a kernel and disassemble it."""
    names = list(case.signature)
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    source = ASTSource(fn=case.function, signature=dict(case.signature), constexprs=constexprs, attrs=dict(case.attrs))
    kernel = compile_kernel(source, target=GPUTarget("cuda", capability, 32), options=dict(case.options))
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(kernel.asm["cubin"])
        code, usage = (_dump(option, binary) for option in ("-sass", "-res-usage"))
    found = _USAGE.search(usage)
    assert found is not None
    return Compiled(parse(code), int(found[1]), int(found[2]), kernel.metadata.shared)


def _dump(option: str, binary: Path) -> str:
    run = subprocess.run([CUOBJDUMP, option, binary], capture_output=True, text=True, check=True)  # noqa: S603 - triton's
    return run.stdout + run.stderr


def parse(code: str) -> list[tuple[int, str, str]]:
    """Return address, operation and operands of every instruction of a disassembly."""
    return [(int(found[1], 16), found[2], found[3]) for found in map(_INSTRUCTION.search, code.splitlines()) if found]


def longest_loop(instructions: Sequence[tuple[int, str, str]]) -> tuple[int, int] | None:
    """Return first and last address of the longest backward branch; None if there is none."""
    loops = []
    for address, operation, operands in instructions:
        target = _TARGET.search(operands) if operation.startswith("BRA") else None
        if target is not None and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    return max(loops, key=lambda loop: loop[1] - loop[0], default=None)


def counted(case: CompileCase, compiled: Compiled) -> Counter[str]:
    """Return how often a warp issues each operation for each row."""
    first, last = longest_loop(compiled.instructions) or (0, -1)
    # The encoder's loop runs over channels, not over rows.
    steps = case.constexprs["head_dim"] // case.constexprs["chunk"] if "chunk" in case.constexprs else None
    whole = steps is not None or last < 0
    count: Counter[str] = Counter()
    for address, operation, _ in compiled.instructions:
        if first <= address <= last:
            count[operation] += steps or 1
        elif whole:
            count[operation] += 1
    share = case.options["num_warps"] / case.rows
    return Counter({operation: times * share for operation, times in count.items()})


def by_class(count: Counter[str]) -> dict[str, float]:
    """Return the counts of operations summed by what executes them; ``alu`` is integer and logic."""
    classes: Counter[str] = Counter()
    for operation, times in count.items():
        name = operation.partition(".")[0]
        classes["uniform" if name.startswith("U") else _CLASS.get(name, "alu")] += times
    return {name: round(times, 2) for name, times in classes.most_common()}


def modelled(case: CompileCase, count: Counter[str]) -> dict[str, Any]:
    """Return clocks of an H200's multiprocessor per row, and for attention the bound of the speed-up over fp16."""
    classes = by_class(count)

    def of(*names: str) -> float:
        return sum(classes.get(name, 0.0) for name in names)

    clocks = {
        "issue": sum(count.values()) / _ISSUE,
        "alu": of("alu") / _ALU,
        "fma": of("half", "float") / _FMA + of("multiply") / _MULTIPLY,
        "special": of("special") / _SPECIAL,
        "matrix": sum(times for name, times in count.items() if name.startswith("HMMA"))
        * _CLOCKS_PER_MATRIX_INSTRUCTION,
        "shared": sum(times * _shared_words(name) for name, times in count.items()),
    }
    if any(name.startswith("HGMMA") for name in count):  # asynchronous, of any size: the model has no clocks for it
        del clocks["matrix"]
    model: dict[str, Any] = {"clocks": {name: round(value, 2) for name, value in clocks.items()}}
    if "K_SHAPE" in case.constexprs:
        sides = [case.constexprs[name] for name in ("K_SHAPE", "V_SHAPE")]
        memory = sum(side[1] + 1 for side in sides) / _BYTES_PER_CLOCK  # a row and its scale
        plain = 2 * (case.constexprs["D"] + case.constexprs["DV"]) / _BYTES_PER_CLOCK
        model |= {"memory_clocks": round(memory, 2), "fp16_memory_clocks": round(plain, 2)}
        model["bound"] = round(plain / max(memory, *clocks.values()), 2)
    return model


def _shared_words(operation: str) -> int:
    """Return the 32-bit words of each lane that an operation moves through shared memory: clocks, without conflicts."""
    name, *kinds = operation.split(".")
    if name in ("LDSM", "STSM"):
        return 4 if "4" in kinds else 2 if "2" in kinds else 1
    if name in ("LDS", "STS", "LDGSTS", "ATOMS"):
        return 4 if "128" in kinds else 2 if "64" in kinds else 1
    return 0


def measure(case: CompileCase, capability: int) -> dict[str, Any]:
    """Return the row of the result file for one kernel and GPU."""
    compiled = compile_case(case, capability)
    count = counted(case, compiled)
    return {
        "kernel": case.name,
        "capability": capability,
        "instructions": round(sum(count.values()), 2),
        "budget": round(sum(count.values()) * SLACK, 2),
        "classes": by_class(count),
        "registers": compiled.registers,
        "stack_bytes": compiled.stack,
        "shared_bytes": compiled.shared,
        "warps": case.options["num_warps"],
        "modelled_h200": modelled(case, count),
    }


def excesses(rows: Sequence[dict[str, Any]], committed: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Yield kernel, GPU, count, budget and advice for every kernel above its budget, or without one."""
    budgets = {(row["kernel"], row["capability"]): row["budget"] for row in committed}
    for row in rows:
        budget = budgets.get((row["kernel"], row["capability"]))
        if budget is None:
            advice = "new: run the script without --check and commit the file"
        elif row["instructions"] > budget:
            advice = "find what added instructions; if they are worth it, run the script without --check"
        else:
            continue
        limit = "none" if budget is None else f"{budget:.1f}"
        yield row["kernel"], f"sm_{row['capability']}", f"{row['instructions']:.1f}", limit, advice


def check(rows: Sequence[dict[str, Any]], committed: dict[str, Any], console: Console) -> bool:
    """Print the kernels that have grown beyond their budgets; tell whether there is none."""
    table = Table("kernel", "GPU", "instructions per row", "budget", "what to do", title="Kernels above their budgets")
    for row in excesses(rows, committed["rows"]):
        table.add_row(*row)
    if table.row_count:
        console.print(table)
        return False
    console.print(f"{len(rows)} kernels are within their budgets")
    return True


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the counts."""
    table = Table(
        "kernel", "GPU", "instructions per row", "registers", "stack", "modelled bound", title="Counted, not run"
    )
    for row in rows:
        bound = row["modelled_h200"].get("bound")
        table.add_row(
            row["kernel"],
            f"sm_{row['capability']}",
            f"{row['instructions']:.1f}",
            str(row["registers"]),
            str(row["stack_bytes"]),
            "" if bound is None else f"{bound:.1f}x",
        )
    console.print(table)


def main() -> None:
    """Count, and write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if a kernel is above its budget")
    parser.add_argument("--capabilities", type=int, nargs="+", choices=CAPABILITIES, default=CAPABILITIES, help="GPUs")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of kernels; others are left out")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file, or file of budgets to check against")
    given = parser.parse_args()
    everything = given.only == [""] and given.capabilities == CAPABILITIES
    if not everything and not given.check and given.output == RESULT:
        parser.error("the committed file holds all kernels: leave some out only together with --check or --output")
    console = Console(width=160)
    committed = read_json(given.output)
    if given.check and committed.get("triton") != triton.__version__:
        console.print(f"budgets are for triton {committed.get('triton')}, this is {triton.__version__}: not compared")
        return
    cases = [case for case in compile_cases() if any(part in case.name for part in given.only)]
    rows = [measure(*pair) for pair in itertools.product(cases, given.capabilities)]
    show(rows, console)
    if given.check:
        sys.exit(not check(rows, committed, console))
    write_json(given.output, {"environment": environment(), "triton": triton.__version__, "rows": rows})


if __name__ == "__main__":
    main()
