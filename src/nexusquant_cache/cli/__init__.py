"""The command line, ``nexusquant-cache``; needs the extra ``cli``."""

import importlib.util
import sys

_PACKAGES = ("typer", "rich")


def main() -> None:
    """Run the command line, or say what to install for it."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f'error: the command line needs {" and ".join(missing)}: pip install "nexusquant-cache[cli]"\n'
        )
        sys.exit(2)
    from nexusquant_cache.cli.app import app  # noqa: PLC0415 - it imports the packages just looked for

    app(prog_name="nexusquant-cache")
