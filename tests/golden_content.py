"""What a golden file holds, said without the code that hashes files."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from files import CONFIGS
from torch import Tensor

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.files import verify_file
from nexusquant_cache.layer.layer import NexusQuantLayer


def load_golden(path: Path) -> NexusQuantCache:
    """Load a golden file with the config of its kind, which is the first word of its name."""
    return NexusQuantCache.load(path, config=CONFIGS[path.name.partition("-")[0]]())


def content_of(path: Path, cache: NexusQuantCache) -> dict[str, Any]:
    """Return the file's own hash, and what the loaded cache holds."""
    origins = next(layer for layer in cache.layers if isinstance(layer, NexusQuantLayer)).state.origins
    return {
        "sha256": verify_file(path).sha256,
        "seen": cache.get_seq_length(),
        "pads": None if origins is None else origins.tolist(),
        "layers": [_layer(layer, is_first=path.parent.name == "version-1") for layer in cache.layers],
    }


def _layer(layer: Any, *, is_first: bool) -> dict[str, Any]:
    """Return what a layer holds; what files of the first version only tell by what they have instead is left out."""
    if not isinstance(layer, NexusQuantLayer):
        return {"class": type(layer).__name__, "keys": _hash(layer.keys), "values": _hash(layer.values)}
    found = {
        "kept": layer.state.kept,
        "tail": [_hash(x) for x in layer.state.tail],
        "codecs": repr(layer.state.codecs[0].layout),
    }
    if layer.state.body is not None:
        positions = layer.state.body.positions.positions(torch.device("cpu"))
        found |= {"sinks": [_hash(x) for x in layer.state.sinks], "positions": _hash(positions)}
        for name, side in (("keys", layer.state.body.keys), ("values", layer.state.body.values)):
            transform = side.transform
            tensors = [side.words.stored(), side.scales.stored(), transform.mean, transform.reference, transform.plans]
            tensors += [getattr(transform.rotation, part, None) for part in ("basis", "step")]
            found[name] = [None if x is None else _hash(x) for x in tensors]
    if not is_first:
        found |= {
            "shown": list(layer.state.shown),
            "updates": [layer.state.turn.longest, layer.state.turn.short_updates],
        }
        listed = ((declared.name, x) for declared, x in layer.state.tensors() if declared.is_listed)
        found |= {name: x.int().tolist() for name, x in listed}
    return found


def _hash(x: Tensor) -> str:
    content = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{x.dtype} {list(x.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
