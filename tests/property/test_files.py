"""Damaged and forged files.

**The laws.**  Whatever is done to the bytes of a saved cache, reading them raises `FormatError` or returns the content
that was saved, and nothing else.  Whatever is written into metadata, tensors and their packings whose hash is then made
right, loading raises `FormatError` (or asks for the policy), or returns a cache that has the shapes it says it has,
holds finite numbers, and goes on.
"""

import json
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from feeding import feed
from files import (
    CONFIGS,
    MAKERS,
    Entry,
    file_bytes,
    forged,
    packed,
    put_together,
    refitted,
    take_apart,
    with_fingerprint,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexusquant_cache import FormatError, NexusQuantCache, OptionError
from nexusquant_cache.errors import NexusQuantError
from nexusquant_cache.files.packing import PACKINGS
from nexusquant_cache.files.reader import read_file
from nexusquant_cache.layer.layer import NexusQuantLayer

IS_THOROUGH = settings().max_examples >= 1000
EXAMPLES = 10_000 if IS_THOROUGH else 100
LONGEST = 5.0  # seconds, for a file of 20 kB, on a busy machine

names = st.sampled_from(sorted(MAKERS))
levels = st.sampled_from([None, 3])
# Scrambled, since what is drawn is often 0, or another end of its range.
places = st.integers(0, (1 << 16) - 1).map(lambda x: (x * 40503 + 7919) % (1 << 16) / (1 << 16))
# Most of a file is codes; what is most worth damaging stands at the beginning.
anywhere = st.one_of(places, places, places.map(lambda x: x * 0.4))
some_bytes = st.binary(min_size=1, max_size=9) | st.sampled_from([b"0", b"9", b"-", b",", b"{", b'"', b"\x00", b"\xff"])
# Most leave the length as it is: others are found out by it alone.
kinds = st.sampled_from([*["flip", "set", "copy", "swap bytes"] * 3, "cut", "insert", "remove", "repeat", "swap"])
damages = st.lists(st.tuples(kinds, anywhere, anywhere, some_bytes), min_size=1, max_size=3)


def damaged(data: bytes, how: str, one: float, other: float, new: bytes) -> bytes:
    """Return the bytes after one damage at a place, or between two."""
    # A damaged length of the header ends it at once, too.
    begin = 8 if new[0] % 8 and len(data) > 8 else 0
    at, until = (begin + int(place * (len(data) - begin)) for place in (one, other))
    start, stop = sorted((at, until))
    few = min(len(new), stop - start, len(data) - stop)
    near = min(stop, start + 400)
    return {
        "flip": data[:at] + bytes([data[at] ^ 1 << new[0] % 8]) + data[at + 1 :] if data else data,
        "set": (data[:at] + new + data[at + len(new) :])[: len(data)],
        "copy": data[:stop] + data[start : start + few] + data[stop + few :],
        "swap bytes": data[:start]
        + data[stop : stop + few]
        + data[start + few : stop]
        + data[start : start + few]
        + data[stop + few :],
        "cut": data[:at],
        "insert": data[:at] + new + data[at:],
        "remove": data[:start] + data[near:],
        "repeat": data[:near] + data[start:near] + data[near:],
        "swap": data[near:] + data[:near],
    }[how]


def read_soon(path):
    """Return what a file holds, or None if it is refused, and neither after a long time."""
    start = time.perf_counter()
    try:
        return read_file(path, threads=1)
    except FormatError:
        return None
    finally:
        assert time.perf_counter() - start < LONGEST


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "cache"


class _Contents(dict):
    """What files hold, by their makers and levels; hypothesis shows arguments, and these are too long for that."""

    def __repr__(self) -> str:
        return "right"


@pytest.fixture(scope="module")
def right(path):
    """What undamaged files hold."""
    found = _Contents()
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
    found = read_soon(path)
    if found is None:
        return
    promise, tensors = found
    expected, content = right[name, level]
    assert promise.cache == expected.cache
    assert promise.sha256 == expected.sha256
    assert tensors.keys() == content.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == content[key].dtype
        assert torch.equal(tensor, content[key])


numbers = st.sampled_from([-1, 0, 1, 2, 3, 7, 8, 9, 16, 60, 100, 1 << 31, 1 << 47, 1 << 63, 10**40])
texts = st.sampled_from(["", "float16", "bfloat16", "int64", "hadamard", "principal", "e8", "inf", "auto", "norm"])
others = st.one_of(
    st.none(),
    st.booleans(),
    numbers,
    st.floats(allow_nan=False, allow_infinity=False),
    texts,
    st.just([]),
    st.just({}),
    st.lists(st.integers(0, 9), max_size=3),
    st.just("remove"),
)
# A value like the old one goes further than any other.
values = st.sampled_from(["more", "less", "twice", "another"]) | others
value_bytes = st.sampled_from([b"\x00", b"\x01", b"\x7f", b"\xff", b"\xff\x7f", b"\x80\x7f", b"\x00\x7c", b"\x99\x76"])


def paths_of(content, prefix=()):
    """Return the paths to all values inside JSON."""
    found = []
    children = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, child in children:
        found += [(*prefix, key), *paths_of(child, (*prefix, key))]
    return found


def parent_of(content, path):
    for step in path[:-1]:
        content = content[step]
    return content


def like(old, how, pool, place):
    """Return a value of the kind of an old one."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int | float) and how != "another":
        return {"more": old + 1, "less": old - 1, "twice": 2 * old}[how]
    alike = [x for x in pool if type(x) is type(old)]
    return alike[int(place * len(alike))] if alike else old


def change_content(content: dict, changes: list[tuple[float, float, object]]) -> None:
    """Change metadata at some places."""
    for at, other, value in changes:
        paths = paths_of(content)
        if not paths:
            return
        path = paths[int(at * len(paths))]
        parent, key = parent_of(content, path), path[-1]
        if value == "remove":
            del parent[key]
        elif isinstance(value, str) and value in {"more", "less", "twice", "another"}:
            pool = [parent_of(content, each)[each[-1]] for each in paths]
            parent[key] = json.loads(json.dumps(like(parent[key], value, pool, other)))
        else:
            parent[key] = value


def change_tensor(named: dict[str, Entry], which: float, at: float, until: float, new: bytes) -> None:
    """Fill a part of a tensor with a pattern; its length stays."""
    key = sorted(named)[int(which * len(named))]
    name, dtype, shape, data = named[key]
    start, stop = sorted(int(place * len(data)) & ~7 for place in (at, until))
    fill = (new * (stop - start + 8))[: max(stop - start, 1)]
    named[key] = name, dtype, shape, (data[:start] + fill + data[start + len(fill) :])[: len(data)]


def check_goes_on(cache: NexusQuantCache) -> None:
    """Check what every layer of ours holds, and give it a token more."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, NexusQuantLayer) and layer.is_initialized:
            state = layer.state
            places = state.sink_tokens + state.packed_tokens + state.tail_tokens
            assert layer.keys.shape[:3] == layer.values.shape[:3] == (*state.tail[0].shape[:2], places)
            for x in (layer.keys, layer.values):
                assert x.dtype not in {torch.float32, torch.float64} or bool(x.isfinite().all())
            try:
                feed(cache, *(x.new_ones(*x.shape[:2], 1, x.shape[3]) for x in layer.state.tail), index)
            except NexusQuantError:  # exact tokens may be as large as their dtype allows, and too large to be coded
                return


@pytest.mark.usefixtures("unchecked")
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=names,
    changes=st.lists(st.tuples(places, places, values), max_size=2),
    fills=st.lists(st.tuples(places, places, places, value_bytes), max_size=2),
    repaired=st.booleans(),
)
def test_forged_files(name, changes, fills, repaired, path):
    def change(content: dict, named: dict[str, Entry]) -> None:
        change_content(content, changes)
        if repaired:  # so that not the first contradiction ends it
            if isinstance(content.get("model"), dict) and isinstance(content["model"].get("fields"), dict):
                with_fingerprint(content)
            made = refitted(content, named)
            if made is not None:
                named.clear()
                named.update(made)
        for fill in fills if named else ():
            change_tensor(named, *fill)

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of codes that change what attention reads, as they do here
        check_goes_on(cache)


@pytest.mark.usefixtures("unchecked")
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=names,
    which=places,
    packings=st.tuples(st.sampled_from(PACKINGS[1:]), st.sampled_from(PACKINGS)),
    is_renamed=st.booleans(),
    damages=st.lists(st.tuples(kinds, places, places, some_bytes), max_size=2),
)
def test_forged_packings(name, which, packings, is_renamed, damages, path, right):  # noqa: PLR0917 - drawn by name
    """A packed tensor, damaged or in another packing than its name says, and a right hash of what it should be."""
    metadata, content, entries = take_apart(file_bytes(name, None))
    index = int(which * len(entries))
    plain, _, _, data = entries[index]
    packed_name, _, _, stored = packed(entries[index], packings[0])
    for damage in damages:
        stored = damaged(stored, *damage)
    if is_renamed:
        packed_name = f"{plain}:{packings[1]}"
    entries[index] = packed_name, "U8", [len(stored)], stored
    path.write_bytes(put_together(metadata, content, entries, {plain: data}))
    found = read_soon(path)
    if found is None:
        return
    _, tensors = found
    expected = right[name, None][1]
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[key])
