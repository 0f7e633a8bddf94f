"""The result file: rows written one by one, so that an interrupted run goes on where it stopped."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import nexusquant_cache
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.models import LoadedModel

SECTIONS = ("quality", "needles", "facts")
_CONFIG_NOISE = ("transformers_version", "_name_or_path")  # what differs between copies of one model
_SAMPLE = 8  # weights looked at per parameter


class Results:
    """The rows of a result file, each written as soon as it is measured.

    A row of an earlier run is taken over if everything that decides it is the same as now; that is what its
    fingerprint says.  Rows of tasks and caches that are not asked for now are set aside in the file, for a later run.

    Args:
        path: The file; None keeps the rows in memory only.
        head: What the file says besides: environment, settings, caches.
        wanted: By section and task, the fingerprint of each cache's row.
        fresh: Forget the rows of earlier runs.

    Raises:
        EvaluationError: If there is a file that is no result file.
    """

    def __init__(
        self,
        path: Path | None,
        head: Mapping[str, Any],
        wanted: Mapping[str, Mapping[str, Mapping[str, str]]],
        *,
        fresh: bool = False,
    ) -> None:
        """Take over the rows of an earlier run that are still valid."""
        self._path = path
        self._wanted = wanted
        earlier = {} if fresh or path is None else read_json(path)
        self.content: dict[str, Any] = {**head, **{section: [] for section in SECTIONS}, "set_aside": {}}
        for section in SECTIONS:
            rows = [*earlier.get(section, []), *earlier.get("set_aside", {}).get(section, [])]
            aside = [row for row in rows if self._fingerprint(section, row["task"], row["cache"]) is None]
            self.content[section] = [row for row in rows if self._is_valid(section, row)]
            self.content["set_aside"][section] = aside

    def _fingerprint(self, section: str, task: str, cache: str) -> str | None:
        return self._wanted.get(section, {}).get(task, {}).get(cache)

    def _is_valid(self, section: str, row: Mapping[str, Any]) -> bool:
        wanted = self._fingerprint(section, row["task"], row["cache"])
        return wanted is not None and row.get("fingerprint") == wanted

    def missing(self, section: str, task: str) -> list[str]:
        """Return the caches not yet measured on a task."""
        done = {row["cache"] for row in self.content[section] if row["task"] == task}
        return [name for name in self._wanted[section][task] if name not in done]

    def count_missing(self) -> int:
        """Return how many rows are still to be measured."""
        return sum(len(self.missing(section, task)) for section in self._wanted for task in self._wanted[section])

    def add(self, section: str, task: str, cache: str, row: Mapping[str, Any]) -> None:
        """Add a row and write the file."""
        head = {"task": task, "cache": cache, "fingerprint": self._wanted[section][task][cache]}
        self.content[section].append(json.loads(json.dumps({**head, **row})))  # tuples become lists, as in the file
        self.write()

    def write(self) -> None:
        """Write the file."""
        if self._path is not None:
            write_json(self._path, self.content)


def environment() -> dict[str, Any]:
    """Return hardware and versions, without anything that names a machine or its folders."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "nexusquant_cache": nexusquant_cache.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def text_id(name: str, text: str) -> dict[str, str]:
    """Return what identifies a text: its name without folders, and its checksum."""
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def model_id(loaded: LoadedModel) -> dict[str, str]:
    """Return what identifies a model: its name without folders, its dtype, and a checksum of config and weights.

    A few weights of every parameter stand for all of them.
    """
    config = {key: value for key, value in loaded.model.config.to_dict().items() if key not in _CONFIG_NOISE}
    samples = {name: weight.flatten()[:_SAMPLE].tolist() for name, weight in loaded.model.named_parameters()}
    return {
        "name": Path(loaded.name).name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "checksum": fingerprint(json.dumps(config, sort_keys=True, default=str), samples),
    }


def fingerprint(*parts: object) -> str:
    """Return a short checksum of plain containers and tensors.

    Raises:
        EvaluationError: If a part holds anything else.
    """
    try:
        text = json.dumps(parts, sort_keys=True, default=_listed)
    except TypeError as error:
        msg = f"only plain containers and tensors can be compared with those of a later run: {error}"
        raise EvaluationError(msg) from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _listed(part: object) -> object:
    if isinstance(part, Tensor):
        return part.tolist()
    msg = f"got {part!r}"
    raise TypeError(msg)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return a result file, empty if there is none yet.

    Raises:
        EvaluationError: If the file holds no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not a result file ({error}); remove it or choose another place"
        raise EvaluationError(msg) from error
    if not isinstance(content, dict):
        msg = f"{path} is not a result file: it holds no JSON object; remove it or choose another place"
        raise EvaluationError(msg)
    return content
