"""Settings of a cache and the named presets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from math import ceil
from typing import Any, get_args

from nexusquant_cache.codec.e8 import TransformRule
from nexusquant_cache.codec.impl import Impl
from nexusquant_cache.codec.layout import MAX_BITS, Bits
from nexusquant_cache.codec.registry import check_codec_name
from nexusquant_cache.codec.scale import CANDIDATES
from nexusquant_cache.errors import OptionError, nearest, suggest

_LEAST = {"sink_tokens": 0, "residual_length": 1, "flush_length": 1, "min_tokens": 1, "min_kept": 0}
_CHOICES = {"transform": TransformRule, "impl": Impl}
_LEAST_BITS = 0.5  # per channel: a head of 16 channels then has one coded block


@dataclass(frozen=True)
class Removed:
    """An option that is no more.

    Attributes:
        remains: The value whose effect every cache now has.
        advice: What to do without the option.
    """

    remains: str | int
    advice: str

    def is_what_remains(self, value: object) -> bool:
        """Tell whether a value asks for what every cache does."""
        return type(value) is type(self.remains) and value == self.remains


_ONE_GAIN = "decoded vectors always keep their norm, which no other rule improved on; leave it out"
REMOVED: dict[str, Removed] = {
    "key_gain": Removed("norm", _ONE_GAIN),
    "value_gain": Removed("norm", _ONE_GAIN),
    "protect_boundary": Removed(
        0,
        "no layers are special by their place, and one that coding harms gets more bits by itself (most_code_error); "
        "to give a layer more, override make_codec",
    ),
}
"""Options of earlier releases, by name.  Callers get the advice; files may still hold the value that remains."""


@dataclass(frozen=True)
class CacheConfig:
    """How a cache spends its bytes.

    Attributes:
        key_bits: Mean bits per channel of coded keys, 1/2 to 4; rounded to what the blocks of a head can hold.
        value_bits: Mean bits per channel of coded values, likewise.
        keep_ratio: Part of the prompt's tokens that is kept, in (0, 1]; 1 evicts nothing.  Sinks and the
            residual are kept besides.
        short_text_bits: Bits per channel that codes have besides, where a text begins so short that all of it is kept
            (`min_kept`).
        sink_tokens: First tokens, always kept, in full precision.
        residual_length: Newest tokens, always kept, in full precision.
        flush_length: Tokens by which the residual may grow before its oldest ones are encoded together.
        min_tokens: Fewer tokens than this between sinks and residual stay in full precision: what is fitted to the
            first tokens serves all later ones, and a handful would not do.
        min_kept: So many of the tokens seen are kept whatever `keep_ratio` says, on average over heads: a text that is
            not longer is only coded, since eviction would save little of it.
        center_keys: Remove the mean key of each head before coding.
        remove_rope: Code keys without their rotary phase; needs the model's config.
        transform: ``"auto"``, ``"principal"`` or ``"hadamard"``: what rotates the channels, see `codec.e8.E8Codec`.
            ``"auto"`` gives values a Hadamard rotation, and keys principal axes.  Where these would take more bytes
            than they save, keys get a Hadamard rotation, too, with more bits than `key_bits` says: equal quality in
            fewer bytes.
        scale_candidates: Scales to try per vector, relative to its root mean square.
        most_code_error: How much encoding may change what attention reads from a layer, see `LayerReport.code_error`.
            A layer above it gets one more bit per channel, and again, up to 4.
        codec: Name of the codec of keys and values: ``"e8"``, or one of your own (`register_codec`), for which the
            bits, the centring, the transform and the candidates have no meaning.
        impl: ``"auto"`` encodes, decodes and attends by Triton kernels on a GPU, by functions that numba compiles on a
            CPU, and in plain torch where these are missing or cannot work; a line in the log then says why.
            ``"triton"`` and ``"cpu"`` insist on them, ``"torch"`` uses neither.

    Raises:
        OptionError: If a value is outside its range, or an option does not exist.
    """

    key_bits: Bits = 2
    value_bits: Bits = 2
    keep_ratio: float = 1.0
    short_text_bits: float = 0.0
    sink_tokens: int = 4
    residual_length: int = 64
    flush_length: int = 16
    min_tokens: int = 128
    min_kept: int = 0
    center_keys: bool = True
    remove_rope: bool = True
    transform: TransformRule = "auto"
    scale_candidates: tuple[float, ...] = CANDIDATES
    most_code_error: float = 0.7
    codec: str = "e8"
    impl: Impl = "auto"

    def __new__(cls, *_: object, **options: object) -> "CacheConfig":  # noqa: PYI034 - from Python 3.11 on
        """Refuse options that do not exist, with advice, before the dataclass does without."""
        _check_names(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every range."""
        self._check_numbers()
        for name, least in _LEAST.items():
            _check_whole(name, getattr(self, name), least)
        ratio: object = self.keep_ratio  # whatever the annotation says
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 < ratio <= 1:
            msg = f"keep_ratio must be in (0, 1], the part of the tokens that is kept; got {ratio!r}"
            raise OptionError(msg)
        for name in ("center_keys", "remove_rope"):
            if not isinstance(getattr(self, name), bool):
                msg = f"{name} must be True or False, got {getattr(self, name)!r}"
                raise OptionError(msg)
        scales: object = self.scale_candidates
        if not isinstance(scales, tuple) or not scales or not all(_is_positive(scale) for scale in scales):
            msg = f"scale_candidates must be positive numbers, at least one, in a tuple; got {scales!r}"
            raise OptionError(msg)
        check_codec_name(self.codec)
        for name, rules in _CHOICES.items():
            given = getattr(self, name)
            if given not in get_args(rules):
                msg = f"unknown {name} {given!r}. {suggest(str(given), get_args(rules))}"
                raise OptionError(msg)

    def _check_numbers(self) -> None:
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if not _is_positive(bits) or not _LEAST_BITS <= bits <= MAX_BITS:
                msg = f"{name} must be from {_LEAST_BITS} to {MAX_BITS} bits per channel, got {bits!r}"
                raise OptionError(msg)
        if self.short_text_bits != 0 and not (_is_positive(self.short_text_bits) and self.short_text_bits <= MAX_BITS):
            msg = f"short_text_bits must be from 0 to {MAX_BITS} bits per channel, got {self.short_text_bits!r}"
            raise OptionError(msg)
        if not _is_positive(self.most_code_error):
            msg = f"most_code_error must be a positive number, got {self.most_code_error!r}"
            raise OptionError(msg)

    def budget(self, tokens: int, before: int = 0) -> int:
        """Return how many of so many tokens heads keep, on average, where they come behind so many others.

        Fewer than `min_tokens` are all kept.
        """
        if tokens < self.min_tokens:
            return tokens
        return min(max(ceil(self.keep_ratio * tokens), self.min_kept - before), tokens)

    def override(self, options: Mapping[str, Any]) -> "CacheConfig":
        """Return a copy with these options changed.

        Raises:
            OptionError: If an option does not exist; the message names the nearest that does, or says why the option
                was removed and what to do.
        """
        _check_names(options)
        return replace(self, **options)


def _check_names(options: Iterable[str]) -> None:
    """Check that there are such options.

    Raises:
        OptionError: If there is none; the message names the nearest, or says why it was removed and what to do.
    """
    known = [field.name for field in fields(CacheConfig)]
    for name in options:
        if name in REMOVED:
            msg = f"the option {name!r} was removed: {REMOVED[name].advice}"
            raise OptionError(msg)
        if name not in known:
            msg = f"unknown option {name!r}. {suggest(name, known)}"
            raise OptionError(msg)


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"{name} must be a whole number, at least {least}, got {value!r}"
        raise OptionError(msg)


# Bits and ratios that reach 6, 10, 14, 17 and 33 times at 32k tokens with heads of 64 channels, where scales and
# exact tokens weigh most, principal axes included, and stay there while the tail and the buffers fill
# (tests/integration/test_preset_bytes.py).  "asym" has fewer bits for values: its alias promises half of the tokens.
_EVICTING: dict[str, Any] = {"key_bits": 2, "value_bits": 2.25, "short_text_bits": 0.5}
PRESETS: dict[str, CacheConfig] = {
    "quant": CacheConfig(key_bits=2.5, value_bits=2.5, residual_length=32),
    "high": CacheConfig(keep_ratio=0.695, residual_length=24, min_kept=768, **_EVICTING),
    "asym": CacheConfig(keep_ratio=0.501, residual_length=24, min_kept=768, **(_EVICTING | {"value_bits": 2.125})),
    "balanced": CacheConfig(keep_ratio=0.403, residual_length=24, min_kept=768, **_EVICTING),
    "max": CacheConfig(keep_ratio=0.201, residual_length=16, min_kept=384, **_EVICTING),
}
"""The presets by name; ``"balanced"`` is the default of `NexusQuantCache`."""

ALIASES: dict[str, str] = {
    "keep-all": "quant",
    "keep-most": "high",
    "keep-half": "asym",
    "keep-some": "balanced",
    "keep-few": "max",
}
"""The descriptive aliases, and whose they are.  An alias is accepted wherever a preset's name is; reports, files and
results have the name.  It says how many of the tokens that were read are kept at least: short texts keep more.
"""
_CUSTOM = "custom"


def preset_name(preset: str | CacheConfig) -> str:
    """Return the one name of a preset that is given by name or alias; ``"custom"`` for settings.

    Raises:
        OptionError: If there is no such preset; the message names the nearest that exists.
    """
    if isinstance(preset, CacheConfig):
        return _CUSTOM
    named: object = preset  # whatever the annotation says
    if hasattr(named, "to_dict") or hasattr(named, "config"):
        msg = f"preset is the first argument, got {type(named).__name__}: write NexusQuantCache(config=model.config)"
        raise OptionError(msg)
    if isinstance(named, str) and named not in PRESETS:  # one of your own may have the name of an alias
        named = ALIASES.get(named, named)
    if not isinstance(named, str) or named not in PRESETS:
        hint = nearest(str(named), [*PRESETS, *ALIASES])
        msg = f"unknown preset {named!r}. {hint}Allowed: {all_presets()}. A CacheConfig is also accepted."
        raise OptionError(msg)
    return named


def preset_names(presets: Iterable[str]) -> tuple[str, ...]:
    """Return the names of presets that are given by name or alias, each once.

    Raises:
        OptionError: As for `preset_name`.
    """
    return tuple(dict.fromkeys(preset_name(preset) for preset in presets))


def with_alias(name: str) -> str:
    """Return how texts call a preset: alias and name, as in ``"keep-all (quant)"``."""
    alias = next((alias for alias, other in ALIASES.items() if other == name), None)
    return name if alias is None else f"{alias} ({name})"


def all_presets() -> str:
    """Return every preset as texts call it, in one line."""
    return ", ".join(with_alias(name) for name in PRESETS)


def resolve_preset(preset: str | CacheConfig) -> "CacheConfig":
    """Return the settings of a preset that is given by name or alias, or the settings given.

    Raises:
        OptionError: As for `preset_name`.
    """
    return preset if isinstance(preset, CacheConfig) else PRESETS[preset_name(preset)]
