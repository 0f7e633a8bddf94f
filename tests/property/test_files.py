"""Damaged and forged files.

**The laws.**  Whatever is done to the bytes of a saved cache, reading them raises `FormatError` or returns the content
that was saved, and nothing else.  Whatever is written into metadata whose hash is then made right, loading raises
`FormatError` (or asks for the policy), or returns a cache that has the shapes it says it has.
"""

import tempfile
import time
from pathlib import Path

import pytest
import torch
from files import CONFIGS, MAKERS, Entry, file_bytes, forged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexusquant_cache import FormatError, NexusQuantCache, OptionError
from nexusquant_cache.cache.layer import NexusQuantLayer
from nexusquant_cache.serialization.reader import read_file

IS_THOROUGH = settings().max_examples >= 1000
EXAMPLES = 10_000 if IS_THOROUGH else 100
LONGEST = 5.0  # seconds, for a file of 20 kB, on a busy machine

names = st.sampled_from(sorted(MAKERS))
levels = st.sampled_from([None, 3])
places = st.floats(0, 1, exclude_max=True)
# Most of a file is codes; what is most worth damaging stands at the beginning.
anywhere = places | places.map(lambda x: x * 0.01) | places.map(lambda x: x * 0.4)
some_bytes = st.binary(min_size=1, max_size=9) | st.sampled_from([b"0", b"9", b"-", b",", b"{", b'"', b"\x00", b"\xff"])
damages = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "remove", "repeat", "swap"]), anywhere, anywhere, some_bytes
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, how: str, one: float, other: float, new: bytes) -> bytes:
    """Return the bytes after one damage at a place, or between two."""
    at = int(one * len(data))
    start, stop = sorted((at, int(other * len(data))))
    stop = min(stop, start + 400)
    return {
        "flip": data[:at] + bytes([data[at] ^ 1 << new[0] % 8]) + data[at + 1 :] if data else data,
        "set": data[:at] + new + data[at + len(new) :],
        "cut": data[:at],
        "insert": data[:at] + new + data[at:],
        "remove": data[:start] + data[stop:],
        "repeat": data[:stop] + data[start:stop] + data[stop:],
        "swap": data[stop:] + data[:stop],
    }[how]


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "cache"


@pytest.fixture(scope="module")
def right(path):
    """What undamaged files hold."""
    found = {}
    for name in MAKERS:
        for level in (None, 3):
            path.write_bytes(file_bytes(name, level))
            found[name, level] = read_file(path)
    return found


@pytest.mark.usefixtures("unchecked")
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names, level=levels, damages=damages)
def test_damaged_files(name, level, damages, path, right):
    data = file_bytes(name, level)
    for damage in damages:
        data = damaged(data, *damage)
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        promise, tensors = read_file(path, threads=1)
    except FormatError:
        return
    finally:
        assert time.perf_counter() - start < LONGEST
    expected, content = right[name, level]
    assert promise.cache == expected.cache
    assert promise.sha256 == expected.sha256
    assert tensors.keys() == content.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == content[key].dtype
        assert torch.equal(tensor, content[key])


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 100),
    st.sampled_from([1 << 31, 1 << 47, 1 << 63, 10**40]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["", "float16", "bfloat16", "int64", "hadamard", "principal", "e8", "inf", "bytes"]),
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 9), max_size=3),
)


def paths_of(content, prefix=()):
    """Return the paths to all values inside JSON."""
    found = []
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in children:
        found += [(*prefix, key), *paths_of(child, (*prefix, key))]
    return found


def change_at(where: list[float], what: list[object], tensor: float):
    """Return a change of metadata at some places, and of the shape of a tensor's entry."""

    def change(content: dict, named: dict[str, Entry]) -> None:
        for at, value in zip(where, what, strict=True):
            paths = paths_of(content)
            if not paths:
                return
            path = paths[int(at * len(paths))]
            parent = content
            for step in path[:-1]:
                parent = parent[step]
            if value == "remove":
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
        if tensor < 0.2:
            key = sorted(named)[int(tensor * 5 * len(named))]
            entry, dtype, shape, data = named[key]
            named[key] = entry, dtype, [length + 1 for length in shape], data + bytes(4)

    return change


@pytest.mark.usefixtures("unchecked")
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=names,
    changes=st.lists(st.tuples(places, values | st.just("remove")), min_size=1, max_size=2),
    tensor=places,
)
def test_forged_files(name, changes, tensor, path):
    change = change_at([at for at, _ in changes], [value for _, value in changes], tensor)
    path.write_bytes(forged(file_bytes(name, None), change))
    start = time.perf_counter()
    try:
        cache = NexusQuantCache.load(path, config=CONFIGS[name](), threads=1)
    except FormatError:
        return
    except OptionError as error:
        assert "give policy=" in str(error)  # noqa: PT017 - what else there may be is told apart here
        return
    finally:
        assert time.perf_counter() - start < LONGEST
    assert isinstance(cache.memory_report().held_bytes, int)
    for layer in cache.layers:
        if isinstance(layer, NexusQuantLayer) and layer.is_initialized:
            assert layer.keys.shape[:3] == layer.values.shape[:3] == (*layer.tail[0].shape[:2], layer.kept)
