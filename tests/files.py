"""Files of saved caches for the tests: small valid ones, and forged ones whose hash is right."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import zstandard
from feeding import feed
from integration.tiny import SMALL, balanced, generate, logits, prompt, random_states, tiny_config, tiny_llama
from torch import Tensor
from transformers import PreTrainedConfig, Qwen2Config

from nexusquant_cache import FormatError, NexusQuantCache
from nexusquant_cache.files import convert_file
from nexusquant_cache.files.contents import DTYPES, FileTensor, tensors_of
from nexusquant_cache.files.packing import arrange
from nexusquant_cache.files.schema import from_json

GOLDEN = Path(__file__).parent / "golden"
Entry = tuple[str, str, list[int], bytes]  # name, dtype, shape, bytes


def compressed() -> NexusQuantCache:
    """Return a cache that has compressed a prompt and some generated tokens; two layers."""
    model = tiny_llama()
    made = balanced(model, transform="principal", when="post_prefill")
    generate(model, prompt(60), made)
    return made


def padded() -> NexusQuantCache:
    """Return a cache of two rows, one of them padded, so that it keeps fewer tokens than the other."""
    model = tiny_llama()
    made = balanced(model, when="post_prefill")
    generate(model, prompt(50, batch=2), made, attention_mask=left_padded(6, 0))
    return made


def short() -> NexusQuantCache:
    """Return a cache of three rows, of which one has fewer tokens than stay exact."""
    model = tiny_llama()
    made = balanced(model, when="post_prefill")
    generate(model, prompt(50, batch=3), made, tokens=20, attention_mask=left_padded(44, 6, 0))
    return made


def waiting() -> NexusQuantCache:
    """Return a cache whose prompt of two rows, one of them padded, waits for its compression."""
    model = tiny_llama()
    made = balanced(model, when="post_prefill")
    logits(model, prompt(50, batch=2), made, attention_mask=left_padded(6, 0))
    return made


def reading() -> NexusQuantCache:
    """Return the same of a cache that encodes early: the first layer waits as codes, of which none is dropped yet."""
    model = tiny_llama()
    made = balanced(model)
    logits(model, prompt(50, batch=2), made, attention_mask=left_padded(6, 0))
    return made


def left_padded(*pads: int) -> Tensor:
    """Return the mask of rows of 50 tokens that begin with so many pads."""
    return (torch.arange(50) >= torch.tensor(pads)[:, None]).long()


def mixed() -> NexusQuantCache:
    """Return a cache with a sliding-window layer, whose prompt waits for its compression."""
    made = NexusQuantCache("balanced", config=mixed_config(), when="post_prefill", **SMALL)
    for layer in range(2):
        feed(made, *random_states((1, 2, 40, 16), layer, torch.bfloat16), layer)
    return made


def mixed_config() -> Qwen2Config:
    """Return the config of `mixed`."""
    kinds = ["sliding_attention", "full_attention"]
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    return Qwen2Config(**heads, layer_types=kinds, use_sliding_window=True, sliding_window=30)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "compressed": tiny_config,
    "padded": tiny_config,
    "short": tiny_config,
    "waiting": tiny_config,
    "reading": tiny_config,
    "mixed": mixed_config,
}
MAKERS: dict[str, Callable[[], NexusQuantCache]] = {
    "compressed": compressed,
    "padded": padded,
    "short": short,
    "waiting": waiting,
    "reading": reading,
    "mixed": mixed,
}


@cache
def file_bytes(name: str, level: int | None = 3) -> bytes:
    """Return the bytes of a saved cache of this kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            MAKERS[name]().save(path, level=level)
        return path.read_bytes()


@cache
def version_1_bytes(name: str) -> bytes:
    """Return the bytes of a golden file of version 1, with its tensors as they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        convert_file(GOLDEN / "version-1" / f"{name}-19.safetensors", path, level=None)
        return path.read_bytes()


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, Any], list[Entry]]:
    """Return the metadata of a file, the JSON object inside it, and its tensors."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__")
    entries = [(name, x["dtype"], x["shape"], body[slice(*x["data_offsets"])]) for name, x in header.items()]
    return metadata, json.loads(metadata["cache"]), entries


def put_together(
    metadata: Mapping[str, Any], content: Any, entries: list[Entry], decoded: Mapping[str, bytes] | None = None
) -> bytes:
    """Return a file of these parts whose hash is right.

    Args:
        metadata: Texts.
        content: The JSON object inside them, or its text.
        entries: The tensors.
        decoded: For names of packed tensors, without the packing, the bytes that they stand for.
    """
    text = content if isinstance(content, str) else json.dumps(content, separators=(",", ":"), sort_keys=True)
    total = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, _, _, stored in sorted(entries):
        plain = name.partition(":")[0]
        digest = hashlib.sha256((decoded or {}).get(plain, stored)).hexdigest()
        total.update(f"\n{plain} {digest}".encode("utf-8", "surrogatepass"))
    header: dict[str, Any] = {"__metadata__": {**metadata, "cache": text, "sha256": total.hexdigest()}}
    place = 0
    for name, dtype, shape, stored in entries:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(stored)]}
        place += len(stored)
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + b"".join(entry[3] for entry in entries)


def forged(data: bytes, change: Callable[[dict[str, Any], dict[str, Entry]], None]) -> bytes:
    """Return a raw file after a change to its metadata and tensors, with the right hash."""
    metadata, content, entries = take_apart(data)
    named = {entry[0]: entry for entry in entries}
    change(content, named)
    return put_together(metadata, content, list(named.values()))


def packed(entry: Entry, packing: str) -> Entry:
    """Return a tensor in a packing that arranges its bytes, or in none, and then makes a zstd frame."""
    name, dtype, shape, data = entry
    spec = FileTensor(name, next(key for key, x in DTYPES.items() if x[0] == dtype), tuple(shape), "other")
    groups, items, width = spec.rows
    part = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(groups, items, width)
    stored = zstandard.ZstdCompressor().compress(arrange(part, packing, spec.itemsize))
    return f"{name}:{packing}", "U8", [len(stored)], stored


def refitted(content: Any, named: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """Return the tensors that metadata announce, of bytes that were there before; None if they are impossible."""
    try:
        specs = tensors_of(from_json(json.dumps(content)))
    except FormatError:
        return None
    if sum(spec.nbytes for spec in specs.values()) > 1 << 20:
        return None
    made = {}
    for name, spec in specs.items():
        old = named[name][3] if name in named else b"\x01"
        data = (old * (spec.nbytes // max(len(old), 1) + 1))[: spec.nbytes] if old else bytes(spec.nbytes)
        made[name] = name, DTYPES[spec.dtype][0], list(spec.shape), data
    return made


def with_fingerprint(content: Any) -> None:
    """Make the model's fingerprint that of its fields."""
    text = json.dumps(content["model"]["fields"], sort_keys=True)
    content["model"]["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()


def with_tensor(named: dict[str, Entry], name: str, tensor: Tensor) -> None:
    """Replace the bytes of a tensor."""
    _, dtype, shape, _ = named[name]
    named[name] = name, dtype, shape, tensor.contiguous().view(torch.uint8).numpy().tobytes()
