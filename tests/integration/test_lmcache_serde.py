"""`examples/lmcache_serde.py` inside LMCache's own parts: memory for chunks, the wrapper that codes, files on a disk.

Skipped where LMCache is not installed; ``nox -s engines`` installs it, without the packages that only GPUs need.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("lmcache", reason="LMCache is not installed: nox -s engines")

# Importing LMCache sets up its log, if OpenTelemetry is installed for something else.
pytestmark = pytest.mark.filterwarnings("ignore:.LoggingHandler. in .opentelemetry-sdk. is deprecated")

HEAD_DIM, HEADS, LAYERS, TOKENS = 64, 2, 3, 256
PATIENCE = 60  # seconds


@pytest.fixture(scope="module", autouse=True)
def _examples() -> Iterator[None]:
    """Let LMCache find the example, which registers itself when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
        yield


def chunk(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Draw keys and values as LMCache lays them out, with a mean, as real ones have."""
    return (torch.randn(2, LAYERS, TOKENS, HEADS * HEAD_DIM) + 2 * torch.randn(HEADS * HEAD_DIM)).to(dtype)


def waited(ask: Callable[[], Any]) -> Any:
    """Return an answer when it is there."""
    deadline = time.monotonic() + PATIENCE
    while not (found := ask()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


class Storage:
    """What LMCache builds from the JSON of an adapter."""

    def __init__(self, folder: Path, **options: Any) -> None:
        from lmcache.v1.distributed import config, l1_manager, l2_adapters  # noqa: PLC0415
        from lmcache.v1.distributed.l2_adapters import config as adapters  # noqa: PLC0415
        from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper  # noqa: PLC0415
        from lmcache.v1.distributed.serde import create_serde_processor  # noqa: PLC0415

        spec: dict[str, Any] = {"type": "plugin", "module_path": "lmcache_serde", "class_name": "Files"}
        spec |= {"adapter_params": {"base_path": str(folder)}, "serde": {"type": "nexusquant", **options}}
        parser = adapters.add_l2_adapters_args(argparse.ArgumentParser())
        given = adapters.parse_args_to_l2_adapters_config(parser.parse_args(["--l2-adapter", json.dumps(spec)]))
        memory = config.L1MemoryManagerConfig(64 << 20, use_lazy=False, shm_name="")
        self.memory = l1_manager.L1Manager(config.L1ManagerConfig(memory))
        inner = l2_adapters.create_l2_adapter(given.adapters[0], self.memory.get_l1_memory_desc())
        self.adapter = SerdeL2AdapterWrapper(inner, create_serde_processor(given.adapters[0].serde_config), self.memory)

    def store(self, name: bytes, states: Tensor) -> tuple[Any, Any, Any]:
        """Put a chunk into memory, and from there on the disk; return its key, layout and object."""
        from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey  # noqa: PLC0415

        key, layout = ObjectKey(name * 32, "tiny", 0), MemoryLayoutDesc([states.shape], [states.dtype])
        held = self.memory.reserve_write([key], [False], layout)[key][1]
        held.tensor.copy_(states)
        self.memory.finish_write([key])
        self.memory.reserve_read([key])
        self.adapter.submit_store_task([key], [held])
        (result,) = waited(self.adapter.pop_completed_store_tasks).values()
        assert result.is_successful()
        return key, layout, held

    def load(self, key: Any, layout: Any, held: Any) -> Tensor:
        """Overwrite the chunk in memory by what the disk has."""
        held.tensor.fill_(float("nan"))
        for task, ask in (
            (self.adapter.submit_lookup_and_lock_task([key], {0: layout}), self.adapter.query_lookup_and_lock_result),
            (self.adapter.submit_load_task([key], [held]), self.adapter.query_load_result),
        ):
            assert waited(lambda ask=ask, task=task: ask(task)).popcount() == 1
        return held.tensor

    def close(self) -> None:
        self.adapter.close()
        self.memory.close()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Callable[..., Storage]]:
    made: list[Storage] = []

    def make(**options: Any) -> Storage:
        made.append(Storage(tmp_path, **({"head_dim": HEAD_DIM} | options)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def error(found: Tensor, states: Tensor) -> list[float]:
    """Return the root mean square error of keys and of values, relative to their deviation from the mean."""
    spread = (states - states.float().mean(2, keepdim=True)).square().mean((1, 2, 3)).sqrt()
    return ((found.float() - states.float()).square().mean((1, 2, 3)).sqrt() / spread).tolist()


def test_a_chunk_goes_to_the_disk_as_codes_and_comes_back(storage: Any, tmp_path: Path) -> None:
    made, states = storage(), chunk()
    found = made.load(*made.store(b"a", states))
    import lmcache_serde as serde  # noqa: PLC0415 - it needs LMCache

    (file,) = tmp_path.rglob("*.data")
    codes = sum(
        LAYERS * HEADS * TOKENS * (codec.layout.bytes_per_vector + 1) for codec in serde.Sides(HEAD_DIM).codecs()
    )
    shared = 2 * LAYERS * HEADS * (2 * HEAD_DIM + 4)  # means in 16 bit, reference scales in 32
    assert file.stat().st_size == codes + shared
    assert states.nbytes / file.stat().st_size > 6
    keys, values = error(found, states)
    assert 0.1 < values < keys < 0.3
    assert found.dtype == torch.bfloat16


def test_more_bits_are_nearer(storage: Any) -> None:
    made, states = storage(key_bits=4, value_bits=4, max_workers=2), chunk(torch.float16)
    assert max(error(made.load(*made.store(b"a", states)), states)) < 0.09


def test_every_chunk_is_coded_alone(storage: Any) -> None:
    """Another process that has only the file decodes the same."""
    first, states = storage(), chunk()
    key, layout, held = first.store(b"a", states)
    expected = first.load(key, layout, held).clone()
    again = storage()
    again.store(b"b", chunk())
    room = again.memory.reserve_write([key], [False], layout)[key][1]
    assert torch.equal(again.load(key, layout, room), expected)


def test_another_layout_is_refused() -> None:
    import lmcache_serde as serde  # noqa: PLC0415 - it needs LMCache

    sides = serde.Sides(head_dim=96)
    with pytest.raises(ValueError, match=r"expected \[2, layers, tokens, kv_heads \* 96\].*check head_dim"):
        sides.size(chunk().shape)
    with pytest.raises(ValueError, match="has no option 'type_of_head'; there are max_workers, head_dim, key_bits"):
        serde.create({"type_of_head": 64})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_chunk_without_numbers_is_not_stored(storage: Any, number: float, tmp_path: Path, caplog: Any) -> None:
    """LMCache logs why, and says that the store has failed."""
    states = chunk()
    states[1, 0, 3, 2] = number
    with pytest.raises(AssertionError, match="is_successful"):
        storage().store(b"a", states)
    assert "a chunk has NaN or infinity among its keys or values" in caplog.text
    assert not list(tmp_path.rglob("*.data"))
