"""What crosses the bus when a cache is kept in host memory.

python benchmarks/offload.py --text frankenstein.txt

The keys and values of a text, as a real model computes them, are given to caches in bfloat16, layer by layer: a prompt,
then one token at a time.  Between its updates each layer is in host memory: with transformers' `DynamicCache
(offloading=True)`, and with every preset and ``offloading=True``.  All tensors are on a CUDA device; where there is
none, on one that the tests simulate (`tests/integration/simulated.py`), which has no streams.

- ``fetched``, ``sent``: bytes to the device and back, counted where they are copied (`Bus`): for the prompt with its
  compression, and per token after that;
- ``on_device``: bytes of the cache itself that are on the device, at the moment when they are most, while tokens are
  generated.

Writes ``benchmarks/results/offload.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from _common import RESULTS, ROOT, preset_argument, read_texts, shown_steps
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from nexusquant_cache import PRESETS, NexusQuantCache
from nexusquant_cache.cache.report import content, storage_bytes
from nexusquant_cache.evaluation import load_model
from nexusquant_cache.evaluation.caches import prefill, update
from nexusquant_cache.evaluation.presets import describe
from nexusquant_cache.evaluation.results import environment, text_id, write_json
from nexusquant_cache.evaluation.steps import Step
from nexusquant_cache.evaluation.texts import token_windows
from nexusquant_cache.layer.host import HOST
from nexusquant_cache.layer.residency import Residency

sys.path.insert(0, str(ROOT / "tests"))
from integration.simulated import Placed, SimulatedDevices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    States = Sequence[tuple[Tensor, Tensor]]

PLAIN = "plain"


class Bus(TorchFunctionMode):
    """Counts the bytes that are copied from the host to a device and back.

    Attributes:
        fetched: Bytes to a device.
        sent: Bytes to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fetched = self.sent = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Count what a function copies."""
        del types
        result = func(*args, **(kwargs or {}))
        if func in {torch.Tensor.to, torch.Tensor.cpu}:
            self._count(args[0], result)
        elif func is torch.Tensor.copy_:
            self._count(args[1], args[0])
        return result

    def _count(self, source: Tensor, target: Tensor) -> None:
        # Numbers do not count: a device reads them without a copy of its own.
        if source.device == target.device or source.ndim == 0:
            return
        nbytes = target.numel() * target.element_size()
        if target.device == HOST:
            self.sent += nbytes
        elif source.device == HOST:
            self.fetched += nbytes


@dataclass
class Place:
    """Where the caches are: a CUDA device, or a simulated one."""

    device: torch.device

    @classmethod
    def best(cls) -> Place:
        """Return the CUDA device, if there is one."""
        return cls(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("xpu", 0))

    @property
    def is_simulated(self) -> bool:
        """Whether the device is not really there."""
        return self.device.type != "cuda"

    @contextlib.contextmanager
    def used(self) -> Iterator[Bus]:
        """Enter the device and count what crosses the bus."""
        devices = SimulatedDevices() if self.is_simulated else contextlib.nullcontext()
        with devices, Bus() as bus:
            yield bus

    def put(self, x: Tensor) -> Tensor:
        """Return a tensor that is on the device; this does not count."""
        return Placed.of(x, self.device) if self.is_simulated else x.to(self.device)


class SimulatedOffloading(DynamicCache):
    """transformers' offloading cache without its streams, which need CUDA; the order and the copies are its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.prefetch_stream = contextlib.nullcontext()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Fetch the next layer, update this one, and send it away."""
        self.prefetch(layer_idx + 1, only_non_sliding=False)
        returned = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.offload(layer_idx, only_non_sliding=False)
        return returned


@contextlib.contextmanager
def most_on_device(cache: Any) -> Iterator[list[int]]:
    """Yield a list of the bytes that a cache has on the device, each time just before one of its layers leaves."""
    found: list[int] = []

    def look(original: Callable[[Any], None]) -> Callable[[Any], None]:
        def looking(layer: Any) -> None:
            ours = isinstance(cache, NexusQuantCache)
            parts = [content(x) for x in cache.parts()] if ours else [vars(x) for x in cache.layers]
            found.append(storage_bytes(parts) - storage_bytes(parts, only=HOST))
            original(layer)

        return looking

    leaving = mock.patch.object(Residency, "release", look(Residency.release))
    theirs = mock.patch.object(DynamicLayer, "offload", look(DynamicLayer.offload))
    with leaving, theirs:
        yield found


def make_cache(name: str, place: Place, config: Any, *, offloading: bool = True) -> Any:
    """Return an empty cache."""
    if name != PLAIN:
        return NexusQuantCache(name, config=config, offloading=offloading)
    if place.is_simulated:
        return SimulatedOffloading(config=config)
    return DynamicCache(config=config, offloading=True)


def feed(cache: Any, place: Place, states: States, start: int, stop: int) -> None:
    """Give a cache the tokens of one forward."""
    for layer_idx, (keys, values) in enumerate(states):
        update(cache, *(place.put(x[:, :, start:stop].contiguous()) for x in (keys, values)), layer_idx)


def count_bytes(name: str, place: Place, config: Any, states: States, tokens: int) -> dict[str, Any]:
    """Return what crosses the bus for the prompt and for each token after it.

    Args:
        name: The preset, or `PLAIN`.
        place: The device.
        config: The model's config.
        states: Keys and values of each layer.
        tokens: How many of them are the prompt; the first one after it, at which it is compressed, counts with it.
    """
    cache = make_cache(name, place, config)
    last = states[0][0].shape[2] - 1
    with place.used() as bus:
        feed(cache, place, states, 0, tokens)
        feed(cache, place, states, tokens, tokens + 1)
        prompt = {"fetched": bus.fetched, "sent": bus.sent}
        if isinstance(cache, NexusQuantCache):
            for layer in cache.layers:  # nobody will: decoding moves nothing, and takes most of the time
                layer.state.codes_are_read = True
        bus.fetched = bus.sent = 0
        for token in range(tokens + 1, last):
            feed(cache, place, states, token, token + 1)
        steps = last - tokens - 1
        per_token = {"fetched": bus.fetched / steps, "sent": bus.sent / steps}
        with most_on_device(cache) as found:
            feed(cache, place, states, last, last + 1)
        if isinstance(cache, NexusQuantCache):
            cache.offload()  # now copies on the device do not count twice
    return {
        "cache": name,
        "stored": _stored_bytes(cache),
        "prompt": prompt,
        "per_token": per_token,
        "on_device": max(found),
    }


def _stored_bytes(cache: Any) -> int:
    """Return what a cache holds, wherever that is."""
    if isinstance(cache, NexusQuantCache):
        return cache.memory_report().held_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def main() -> None:
    """Count everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 text; Python's help topics by default")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="tokens generated after it (%(default)s)")
    parser.add_argument("--presets", nargs="+", type=preset_argument, choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--output", type=Path, default=RESULTS / "offload.json")
    given = parser.parse_args()

    place = Place.best()
    (name, text), *_ = read_texts(given.text).items()
    with shown_steps() as report:
        report(Step("loading the model"))
        loaded = load_model()
        length = given.tokens + given.steps + 2
        (window,) = token_windows(loaded.tokenizer, text, length=length, count=1, name=name)
        report(Step("reading", detail=name))
        plain = prefill(loaded.model, window)
        states = [(x.keys.bfloat16(), x.values.bfloat16()) for x in plain.cache.layers]
        rows = []
        for done, each in enumerate((PLAIN, *given.presets)):
            report(Step("counting", done, len(given.presets) + 1, each))
            rows.append(count_bytes(each, place, loaded.model.config, states, given.tokens))
    content = {
        "environment": environment(),
        "settings": {
            "model": loaded.name,
            "device": "simulated" if place.is_simulated else torch.cuda.get_device_name(place.device),
            "dtype": "bfloat16",
            "text": text_id(name, text),
            "tokens": given.tokens,
            "steps": given.steps,
        },
        "presets": {key: describe(PRESETS[key]) for key in given.presets},
        "rows": rows,
    }
    write_json(given.output, content)
    for row in rows:
        moved = row["per_token"]
        print(
            f"{row['cache']:>10}  {moved['fetched'] / 1e6:8.3f} MB in and {moved['sent'] / 1e6:8.3f} MB out per token"
        )


if __name__ == "__main__":
    main()
