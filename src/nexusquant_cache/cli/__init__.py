"""The command line, ``nexusquant-cache``; needs the extra ``cli``."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = ("typer", "rich")
_STARTING = "starting ..."


def main() -> None:
    """Run the command line, or say what to install for it."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f'error: the command line needs {" and ".join(missing)}: pip install "nexusquant-cache[cli]"\n'
        )
        sys.exit(2)
    with _starting():
        from nexusquant_cache.cli.app import app  # noqa: PLC0415 - it imports the packages just looked for

    app(prog_name="nexusquant-cache")


@contextmanager
def _starting() -> Iterator[None]:
    """Show on a terminal that something happens: to import torch and transformers takes seconds."""
    if not sys.stderr.isatty():
        yield
        return
    sys.stderr.write(_STARTING)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write(f"\r{' ' * len(_STARTING)}\r")
        sys.stderr.flush()
