"""Everything that needs a GPU, in one command of less than ten minutes: numerics first, then times, memory, capacity.

python benchmarks/gpu.py                          # all parts, into benchmarks/results/gpu.json and docs/images
python benchmarks/gpu.py --only attention encode  # some parts
python benchmarks/gpu.py --plot                   # nothing but the pictures, from the result file, on any machine
python benchmarks/gpu.py --smoke --output FILE    # a look at the mechanics in triton's interpreter, on the CPU

The kernels are compared with float64 before anything is timed; where they differ, nothing is.  Rows are written one by
one.  A later run with the same card, versions, sources and settings goes on where an earlier one ended, and what
is not to be had in the time given is left out and named.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from _gpu_record import Budget, Record
    from rich.console import Console
    from rich.progress import Progress

PARTS = ("attention", "encode", "end_to_end", "capacity")
_MOST_JOBS = 12
_ADVICE = "numbers say nothing before that is mended (--anyway measures without regard to it)"


def arguments() -> argparse.Namespace:
    """Return the options, without importing torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--minutes", type=float, default=9.0, help="parts that do not fit are left out")
    parser.add_argument("--jobs", type=int, help="processes that compile and check kernels")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU, in triton's interpreter")
    parser.add_argument("--anyway", action="store_true", help="measure even if kernels are found to be wrong")
    parser.add_argument("--plot", action="store_true", help="draw the result file and measure nothing")
    parser.add_argument("--output", type=Path, help="result file; benchmarks/results/gpu.json by default")
    parser.add_argument("--images", type=Path, help="folder of the pictures; docs/images by default")
    given = parser.parse_args()
    if given.smoke and given.output is None:
        parser.error("--smoke measures nothing worth keeping: say where to write it with --output")
    return given


def main() -> None:
    """Check, measure, draw."""
    given = arguments()
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # is read when triton is imported, which torch does
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from _common import IMAGES, RESULTS  # noqa: PLC0415 - imports torch
    from rich.console import Console  # noqa: PLC0415

    from nexusquant_cache.evaluation.results import read_json  # noqa: PLC0415

    console = Console(stderr=True)
    given.output = given.output or RESULTS / "gpu.json"
    given.images = given.images or (given.output.parent if given.smoke else IMAGES)
    if not given.plot:
        _measure(given, console)
    _draw(read_json(given.output), given.images, console)


def _measure(given: argparse.Namespace, console: Console) -> None:
    import torch  # noqa: PLC0415
    from _gpu_model import FULL, SMOKE  # noqa: PLC0415
    from _gpu_record import Budget, Record  # noqa: PLC0415
    from _gpu_tokens import SINKS, TAIL  # noqa: PLC0415
    from rich.progress import Progress  # noqa: PLC0415

    if not given.smoke:
        if not torch.cuda.is_available() or torch.version.hip is not None:
            console.print(
                "[red]no NVIDIA GPU[/]: this needs a card of compute capability 8.0 or more, and torch with CUDA and "
                "triton. --smoke --output FILE goes through all parts on the CPU, without any meaning for speed."
            )
            sys.exit(2)
        torch.cuda.init()
    device = torch.device("cpu" if given.smoke else "cuda:0")
    torch.manual_seed(0)
    budget = Budget(given.minutes)
    sizes = SMOKE if given.smoke else FULL
    about = {"model": sizes.model, "model_dtype": str(sizes.dtype), "sinks": SINKS, "tail": TAIL}
    settings = {"smoke": given.smoke} | about
    with Progress(console=console, transient=True) as progress:

        def say(line: str) -> None:
            progress.console.print(line, soft_wrap=True, highlight=False)

        record = Record(given.output, ("numerics", *PARTS), settings, say, fresh=given.fresh)
        jobs = given.jobs or (1 if given.smoke else min(os.cpu_count() or 1, _MOST_JOBS))
        right = _numerics(record, device, jobs, progress, smoke=given.smoke)
        if not right:
            console.print("[red]the kernels are wrong on this device[/]; " + _ADVICE)
            if not given.anyway:
                sys.exit(1)
        for part in given.only:
            _run(part, record, budget, device, progress, smoke=given.smoke)
    _show_targets(record.content, console)
    console.print(f"{given.output} written, {budget.left:.0f} s left")
    if not right:
        sys.exit(1)


def _numerics(record: Record, device: torch.device, jobs: int, progress: Progress, *, smoke: bool) -> bool:
    """Compare the kernels with float64; say what differs."""
    from _gpu_numerics import checks, run_all  # noqa: PLC0415
    from rich.markup import escape  # noqa: PLC0415

    if record.is_done("numerics", "all"):
        return True
    record.begin("numerics", "all")
    wanted = checks(smoke=smoke)
    task = progress.add_task("numerics", total=len(wanted))
    rows = run_all(wanted, device, jobs, lambda: progress.advance(task))
    failed = [row for row in rows if not row["passed"]]
    for row in rows:
        record.add("numerics", "all", row)
    for row in failed:
        differs = f"{row['what']}: {row['error']}, allowed {row['allowed']}; {row['where']}"
        record.say(f"[red]{row['check']}[/] ({row['preset']}): {escape(differs)}")
    if not failed:
        record.finish("numerics", "all")
        record.say(f"{len(rows)} comparisons of kernels with float64 passed")
    return not failed


def _run(  # noqa: PLR0913 - what every part needs
    part: str, record: Record, budget: Budget, device: torch.device, progress: Progress, *, smoke: bool
) -> None:
    """Measure one part."""
    import _gpu_attention as kernels  # noqa: PLC0415
    import _gpu_model as model  # noqa: PLC0415

    sizes = model.SMOKE if smoke else model.FULL
    task = progress.add_task(part, total=None)

    def started(total: int) -> None:
        progress.update(task, total=total, completed=0)

    def done() -> None:
        progress.advance(task)

    if part == "attention":
        started(len(kernels.units(smoke=smoke)))
        kernels.measure(record, budget, device, done, smoke=smoke)
    elif part == "encode":
        started(len(kernels.encodings(smoke=smoke)))
        kernels.measure_encoding(record, budget, device, done, smoke=smoke)
    elif part == "end_to_end":
        started(model.steps_in(sizes))
        model.measure(record, budget, device, done, sizes)
    else:
        started(1 + len(model.capacities(sizes)))
        model.measure_capacity(record, budget, device, done, sizes)


def _draw(content: dict[str, Any], folder: Path, console: Console) -> None:
    try:
        from _gpu_plot import plot_all  # noqa: PLC0415
    except ImportError as error:
        console.print(f"no pictures: {error}; --plot draws them later")
        return
    if not content:
        console.print("there are no results to draw")
        return
    for path in plot_all(content, folder):
        console.print(f"{path} drawn")


def _show_targets(content: dict[str, Any], console: Console) -> None:
    from rich.table import Table  # noqa: PLC0415

    table = Table("target", "wanted", "found", "", title="Targets of the issue, for a card like the H200")
    for target in content["targets"]:
        found = "" if target["found"] is None else f"{target['found']:.3g}"
        bound = "at most" if target["at_most"] else "at least"
        table.add_row(target["what"], f"{bound} {target['wanted']:.3g}", found, target["verdict"])
    console.print(table)


if __name__ == "__main__":
    main()
