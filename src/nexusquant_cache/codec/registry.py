"""Codecs by name, for generation, attention and files alike."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.e8 import E8Codec
from nexusquant_cache.codec.hadamard import hadamard_factors
from nexusquant_cache.codec.layout import CodeLayout
from nexusquant_cache.errors import FormatError, NexusQuantError, OptionError, UnsupportedError, suggest

Options = dict[str, Any]
_PLAIN: dict[Any, type] = {kind.__name__: kind for kind in (bool, int, float, str)}
_MOST_CHANNELS = 2048  # of a head: plans of bits take a time that grows with the square
MOST_CANDIDATES = 64
"""Scales to try for each vector: each takes as long as the first."""
_SEED_BITS = 64  # all that signs depend on


@dataclass(frozen=True)
class CodecMeta:
    """A codec: its registered name, and what makes it again."""

    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    codec_class: type[VectorCodec]
    describe: Callable[[Any], Options]
    make: Callable[[Options], VectorCodec]


def _describe_e8(codec: E8Codec) -> Options:
    given = {name: getattr(codec, name) for name in _e8_options()}
    if abs(codec.seed) >> _SEED_BITS:
        given["seed"] = codec.seed & ((1 << _SEED_BITS) - 1)
    return {
        "head_dim": codec.layout.head_dim,
        "block_bits": list(codec.layout.block_bits),
        **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
    }


def _e8_options() -> Options:
    """Return what a file may say of an E8 codec besides its layout, with defaults for what it does not say.

    A field that is not compared, like the implementation, does not decide the result: it is the reader's choice.
    """
    return {field.name: field.default for field in fields(E8Codec) if field.compare and field.name != "layout"}


def _make_e8(options: Options) -> E8Codec:
    given = dict(options)
    given.pop("axes_save", None)  # files of earlier releases: what they expected of axes is now seen in the keys
    if given.pop("gain", "norm") != "norm":  # they name that, too
        msg = "the gain rules besides 'norm' have been removed"
        raise ValueError(msg)
    head_dim, bits = given.pop("head_dim"), tuple(given.pop("block_bits"))
    defaults = _e8_options()
    for name, value in given.items():
        given[name] = _like(defaults[name], value)
    if type(head_dim) is not int or head_dim > _MOST_CHANNELS or not any(bits):
        msg = f"impossible blocks: {str(bits)[:40]} of {str(head_dim)[:20]} channels"
        raise ValueError(msg)
    if len(given.get("candidates", ())) > MOST_CANDIDATES:
        msg = f"more than {MOST_CANDIDATES} scale candidates"
        raise ValueError(msg)
    hadamard_factors(head_dim)
    return E8Codec(CodeLayout(head_dim, bits), **given)


def _like(default: object, value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a value of JSON as an option of the kind that its default is."""
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(_like(default[0], x) for x in value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default) or (isinstance(value, int) and abs(value) >> _SEED_BITS):
        msg = f"{str(value)[:40]!r} in place of something like {default!r}"
        raise TypeError(msg)
    return value


_CODECS: dict[str, _Entry] = {"e8": _Entry(E8Codec, _describe_e8, _make_e8)}


def register_codec(
    name: str,
    codec_class: type[VectorCodec],
    describe: Callable[[Any], Options] | None = None,
    make: Callable[[Options], VectorCodec] | None = None,
) -> None:
    """Register a codec of your own: caches then use it by its name, ``NexusQuantCache(codec=name)``, and can be saved.

    Every program that makes such caches, or loads them from files, registers it first.  The codec's transforms must
    have one of the package's rotations (`codec.rotation`), and each vector must become a row of
    ``bytes_per_vector - 1`` bytes.

    Args:
        name: What caches and files call the codec; choose one that nobody else will, such as ``"yourname.codec"``.
        codec_class: The class; subclasses need names of their own.
        describe: Returns a codec's options, in values that JSON knows.  A dataclass needs none: its options are the
            fields that are compared.
        make: Makes a codec from options, those of a file or, for a new cache, ``{"head_dim": ...}``.  Options of a
            file may be wrong: raise ValueError then.  A dataclass needs none: it is called with the options, whose
            values must have the types of its fields.

    Raises:
        OptionError: If the name is no text or taken by another class, the class is no `VectorCodec`, or there is no
            default for it.
    """
    _check_registration(name, codec_class, describe, make)
    known = _CODECS.get(name)
    # A class may be defined again, as a cell of a notebook does.
    if known is not None and _path(known.codec_class) != _path(codec_class):
        msg = f"the codec name {name!r} is taken by {known.codec_class.__name__}; choose another"
        raise OptionError(msg)
    kind: Any = codec_class  # mypy knows no dataclass that is a codec
    if (describe is None or make is None) and not is_dataclass(kind):
        msg = f"{codec_class.__name__} is no dataclass: give register_codec both describe and make"
        raise OptionError(msg)
    _CODECS[name] = _Entry(
        codec_class,
        _fields_of if describe is None else describe,
        partial(_from_fields, codec_class) if make is None else make,
    )


def _check_registration(name: object, codec_class: object, describe: object, make: object) -> None:
    """Check what `register_codec` is given, whatever its annotations say.

    Raises:
        OptionError: If something is of a wrong kind.
    """
    if not isinstance(name, str) or not name:
        msg = f"the name of a codec must be a text, got {name!r}"
        raise OptionError(msg)
    if not isinstance(codec_class, type) or not issubclass(codec_class, VectorCodec):
        msg = f"codec_class must be a subclass of VectorCodec, the class and not an instance, got {codec_class!r}"
        raise OptionError(msg)
    for what, given in (("describe", describe), ("make", make)):
        if given is not None and not callable(given):
            msg = f"{what} must be a function, got {given!r}"
            raise OptionError(msg)


def _path(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def _fields_of(codec: Any) -> Options:  # noqa: ANN401 - any dataclass
    """Return the fields of a dataclass that are compared."""
    given = {field.name: getattr(codec, field.name) for field in fields(codec) if field.compare}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _from_fields(codec_class: Any, options: Options) -> VectorCodec:  # noqa: ANN401
    """Make a dataclass of its fields; lists are those that JSON made of tuples."""
    given: Options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for field in fields(codec_class):
        kind = _PLAIN.get(getattr(field.type, "__name__", field.type))
        value = given.get(field.name)
        if kind is float and type(value) is int:
            given[field.name] = value = float(value)
        if kind is not None and field.name in given and type(value) is not kind:
            msg = f"{field.name} must be of type {kind.__name__}, got {str(value)[:40]!r}"
            raise TypeError(msg)
    made: VectorCodec = codec_class(**given)
    return made


def check_codec_name(name: object) -> None:
    """Check that a codec is registered.

    Raises:
        OptionError: If it is not.
    """
    if not isinstance(name, str) or name not in _CODECS:
        msg = f"no codec is registered as {name!r} (nexusquant_cache.register_codec). {suggest(str(name), _CODECS)}"
        raise OptionError(msg)


def new_codec(name: str, head_dim: int) -> VectorCodec:
    """Return a codec of a registered class for vectors of so many channels.

    Raises:
        OptionError: If it is not registered.
    """
    check_codec_name(name)
    return _CODECS[name].make({"head_dim": head_dim})


def describe_codec(codec: VectorCodec) -> CodecMeta:
    """Return what a file says about a codec.

    Raises:
        UnsupportedError: If its class is not registered.
    """
    for name, entry in _CODECS.items():
        if type(codec) is entry.codec_class:
            return CodecMeta(name, entry.describe(codec))
    msg = (
        f"a file cannot name the codec class {type(codec).__name__}: register it first, with "
        "nexusquant_cache.register_codec"
    )
    raise UnsupportedError(msg)


def make_codec(meta: CodecMeta) -> VectorCodec:
    """Return the codec that a file describes.

    Raises:
        FormatError: If it is not registered here, or the description makes no codec.
    """
    entry = _CODECS.get(meta.name)
    if entry is None:
        msg = f"the file needs the codec {meta.name[:60]!r}, not registered here (see nexusquant_cache.register_codec)"
        raise FormatError(msg)
    try:
        codec = entry.make(dict(meta.options))
    except (NexusQuantError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        msg = f"the file describes no codec {meta.name!r}: {error}"
        raise FormatError(msg) from error
    if type(codec) is not entry.codec_class or not 1 <= codec.bytes_per_vector <= 1 << 20:
        msg = f"the file describes no codec {meta.name!r}"
        raise FormatError(msg)
    return codec
