"""The codecs, the byte counts and the scripts of the comparison with other caches (`benchmarks/`)."""

import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from integration.tiny import prompt, tiny_llama
from transformers import DynamicCache, LlamaConfig, cache_utils
from unit.evaluation_tiny import tiny

from nexusquant_cache import CacheConfig, KeyNormPolicy
from nexusquant_cache.errors import OptionError, ShapeError
from nexusquant_cache.evaluation.caches import footprint, update
from nexusquant_cache.releases import CACHE

CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size=64)


needs_fp8 = pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no cache in fp8"
)


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def codes(load):
    return load("_codes")


@pytest.fixture
def packages(load):
    return load("_packages")


def filled(cache, tokens, layers=2):
    for index in range(layers):
        update(cache, *torch.randn(2, 1, 2, tokens, 16), index)
    return cache


class TestPacking:
    def test_fields_stand_side_by_side_lowest_bit_first(self, codes):
        words = codes.pack_bits(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3)
        assert int.from_bytes(bytes(words[0].tolist()), "little") == sum(
            n << 3 * i for i, n in enumerate([1, 2, 3, 4, 5, 6, 7])
        )

    @pytest.mark.parametrize("bits", [1, 2, 3, 4])
    def test_unpacking_inverts_packing_and_no_bit_is_lost(self, codes, bits):
        given = torch.randint(0, 1 << bits, (3, 5, 24), dtype=torch.uint8)
        words = codes.pack_bits(given, bits)
        assert words.dtype == torch.uint8
        assert words.shape == (3, 5, 24 * bits // 8)
        assert torch.equal(codes.unpack_bits(words, bits), given)


class TestLloydMax:
    def test_levels_are_the_published_ones(self, codes):
        """Max (1960), "Quantizing for minimum distortion", table I."""
        assert codes.lloyd_max_levels(1) == pytest.approx((-0.7979, 0.7979), abs=1e-4)
        assert codes.lloyd_max_levels(2) == pytest.approx((-1.5104, -0.4528, 0.4528, 1.5104), abs=1e-4)
        assert codes.lloyd_max_levels(4)[-1] == pytest.approx(2.7326, abs=1e-3)

    @pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
    def test_distortion_of_a_gaussian_is_the_published_one(self, codes, bits, distortion):
        """That of the levels, give or take what one scale for each 256 channels changes."""
        vectors = torch.randn(1, 2, 400, 256)
        codec = codes.LloydMaxCodec(256, bits)
        transform = codec.fit(vectors)
        error = codec.decode(codec.encode(vectors, transform), transform) - vectors
        kept = 2 - 2 * (1 - distortion) ** 0.5  # a little more, since norms are kept
        assert float(error.square().mean()) == pytest.approx(kept, rel=0.04)

    def test_norms_are_kept(self, codes):
        vectors = torch.randn(1, 2, 50, 64)
        codec = codes.LloydMaxCodec(64, 2)
        transform = codec.fit(vectors)
        decoded = codec.decode(codec.encode(vectors, transform), transform)
        torch.testing.assert_close(decoded.norm(dim=-1), vectors.norm(dim=-1), rtol=0.03, atol=0)  # half a step

    def test_a_mean_is_taken_off_and_put_back(self, codes):
        vectors = 0.01 * torch.randn(1, 2, 50, 64) + torch.randn(64)
        codec = codes.LloydMaxCodec(64, 2, center=True)
        transform = codec.fit(vectors)
        error = codec.decode(codec.encode(vectors, transform), transform) - vectors
        assert float(error.abs().max()) < 0.05

    def test_zeros_stay_zeros(self, codes):
        codec = codes.LloydMaxCodec(64, 2)
        vectors = torch.zeros(1, 2, 3, 64)
        transform = codec.fit(vectors)
        assert torch.equal(codec.decode(codec.encode(vectors, transform), transform), vectors)

    def test_a_vector_takes_the_bytes_it_says(self, codes):
        codec = codes.LloydMaxCodec(64, 3)
        vectors = torch.randn(1, 2, 7, 64)
        packed = codec.encode(vectors, codec.fit(vectors))
        assert codec.bytes_per_vector == 25 == packed.words.shape[-1] + 1

    def test_impossible_rates_are_refused(self, codes):
        with pytest.raises(OptionError, match="1 to 4 whole bits"):
            codes.LloydMaxCodec(64, 2.5)
        with pytest.raises(ShapeError, match="whole bytes"):
            codes.LloydMaxCodec(12, 1)


class TestExact:
    def test_vectors_are_rounded_to_float16_and_take_two_bytes_a_channel(self, codes):
        codec = codes.ExactCodec(16)
        vectors = torch.randn(2, 2, 5, 16)
        transform = codec.fit(vectors)
        packed = codec.encode(vectors, transform)
        assert torch.equal(codec.decode(packed, transform), vectors.half().float())
        assert (
            packed.words.nbytes + packed.scales.nbytes
            == 2 * vectors.numel()
            == vectors.numel() // 16 * codec.bytes_per_vector
        )

    def test_eviction_alone_holds_the_bytes_asked_for(self, codes):
        """The ratio found on one layer of noise gives the factor asked for."""
        settings = CacheConfig(residual_length=8, remove_rope=False)
        target = codes.dense_bytes(CONFIG, 1000) / 4
        ratio = codes.ratio_for(codes.ExactCache, settings, target, CONFIG, 1000)
        candidate = codes.candidate_of(
            "knorm@4x", codes.ExactCache, settings.override({"keep_ratio": ratio}), CONFIG, KeyNormPolicy()
        )
        cache = filled(candidate.factory(), 1000)
        cache.compress()
        assert footprint(cache).compression_factor == pytest.approx(4, rel=0.01)
        assert candidate.settings["kind"] == "ExactCache"


def test_a_flat_plan_gives_all_axes_the_same_bits(codes):
    cache = codes.FlatPlanCache(CacheConfig(transform="principal"), config=CONFIG)
    codec = cache.make_codec("keys", 64, 0)
    vectors = torch.randn(1, 2, 300, 64) * torch.logspace(0, -2, 64)
    transform = codec.fit(vectors)
    assert [layout.block_bits for layout in codec.layouts] == [(2,) * 8]
    assert int(transform.plans.max()) == 0


def test_scalar_codes_take_the_place_of_the_lattice(codes):
    settings = CacheConfig(key_bits=3, value_bits=1, center_keys=True, remove_rope=False)
    cache = codes.ScalarCache(settings, config=CONFIG)
    assert cache.make_codec("keys", 16, 0) == codes.LloydMaxCodec(16, 3, center=True)
    assert cache.make_codec("values", 16, 0) == codes.LloydMaxCodec(16, 1)


class TestPackages:
    @needs_fp8
    def test_a_quantized_cache_is_weighed_by_its_storages(self, packages):
        cache = filled(packages.MeasuredQuantizedCache("fp8", CONFIG), 100)
        held = footprint(cache)
        channels = 2 * 2 * 2 * 100 * 16
        scales = 2 * 2 * 4
        assert (held.seen_tokens, held.kept_tokens) == (100, 100)
        assert held.held_bytes == channels + scales
        assert held.dense_bytes == 2 * channels
        assert cache.memory_report().half_bytes == channels + scales // 2

    def test_wrappers_of_tensors_are_taken_apart(self, packages):
        class Wrapper(torch.Tensor):
            def __tensor_flatten__(self):
                return ["data_", "scale_"], None

        wrapper = torch.zeros(1000).as_subclass(Wrapper)
        wrapper.data_, wrapper.scale_ = torch.zeros(4, dtype=torch.uint8), torch.zeros(1)
        assert [tensor.nbytes for tensor in packages.plain_tensors({"any": [wrapper]})] == [4, 4]

    def test_masked_tokens_are_seen_and_not_held(self, packages):
        cache = filled(packages.MaskedCache(CONFIG, (20, 22)), 100)
        keys = cache.layers[0].keys
        kept = torch.tensor([0, 3, 97, 98, 99])
        for layer in cache.layers:
            layer.keep(kept)
        assert torch.equal(cache.layers[0].keys, keys[:, :, kept])
        assert cache.get_seq_length() == 100
        assert cache.get_mask_sizes(3, 0) == (8, 95)
        held = footprint(cache)
        assert (held.seen_tokens, held.kept_tokens) == (100, 5)
        assert held.held_bytes == 5 * 2 * 2 * (20 + 22) + 13  # tokens, layers, heads; a bit for each token seen
        assert cache.memory_report().stored_bytes == held.dense_bytes

    def test_masking_is_what_an_attention_mask_does(self, packages):
        """The next token, predicted through a cache without the masked tokens, is that of a cache with a mask."""
        model = tiny_llama()
        ids = prompt(40)
        mask = torch.ones(1, 41, dtype=torch.long)
        mask[:, 5:30] = 0
        plain, masked = DynamicCache(), packages.MaskedCache(model.config, (1, 1))
        with torch.no_grad():
            for cache in (plain, masked):
                model(input_ids=ids, **{CACHE: cache})
            for layer in masked.layers:
                layer.keep(mask[0, :40].nonzero()[:, 0])
            step = {"input_ids": ids[:, :1], "position_ids": torch.tensor([[40]])}
            expected = model(**step, attention_mask=mask, **{CACHE: plain}).logits
            given = model(**step, **{CACHE: masked}).logits
        torch.testing.assert_close(given, expected, rtol=0, atol=2e-5)

    def test_packed_bytes_of_nexusquant_kv_hold_every_point(self, packages):
        """8 channels of 2 "bits" have 5 whole values each, half of whose sums are even, or 4 halves each."""
        assert packages._block_bits(2) == pytest.approx(math.log2(5**8 / 2 + 4**8))
        assert packages.NexusQuantKv(3, 2, 0.6).vector_bytes(64) == (26 + 2, 18 + 2)

    @pytest.mark.parametrize("preset", ["high", "max"])
    def test_nexusquant_kv_evicts_and_rounds(self, packages, load, preset):
        pytest.importorskip("nexusquant")
        recipe = load("peers").NEXUSQUANT_KV[preset]
        cache = filled(packages.MaskedCache(CONFIG, recipe.vector_bytes(16)), 200)
        before = cache.layers[1].keys.clone()
        recipe.prepare(cache, SimpleNamespace(model=SimpleNamespace(config=CONFIG)), torch.zeros(1, 200))
        assert footprint(cache).kept_tokens == 32 + 1 + int((200 - 32) * (1 - recipe.eviction_rate))
        assert not torch.equal(cache.layers[1].keys[:, :, -1], before[:, :, -1])


class TestScripts:
    def test_every_peer_makes_candidates_of_its_own_name(self, load, monkeypatch):
        peers = load("peers")
        monkeypatch.setattr(peers.metadata, "version", lambda _: "1.0")
        loaded = tiny()
        named = {peer: [each.name for each in make(loaded, 600)] for peer, make in peers.PEERS.items()}
        names = [name for each in named.values() for name in each]
        assert len(set(names)) == len(names)
        assert all(
            {name.partition("@")[0] for name in each} == {peer} for peer, each in named.items() if peer != "presets"
        )

    def test_a_missing_package_is_named(self, load, monkeypatch, capsys):
        peers = load("peers")
        monkeypatch.setitem(peers.PACKAGES, "hqq", "no-such-package")
        assert not peers.is_installed("hqq")
        assert "pip install no-such-package" in capsys.readouterr().err
        assert peers.is_installed("snapkv")

    @needs_fp8
    def test_holdings_are_those_of_other_packages(self, load):
        peers = load("peers")
        loaded = tiny()
        found = peers.holdings(loaded, [*peers.PEERS["fp8"](loaded, 50), *peers.PEERS["turboquant"](loaded, 50)], 50)
        assert list(found) == ["fp8"]
        assert found["fp8"]["seen_tokens"] == 50

    def test_every_ablation_makes_a_cache(self, load):
        ablations = load("ablations")
        for name, row in ablations.ROWS.items():
            candidate = row.candidate(name, CONFIG)
            assert candidate.factory().cache_config == row.settings
            assert (candidate.prepare is not None) == name.startswith("scorer: second reading")
