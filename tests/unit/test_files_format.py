"""Saved files: what every check refuses, one by one, in files whose hash is right."""

import copy
import json
import struct
import time

import pytest
import safetensors
import safetensors.torch
import torch
import zstandard
from feeding import feed
from files import (
    compressed,
    file_bytes,
    forged,
    mixed,
    mixed_config,
    put_together,
    refitted,
    take_apart,
    version_1_bytes,
    with_fingerprint,
    with_tensor,
)
from hypothesis import given
from hypothesis import strategies as st
from integration.families import build
from integration.tiny import SMALL, LosslessCodec, logits, prompt, random_states, tiny_config
from transformers.cache_utils import DynamicIndexedLayer

from nexusquant_cache import (
    CacheConfig,
    FormatError,
    NexusQuantCache,
    NonFiniteError,
    OptionError,
    UnsupportedError,
    register_codec,
)
from nexusquant_cache.codec import registry
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.codec.registry import CodecMeta
from nexusquant_cache.files import (
    contents,
    convert_file,
    inspect_file,
    packing,
    schema,
    verify_file,
)
from nexusquant_cache.files.container import VERSION, header_bytes, read_header
from nexusquant_cache.files.contents import FileTensor, tensors_of
from nexusquant_cache.files.reader import read_file
from nexusquant_cache.files.schema import from_json, to_json
from nexusquant_cache.files.state import Source
from nexusquant_cache.files.stock import restore_stock, stock_state
from nexusquant_cache.layer import state as state_module


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "cache"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def refused(write):
    """Check that these bytes are refused, by everything that reads files, for this reason."""

    def refused(data, reason):
        path = write(data)
        with pytest.raises(FormatError, match=reason):
            verify_file(path)
        with pytest.raises(FormatError, match=reason):
            NexusQuantCache.load(path, config=tiny_config())

    return refused


class TestContainer:
    def test_any_reader_of_safetensors_reads_raw_files(self, write):
        path = write(file_bytes("compressed", None))
        cache = NexusQuantCache.load(path)
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "nexusquant-cache"
            assert torch.equal(file.get_tensor("layers.0.keys.tail"), cache.layers[0].state.tail[0])
            assert torch.equal(
                file.get_tensor("layers.1.values.words"), cache.layers[1].state.body.values.words.stored()
            )

    @pytest.mark.parametrize("name", ["compressed", "padded", "mixed"])
    @pytest.mark.parametrize("level", [None, 3])
    def test_any_reader_of_safetensors_reads_the_container(self, name, level):
        data = file_bytes(name, level)
        tensors = safetensors.torch.load(data)
        entries = {entry[0]: entry[3] for entry in take_apart(data)[2]}
        assert {key: x.flatten().view(torch.uint8).numpy().tobytes() for key, x in tensors.items() if x.numel()} == {
            key: x for key, x in entries.items() if x
        }

    def test_tensors_that_keep_their_dtype_are_aligned(self, write):
        for level in (None, 3):
            with write(file_bytes("compressed", level)).open("rb") as file:
                for entry in read_header(file)[1]:
                    size = {"F32": 4, "F16": 2, "I64": 8}.get(entry.dtype, 1)
                    assert entry.start % size == 0

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"", "no safetensors file, or it has been cut off"),
            (b"\x02\x00", "no safetensors file, or it has been cut off"),
            (b"\xff" * 8, "no safetensors file, or it has been cut off"),
            (struct.pack("<q", 2) + b"{}", "no metadata"),
            (struct.pack("<q", 2) + b"[]", "no JSON object"),
            (struct.pack("<q", 2) + b"{]", "no JSON"),
            (struct.pack("<q", 2) + b"\xff\xff", "no JSON"),
            (struct.pack("<q", 200_000) + b"[" * 200_000, "no JSON"),
            (header_bytes({"format": "other"}, []), "of another kind"),
            (header_bytes({"format": "nexusquant-cache"}, []), "version ''"),
            (header_bytes({"format": "nexusquant-cache", "version": str(VERSION + 1)}, []), "later release: update"),
            (header_bytes({"format": "nexusquant-cache", "version": "0"}, []), "no such version"),
            (header_bytes({"format": "nexusquant-cache", "version": "²"}, []), "no such version"),
            (header_bytes({"format": "nexusquant-cache", "version": "1"}, []), "must be format, version, cache"),
            (
                header_bytes({"a": "b"}, [("x", "U8", (1,), 1)]).replace(b'"U8"', b"[9] ") + b"1",
                "nonsense about the tensor 'x'",
            ),
            (header_bytes({"a": "b"}, [("x", "U9", (1,), 1)]) + b"1", "nonsense about the tensor 'x'"),
            (header_bytes({"a": "b"}, [("x", "U8", (2,), 1)]) + b"1", "nonsense about the tensor 'x'"),
            (header_bytes({"a": "b"}, [("x", "U8", (1,) * 9, 1)]) + b"1", "nonsense about the tensor 'x'"),
            (header_bytes({"a": "b"}, [("x", "U8", (-1,), -1)]), "nonsense about the tensor 'x'"),
            (header_bytes({"a": "b"}, [("x", "U8", (1 << 62,), 1 << 62)]), "nonsense about the tensor 'x'"),
            (header_bytes({"a": "b"}, [("x", "U8", (1 << 40,), 1 << 40)]), "describes a file of 1,099,511,6"),
            (header_bytes({"a": "b"}, [("x", "U8", (1,), 1)]) + b"12", "this one has"),
        ],
    )
    def test_what_is_no_container(self, data, reason, refused):
        refused(data, reason)

    @pytest.mark.parametrize("offsets", [[0, 2], [2, 4], [3, 5], [0, 1 << 49], [1, 2]])
    def test_tensors_must_follow_each_other(self, offsets, refused):
        entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
        header = {"__metadata__": {}, "a": entry, "b": {**entry, "data_offsets": offsets}}
        text = json.dumps(header).encode()
        reason = "overlaps another|nonsense|this one has"
        data = struct.pack("<q", len(text)) + text + b"1234"
        if offsets == [2, 4]:
            reason = "of another kind"
        refused(data, reason)

    def test_a_name_twice(self, refused):
        text = b'{"__metadata__":{"format":"x"},"__metadata__":{"format":"y"}}'
        refused(struct.pack("<q", len(text)) + text, "a name comes twice")

    def test_no_constants(self, refused):
        text = b'{"__metadata__":NaN}'
        refused(struct.pack("<q", len(text)) + text, "NaN is no number")

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
    def test_only_utf_8(self, encoding, refused):
        text = '{"__metadata__":{"format":"x"}}'.encode(encoding)
        refused(struct.pack("<q", len(text)) + text, "no JSON")

    def test_an_endless_header_is_not_read(self, tmp_path):
        path = tmp_path / "huge"
        with path.open("wb") as file:
            file.write(struct.pack("<q", 1 << 30))
            file.truncate((1 << 30) + 8)  # sparse
        start = time.perf_counter()
        with pytest.raises(FormatError, match="no safetensors file"):
            verify_file(path)
        assert time.perf_counter() - start < 1


def at(content, *path):
    for step in path:
        content = content[step]
    return content


def setting(*path, to):
    """Return the change that sets a field of the metadata."""

    def change(content, _named):
        at(content, *path[:-1])[path[-1]] = to

    return change


def nested(depth):
    return [] if depth == 0 else [nested(depth - 1)]


def with_codec(layer, name):
    """Return the change that makes codecs of a layer those of longer vectors."""

    def change(content, _named):
        codec = json.loads(json.dumps(content["codecs"][0]))
        codec["options"] |= {"head_dim": 64, "block_bits": [2] * 8}
        content["codecs"].append(codec)
        at(content, *layer)[name] = [len(content["codecs"]) - 1] * 2

    return change


def move(body, one, other):
    """Take one away from a count and give it to another."""
    body[one], body[other] = body[one] + 1, body[other] - 1


GIVEN = {"rotation": "hadamard", "seed": 0, "rows": 1, "plans": False}
EMPTY = {
    "seen": 0,
    "tail": 0,
    "record_past": False,
    "expects_prompt": False,
    "updated_since_crop": False,
}
LAYER = ("layers", 0)
BODY = (*LAYER, "body")
COUNTS = {"counts": "int64"}
LIES = [
    (setting("layers", to=7), "cache.layers in the metadata must be a list"),
    (setting("when", to="never"), "when must be one of"),
    (setting("when", to=None), "must be str"),
    (setting("extra", to=1), "must have the fields"),
    (setting("tokens_seen", to=-1), "tokens_seen in the metadata must be int"),
    (setting("tokens_seen", to=True), "tokens_seen in the metadata must be int"),
    (setting("tokens_seen", to=1 << 60), "tokens_seen in the metadata must be int"),
    (setting("tokens_seen", to=5), "layers.0 has seen 71 tokens, and the file says 5"),
    (setting("tokens_seen", to=10**12), "layers.0 has seen 71 tokens"),
    (setting("policies", to=["a"] * 5000), "has 5,000 items, 4,096 are allowed"),
    (setting("codecs", to=[{"name": "e8", "options": {}}] * 5000), "has 5,000 items"),
    (setting("statistics", to={"a": nested(40)}), "statistics.a in the metadata holds too much"),
    (setting("statistics", to={"a": [0] * 70_000}), "statistics.a in the metadata holds too much"),
    (setting("statistics", to={"a": 1 << 64}), "beyond all reason"),
    (setting("model", "fingerprint", to="0" * 64), "fingerprint in the file is not that of its fields"),
    (setting("model", "fields", "head_dim", to=17), "fingerprint in the file is not that of its fields"),
    (setting("user", to={"a": 1}), "user.a in the metadata must be str"),
    (setting("user", to=[]), "user in the metadata must be an object"),
    (setting("settings", to={"key_bits": 9}), "settings are none of this version"),
    (setting("settings", to={"kye_bits": 2}), "settings are none of this version"),
    (setting("settings", "sink_tokens", to=1 << 60), "beyond all reason"),
    (setting("settings", "impl", to="torch"), "the reader's choice"),
    (setting("settings", "scale_candidates", to=[1.0] * 65), "more than 64 scale candidates"),
    (setting("layers", 0, to={"a": 1}), r"layers\[0\] in the metadata is of no known kind"),
    (setting(*LAYER, "seen", to=72), "counts its tokens in two ways"),
    (setting(*LAYER, "tail", to=3), "counts its tokens in two ways"),
    (setting(*LAYER, "pending_from", to=1000), "waits for tokens that it has not seen"),
    (setting(*LAYER, "sinks", to=None), "layers.0.sinks|must have sinks|of no known kind"),
    (setting(*LAYER, "sinks", to=3), "impossible place|cannot be"),
    (setting(*LAYER, "asked", to=[0, 9]), "codec that the file does not describe"),
    (setting(*LAYER, "asked", to=[0]), "must be a list of 2"),
    (with_codec(LAYER, "asked"), "codec for vectors of another length than 16"),
    (with_codec(LAYER, "used"), "codec for vectors of another length than 16"),
    (setting(*LAYER, "sink_place", to=True), "is of another version than the file"),
    (setting("padding", to={"certain": True}), "metadata are none of format version 3"),
    (setting(*LAYER, "shown", to=[0, 72]), "was shown the attention to tokens that it has not seen"),
    (setting(*LAYER, "shown", to=[3, 2]), "was shown the attention to tokens that it has not seen"),
    (setting(*LAYER, "shown", to=[3]), "must be a list of 2"),
    (setting(*LAYER, "updates", to=[0, 0]), "counts its updates wrongly"),
    (setting(*LAYER, "updates", to=[60, 3]), "counts its updates wrongly"),
    (setting(*LAYER, "more", to=COUNTS | {"votes": "int64"}), "names a tensor that no layer has"),
    (setting(*LAYER, "more", to=COUNTS | {"pads": "bool"}), "lacks the tensor layers.0.pads"),
    (setting(*LAYER, "more", to=COUNTS | {"pads": "float32"}), "layers.0.pads must be one of bool"),
    (setting(*LAYER, "more", to={}), "must say how many tokens each head keeps"),
    (setting(*BODY, "total", to=58), "cannot be uint8"),
    (setting(*LAYER, "more", to=COUNTS | {"hidden": "uint8"}), "metadata are none of format version 3"),
    (setting(*LAYER, "more", to=COUNTS | {"sink_positions": "int32"}), "must be one of int64|impossible place"),
    (setting(*LAYER, "more", to=COUNTS | {"origins": "float64"}), "layers.0.origins must be one of int64"),
    (setting(*LAYER, "phase", to=1), "rotary phase that the file does not hold"),
    (setting(*LAYER, "policy", to=1), "policy that the file does not describe"),
    (setting(*LAYER, "code_error", to="nan"), "is no number"),
    (setting(*LAYER, "code_error", to=-1.0), "is negative"),
    (setting(*LAYER, "shape", "batch", to=0), "batch must be from 1"),
    (setting(*LAYER, "shape", "heads", to=1 << 40), "heads must be from 1"),
    (setting(*LAYER, "shape", "key_dtype", to="complex64"), "dtype must be one of"),
    (setting(*LAYER, "shape", "key_dim", to=24), "codec for vectors of another length than 24|cannot be"),
    (setting(*LAYER, "shape", to=None), "of no known kind|holds something before"),
    (lambda content, _: content["layers"][0].pop("shape") and None, "holds something before its first update"),
    *(
        (lambda content, _, new=new: content["layers"].append(EMPTY | new), "holds something before its first update")
        for new in ({"shown": [0, 0]}, {"updates": [1, 0]}, {"more": {"pads": "bool"}}, {"seen": 1})
    ),
    (lambda content, _: content["layers"][0].pop("sinks") and None, "must have sinks when tokens are packed"),
    (lambda content, _: content["layers"][0].pop("asked") and None, "names no codecs"),
    (lambda content, _: [content["layers"][0].pop(x) for x in ("body", "sinks")] and None, "that it does not hold"),
    (lambda content, _: move(content["layers"][0]["body"], "start", "dense"), "impossible place"),
    (setting(*BODY, "start", to=1), "counts its tokens in two ways|impossible place"),
    (setting(*BODY, "kept", to=1 << 40), "counts its tokens in two ways"),
    (setting(*BODY, "keys", "rotation", to="random"), "rotation must be one of"),
    (setting(*BODY, "keys", "rows", to=2), "transforms for another batch"),
    (setting(*BODY, "keys", "mean", to="int8"), "mean must be one of"),
    (setting(*BODY, "values", "plans", to=False), "does not announce"),
    (setting("phases", 0, "pairs", to=9), "more channels than its keys"),
    (setting("phases", 0, "pairs", to=0), "pairs must be from 1"),
    (setting("phases", 0, "pairs", to=4), "what is stored of phases.0"),
    (setting("codecs", 0, "name", to="mystery"), "needs the codec 'mystery'"),
    (setting("codecs", 0, "options", "head_dim", to=1 << 20), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "head_dim", to="16"), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "block_bits", to=[0, 0]), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "block_bits", to=[9, 9]), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "block_bits", to=None), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "candidates", to=["a"]), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "candidates", to=[]), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "seed", to=1 << 70), "beyond all reason"),
    (setting("codecs", 0, "options", "gain", to="vast"), "describes no codec 'e8': the gain rules .* been removed"),
    (setting("settings", "key_gain", to="unbiased"), "none of this version: the option 'key_gain' was removed"),
    (setting("settings", "protect_boundary", to=1), "none of this version: the option 'protect_boundary' was removed"),
    (setting("settings", "protect_boundary", to=False), "the option 'protect_boundary' was removed"),
    (setting("codecs", 0, "options", "center", to=1), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "secret", to=1), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "impl", to="torch"), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "candidates", to=[1.0] * 65), "more than 64 scale candidates"),
    (setting(*LAYER, "observed", "reconstruction", to=1000), "attention to tokens that it has not seen"),
    (setting(*LAYER, "observed", "now", "end", to=10**9), "queries of tokens that it has not seen"),
    (setting(*LAYER, "observed", "now", "heads", to=4), "queries without a dtype"),
    (
        setting(*LAYER, "observed", "now", to={"heads": 3, "tokens": 1, "dtype": "float32", "end": 1}),
        "queries that do not fit",
    ),
    (
        setting(*LAYER, "given", to={"keys": {}, "values": {}, "codecs": [0, 0], "asked": [0, 0], "unrotated": True}),
        "given.keys in the metadata must have the fields",
    ),
    *(
        (
            setting(
                *LAYER,
                "given",
                to={
                    "keys": GIVEN | {"rows": rows},
                    "values": GIVEN,
                    "codecs": [0, 0],
                    "asked": asked,
                    "unrotated": True,
                },
            ),
            reason,
        )
        for rows, asked, reason in ((1, [0, 99], "codec that the file does not"), (2, [0, 0], "for another batch"))
    ),
]


@pytest.mark.parametrize(("change", "reason"), LIES, ids=[str(i) for i in range(len(LIES))])
def test_metadata_that_lie(change, reason, refused):
    refused(forged(file_bytes("compressed", None), change), reason)


def stored(name, make):
    """Return the change that replaces the content of a tensor."""

    def change(_content, named):
        _, dtype, shape, data = named[name]
        types = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8, "I8": torch.int8, "I64": torch.int64}
        tensor = torch.frombuffer(bytearray(data), dtype=types[dtype]).view(shape)
        with_tensor(named, name, make(tensor))

    return change


def first(value):
    def make(tensor):
        tensor.flatten()[0] = value
        return tensor

    return make


POISON = [
    ("layers.0.keys.reference", first(float("nan")), "holds NaN or infinity"),
    ("layers.0.keys.reference", first(float("inf")), "holds NaN or infinity"),
    ("layers.0.keys.reference", first(-1.0), "scale that is not positive"),
    ("layers.1.values.reference", first(0.0), "scale that is not positive"),
    ("layers.0.keys.step", first(-1.0), "scale that is not positive"),
    ("layers.0.keys.mean", first(float("inf")), "holds NaN or infinity"),
    ("layers.0.keys.tail", first(float("nan")), "holds NaN or infinity"),
    ("layers.0.values.sinks", first(float("inf")), "holds NaN or infinity"),
    ("layers.0.keys.plans", first(200), "plan of bits that the codec does not have"),
    ("layers.0.kept", torch.bitwise_not, "tokens in every head"),
    ("layers.0.kept", lambda x: x | 1 if not bool((x & 1).all()) else x & 254, "tokens in every head"),
    ("phases.0", first(float("nan")), "holds NaN or infinity"),
    ("layers.0.keys.reference", first(3e38), "too large to be decoded"),
    ("layers.0.values.step", first(3e38), "too large to be decoded"),
    ("layers.0.keys.mean", first(3e38), "too large to be decoded|holds NaN or infinity"),
    ("layers.0.kept", lambda x: x | 128, "tokens in every head"),
]


@pytest.mark.parametrize(("name", "make", "reason"), POISON)
def test_poisoned_tensors(name, make, reason, refused):
    refused(forged(file_bytes("compressed", None), stored(name, make)), reason)


def as_text(content, change):
    """Return metadata as text after a change that JSON written from Python would not have."""
    return change(json.dumps(content, separators=(",", ":"), sort_keys=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: text.replace('"preset":"custom"', '"preset":"\ud800"'), "no JSON"),
        (lambda text: text.replace('"statistics":{', '"statistics":{"a":1e999,'), "too large a number"),
        (lambda text: text.replace('"fields":{', '"fields":{"a":-1e999,'), "too large a number"),
    ],
)
def test_texts_and_numbers_that_cannot_be_written_again(change, reason, refused):
    metadata, content, entries = take_apart(file_bytes("compressed", None))
    text = as_text(content, change)
    assert text != as_text(content, str)
    refused(put_together(metadata, text, entries), reason)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("covered", [0, 1, 8, 9, 1000, 1003])
@pytest.mark.parametrize("part", [1, 7, 1 << 20])
def test_bits_are_counted_in_parts(batch, covered, part, monkeypatch):
    monkeypatch.setattr(state_module, "_PART", part)
    kept = torch.stack([torch.randperm(covered).sort().values < covered // 3 for _ in range(2 * batch)])
    kept = torch.stack([row[torch.randperm(covered)] for row in kept]).view(batch, 2, covered)
    bits = torch.nn.functional.pad(kept, (0, -covered % 8)).view(batch, 2, -1, 8)
    bitmap = (bits * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
    facts = {"covered": covered, "kept": covered // 3, "counts": None}
    assert state_module._bitmap(bitmap, facts) is None
    for bit in range(0, 8 * bitmap.shape[-1], 11):  # also those behind the last position
        wrong = bitmap.clone()
        wrong[-1, -1, bit // 8] ^= 1 << bit % 8
        assert "tokens in every head" in str(state_module._bitmap(wrong, facts))


def test_counting_bits_takes_little_memory(monkeypatch):
    sizes, count = [], state_module._count_bits
    monkeypatch.setattr(state_module, "_count_bits", lambda x: sizes.append(x.numel()) or count(x))
    for shape in ((1, 2, 3 << 20), (1 << 10, 1 << 10, 4)):
        start = time.perf_counter()
        facts = {"covered": 8 * shape[2], "kept": 0, "counts": None}
        assert state_module._bitmap(torch.zeros(shape, dtype=torch.uint8), facts) is None
        assert time.perf_counter() - start < 2
    assert max(sizes) <= 1 << 20
    assert len(sizes) < 20


def test_annotations_are_read_once(monkeypatch):
    text = take_apart(file_bytes("mixed"))[0]["cache"]
    from_json(text)
    monkeypatch.setattr(schema, "get_type_hints", lambda _: pytest.fail("read again"))
    from_json(text)


def test_too_many_tensors(monkeypatch):
    meta = from_json(take_apart(file_bytes("compressed"))[0]["cache"])
    monkeypatch.setattr(contents, "_MOST_TENSORS", len(tensors_of(meta)))
    tensors_of(meta)
    monkeypatch.setattr(contents, "_MOST_TENSORS", len(tensors_of(meta)) - 1)
    with pytest.raises(FormatError, match="tensors are announced"):
        tensors_of(meta)


def test_layers_of_different_lengths(refused):
    def change(content, named):
        content["layers"][1]["seen"] -= 1
        content["layers"][1]["tail"] -= 1
        content["layers"][1]["shown"] = [0, 70]
        named.update(refitted({**content, "tokens_seen": 70, "layers": content["layers"][1:]}, named) or named)

    refused(forged(file_bytes("compressed", None), change), "layers.1 has seen 70 tokens, and the file says 71")


def test_more_layers_than_the_model_has(write):
    def change(content, _named):
        content["layers"] += [EMPTY] * 1000

    path = write(forged(file_bytes("compressed", None), change))
    with pytest.raises(FormatError, match="holds 1002 layers, the cache of this model has 2"):
        NexusQuantCache.load(path, config=tiny_config())


def test_settings_of_later_releases_have_their_defaults(write):
    def change(content, _named):
        del content["settings"]["most_code_error"]

    loaded = NexusQuantCache.load(write(forged(file_bytes("compressed", None), change)))
    assert loaded.cache_config.most_code_error == CacheConfig().most_code_error


class TestModel:
    """Which config a file fits."""

    def load(self, write, change, config):
        def changed(content, _named):
            change(content["model"]["fields"])
            with_fingerprint(content)

        return NexusQuantCache.load(write(forged(file_bytes("compressed", None), changed)), config=config)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("intermediate_size", 96),
            ("rms_norm_eps", 1e-2),
            ("hidden_act", "relu"),
            ("attention_bias", True),
            ("mlp_bias", True),
            ("num_key_value_heads", 4),
        ],
    )
    def test_others_are_refused(self, name, value, write):
        with pytest.raises(FormatError, match=f"belongs to another model: {name} "):
            self.load(write, lambda _: None, tiny_config(**{name: value}))

    def test_files_that_know_fewer_fields(self, write):
        def change(fields):
            for name in ("intermediate_size", "rms_norm_eps", "hidden_act", "attention_bias", "mlp_bias"):
                del fields[name]

        self.load(write, change, tiny_config(mlp_bias=True))

    def test_what_was_always_there_is_never_missing(self, write):
        with pytest.raises(FormatError, match=r"another model: head_dim None \(here 16\)"):
            self.load(write, lambda fields: fields.pop("head_dim"), tiny_config())

    @pytest.mark.parametrize(
        "name",
        ["linear_num_value_heads", "linear_num_key_heads", "linear_value_head_dim", "linear_conv_kernel_dim"],
    )
    def test_other_states_of_linear_attention(self, name, tmp_path):
        model = build("qwen3_next")
        cache = NexusQuantCache("quant", config=model.config)
        logits(model, prompt(20), cache)
        cache.save(tmp_path / "a")
        other = copy.deepcopy(model.config)
        setattr(other, name, 2 * getattr(other, name))
        with pytest.raises(FormatError, match=f"belongs to another model: {name} "):
            NexusQuantCache.load(tmp_path / "a", config=other)


class TestSavingWhatLoadingRefuses:
    """A cache that no file can hold is not saved: it would be lost."""

    def refused(self, folder, cache, reason, error=UnsupportedError, **options):
        with pytest.raises(error, match=reason):
            cache.save(folder / "a", **options)
        assert not list(folder.iterdir())

    def cache(self, codec=None, **options):
        class Own(NexusQuantCache):
            def make_codec(self, side, head_dim, layer_idx):
                return codec or super().make_codec(side, head_dim, layer_idx)

        # Of keys that are queries, many codes change what attention reads by more than is allowed.
        return Own("balanced", **(SMALL | {"most_code_error": 100.0} | options))

    @pytest.mark.parametrize("seed", [-1, 1 << 48, (1 << 63) + 5, (1 << 64) - 1, 1 << 64, 1 << 200, -(1 << 200) + 3])
    def test_every_seed_comes_back(self, seed, tmp_path):
        cache = self.cache(E8Codec(CodeLayout.flat(16, 2), seed=seed))
        for tokens in (60, 1):
            feed(cache, *random_states((1, 2, tokens, 16), tokens), 0)
        cache.save(tmp_path / "a")
        loaded = NexusQuantCache.load(tmp_path / "a")
        assert cache.layers[0].state.body is not None
        assert torch.equal(loaded.layers[0].keys, cache.layers[0].keys)
        assert torch.equal(loaded.layers[0].values, cache.layers[0].values)

    def test_long_metadata(self, tmp_path):
        self.refused(tmp_path, NexusQuantCache("quant"), "1,048,576", OptionError, metadata={"a": "x" * (1 << 20)})
        NexusQuantCache("quant").save(tmp_path / "a", metadata={"a": "x" * (1 << 19), "\ud800": "\x1b"})
        inspect_file(tmp_path / "a")

    def test_settings(self, tmp_path):
        self.refused(tmp_path, NexusQuantCache("quant", sink_tokens=1 << 50), "beyond all reason")
        self.refused(tmp_path, NexusQuantCache("quant", scale_candidates=(1.0,) * 65), "scale candidates")

    def test_long_vectors(self, tmp_path):
        cache = NexusQuantCache("balanced", transform="hadamard", **SMALL)
        feed(cache, *random_states((1, 1, 3, 4096), 0), 0)
        self.refused(tmp_path, cache, "impossible blocks")

    def test_no_rows(self, tmp_path):
        cache = NexusQuantCache("balanced", **SMALL)
        feed(cache, *random_states((1, 2, 5, 16), 0), 0)
        cache.layers[0].batch_select_indices(torch.tensor([], dtype=torch.int64))  # the cache itself would refuse
        self.refused(tmp_path, cache, "batch must be from 1")

    def test_a_forward_that_has_not_ended(self, tmp_path):
        cache = NexusQuantCache("balanced", **SMALL)
        for layer in range(2):
            feed(cache, *random_states((1, 2, 60, 16), layer), layer)
        feed(cache, *random_states((1, 2, 1, 16), 2), 0)
        self.refused(tmp_path, cache, "layers.1 has seen 60 tokens, and the file says 61")

    def test_codes_of_another_size_than_the_codec_says(self, tmp_path, monkeypatch):
        cache = self.cache(E8Codec(CodeLayout.flat(16, 2)))
        for tokens in (60, 1):
            feed(cache, *random_states((1, 2, tokens, 16), tokens), 0)
        words = cache.layers[0].state.body.keys.words
        monkeypatch.setattr(words, "front", words.front[..., :-1])
        self.refused(tmp_path, cache, r"layers.0.keys.words is torch.uint8 .*, not uint8")

    def test_numbers_that_are_none_in_layers_of_transformers(self, tmp_path):
        cache = mixed()
        cache.layers[0].values[0, 0, 0, 0] = float("nan")
        self.refused(tmp_path, cache, "layers.0.values holds NaN or infinity", NonFiniteError)

    def test_configs_that_no_json_can_hold(self, tmp_path):
        config = tiny_config()
        config.rope_parameters["factor"] = float("inf")
        self.refused(tmp_path, NexusQuantCache("quant", config=config), "cannot hold this cache")


def bits_of(named, name):
    """Return the bits of a bitmap, ``[batch, heads, positions]``."""
    _, _, shape, data = named[name]
    bitmap = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
    return (bitmap[..., None] >> torch.arange(8) & 1).flatten(-2).bool()


def with_bits(named, name, bits):
    with_tensor(named, name, (bits.unflatten(-1, (-1, 8)) * 2 ** torch.arange(8)).sum(-1).to(torch.uint8))


class TestPlaces:
    """Which tokens are where: sinks, pads, and how many each head has."""

    @pytest.mark.parametrize(
        ("name", "change", "reason"),
        [
            (
                "compressed",
                setting(*LAYER, "more", to=COUNTS | {"sink_positions": "int64"}),
                "lacks the tensor layers.0.sink|impossible place",
            ),
            (
                "compressed",
                setting(*LAYER, "more", to=COUNTS | {"origins": "int64"}),
                "lacks the tensor layers.0.origins",
            ),
            ("waiting", setting(*LAYER, "more", "counts", to="int64"), "says where tokens are that it does not have"),
            ("waiting", setting(*LAYER, "more", "sink_positions", to="int64"), "where tokens are that it does not"),
            ("waiting", setting(*LAYER, "more", "origins", to="int64"), "says where tokens are that it does not have"),
            ("padded", setting(*LAYER, "sinks", to=0), "says where tokens are that it does not have"),
            ("padded", setting(*LAYER, "more", "counts", to="int32"), "layers.0.counts must be one of int64"),
            ("padded", setting(*BODY, "total", to=10**6), "has more tokens than its heads keep"),
            ("padded", setting(*BODY, "total", to=1), "what is stored of layers.0"),
            ("padded", setting(*BODY, "bitmap", to=False), "begins its packed tokens in an impossible place"),
        ],
    )
    def test_metadata_that_lie(self, name, change, reason, refused):
        refused(forged(file_bytes(name, None), change), reason)

    @pytest.mark.parametrize(
        ("name", "make", "reason"),
        [
            ("layers.0.counts", lambda x: x + 1, "counts does not count the tokens that there are"),
            ("layers.0.counts", lambda x: x - torch.tensor([[0, 30], [0, 0]]), "does not count the tokens that there"),
            ("layers.0.counts", lambda x: x.flip(0), "counts are not the numbers of tokens that are kept"),
            ("layers.1.kept", lambda x: x | 128, "tokens in every head"),  # behind the last position
            ("layers.0.sink_positions", lambda x: x + 1000, "behind the packed tokens"),
            ("layers.0.sink_positions", lambda x: x - 1, "behind the packed tokens"),
            ("layers.0.sink_positions", lambda x: x.flip(1), "is not ascending"),
            ("layers.0.sink_positions", lambda x: x * 0, "is not ascending"),
            ("layers.0.sink_positions", lambda _: torch.tensor([[6, 45], [0, 1]]), "sinks among its packed tokens"),
            ("layers.0.origins", lambda x: x - 1, "must hold numbers from 0 to 61"),
            ("layers.0.origins", lambda x: x + 56, "must hold numbers from 0 to 61"),
        ],
    )
    def test_poisoned_tensors(self, name, make, reason, refused):
        refused(forged(file_bytes("padded", None), stored(name, make)), reason)

    def test_sinks_that_are_packed_too(self, refused):
        """A head of the row without pads keeps a sink in the place of its first packed token."""

        def change(_content, named):
            bits = bits_of(named, "layers.0.kept")
            first = bits[-1, -1].nonzero()[0]
            bits[-1, -1, first], bits[-1, -1, 1] = False, True
            with_bits(named, "layers.0.kept", bits)

        refused(forged(file_bytes("padded", None), change), "layers.0 has sinks among its packed tokens")

    def test_truth_values_are_two(self, refused):
        def change(_content, named):
            name, dtype, shape, data = named["layers.0.pads"]
            named[name] = name, dtype, shape, b"\x07" + data[1:]

        refused(forged(file_bytes("waiting", None), change), "truth value that is neither")

    @pytest.mark.parametrize("tokens", [49, 51])
    def test_pads_are_as_many_as_exact_tokens(self, tokens, refused):
        def change(_content, named):
            name, dtype, _, _ = named["layers.0.pads"]
            named[name] = name, dtype, [2, tokens], bytes(2 * tokens)

        refused(forged(file_bytes("waiting", None), change), "what is stored of layers.0.pads")


class TestVersion1:
    """What files of version 1 say of padding, and others in other words."""

    @pytest.mark.parametrize(
        ("name", "change", "reason"),
        [
            ("compressed", setting("padding", "stated", to=1), "lacks the tensor padding.stated"),
            ("compressed", setting("padding", "pads", to=1), "first tokens of padded rows are, and of no others"),
            ("compressed", setting("padding", "settled_at", to=10**12), "settled by tokens that have not been seen"),
            ("compressed", setting("padding", "beginning", to={"rows": 0, "channels": 1}), "rows must be from 1"),
            ("compressed", setting("padding", "beginning", to={"rows": 1, "channels": 1}), "lacks the tensor padding"),
            ("compressed", setting(*LAYER, "sink_place", to=True), "first tokens of padded rows are, and of no others"),
            ("compressed", lambda content, _: content.pop("padding") and None, "none of format version 1"),
            ("compressed", lambda content, _: at(content, *LAYER).pop("sink_place"), "is of another version"),
            (
                "compressed",
                setting(*LAYER, "more", to=COUNTS | {"pads": "bool"}),
                "is of another version than the file",
            ),
            ("compressed", setting(*LAYER, "shown", to=[0, 71]), "is of another version than the file"),
            ("compressed", setting(*LAYER, "updates", to=[60, 0]), "is of another version than the file"),
        ],
    )
    def test_metadata_that_lie(self, name, change, reason, refused):
        refused(forged(version_1_bytes(name), change), reason)

    def test_padded_rows_without_places(self, refused):
        def change(content, named):
            for index in (0, 1):
                content["layers"][index]["sink_place"] = False
                del named[f"layers.{index}.sink_place"]

        refused(forged(version_1_bytes("padded"), change), "must say where the first tokens of padded rows are")

    @pytest.mark.parametrize(
        ("name", "make", "reason"),
        [
            ("padding.pads", lambda x: x - 7, "must hold numbers from 0"),
            ("padding.stated", lambda x: x - 7, "must hold numbers from 0"),
            ("layers.0.sink_place", lambda x: x + 1000, "must hold numbers from 0"),
            ("layers.0.sink_place", lambda _: torch.tensor([[60, 0], [0, 0]]), "behind the packed tokens"),
            ("layers.0.sink_place", lambda _: torch.tensor([[45, 0], [0, 0]]), "has sinks among its packed tokens"),
            ("padding.pads", lambda x: x + 10**9, "must hold numbers from 0 to 61"),
        ],
    )
    def test_poisoned_padding(self, name, make, reason, refused):
        refused(forged(version_1_bytes("padded"), stored(name, make)), reason)

    def test_padding_of_another_batch(self, refused):
        def change(content, named):
            content["padding"]["pads"] = 1
            named["padding.pads"] = "padding.pads", "I64", [1], bytes(8)

        refused(forged(version_1_bytes("padded"), change), "padding is that of another batch")

    def test_truth_values_are_two(self, refused):
        def change(content, named):
            content["padding"]["beginning"] = {"rows": 1, "channels": 1}
            for name, dtype, shape, data in (
                ("first", "F32", [1, 1], bytes(4)),
                ("after", "F32", [1, 1], bytes(4)),
                ("run", "I64", [1], bytes(8)),
                ("open", "BOOL", [1], b"\x07"),
            ):
                named[f"padding.{name}"] = f"padding.{name}", dtype, shape, data

        refused(forged(version_1_bytes("compressed"), change), "truth value that is neither")


class TestStockLayers:
    """Layers of transformers' own: what a file says of them must fit a new one."""

    def refused(self, write, change, reason):
        path = write(forged(file_bytes("mixed", None), change))
        with pytest.raises(FormatError, match=reason):
            NexusQuantCache.load(path, config=mixed_config())

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (setting("layers", 0, "layer_class", to="DynamicLayer"), "of another kind than DynamicSlidingWindowLayer"),
            (setting("layers", 0, "numbers", "cumulative_length", to=-1), "cumulative_length in the file does not fit"),
            (setting("layers", 0, "numbers", "cumulative_length", to=True), "cumulative_length in the file does not"),
            (setting("layers", 0, "numbers", "update", to=1), "update in the file does not fit"),
            (setting("layers", 0, "numbers", "dtype", to="object"), "dtype in the file does not fit"),
            (setting("layers", 0, "numbers", "has_previous_state", to={"0": 1}), "has_previous_state in the file"),
            (setting("layers", 0, "tensors", 0, "dtype", to="object"), "must be one of"),
            (setting("layers", 0, "numbers", "cumulative_length", to=10**12), "cumulative_length in the file does not"),
            (setting("layers", 0, "numbers", "is_initialized", to=False), "is_initialized in the file does not fit"),
            (setting("layers", 0, "numbers", "dtype", to="int8"), "dtype in the file does not fit"),
            (setting("layers", 0, "tensors", 0, "shape", to=[1] * 9), "impossible shape"),
            (setting("layers", 0, "tensors", 0, "name", to="\u00e4"), "impossible name"),
            (setting("layers", 0, "tensors", 0, "name", to="values"), "announced twice"),
        ],
    )
    def test_lies(self, change, reason, write):
        self.refused(write, change, reason)

    @pytest.mark.parametrize(
        "shape",
        [[1 << 40, 1 << 40, 0], [0, 1 << 40, 1 << 40, 1 << 40], [*[1 << 40] * 7, 0], [1 << 32, 1 << 31, 0]],
    )
    @pytest.mark.parametrize("suffix", ["", ":bytes", ":zstd"])
    def test_lengths_that_an_empty_tensor_hides(self, shape, suffix, refused):
        def change(content, named):
            content["layers"][0]["tensors"].append({"name": "t", "dtype": "uint8", "shape": shape})
            data = frame(b"") if suffix == ":zstd" else b""
            named["t"] = (f"layers.0.t{suffix}", "U8", [len(data)] if suffix else shape, data)

        refused(forged(file_bytes("mixed", None), change), "impossible shape|nonsense about the tensor")

    @pytest.mark.parametrize(
        ("shape", "dtype", "reason"),
        [
            ([], "bfloat16", "has 0 axes"),
            ([5], "bfloat16", "has 1 axes"),
            ([1, 2, 29], "bfloat16", "has 3 axes"),
            ([3, 2, 29, 16], "bfloat16", "of batches of 1, 3 rows"),
            ([0, 2, 29, 16], "bfloat16", "the batch must be from 1"),
            ([1, 2, 29, 16], "int8", "must be one of float64"),
            ([1, 2, 5000, 16], "bfloat16", "keys in the file does not fit a new"),
            ([1, 2, 30, 16], "bfloat16", "keys in the file does not fit a new"),
            ([0], "bfloat16", "cumulative_length in the file does not fit a new"),
        ],
    )
    def test_tensors_that_no_layer_has(self, shape, dtype, reason, write):
        def change(content, named):
            for tensor in content["layers"][0]["tensors"]:
                tensor |= {"shape": shape, "dtype": dtype}
            named.update(refitted(content, named) or {})

        self.refused(write, change, reason)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, value, refused):
        data = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()

        def change(_content, named):
            name, kind, shape, old = named["layers.0.keys"]
            named[name] = name, kind, shape, data + old[2:]

        refused(forged(file_bytes("mixed", None), change), "layers.0.keys holds NaN or infinity")

    @pytest.mark.parametrize("name", ["update", "conv_states", "keys.0", "__class__"])
    def test_names(self, name, write):
        def change(content, named):
            content["layers"][0]["tensors"][0]["name"] = name
            _, dtype, shape, data = named.pop("layers.0.keys")
            named[f"layers.0.{name}"] = f"layers.0.{name}", dtype, shape, data

        self.refused(write, change, "in the file does not fit a new DynamicSlidingWindowLayer")

    def test_tensors_that_are_not_there(self, write):
        def change(content, named):
            content["layers"][0]["tensors"] = []
            del named["layers.0.keys"], named["layers.0.values"]

        self.refused(write, change, "is_initialized in the file does not fit")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("conv_states.7", r"conv_states\.7 in the file does not fit"),
            ("conv_states", "conv_states in the file does not fit"),
            (None, "conv_states in the file does not fit"),
        ],
    )
    def test_states_of_linear_attention(self, name, reason, tmp_path):
        model = build("qwen3_next")
        cache = NexusQuantCache("quant", config=model.config)
        logits(model, prompt(20), cache)
        cache.save(tmp_path / "a", level=None)

        def change(content, named):
            tensors = content["layers"][0]["tensors"]
            index = next(i for i, tensor in enumerate(tensors) if tensor["name"] == "conv_states.0")
            _, dtype, shape, data = named.pop("layers.0.conv_states.0")
            if name is None:
                del tensors[index]
            else:
                tensors[index]["name"] = name
                named[f"layers.0.{name}"] = f"layers.0.{name}", dtype, shape, data

        (tmp_path / "a").write_bytes(forged((tmp_path / "a").read_bytes(), change))
        with pytest.raises(FormatError, match=reason):
            NexusQuantCache.load(tmp_path / "a", config=model.config)

    def test_indexers(self):
        layer = DynamicIndexedLayer()
        feed(layer, *random_states((1, 2, 20, 16), 0))
        layer.update_indexer(torch.randn(1, 20, 8))
        if hasattr(layer, "indexer_position_ids"):  # not in transformers 5.17
            layer.indexer_position_ids = torch.arange(60).view(3, 1, 20)
        meta, tensors = stock_state(layer, 0)
        assert {x.name: list(x.shape) for x in contents._stock(meta, "layers.0")} == {
            name: list(x.shape) for name, x in tensors.items()
        }
        for seen, wrong in ((20, None), (20, "layers.0.indexer_keys"), (21, "layers.0.keys")):
            new, found = DynamicIndexedLayer(), dict(tensors)
            if wrong == "layers.0.indexer_keys":
                found[wrong] = found[wrong][:, 1:]
            source = Source((), (), found, torch.device("cpu"), None)
            if wrong is None:
                restore_stock(new, 0, meta, source, seen)
                assert torch.equal(new.indexer_keys, layer.indexer_keys)
            else:
                with pytest.raises(FormatError, match=f"{wrong} in the file does not fit"):
                    restore_stock(new, 0, meta, source, seen)

    def test_none_is_one_of_ours(self, write):
        """Whatever a file calls it, a compressed layer is not filled like one of transformers' own."""

        def change(content, named):
            numbers = {"is_initialized": True, "record_past": False}
            content["layers"][1] = {"layer_class": "NexusQuantLayer", "numbers": numbers, "tensors": []}
            for name in [name for name in named if name.startswith("layers.1.")]:
                del named[name]

        self.refused(write, change, "layer 1 of the file is of another kind than NexusQuantLayer")

    def test_keys_without_values(self, write):
        def change(content, named):
            del content["layers"][0]["tensors"][1]
            del named["layers.0.values"]

        self.refused(write, change, "keys in the file does not fit")


class TestTensors:
    def test_each_once(self, refused):
        def twice(_content, named):
            named["x"] = ("phases.0:bytes", "U8", [32], named["phases.0"][3])

        refused(forged(file_bytes("compressed", None), twice), "does not announce, or holds it twice")

    def test_none_missing(self, refused):
        refused(
            forged(file_bytes("compressed", None), lambda _, named: named.pop("phases.0") and None),
            "lacks the tensor phases.0",
        )

    @pytest.mark.parametrize("suffix", ["zstd+zstd", "lzma", "", "delta"])
    def test_unknown_packings(self, suffix, refused):
        def change(_content, named):
            named["phases.0"] = (f"phases.0:{suffix}", "U8", [32], named["phases.0"][3])

        refused(forged(file_bytes("compressed", None), change), "what is stored of phases.0")

    def test_another_dtype(self, refused):
        def change(_content, named):
            named["phases.0"] = ("phases.0", "I32", [8], named["phases.0"][3])

        refused(forged(file_bytes("compressed", None), change), "cannot be float32")


def frame(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


class TestFrames:
    """Zstd frames that are not what they say."""

    def refused(self, refused, made, reason):
        def change(_content, named):
            name = "layers.0.keys.words"
            data = made(named[name][3])
            named[name] = (f"{name}:zstd", "U8", [len(data)], data)

        refused(forged(file_bytes("compressed", None), change), reason)

    def test_a_right_frame_is_read(self, write):
        def change(_content, named):
            name, _, _, data = named["layers.0.keys.words"]
            named[name] = (f"{name}:zstd", "U8", [len(frame(data))], frame(data))

        data = forged(file_bytes("compressed", None), change)
        metadata, content, entries = take_apart(data)
        right = take_apart(file_bytes("compressed", None))[0]
        with pytest.raises(FormatError, match="does not have the hash"):
            verify_file(write(put_together(metadata, content, entries)))  # hashed as it is stored
        text = data.replace(metadata["sha256"].encode(), right["sha256"].encode())
        verify_file(write(text))

    def test_more_than_announced(self, refused):
        self.refused(refused, lambda data: frame(data + b"1"), "it must be")

    def test_less_than_announced(self, refused):
        self.refused(refused, lambda data: frame(data[1:]), "it must be")

    def test_no_size(self, refused):
        self.refused(refused, lambda data: frame(data, write_content_size=False), "it must be")

    def test_no_frame(self, refused):
        self.refused(refused, lambda data: data, "is no zstd frame")

    def test_cut_off(self, refused):
        self.refused(refused, lambda data: frame(data)[:-9], "shorter than its shape demands|damaged zstd frame")

    def test_behind_the_frame(self, refused):
        self.refused(refused, lambda data: frame(data) + b"12345", "damaged zstd frame|longer than")
        self.refused(refused, lambda data: frame(data) + frame(b"1"), "longer than its shape allows")

    def test_a_bomb(self, refused, monkeypatch):
        """A frame that would fill terabytes is refused by its length alone."""
        monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("something was allocated"))

        def change(content, named):
            content["layers"][0]["tail"] += 1 << 37
            content["tokens_seen"] += 1 << 37
            for layer in content["layers"]:
                layer["seen"] += 1 << 37
            content["layers"][1]["body"]["dense"] += 1 << 37
            for side in ("keys", "values"):
                data = frame(bytes(1 << 20))
                named[f"layers.0.{side}.tail"] = (f"layers.0.{side}.tail:zstd", "U8", [len(data)], data)

        refused(forged(file_bytes("compressed", None), change), "what is stored of layers.0.keys.tail")

    def test_a_frame_that_lies_about_its_size_is_stopped(self, write):
        """It says what the shape says, and goes on: no more than that is taken out of it."""

        def change(_content, named):
            name = "layers.0.keys.words"
            size = len(named[name][3])
            work = zstandard.ZstdCompressor(write_content_size=False).compressobj()
            honest = frame(bytes(size))
            data = bytearray(work.compress(bytes(1 << 26)) + work.flush())
            header = zstandard.frame_header_size(bytes(data))
            data = honest[: zstandard.frame_header_size(honest)] + bytes(data[header:])
            named[name] = (f"{name}:zstd", "U8", [len(data)], data)

        with pytest.raises(FormatError, match=r"damaged zstd frame|longer than|shorter than"):
            verify_file(write(forged(file_bytes("compressed", None), change)))


class TestEntropy:
    @given(
        shape=st.sampled_from(
            [(1, 1, 5, 3), (2, 3, 7, 4), (1, 2, 300, 9), (4,), (2, 1, 1), (3, 2, 0, 5), (2, 3, 1, 8)]
        ),
        dtype=st.sampled_from(["uint8", "float16", "float32", "int64"]),
        kind=st.sampled_from(packing.PACKINGS),
        seed=st.integers(0, 99),
    )
    def test_what_was_arranged_comes_back(self, shape, dtype, kind, seed):
        torch.manual_seed(seed)
        spec = FileTensor("x", dtype, shape, "other")
        tensor = torch.randint(0, 256, (spec.nbytes,), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
        for part in packing.pieces(spec, tensor):
            data = packing.arrange(part, kind, spec.itemsize)
            assert torch.equal(packing.restore(data, tuple(part.shape), kind, spec.itemsize), part)

    def test_long_tensors_go_in_pieces(self, monkeypatch):
        monkeypatch.setattr(packing, "_PIECE", 64)
        spec = FileTensor("x", "uint8", (3, 4, 10, 5), "key words")
        tensor = torch.randint(0, 9, spec.shape, dtype=torch.uint8)
        assert [len(part) for part in packing.pieces(spec, tensor)] == [1] * 12
        chunks, used, _ = packing.compress(spec, tensor, "delta+columns+zstd", 3, 1)
        assert used == "delta+columns+zstd"
        assert sum(map(len, chunks)) < spec.nbytes

    def test_what_does_not_shrink_is_stored(self):
        spec = FileTensor("x", "uint8", (1, 1, 100, 10), "key words")
        tensor = torch.randint(0, 256, spec.shape, dtype=torch.uint8)
        assert packing.choose_packing(spec, tensor, 3) is None
        chunks, used, _ = packing.compress(spec, tensor, "zstd", 3, 1)
        assert (used, b"".join(chunks)) == ("bytes", tensor.numpy().tobytes())

    def test_what_shrinks_too_well_is_stored_too(self):
        """Or it could not be told from a bomb."""
        spec = FileTensor("x", "uint8", (1, 1, 100_000, 10), "key words")
        chunks, used, _ = packing.compress(spec, torch.zeros(spec.shape, dtype=torch.uint8), "zstd", 3, 1)
        assert (used, sum(map(len, chunks))) == ("bytes", spec.nbytes)

    def test_delta_is_taken_where_tokens_resemble_the_ones_before(self):
        spec = FileTensor("x", "uint8", (1, 2, 2000, 8), "key words")
        steps = torch.randint(0, 2, spec.shape, dtype=torch.uint8)
        assert packing.choose_packing(spec, steps.cumsum(2, dtype=torch.uint8), 3).startswith("delta+")
        assert not packing.choose_packing(spec, steps, 3).startswith("delta+")


class TestConvert:
    def test_every_level_has_the_same_content(self, tmp_path, write):
        path = write(file_bytes("compressed", 3))
        expected = inspect_file(path)
        for level in (None, 1, 22, 3):
            convert_file(path, tmp_path / "new", level=level)
            assert verify_file(tmp_path / "new").sha256 == expected.sha256
            assert (tmp_path / "new").read_bytes() == file_bytes("compressed", level)

    def test_in_place(self, write):
        path = write(file_bytes("compressed", None))
        report = convert_file(path, path, level=3)
        assert path.read_bytes() == file_bytes("compressed", 3)
        assert report.total_bytes == path.stat().st_size

    def test_no_level(self, write):
        path = write(file_bytes("compressed", 3))
        with pytest.raises(OptionError, match="level must be"):
            convert_file(path, path, level=23)


class TestRegistry:
    def test_e8_codecs_come_back_equal(self):
        codec = E8Codec(CodeLayout.flat(24, 2.5), (1.0, 1.25), center=True, seed=7, transform="principal")
        assert registry.make_codec(registry.describe_codec(codec)) == codec

    def test_whole_numbers_may_stand_for_others(self):
        meta = registry.describe_codec(E8Codec(CodeLayout.flat(16, 2)))
        codec = registry.make_codec(CodecMeta("e8", meta.options | {"candidates": [1, 2]}))
        assert codec == E8Codec(CodeLayout.flat(16, 2), candidates=(1.0, 2.0))

    @pytest.mark.parametrize("value", [0.95, 1])
    def test_what_earlier_releases_expected_of_axes_is_ignored(self, value):
        codec = E8Codec(CodeLayout.flat(16, 2))
        meta = registry.describe_codec(codec)
        assert registry.make_codec(CodecMeta("e8", meta.options | {"axes_save": value})) == codec

    def test_options_of_later_releases_have_their_defaults(self):
        meta = registry.describe_codec(E8Codec(CodeLayout.flat(16, 2)))
        options = {name: x for name, x in meta.options.items() if name != "seed"}
        assert registry.make_codec(CodecMeta("e8", options)) == E8Codec(CodeLayout.flat(16, 2))

    def test_names_are_taken_once(self):
        with pytest.raises(OptionError, match="taken by E8Codec"):
            register_codec("e8", LosslessCodec, dict, LosslessCodec)
        register_codec("e8", E8Codec, registry._describe_e8, registry._make_e8)  # again is no harm

    def test_what_makes_another_codec_is_refused(self, monkeypatch):
        monkeypatch.setattr(registry, "_CODECS", dict(registry._CODECS))
        register_codec("tests.odd", LosslessCodec, lambda _: {}, lambda _: E8Codec(CodeLayout.flat(16, 2)))
        with pytest.raises(FormatError, match="describes no codec"):
            registry.make_codec(CodecMeta("tests.odd", {}))


def test_metadata_come_back_the_same():
    _, content, _ = take_apart(file_bytes("padded"))
    text = json.dumps(content, separators=(",", ":"), sort_keys=True)
    assert to_json(from_json(text)) == text


def test_files_are_little_endian(tmp_path, monkeypatch, write):
    path = write(file_bytes("compressed"))
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(UnsupportedError, match="this machine is not"):
        read_file(path)
    with pytest.raises(UnsupportedError, match="this machine is not"):
        NexusQuantCache("quant", **SMALL).save(tmp_path / "new")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        NexusQuantCache.load(tmp_path / "none")


def test_reading_needs_no_more_memory_than_the_file_promises():
    cache = compressed()
    specs = tensors_of(from_json(take_apart(file_bytes("compressed"))[0]["cache"]))
    held = cache.memory_report()
    assert sum(spec.nbytes for spec in specs.values()) <= held.held_bytes
