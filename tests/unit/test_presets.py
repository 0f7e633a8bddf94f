"""`CacheConfig`, the presets, and every message they can give."""

from dataclasses import FrozenInstanceError, replace

import pytest

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.errors import NexusQuantError, OptionError, suggest
from nexusquant_cache.presets import PRESETS, CacheConfig, resolve_preset

PROMISED = {"quant": 6, "high": 10, "asym": 14, "balanced": 17, "max": 33}  # compression factors


@pytest.mark.parametrize("name", PROMISED)
def test_presets_can_reach_their_factor(name: str) -> None:
    """In the limit of long prompts: codes, scales and one bit per seen token, against 16 bits per channel."""
    config, head_dim = PRESETS[name], 128
    sides = [CodeLayout.flat(head_dim, bits) for bits in (config.key_bits, config.value_bits)]
    kept = config.keep_ratio * sum(E8Codec(layout).bytes_per_vector for layout in sides)
    assert 2 * 2 * head_dim / (kept + 1 / 8) > PROMISED[name]


def test_the_presets_are_the_promised_ones() -> None:
    assert set(PRESETS) == set(PROMISED)


def test_resolves_names_and_settings() -> None:
    assert resolve_preset("max") is PRESETS["max"]
    config = CacheConfig(key_bits=4)
    assert resolve_preset(config) is config


@pytest.mark.parametrize(
    ("given", "hint"), [("balance", "'balanced'"), ("Max", "'max'"), ("quantt", "'quant'"), ("asymm", "'asym'")]
)
def test_an_unknown_preset_gets_the_nearest_name(given: str, hint: str) -> None:
    with pytest.raises(OptionError, match=f"unknown preset '{given}'. Did you mean {hint}\\? Allowed: keep-all"):
        resolve_preset(given)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("given", ["", None, 3, {"key_bits": 2}, ["max"]])
def test_anything_else_gets_all_names(given: object) -> None:
    with pytest.raises(OptionError, match=r"Allowed: keep-all \(quant\), .*keep-few \(max\)\. A CacheConfig is also"):
        resolve_preset(given)


class TestOverride:
    def test_returns_a_changed_copy(self) -> None:
        changed = PRESETS["max"].override({"key_bits": 4, "keep_ratio": 0.5})
        assert changed == replace(PRESETS["max"], key_bits=4, keep_ratio=0.5)
        assert PRESETS["max"].key_bits == 2

    def test_no_options_change_nothing(self) -> None:
        assert PRESETS["high"].override({}) == PRESETS["high"]

    @pytest.mark.parametrize(
        ("given", "hint"),
        [
            ("keybits", "'key_bits'"),
            ("sink_token", "'sink_tokens'"),
            ("keep", "'keep_ratio'"),
            ("residual", "'residual_length'"),
        ],
    )
    def test_an_unknown_option_gets_the_nearest_name(self, given, hint) -> None:
        with pytest.raises(OptionError, match=f"unknown option '{given}'. Did you mean {hint}\\? Allowed: center_keys"):
            CacheConfig().override({given: 1})

    def test_a_strange_option_gets_all_names(self) -> None:
        with pytest.raises(OptionError, match=r"unknown option 'xyz'\. Allowed: center_keys, codec, flush_length"):
            CacheConfig().override({"xyz": 1})

    @pytest.mark.parametrize(
        ("name", "advice"),
        [("key_gain", "keep their norm"), ("value_gain", "leave it out"), ("protect_boundary", "override make_codec")],
    )
    def test_a_removed_option_says_so(self, name, advice) -> None:
        """Whatever it is given, also what every cache does now."""
        for value in ("norm", 0, "unbiased"):
            with pytest.raises(OptionError, match=f"the option '{name}' was removed: .*{advice}"):
                NexusQuantCache(**{name: value})

    @pytest.mark.parametrize(
        ("tokens", "before", "budget"),
        [
            *[(0, 0, 0), (9, 0, 9), (10, 0, 10), (40, 0, 40), (41, 0, 40), (80, 0, 40), (81, 0, 41), (90, 0, 45)],
            *[(40, 30, 20), (40, 15, 25), (40, 10**9, 20), (9, 50, 9)],
        ],
    )
    def test_budget(self, tokens, before, budget) -> None:
        assert CacheConfig(keep_ratio=0.5, min_tokens=10, min_kept=40).budget(tokens, before) == budget

    def test_checks_the_values(self) -> None:
        with pytest.raises(OptionError, match=r"value_bits must be from 0\.5 to 4 bits per channel, got 9"):
            CacheConfig().override({"value_bits": 9})


WHOLE = [
    *[(name, value, "at least 0") for name in ("sink_tokens", "min_kept") for value in (-1, 1.5, False)],
    *[
        (name, value, "at least 1")
        for name in ("residual_length", "flush_length", "min_tokens")
        for value in (0, -5, 16.0, True)
    ],
]


@pytest.mark.usefixtures("unchecked")
class TestRefusals:
    @pytest.mark.parametrize(("name", "value", "bounds"), WHOLE)
    def test_whole_numbers(self, name, value, bounds) -> None:
        with pytest.raises(OptionError, match=f"{name} must be a whole number, {bounds}, got {value!r}"):
            CacheConfig(**{name: value})

    @pytest.mark.parametrize("name", ["key_bits", "value_bits"])
    @pytest.mark.parametrize("value", [0, 0.49, 4.01, 5, -1, float("nan"), float("inf"), True, "2", None])
    def test_bits(self, name, value) -> None:
        with pytest.raises(OptionError, match=rf"{name} must be from 0\.5 to 4 bits per channel, got {value!r}"):
            CacheConfig(**{name: value})

    @pytest.mark.parametrize("value", [-0.1, 4.01, float("nan"), float("inf"), True, "0.7", None])
    def test_short_text_bits(self, value) -> None:
        with pytest.raises(OptionError, match=f"short_text_bits must be from 0 to 4 bits per channel, got {value!r}"):
            CacheConfig(short_text_bits=value)

    @pytest.mark.parametrize("value", [0, -0.1, float("nan"), float("inf"), True, "0.7", None])
    def test_most_code_error(self, value) -> None:
        with pytest.raises(OptionError, match=f"most_code_error must be a positive number, got {value!r}"):
            CacheConfig(most_code_error=value)

    def test_transforms(self) -> None:
        with pytest.raises(
            OptionError, match=r"unknown transform 'principle'\. Did you mean 'principal'\? Allowed: auto"
        ):
            CacheConfig(transform="principle")

    @pytest.mark.parametrize("ratio", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), True, "1", None])
    def test_keep_ratio(self, ratio) -> None:
        with pytest.raises(OptionError, match=rf"keep_ratio must be in \(0, 1\], .* got {ratio!r}"):
            CacheConfig(keep_ratio=ratio)

    @pytest.mark.parametrize("name", ["center_keys", "remove_rope"])
    @pytest.mark.parametrize("value", [1, 0, None, "yes"])
    def test_switches(self, name, value) -> None:
        with pytest.raises(OptionError, match=f"{name} must be True or False, got {value!r}"):
            CacheConfig(**{name: value})

    @pytest.mark.parametrize("name", ["E8", "", None, 8])
    def test_codecs(self, name) -> None:
        with pytest.raises(OptionError, match=f"no codec is registered as {name!r} .*register_codec.*Allowed: e8"):
            CacheConfig(codec=name)

    @pytest.mark.parametrize(
        "candidates", [(), (0.0,), (1.0, -0.5), (float("nan"),), (1.0, float("nan")), (float("inf"),)]
    )
    def test_scale_candidates(self, candidates) -> None:
        with pytest.raises(OptionError, match=r"scale.candidates must be positive"):
            CacheConfig(scale_candidates=candidates)


@pytest.mark.parametrize("bits", [0.5, 1, 2.0, 2.625, 4])
def test_accepted_bits(bits: float) -> None:
    assert CacheConfig(key_bits=bits, value_bits=bits).value_bits == bits


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("ratio", [1, 1.0, 1e-9, 0.5])
def test_accepted_keep_ratios(ratio: float) -> None:
    assert CacheConfig(keep_ratio=ratio).keep_ratio == ratio


def test_settings_are_values() -> None:
    config = CacheConfig()
    assert config == CacheConfig()
    assert hash(config) == hash(CacheConfig())
    with pytest.raises(FrozenInstanceError):
        config.key_bits = 3


def test_option_errors_are_value_errors() -> None:
    assert issubclass(OptionError, (NexusQuantError, ValueError))
    with pytest.raises(ValueError, match="key_bits"):
        CacheConfig(key_bits=7)


def test_suggestions() -> None:
    assert suggest("nrm", ["unbiased", "norm"]) == "Did you mean 'norm'? Allowed: norm, unbiased."
    assert suggest("qqq", ["unbiased", "norm"]) == "Allowed: norm, unbiased."
