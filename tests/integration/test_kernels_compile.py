"""Kernels compile for GPUs that are not there, and the check of their instruction counts can fail."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# One of each kernel: the script itself compiles all.
SOME = ("attend d=128 after the phase", "decode d=128, with phase", "encode d=64")


AMD = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from nexusquant_cache.codec.triton import kernels_attend as attention
from nexusquant_cache.codec.triton import kernels_decode as dense

for case in (list(attention.compile_cases())[1], list(dense.compile_cases())[0]):
    names, given = list(case.signature), {**case.constexprs, "ASM": False}
    constexprs = {(names.index(name),): value for name, value in given.items()}
    source = ASTSource(fn=case.function, signature=dict(case.signature), constexprs=constexprs, attrs=dict(case.attrs))
    kernel = compile(source, target=GPUTarget("hip", "gfx942", 64), options=dict(case.options))
    print(case.name, len(kernel.asm["hsaco"]))
"""


def run(folder, *arguments, script=(BENCHMARKS / "instructions.py",)):
    """Run a script in a process that compiles: under tests, kernels are decorated for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    environment["PYTHONPATH"] = str(BENCHMARKS.parent / "tests")
    command = [sys.executable, *script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - ours


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructions")
    done = run(folder, "--only", *SOME, "--output", str(folder / "counts.json"))
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(folder=folder, content=json.loads((folder / "counts.json").read_text()))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("instructions")


def test_kernels_compile_for_two_generations(measured):
    rows = measured.content["rows"]
    assert {row["capability"] for row in rows} == {80, 90}
    assert {row["kernel"].partition(" ")[0] for row in rows} == {name.partition(" ")[0] for name in SOME}
    for row in rows:
        assert 0 < row["instructions"] < row["budget"]
        assert row["registers"] <= 255


def test_kernels_without_inline_ptx_compile_for_amd(tmp_path):
    done = run(tmp_path, script=("-c", AMD))
    assert done.returncode == 0, done.stderr
    assert [line.rsplit(maxsplit=1)[0] for line in done.stdout.splitlines()] == [
        "attend d=64 after the phase",
        "decode d=128",
    ]


def test_what_is_launched_compiles(tmp_path):
    """By the host code as it is, for arguments as they come."""
    done = run(tmp_path, "90", script=(Path(__file__).with_name("launches.py"),))
    assert done.returncode == 0, done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines()}
    assert kernels == {
        *("_encode", "attend_kernel", "combine_kernel", "decode_kernel", "positions_kernel"),
        *("sums_kernel", "greatest_kernel"),
    }


def test_kernels_are_within_the_committed_budgets(measured, script):
    committed = json.loads(script.RESULT.read_text())
    if committed["triton"] != measured.content["triton"]:
        pytest.skip(f"budgets are for triton {committed['triton']}")
    assert list(script.excesses(measured.content["rows"], committed["rows"])) == []


def test_a_kernel_above_its_budget_fails_the_check(measured, tmp_path):
    part = measured.content["rows"][-1]
    lowered = [*measured.content["rows"][:-1], part | {"budget": 0.9 * part["instructions"]}]
    (tmp_path / "budgets.json").write_text(json.dumps(measured.content | {"rows": lowered}))
    done = run(measured.folder, "--check", "--only", *SOME, "--output", str(tmp_path / "budgets.json"))
    assert done.returncode == 1, done.stderr
    verdict = done.stdout.partition("above their budgets")[2]
    for said in (part["kernel"], f"{part['instructions']:.1f}", "find what added instructions"):
        assert said in verdict
    assert measured.content["rows"][0]["kernel"] not in verdict


def test_kernels_within_their_budgets_pass_the_check(measured, script):
    assert script.check(measured.content["rows"], measured.content, Console(quiet=True))


def test_budgets_of_another_triton_are_not_compared(script, tmp_path, monkeypatch, capsys):
    (tmp_path / "budgets.json").write_text(json.dumps({"triton": "0.1", "rows": []}))
    monkeypatch.setattr(sys, "argv", ["instructions.py", "--check", "--output", str(tmp_path / "budgets.json")])
    script.main()
    said = capsys.readouterr().out
    assert "triton 0.1" in said
    assert "not compared" in said


def test_a_kernel_without_a_budget_is_reported(script):
    row = {"kernel": "new", "capability": 90, "instructions": 10.0}
    assert [line[0] for line in script.excesses([row], [])] == ["new"]
    assert list(script.excesses([row], [row | {"budget": 10.0}])) == []
    assert list(script.excesses([row], [row | {"budget": 10.0, "capability": 80}])) != []


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;           /* 0x00000a0000017a02 */
                                                                     /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/               @P1 BRA 0x20 ;
        /*0040*/                   STS.64 [R0], R4 ;
        /*0050*/               @P0 BRA 0x10 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70;
"""


def test_the_longest_loop_counts(script):
    instructions = script.parse(LISTING)
    assert [operation for _, operation, _ in instructions][:3] == ["MOV", "LDG.E.128", "HMMA.16816.F32"]
    assert script.longest_loop(instructions) == (0x10, 0x50)
    assert script.longest_loop(instructions[-2:]) is None
    compiled = script.Compiled(instructions, 0, 0, 0)
    case = SimpleNamespace(constexprs={}, options={"num_warps": 2}, rows=4)
    assert script.counted(case, compiled).total() == 5 * 2 / 4
    loop_of_three = SimpleNamespace(constexprs={"head_dim": 96, "chunk": 32}, options={"num_warps": 1}, rows=1)
    assert script.counted(loop_of_three, compiled).total() == 3 + 5 * 3
    assert script.by_class(script.counted(case, compiled)) == {
        "control": 1.0,
        "global": 0.5,
        "matrix": 0.5,
        "shared": 0.5,
    }
