"""What entropy coding buys on the keys and values of a real model: delta, byte columns and planes, zstd, and the ideal.

python benchmarks/at_rest.py --text frankenstein.txt

A prompt, in bfloat16, is compressed with each preset.  For each kind of tensor in the file, all layers together:

- ``codes``: bytes in each packing that a file may use (`nexusquant_cache.files.packing`), at each level of zstd;
- ``ideal``: the length that an adaptive arithmetic coder would reach with a model of the bytes.  Each context counts
  the symbols that it has met (Krichevsky & Trofimov 1981, with 1/16 in place of 1/2 for bytes): nothing is known in
  advance.  For words the symbols are bytes, or the fields of the codes with counts of their own for each rate of
  a layer, and for each block, coset (which is told first) or value of the token before where the name says so;
- ``file``: the file as it is written, with the time that writing and reading take.

``indices`` compares the indices alone, scales left out.  That of the package that this one has grown from, as in its
version 0.6: keys or values after a Hadamard rotation, divided by half of their largest channel, the nearest point of E8
clamped to -2 to 2 and doubled, one int8 per channel.  And ours at 2 bits, with both rotations, keys without their mean.

Writes ``benchmarks/results/at_rest.json``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import zstandard
from _common import RESULTS, ROOT, preset_argument, read_texts, shown_steps

from nexusquant_cache import PRESETS, NexusQuantCache
from nexusquant_cache.cache.rotary import rotary_phases
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import BLOCK, MAX_BITS, CodeLayout, block_code
from nexusquant_cache.codec.packing import unpack
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.evaluation import Candidate, LoadedModel, load_model
from nexusquant_cache.evaluation.caches import Prefilled, fill_and_compress, prefill
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.files.contents import FileTensor, tensors_of
from nexusquant_cache.files.packing import PACKINGS, arrange, pieces
from nexusquant_cache.files.saving import export_cache

sys.path.insert(0, str(ROOT / "tests"))
from lattice import nearest_point

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from nexusquant_cache.codec.transform import VectorTransform
    from nexusquant_cache.evaluation.steps import Report

SINKS = 4
WORDS = ("key words", "value words")
_BYTE_PRIOR = 1 / 16
_PREDECESSOR_LEVELS = 4


def ideal_bytes(context: Tensor, symbol: Tensor, alphabet: int, prior: float = 0.5) -> float:
    """Return the length of symbols when each context counts those that it has met, in bytes.

    Args:
        context: The context of each symbol, whole numbers from 0.
        symbol: The symbols, from 0 to below ``alphabet``.
        alphabet: How many there are.
        prior: What each symbol counts before it has been met.
    """
    counts = torch.bincount(context.flatten() * alphabet + symbol.flatten())
    counts = torch.nn.functional.pad(counts, (0, -len(counts) % alphabet)).view(-1, alphabet).double()
    counts = counts[counts.sum(1) > 0]
    start = torch.full((), prior * alphabet, dtype=torch.float64)
    nats = (counts.sum(1) + start).lgamma() - start.lgamma()
    nats = nats - ((counts + prior).lgamma() - torch.full((), prior, dtype=torch.float64).lgamma()).sum(1)
    return float(nats.sum()) / torch.log(torch.tensor(2.0)).item() / 8


def combine(*parts: tuple[Tensor, int]) -> Tensor:
    """Return one context of several, each with how many values it has."""
    total = torch.zeros((), dtype=torch.int64)
    for values, count in parts:
        total = total * count + values
    return total


def before(x: Tensor) -> Tensor:
    """Return for each token what the one before it has, and 0 for the first; tokens are the first axis."""
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


def words_ideal(words: Tensor, layouts: Sequence[CodeLayout]) -> dict[str, float]:
    """Return ideal lengths of the words ``[heads, tokens, bytes]`` of one layer."""
    sums: dict[str, float] = defaultdict(float)
    plain = words.long()
    sums["bytes"] = ideal_bytes(torch.zeros_like(plain), plain, 256, _BYTE_PRIOR)
    sums["bytes by column"] = ideal_bytes(torch.arange(plain.shape[-1]).expand(plain.shape), plain, 256, _BYTE_PRIOR)
    for bits in range(1, MAX_BITS + 1):
        fields, block = _fields_of(words, layouts, bits)
        if fields is None:
            continue
        size, low = 1 << bits, fields & 3
        parity = (low ^ low >> 1) & 1  # of each field; the coset is that of all of a block
        coset = parity.sum(-1) & 1
        # The last field has the parity that the coset and the others leave to it, so it says a bit less.
        left = (coset[..., None] + parity[..., :-1].sum(-1, keepdim=True)) & 1
        known = torch.cat([torch.zeros_like(fields[..., :-1]), left + 1], -1)
        told = (coset[..., None].expand(fields.shape), 2)
        blocks, cosets = (block[..., None].expand(fields.shape), 1), (block, 1)
        earlier = (before(fields), size), (before(coset)[..., None].expand(fields.shape), 2)
        nothing = torch.zeros_like(fields)
        sums["fields"] += ideal_bytes(nothing, fields, size)
        sums["fields, block"] += ideal_bytes(blocks[0], fields, size)
        sums["fields, coset"] += ideal_bytes(nothing[..., 0], coset, 2) + ideal_bytes(
            combine(told, (known, 3)), fields, size
        )
        sums["fields, coset, block"] += ideal_bytes(block, coset, 2)
        sums["fields, coset, block"] += ideal_bytes(combine(blocks, told, (known, 3)), fields, size)
        sums["fields, coset, previous token"] += ideal_bytes(combine(cosets, (before(coset), 2)), coset, 2)
        sums["fields, coset, previous token"] += ideal_bytes(combine(blocks, told, (known, 3), *earlier), fields, size)
    return sums


def _fields_of(words: Tensor, layouts: Sequence[CodeLayout], bits: int) -> tuple[Tensor | None, Tensor]:
    """Return the fields ``[tokens, blocks, 8]`` of all blocks of this rate, and numbers of these blocks."""
    parts = []
    for head, layout in zip(words, layouts, strict=True):
        index = [i for i, b in enumerate(layout.block_bits) if b == bits]
        parts.append(unpack(head, layout)[:, index])
    codes = torch.cat(parts, 1)
    if codes.numel() == 0:
        return None, codes
    fields = [
        sum((codes >> shift & 1) << i for i, shift in enumerate(field)) for field in block_code(bits).field_shifts
    ]
    return torch.stack([torch.as_tensor(field) for field in fields], -1), torch.arange(codes.shape[1]).expand(
        codes.shape
    )


def scales_ideal(scales: Tensor) -> dict[str, float]:
    """Return ideal lengths of the scales ``[tokens]`` of one head."""
    x = scales.long()
    return {
        "alone": ideal_bytes(torch.zeros_like(x), x, 256, _BYTE_PRIOR),
        "previous token": ideal_bytes(before(x) >> 3, x, 256, _BYTE_PRIOR),
    }


def bitmap_ideal(bitmap: Tensor) -> dict[str, float]:
    """Return ideal lengths of the bitmap ``[bytes]`` of one head."""
    bits = (bitmap[:, None] >> torch.arange(8) & 1).flatten().long()
    history = sum(before_by(bits, back) << (back - 1) for back in range(1, 5))
    return {
        "alone": ideal_bytes(torch.zeros_like(bits), bits, 2),
        "previous 4 tokens": ideal_bytes(torch.as_tensor(history), bits, 2),
    }


def before_by(x: Tensor, back: int) -> Tensor:
    """Return what stands so many places before each element, 0 at the beginning."""
    return torch.nn.functional.pad(x, (back, 0))[: len(x)]


def planes_ideal(spec: FileTensor, tensor: Tensor) -> dict[str, float]:
    """Return ideal lengths of a tensor of numbers, byte plane by byte plane."""
    plain = tensor.contiguous().flatten().view(torch.uint8).view(-1, spec.itemsize).long()
    plane = torch.arange(spec.itemsize).expand(plain.shape)
    channel = (torch.arange(len(plain)) % spec.shape[-1])[:, None].expand(plain.shape)
    return {
        "byte plane": ideal_bytes(plane, plain, 256, _BYTE_PRIOR),
        "byte plane and channel": ideal_bytes(combine((channel, 0), (plane, spec.itemsize)), plain, 256, _BYTE_PRIOR),
    }


def ideal(
    spec: FileTensor, tensor: Tensor, layouts: Sequence[CodeLayout], counts: Sequence[int] | None
) -> dict[str, float]:
    """Return ideal lengths of one tensor.

    Args:
        spec: What it is.
        tensor: Its values.
        layouts: Those of its heads, for words.
        counts: How many tokens each head has, where they differ.
    """
    if spec.nbytes == 0:
        return {}
    if spec.kind in WORDS and counts is not None:
        heads = zip(tensor.split(counts), layouts, strict=True)
        return _sum(words_ideal(words[None], [layout]) for words, layout in heads if len(words))
    if spec.kind in WORDS:
        return words_ideal(tensor.flatten(0, 1), layouts)
    if spec.kind == "scales":
        return _sum(scales_ideal(scales) for scales in (tensor.split(counts) if counts else tensor.flatten(0, 1)))
    if spec.name.endswith("kept"):
        return _sum(bitmap_ideal(bitmap) for bitmap in tensor.flatten(0, 1))
    return planes_ideal(spec, tensor)


def _sum(parts: Iterator[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return dict(total)


def layouts_of(codec: Any, transform: VectorTransform, heads: int) -> list[CodeLayout]:
    """Return the layout of each head of one layer's keys or values."""
    plans = [0] * heads if transform.plans is None else transform.plans.flatten().tolist()
    return [codec.layouts[plan] if transform.plans is not None else codec.layout for plan in plans]


def measure_packings(cache: NexusQuantCache, levels: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row per kind of tensor."""
    meta, tensors = export_cache(cache._whole())  # noqa: SLF001 - what `save` writes
    rows: dict[str, dict[str, Any]] = {}
    for name, spec in tensors_of(meta).items():
        row = rows.setdefault(spec.kind, {"kind": spec.kind, "packed_bytes": 0, "codes": {}, "ideal": {}})
        row["packed_bytes"] += spec.nbytes
        for packing in PACKINGS[1:]:
            data = b"".join(arrange(part, packing, spec.itemsize) for part in pieces(spec, tensors[name]))
            sizes = row["codes"].setdefault(packing, {str(level): 0 for level in levels})
            for level in levels:
                sizes[str(level)] += len(zstandard.ZstdCompressor(level=level).compress(data)) if data else 0
        shortest = ideal(spec, tensors[name], *_layouts(cache, spec))
        for model, nbytes in shortest.items():
            row["ideal"][model] = row["ideal"].get(model, 0.0) + nbytes
        if spec.kind in WORDS:
            row.setdefault("layers", []).append(_layer_row(spec, tensors[name], levels, shortest))
    return [{**row, "ideal": {model: round(x) for model, x in row["ideal"].items()}} for row in rows.values()]


def _layer_row(
    spec: FileTensor, tensor: Tensor, levels: Sequence[int], shortest: Mapping[str, float]
) -> dict[str, Any]:
    """Return how the words of one layer shrink: they repeat where a layer sees little more than the token itself."""
    data = b"".join(arrange(part, "zstd", 1) for part in pieces(spec, tensor))
    zstd = {str(level): len(zstandard.ZstdCompressor(level=level).compress(data)) / len(data) for level in levels}
    return {"packed_bytes": len(data), "zstd": zstd, "ideal": min(shortest.values()) / len(data)}


def _layouts(cache: NexusQuantCache, spec: FileTensor) -> tuple[list[CodeLayout], list[int] | None]:
    """Return the layouts of a tensor's heads, for words, and how many tokens each has, where they differ."""
    if spec.kind not in {*WORDS, "scales"}:
        return [], None
    layer: Any = cache.layers[int(spec.name.split(".")[1])]
    is_key = ".keys." in spec.name
    body, codec = layer.state.body, layer.state.codecs[0 if is_key else 1]
    side = body.keys if is_key else body.values
    counts = body.positions.counts
    heads = None if counts is None else (counts.flatten() + body.positions.dense).tolist()
    return layouts_of(codec, side.transform, side.transform.reference.shape[:2].numel()), heads


def measure_files(cache: NexusQuantCache, levels: Sequence[int | None]) -> list[dict[str, Any]]:
    """Return a row per level: bytes of the file, header and kinds, and seconds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        for level in levels:
            start = time.perf_counter()
            report = cache.save(path, level=level, threads=1)
            wrote = time.perf_counter()
            NexusQuantCache.load(path, threads=1)
            read = time.perf_counter()
            rows.append(
                {
                    "level": level,
                    "file_bytes": report.total_bytes,
                    "header_bytes": report.header_bytes,
                    "kinds": {kind: stored for kind, (_, stored) in report.kinds.items()},
                    "stored_as": {kind: report.packings(kind) for kind in report.kinds},
                    "write_seconds": wrote - start,
                    "read_seconds": read - wrote,
                }
            )
    return rows


def indices(loaded: LoadedModel, plain: Prefilled, levels: Sequence[int]) -> list[dict[str, Any]]:
    """Return rows of bits per channel, and the error, of the predecessor's indices and of our codes at 2 bits."""
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    tokens = plain.cache.get_seq_length()
    layers: list[Any] = plain.cache.layers
    for layer, phase in zip(layers, rotary_phases(loaded.model.config, tokens), strict=True):
        positions = torch.arange(SINKS, tokens)
        keys, values = (x[:, :, SINKS:].float() for x in (layer.keys, layer.values))
        keys = keys if phase is None else phase.rotate(keys, positions, inverse=True)
        for side, x in (("keys", keys), ("values", values)):
            _add_predecessor(sums["predecessor", side], x, levels)
            for transform in ("hadamard", "principal"):
                codec = E8Codec(CodeLayout.flat(x.shape[-1], 2), center=side == "keys", transform=transform)
                _add_ours(sums[f"ours, {transform}", side], x, codec, levels)
    rows = []
    for (coder, side), found in sums.items():
        channels, error, power = found.pop("channels"), found.pop("error"), found.pop("power")
        bits = {name: x / channels for name, x in found.items()}
        rows.append({"coder": coder, "side": side, "bits_per_channel": bits, "relative_error": error / power})
    return rows


def _add_predecessor(found: dict[str, float], x: Tensor, levels: Sequence[int]) -> None:
    y = HadamardRotation(x.shape[-1]).rotate(x).contiguous()
    scale = y.abs().amax(-1, keepdim=True).clamp_min(1e-9) / (_PREDECESSOR_LEVELS / 2)
    points = nearest_point((y / scale).unflatten(-1, (-1, BLOCK))).flatten(-2)
    points = points.clamp(-_PREDECESSOR_LEVELS / 2, _PREDECESSOR_LEVELS / 2)
    index = (points * 2).to(torch.int8).view(torch.uint8)
    _add(found, y, points * scale, index, levels)
    wrapped = (index + 128).long().transpose(0, 2).flatten(1)
    channel = torch.arange(wrapped.shape[1]).expand(wrapped.shape)
    found["ideal"] += 8 * ideal_bytes(channel, wrapped, 256, _BYTE_PRIOR)


def _add_ours(found: dict[str, float], x: Tensor, codec: E8Codec, levels: Sequence[int]) -> None:
    transform = codec.fit(x)
    packed = codec.encode(x, transform)
    _add(found, x, codec.decode(packed, transform), packed.words, levels)
    found["ideal"] += 8 * min(words_ideal(packed.words[0], layouts_of(codec, transform, x.shape[1])).values())


def _add(found: dict[str, float], x: Tensor, decoded: Tensor, index: Tensor, levels: Sequence[int]) -> None:
    """Add the sizes of indices, without scales, in bits."""
    found["channels"] += x.numel()
    found["error"] += float((decoded - x).double().square().sum())
    found["power"] += float(x.double().square().sum())
    found["stored"] += 8 * index.numel()
    spec = FileTensor("", "uint8", tuple(index.shape), "other")
    for level in levels:
        for packing in ("zstd", "delta+zstd"):
            data = b"".join(arrange(part, packing, 1) for part in pieces(spec, index))
            found[f"{packing} {level}"] += 8 * len(zstandard.ZstdCompressor(level=level).compress(data))


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 text; the first one is used")
    parser.add_argument("--tokens", type=int, default=2560, help="tokens in the cache")
    parser.add_argument(
        "--presets", nargs="+", type=preset_argument, choices=PRESETS, default=["quant", "balanced"], help="presets"
    )
    parser.add_argument("--levels", type=int, nargs="+", default=[3, 19], help="levels of zstd")
    parser.add_argument("--output", type=Path, default=RESULTS / "at_rest.json", help="result file")
    return parser.parse_args()


def read_prompt(loaded: LoadedModel, name: str, text: str, tokens: int, report: Report) -> Prefilled:
    """Return a prompt in bfloat16, as most models hold it."""
    (ids,) = token_windows(loaded.tokenizer, text, length=tokens, count=1, name=name)
    plain = prefill(loaded.model, ids, progress=lambda done, total: report(Step("reading", done, total)))
    layers: list[Any] = plain.cache.layers
    for layer in layers:
        layer.keys, layer.values = layer.keys.bfloat16().cpu(), layer.values.bfloat16().cpu()
    return replace(plain, queries=tuple(x.bfloat16().cpu() for x in plain.queries))


@torch.no_grad()
def main() -> None:
    """Measure and write the result file."""
    given = arguments()
    loaded = load_model()
    name, text = next(iter(read_texts(given.text).items()))
    with shown_steps() as report:
        plain = read_prompt(loaded, name, text, given.tokens, report)
        rows = []
        for done, preset in enumerate(given.presets):
            report(Step("coding", done, len(given.presets), preset))
            make = Candidate(preset, lambda preset=preset: NexusQuantCache(preset, config=loaded.model.config))
            cache: Any = fill_and_compress(loaded, make, plain).cache
            memory = cache.memory_report()
            rows.append(
                {
                    "preset": preset,
                    "dense_bytes": memory.dense_bytes,
                    "held_bytes": memory.held_bytes,
                    "streams": measure_packings(cache, given.levels),
                    "files": measure_files(cache, [None, *given.levels]),
                }
            )
        report(Step("indices"))
        content = {
            "environment": {**environment(), "zstandard": zstandard.__version__},
            "settings": {
                "model": loaded.name,
                "text": text_id(name, text),
                "tokens": given.tokens,
                "dtype": "bfloat16",
            },
            "presets": {preset: describe(PRESETS[preset]) for preset in given.presets},
            "rows": rows,
            "indices": indices(loaded, plain, given.levels),
        }
    write_json(given.output, content)
    show(content)


def show(content: Mapping[str, Any]) -> None:
    """Print what each kind of tensor comes to, relative to its packed form."""
    for row in content["rows"]:
        print(f"{row['preset']}: {row['dense_bytes']:,} bytes in 16 bit, {row['held_bytes']:,} held")
        for kind in row["streams"]:
            packed = max(kind["packed_bytes"], 1)
            sizes = [
                f"{packing} {level} {x / packed:.3f}"
                for packing, by in kind["codes"].items()
                for level, x in by.items()
            ]
            models = [f"{model} {x / packed:.3f}" for model, x in kind["ideal"].items()]
            print(f"  {kind['kind']:<12} {packed:>10,}  {', '.join(sizes)}\n{'':27}ideal: {', '.join(models)}")
            for index, layer in enumerate(kind.get("layers", ())):
                zstd = ", ".join(f"zstd {level} {x:.3f}" for level, x in layer["zstd"].items())
                print(f"{'':27}layer {index}: {zstd}, ideal {layer['ideal']:.3f}")
        for file in row["files"]:
            seconds = f"{file['write_seconds']:.2f} s to write, {file['read_seconds']:.2f} s to read"
            print(f"  level {file['level']}: {file['file_bytes']:,} bytes, header {file['header_bytes']:,}, {seconds}")
    for row in content["indices"]:
        bits = ", ".join(f"{name} {x:.2f}" for name, x in row["bits_per_channel"].items())
        print(f"{row['coder']}, {row['side']}, bits per channel: {bits}; relative error {row['relative_error']:.4f}")


if __name__ == "__main__":
    main()
