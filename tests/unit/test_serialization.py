"""Saved files: what every check refuses, one by one, in files whose hash is right."""

import json
import struct
import time

import pytest
import safetensors
import safetensors.torch
import torch
import zstandard
from files import compressed, file_bytes, forged, mixed_config, put_together, take_apart, with_tensor
from hypothesis import given
from hypothesis import strategies as st
from integration.families import build
from integration.tiny import SMALL, LosslessCodec, logits, prompt, tiny_config

from nexusquant_cache import FormatError, NexusQuantCache, OptionError, UnsupportedError
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.layout import CodeLayout
from nexusquant_cache.serialization import convert_file, entropy, inspect_file, register_codec, registry, verify_file
from nexusquant_cache.serialization.container import header_bytes, read_header
from nexusquant_cache.serialization.reader import read_file
from nexusquant_cache.serialization.schema import CodecMeta, from_json, to_json
from nexusquant_cache.serialization.streams import Stream, streams_of


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
            assert torch.equal(file.get_tensor("layers.0.keys.tail"), cache.layers[0].tail[0])
            assert torch.equal(file.get_tensor("layers.1.values.words"), cache.layers[1].body.values.words.view())

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
            (header_bytes({"format": "nexusquant-cache", "version": "2"}, []), "later release: update"),
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


def move(body, one, other):
    """Take one away from a count and give it to another."""
    body[one], body[other] = body[one] + 1, body[other] - 1


GIVEN = {"rotation": "hadamard", "seed": 0, "rows": 1, "plans": False}
LAYER = ("layers", 0)
BODY = (*LAYER, "body")
LIES = [
    (setting("layers", to=7), "cache.layers in the metadata must be a list"),
    (setting("when", to="never"), "when must be one of"),
    (setting("when", to=None), "must be str"),
    (setting("extra", to=1), "must have the fields"),
    (setting("tokens_seen", to=-1), "tokens_seen in the metadata must be int"),
    (setting("tokens_seen", to=True), "tokens_seen in the metadata must be int"),
    (setting("tokens_seen", to=1 << 60), "tokens_seen in the metadata must be int"),
    (setting("user", to={"a": 1}), "user.a in the metadata must be str"),
    (setting("user", to=[]), "user in the metadata must be an object"),
    (setting("settings", to={"key_bits": 9}), "settings are none of this version"),
    (setting("settings", to={"kye_bits": 2}), "settings are none of this version"),
    (setting("settings", "sink_tokens", to=1 << 60), "beyond all reason"),
    (setting("layers", 0, to={"a": 1}), r"layers\[0\] in the metadata is of no known kind"),
    (setting(*LAYER, "seen", to=70), "counts its tokens in two ways"),
    (setting(*LAYER, "tail", to=3), "counts its tokens in two ways"),
    (setting(*LAYER, "pending_from", to=1000), "waits for tokens that it has not seen"),
    (setting(*LAYER, "sinks", to=None), "layers.0.sinks|must have sinks|of no known kind"),
    (setting(*LAYER, "sinks", to=3), "impossible place|cannot be"),
    (setting(*LAYER, "asked", to=[0, 9]), "codec that the file does not describe"),
    (setting(*LAYER, "asked", to=[0]), "must be a list of 2"),
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
    (setting("codecs", 0, "options", "seed", to=1 << 70), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "gain", to="vast"), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "center", to=1), "describes no codec 'e8'"),
    (setting("codecs", 0, "options", "secret", to=1), "describes no codec 'e8'"),
    (setting("padding", "pads", to=1), "lacks the tensor padding.pads"),
    (setting("padding", "beginning", to={"rows": 0, "channels": 1}), "rows must be from 1"),
    (setting("padding", "beginning", to={"rows": 1, "channels": 1}), "lacks the tensor padding"),
    (setting(*LAYER, "observed", "reconstruction", to=1000), "attention to tokens that it has not seen"),
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
]


@pytest.mark.parametrize(("name", "make", "reason"), POISON)
def test_poisoned_tensors(name, make, reason, refused):
    refused(forged(file_bytes("compressed", None), stored(name, make)), reason)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("padding.pads", lambda x: x - 7, "must hold numbers from 0"),
        ("padding.stated", lambda x: x - 7, "must hold numbers from 0"),
        ("layers.0.sink_place", lambda x: x + 1000, "must hold numbers from 0"),
        ("layers.0.sink_place", lambda _: torch.tensor([[6, 50], [0, 0]]), "behind the packed tokens"),
    ],
)
def test_poisoned_padding(name, make, reason, refused):
    refused(forged(file_bytes("padded", None), stored(name, make)), reason)


def test_padding_of_another_batch(refused):
    def change(content, named):
        content["padding"]["pads"] = 1
        named["padding.pads"] = "padding.pads", "I64", [1], bytes(8)

    refused(forged(file_bytes("padded", None), change), "padding is that of another batch")


def test_truth_values_are_two(refused):
    def change(content, named):
        content["padding"]["beginning"] = {"rows": 1, "channels": 1}
        for name, dtype, shape, data in (
            ("first", "F32", [1, 1], bytes(4)),
            ("after", "F32", [1, 1], bytes(4)),
            ("run", "I64", [1], bytes(8)),
            ("open", "BOOL", [1], b"\x07"),
        ):
            named[f"padding.{name}"] = f"padding.{name}", dtype, shape, data

    refused(forged(file_bytes("compressed", None), change), "truth value that is neither")


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
            (setting("layers", 0, "tensors", 0, "shape", to=[1] * 9), "impossible shape"),
            (setting("layers", 0, "tensors", 0, "name", to="values"), "announced twice"),
        ],
    )
    def test_lies(self, change, reason, write):
        self.refused(write, change, reason)

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

    @pytest.mark.parametrize("code", ["zstd+zstd", "lzma", "", "delta"])
    def test_unknown_codes(self, code, refused):
        def change(_content, named):
            named["phases.0"] = (f"phases.0:{code}", "U8", [32], named["phases.0"][3])

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
            content["layers"][0]["seen"] += 1 << 37
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
        code=st.sampled_from(entropy.CODES),
        seed=st.integers(0, 99),
    )
    def test_what_was_arranged_comes_back(self, shape, dtype, code, seed):
        torch.manual_seed(seed)
        stream = Stream("x", dtype, shape, "other")
        tensor = torch.randint(0, 256, (stream.nbytes,), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
        for part in entropy.pieces(stream, tensor):
            data = entropy.arrange(part, code, stream.itemsize)
            assert torch.equal(entropy.restore(data, tuple(part.shape), code, stream.itemsize), part)

    def test_long_tensors_go_in_pieces(self, monkeypatch):
        monkeypatch.setattr(entropy, "_PIECE", 64)
        stream = Stream("x", "uint8", (3, 4, 10, 5), "key words")
        tensor = torch.randint(0, 9, stream.shape, dtype=torch.uint8)
        assert [len(part) for part in entropy.pieces(stream, tensor)] == [1] * 12
        chunks, code, _ = entropy.compress(stream, tensor, "delta+columns+zstd", 3, 1)
        assert code == "delta+columns+zstd"
        assert sum(map(len, chunks)) < stream.nbytes

    def test_what_does_not_shrink_is_stored(self):
        stream = Stream("x", "uint8", (1, 1, 100, 10), "key words")
        tensor = torch.randint(0, 256, stream.shape, dtype=torch.uint8)
        assert entropy.choose_code(stream, tensor, 3) is None
        chunks, code, _ = entropy.compress(stream, tensor, "zstd", 3, 1)
        assert (code, b"".join(chunks)) == ("bytes", tensor.numpy().tobytes())

    def test_what_shrinks_too_well_is_stored_too(self):
        """Or it could not be told from a bomb."""
        stream = Stream("x", "uint8", (1, 1, 100_000, 10), "key words")
        chunks, code, _ = entropy.compress(stream, torch.zeros(stream.shape, dtype=torch.uint8), "zstd", 3, 1)
        assert (code, sum(map(len, chunks))) == ("bytes", stream.nbytes)

    def test_delta_is_taken_where_tokens_resemble_the_ones_before(self):
        stream = Stream("x", "uint8", (1, 2, 2000, 8), "key words")
        steps = torch.randint(0, 2, stream.shape, dtype=torch.uint8)
        assert entropy.choose_code(stream, steps.cumsum(2, dtype=torch.uint8), 3).startswith("delta+")
        assert not entropy.choose_code(stream, steps, 3).startswith("delta+")


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
        codec = E8Codec(CodeLayout.flat(24, 2.5), "unbiased", (1.0, 1.25), center=True, seed=7, transform="principal")
        assert registry.make_codec(registry.describe_codec(codec)) == codec

    def test_options_of_later_releases_have_their_defaults(self):
        meta = registry.describe_codec(E8Codec(CodeLayout.flat(16, 2)))
        options = {name: x for name, x in meta.options.items() if name != "axes_save"}
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
    streams = streams_of(from_json(take_apart(file_bytes("compressed"))[0]["cache"]))
    held = cache.memory_report()
    assert sum(stream.nbytes for stream in streams.values()) <= held.held_bytes
