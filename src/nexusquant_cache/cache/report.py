"""What a cache holds, in bytes of storage, and what a plain cache would."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.files.writer import AtRest
from nexusquant_cache.layer.host import HOST
from nexusquant_cache.layer.kinds import kind_of
from nexusquant_cache.layer.parts import Part
from nexusquant_cache.layer.schedule import candidates
from nexusquant_cache.layer.shared import Shared
from nexusquant_cache.layer.state import Kind, LayerState
from nexusquant_cache.layer.tokens import Buffer
from nexusquant_cache.pages.elements import why_no_pictures

DENSE_BYTES_PER_CHANNEL = 2
"""Bytes per channel of the plain cache that everything is compared with: 16 bit, whatever the model's dtype."""


def tensors_of(thing: object) -> Iterator[torch.Tensor]:
    """Yield every tensor reachable through containers and the attributes of objects."""
    seen: set[int] = set()
    stack = [thing]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, (type, ModuleType)) and not callable(item):
            stack.extend(vars(item).values())


def storage_bytes(*things: object, only: torch.device | None = None) -> int:
    """Return the bytes of all distinct storages behind the tensors reachable from these objects.

    Args:
        things: The objects.
        only: Count those on this device; all by default.
    """
    storages = {}
    for tensor in tensors_of(things):
        if only not in {None, tensor.device}:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # noqa: SLF001 - it has no storage of its own
            continue
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


@dataclass(frozen=True)
class LayerReport:
    """One layer of a `MemoryReport`; sizes in bytes.

    Attributes:
        layer_idx: Index of the layer in the model.
        kind: ``"compressed"`` for layers of ours, else the name of transformers' layer class.
        seen_tokens: Tokens seen.
        kept_tokens: Tokens kept of each row and head, on average where these differ.
        exact_bytes: Sinks and tail in full precision, and the queries that wait with a prompt for its compression;
            everything, for layers that are not compressed.
        code_bytes: Packed codes and scales, with the room they have to grow.
        other_bytes: Positions of kept tokens and what the transforms hold.
        dense_bytes: What a plain 16-bit cache would hold.
        code_error: How much encoding the first tokens changed what the prompt's last queries read from them (its last
            keys, where no queries are known): relative to what they read, in the head that suffered most.  None if
            nothing is encoded.
        host_bytes: How much of all that is in host memory, away from the layer's device.
        exact_dtype: Dtype of exact tokens, as torch calls it (``"bfloat16"``), or two of keys and values; ``""`` before
            the first update.
        is_compressed: Whether the layer holds codes, and it is decided of which tokens.
        waits_for: What has to come before the prompt, or a later turn, is compressed; ``""`` if nothing waits.
        is_unseen: Whether all tokens were kept because the prompt's attention was not seen.
        bytes_by_kind: The same bytes in finer parts: ``"codes"``, ``"scales"``, ``"axes and means"`` of the transforms,
            ``"positions"`` of kept tokens, ``"sinks"``, ``"tail"``, ``"waiting queries"`` with what attention has
            shown, ``"to undo"`` (what an error in this forward would bring back) and ``"not compressed"``.
        kept_by_head: Tokens kept, for each row of the batch and each KV head; nothing for layers that hold no keys.
    """

    layer_idx: int
    kind: str
    seen_tokens: int
    kept_tokens: int
    exact_bytes: int
    code_bytes: int
    other_bytes: int
    dense_bytes: int
    code_error: float | None = None
    host_bytes: int = 0
    exact_dtype: str = ""
    is_compressed: bool = False
    waits_for: str = ""
    is_unseen: bool = False
    bytes_by_kind: Mapping[str, int] = field(default_factory=dict, hash=False)
    kept_by_head: tuple[tuple[int, ...], ...] = ()

    @property
    def state(self) -> str:
        """Where the layer stands, in words."""
        if not self.seen_tokens:
            return "empty"
        if self.kind != "compressed":
            return "left as it is"
        if not self.is_compressed:
            return f"not compressed yet: {self.waits_for}"
        said = "compressed"
        if self.is_unseen:
            said += "; attention was not seen, so all tokens were kept (attention.enable)"
        return f"{said}; a later turn: {self.waits_for}" if self.waits_for else said

    @property
    def held_bytes(self) -> int:
        """Sum of the parts."""
        return self.exact_bytes + self.code_bytes + self.other_bytes


@dataclass(frozen=True)
class MemoryReport:
    """Bytes really held by a cache: the storages of all its tensors, unused room included.

    Attributes:
        layers: One row per layer.
        shared_bytes: Tables that all layers share (rotary phases).
        peak_bytes: The most that was held at once between updates, usually the exact prompt just before it was
            compressed.  Temporaries of attention and of the model are not the cache's and not counted.
        preset: Name of the preset, or ``"custom"``.
        trouble: Why the cache cannot go on as it is; ``""`` if it can.
        at_rest: What the cache would take in a file, if that was asked for.
    """

    layers: tuple[LayerReport, ...]
    shared_bytes: int
    peak_bytes: int
    preset: str
    at_rest: AtRest | None = None
    trouble: str = ""

    @property
    def held_bytes(self) -> int:
        """Bytes held now."""
        return sum(layer.held_bytes for layer in self.layers) + self.shared_bytes

    @property
    def host_bytes(self) -> int:
        """How many of them are in host memory, away from their layers' devices."""
        return sum(layer.host_bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes of a plain cache of the same tokens in 16 bit."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def compression_factor(self) -> float:
        """``dense_bytes / held_bytes``; 1.0 for an empty cache."""
        return self.dense_bytes / self.held_bytes if self.dense_bytes and self.held_bytes else 1.0

    @property
    def seen_tokens(self) -> int:
        """Tokens seen by the compressed layers (by all, if none is compressed)."""
        return max((layer.seen_tokens for layer in self._main()), default=0)

    @property
    def kept_tokens(self) -> int:
        """Tokens kept by the compressed layers (by all, if none is compressed), on average over layers and heads."""
        kept = [layer.kept_tokens for layer in self._main()]
        return round(sum(kept) / len(kept)) if kept else 0

    @property
    def state(self) -> str:
        """Where the cache stands, in words; if it is not compressed, why."""
        if self.trouble:
            return self.trouble
        ours = [layer for layer in self.layers if layer.kind == "compressed" and layer.seen_tokens]
        if not ours:
            return "nothing to compress" if any(layer.seen_tokens for layer in self.layers) else "empty"
        # The one that is not compressed says why; of those that are, the one of which nothing was evicted.
        telling = min(ours, key=lambda layer: (layer.is_compressed, not layer.is_unseen, not layer.waits_for))
        alike = len({layer.state for layer in ours}) == 1
        return telling.state if alike else f"layer {telling.layer_idx}: {telling.state}"

    @property
    def line(self) -> str:
        """The report in one line."""
        tokens = f"{self.seen_tokens:,} tokens seen"
        if self.kept_tokens != self.seen_tokens:
            tokens += f", {self.kept_tokens:,} kept"
        held = f"{_size(self.held_bytes)} ({self.compression_factor:.1f}x)"
        return f"preset {self.preset}, {tokens}, {held}, {self.state}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:  # noqa: ANN401 - matplotlib is optional
        """Draw the bytes of each layer by kind, and the tokens that each of its heads keeps; needs matplotlib.

        Args:
            path: A file to write the picture to as well; its ending decides how: ``.png``, ``.svg``, ``.pdf``.

        Returns:
            A ``matplotlib.figure.Figure``, which a notebook shows.  Of a batch, the heads' tokens are means over its
            rows.

        Raises:
            UnsupportedError: If matplotlib is missing.
            ValueError: By matplotlib, if it knows no such ending.
            OSError: If the file cannot be written.
        """
        missing = why_no_pictures("plot()")
        if missing:
            raise UnsupportedError(missing)
        from nexusquant_cache.pages.held import held_figure  # noqa: PLC0415 - matplotlib is optional
        from nexusquant_cache.pages.pictures import save_picture  # noqa: PLC0415 - as above

        kept = [[sum(head) / len(head) for head in zip(*layer.kept_by_head, strict=True)] for layer in self.layers]
        figure = held_figure([layer.bytes_by_kind for layer in self.layers], kept, self.shared_bytes, self.line)
        figure.set_facecolor("white")
        if path is not None:
            save_picture(figure, Path(path))
        return figure

    def _main(self) -> tuple[LayerReport, ...]:
        ours = tuple(layer for layer in self.layers if layer.kind == "compressed")
        return ours or self.layers

    def __str__(self) -> str:
        """Return a table: one line per group of equal layers, then the totals."""
        sizes = "".join(f" {name:>10}" for name in ("exact", "codes", "other"))
        header = f"{'layers':>9} {'kind':<24} {'seen':>8} {'kept':>8}{sizes} {'factor':>7}"
        lines = [f"NexusQuantCache, preset {self.preset}", header]
        for first, last, row in self._groups():
            name = str(first) if first == last else f"{first}-{last}"
            factor = row.dense_bytes / row.held_bytes if row.held_bytes else 1.0
            lines.append(
                f"{name:>9} {row.kind:<24} {row.seen_tokens:>8,} {row.kept_tokens:>8,} {_size(row.exact_bytes):>10} "
                f"{_size(row.code_bytes):>10} {_size(row.other_bytes):>10} {factor:>6.1f}x"
            )
        lines.append(
            f"held {_size(self.held_bytes)} (tables {_size(self.shared_bytes)}, peak {_size(self.peak_bytes)}) "
            f"in place of {_size(self.dense_bytes)} in 16 bit: {self.compression_factor:.1f}x"
        )
        lines.extend([*self._compressed_line(), *self._state_lines()])
        if self.host_bytes:
            lines.append(f"in host memory {_size(self.host_bytes)}")
        return "\n".join([*lines, *self._at_rest_lines()])

    def _compressed_line(self) -> Iterator[str]:
        """Yield what the compressed layers hold, if there are others beside, which stay as they are."""
        ours = [layer for layer in self.layers if layer.kind == "compressed" and layer.held_bytes]
        if 0 < len(ours) < len(self.layers):
            held, dense = sum(layer.held_bytes for layer in ours), sum(layer.dense_bytes for layer in ours)
            sizes = f"{_size(held)} in place of {_size(dense)}"
            yield f"of these the layers that are compressed: {sizes}: {dense / held:.1f}x"

    def _state_lines(self) -> Iterator[str]:
        """Yield where the layers stand, and in which dtype their exact tokens are."""
        if self.trouble:
            yield self.trouble
        states: dict[str, list[int]] = {}
        for layer in self.layers:
            if layer.kind == "compressed":
                dtype = f"; exact tokens in {layer.exact_dtype}" if layer.exact_dtype else ""
                states.setdefault(layer.state + dtype, []).append(layer.layer_idx)
        for state, indices in states.items():
            yield state if len(states) == 1 else f"layer{'s' * (len(indices) > 1)} {_ranges(indices)} {state}"

    def _at_rest_lines(self) -> Iterator[str]:
        """Yield a line per kind of tensor in a file."""
        if self.at_rest is None:
            return
        for kind, (packed, stored) in self.at_rest.kinds.items():
            packings = ", ".join(self.at_rest.packings(kind))
            yield f"at rest {kind:<12} {_size(packed):>10} -> {_size(stored):>10}  {packings}"
        total, header = self.at_rest.total_bytes, _size(self.at_rest.header_bytes)
        factor = self.dense_bytes / total
        yield f"at rest in all {_size(total)}, header {header}: {factor:.1f}x"

    def _groups(self) -> list[tuple[int, int, LayerReport]]:
        """Return runs of layers that differ in nothing but their index; sizes are those of one layer."""
        groups: list[tuple[int, int, LayerReport]] = []
        for layer in self.layers:
            if groups and _same(groups[-1][2], layer):
                groups[-1] = (groups[-1][0], layer.layer_idx, layer)
            else:
                groups.append((layer.layer_idx, layer.layer_idx, layer))
        return groups


def content(part: Part) -> list[object]:
    """Return what holds the tensors of a layer, without what it shares with other layers."""
    if part.state is not None:
        return [*part.state.holders("exact", "codes", "scales", "positions", "transform"), *part.layer.held_to_undo]
    return [vars(part.layer)]


def layer_report(part: Part, shared: Shared) -> LayerReport:
    """Return the row of a layer."""
    if part.state is not None:
        return _compressed_report(part.state, shared, part.layer.held_to_undo)
    layer = part.layer
    held = storage_bytes(content(part))
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    dense = sum(x.numel() * DENSE_BYTES_PER_CHANNEL for x in (keys, values) if x is not None)
    kept = 0 if keys is None or keys.ndim < 3 else keys.shape[-2]  # noqa: PLR2004 - no token axis
    host = 0 if getattr(layer, "device", HOST) == HOST else storage_bytes(keys, values, only=HOST)
    return LayerReport(
        layer_idx=part.index,
        kind=type(layer).__name__,
        seen_tokens=part.seen,
        kept_tokens=kept,
        exact_bytes=held,
        code_bytes=0,
        other_bytes=0,
        dense_bytes=dense or held,
        host_bytes=host,
        exact_dtype=_dtype_of(keys, values),
        bytes_by_kind={"not compressed": held} if held else {},
        kept_by_head=() if keys is None or keys.ndim != 4 else ((kept,) * keys.shape[1],) * len(keys),  # noqa: PLR2004
    )


def _dtype_of(*tensors: Tensor | None) -> str:
    """Return the name of the dtype of keys and values."""
    names = [str(x.dtype).removeprefix("torch.") for x in tensors if x is not None]
    return "/".join(dict.fromkeys(names))


def _waits_for(state: LayerState, shared: Shared) -> str:
    """Return what has to come before it is decided what is kept of waiting tokens; nothing if none wait."""
    settings, start = shared.settings, state.turn.pending_from
    if state.body is not None and start is None:
        return ""
    # Of a prompt that waits, some tokens may be encoded already.
    count = max(candidates(state, shared), 0)
    if start is not None and state.body is not None:
        sinks = settings.sink_tokens if start == 0 else 0
        count = max(state.waiting_tokens - settings.residual_length - sinks, count)
    if count < settings.min_tokens:
        least = settings.min_tokens
        return f"{count} tokens are too few to code between the first and the newest (min_tokens is {least})"
    if state.turn.record_past:
        return "waits for the next crop"
    return f"waits for the {'next' if _is_compressed(state) else 'first'} generation step"


def _is_compressed(state: LayerState) -> bool:
    """Tell whether there are codes of which it is decided that they stay."""
    return state.body is not None and state.turn.pending_from != 0


def _compressed_report(state: LayerState, shared: Shared, held_to_undo: list[object]) -> LayerReport:
    if state.tail is None:
        return LayerReport(state.layer_idx, "compressed", 0, 0, 0, 0, 0, 0)
    keys, values = state.tail
    channels = keys.shape[0] * keys.shape[1] * (keys.shape[3] + values.shape[3])
    exact, codes = _by_kind(state, "exact"), _by_kind(state, "codes", "scales")
    other = _by_kind(state, "positions")
    if held_to_undo:
        exact["to undo"] = held_to_undo
    if state.body is not None:
        other["axes and means"] = [state.body.keys.transform, state.body.values.transform]
    exact_bytes, code_bytes, other_bytes = (_sizes(things) for things in (exact, codes, other))
    host = 0
    if state.device != HOST:
        # Without what is always there: plans, the places of sinks, and how many tokens each head has.
        reference = () if state.body is None else (state.body.keys.transform.reference,)
        host = storage_bytes(exact, codes, only=HOST)
        host += storage_bytes(other) if storage_bytes(reference, only=HOST) else 0
    return LayerReport(
        layer_idx=state.layer_idx,
        kind="compressed",
        seen_tokens=state.seen,
        kept_tokens=state.kept,
        exact_bytes=sum(exact_bytes.values()),
        code_bytes=sum(code_bytes.values()),
        other_bytes=sum(other_bytes.values()),
        dense_bytes=state.seen * channels * DENSE_BYTES_PER_CHANNEL,
        code_error=state.code_error,
        host_bytes=host,
        exact_dtype=_dtype_of(keys, values),
        is_compressed=_is_compressed(state),
        waits_for=_waits_for(state, shared),
        # Eviction goes by the attention to all tokens since the first one.
        is_unseen=shared.evicts and state.body is not None and state.is_whole and not state.is_shown_whole,
        bytes_by_kind={kind: size for kind, size in {**exact_bytes, **code_bytes, **other_bytes}.items() if size},
        kept_by_head=_kept_by_head(state),
    )


def _by_kind(state: LayerState, *kinds: Kind) -> dict[str, list[object]]:
    """Return what holds the tensors of these kinds, none of which are transforms, in finer parts."""
    found: dict[str, list[object]] = {}
    for declared, holder in state.declared_holders(*kinds):
        known = found.setdefault(kind_of(declared.name, declared.kind), [])
        known.append(holder.on_the_way if isinstance(holder, Buffer) else holder)
    return found


def _sizes(things: Mapping[str, list[object]]) -> dict[str, int]:
    """Return the bytes of each part; what several parts share counts for the first of them."""
    sizes: dict[str, int] = {}
    seen: list[object] = []
    for name, part in things.items():
        seen += part
        sizes[name] = storage_bytes(seen) - sum(sizes.values())
    return sizes


def _kept_by_head(state: LayerState) -> tuple[tuple[int, ...], ...]:
    batch, heads = state.exact[0].shape[:2]
    exact = state.sink_tokens + state.tail_tokens
    if state.body is None:
        return ((exact,) * heads,) * batch
    positions = state.body.positions
    exact += positions.dense
    if positions.counts is None:
        return ((exact + positions.kept,) * heads,) * batch
    return tuple(tuple(exact + count for count in row) for row in positions.counts.tolist())


def _ranges(indices: list[int]) -> str:
    """Return ascending numbers as ranges."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _same(a: LayerReport, b: LayerReport) -> bool:
    def key(row: LayerReport) -> tuple[object, ...]:
        return (row.kind, row.seen_tokens, row.kept_tokens, row.exact_bytes, row.code_bytes, row.other_bytes)

    return key(a) == key(b)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:  # noqa: PLR2004 - binary prefixes
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
