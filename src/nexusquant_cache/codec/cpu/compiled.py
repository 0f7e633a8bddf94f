"""How functions are compiled: once for a machine, kept on disk, with the interpreter's lock released.

What is kept on disk is found by the file of the function that was called, so a function and all that it calls stand in
one file: a change in another one would not be noticed.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

CHUNK = 128
"""Tokens that compiled functions treat together."""

_LOG = logging.getLogger("nexusquant_cache")
_PATIENCE = 3.0  # seconds; what comes from the disk takes less
# What may be done to sums besides: another order, fused products.  NaN and infinity stay what they are.
_LOOSE = {"contract", "nsz", "reassoc"}

Function = Callable[..., Any]


def array(kind: Any, axes: int, *, strided: bool = False) -> Any:  # noqa: ANN401 - numba has no types for its types
    """Return the type of an array; strided ones are only read and may have any strides, others lie in C's order."""
    return types.Array(kind, axes, "A", readonly=True) if strided else types.Array(kind, axes, "C")


def entry(*arguments: Any) -> Callable[[Function], Function]:  # noqa: ANN401 - as above
    """Compile a function for arguments of these types, at once, and keep the result on disk where that is possible."""

    def compiled(function: Function) -> Function:
        signature = types.void(*arguments)
        with _announced():
            try:
                return cast("Function", njit(signature, nogil=True, cache=True, error_model="numpy")(function))
            except (OSError, RuntimeError):  # no folder that can be written to, or no room in it
                return cast("Function", njit(signature, nogil=True, error_model="numpy")(function))

    return compiled


def part(function: Function) -> Function:
    """Compile a function that others here call, with sums in any order."""
    return cast("Function", njit(nogil=True, error_model="numpy", fastmath=_LOOSE)(function))


def exact_part(function: Function) -> Function:
    """Compile a function that others here call, operation by operation as it is written."""
    return cast("Function", njit(nogil=True, error_model="numpy")(function))


@contextmanager
def _announced() -> Iterator[None]:
    """Say that something is compiled, if that takes long."""
    told = threading.Timer(
        _PATIENCE, _LOG.warning, ["compiling the codec for this machine, once; that takes about half a minute"]
    )
    told.daemon = True
    told.start()
    try:
        yield
    finally:
        told.cancel()


def _same_bits(target: Any, kind: Any) -> Any:  # noqa: ANN401 - as above
    """Return what generates code that takes the 32 bits of a number for those of another type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401
        del context, signature
        return builder.bitcast(arguments[0], kind)

    return target, generate


@intrinsic  # type: ignore[untyped-decorator]
def float_of(typing_context: Any, bits: Any) -> Any:  # noqa: ANN401
    """Return the float32 of 32 bits."""
    del typing_context, bits
    target, generate = _same_bits(types.float32, ir.FloatType())
    return target(types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(typing_context: Any, number: Any) -> Any:  # noqa: ANN401
    """Return the 32 bits of a float32."""
    del typing_context, number
    target, generate = _same_bits(types.uint32, ir.IntType(32))
    return target(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def shifted(typing_context: Any, bits: Any, places: Any) -> Any:  # noqa: ANN401
    """Return 16 bits, shifted down by fewer than 16 places; Python's shift is one of 64 bits here."""
    del typing_context, bits, places

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401
        del context, signature
        return builder.lshr(*arguments)

    return types.uint16(types.uint16, types.uint16), generate


@intrinsic  # type: ignore[untyped-decorator]
def add_products(  # noqa: PLR0913, PLR0917 - a compiled function
    typing_context: Any,  # noqa: ANN401
    pairs: Any,  # noqa: ANN401
    factors: Any,  # noqa: ANN401
    unit: Any,  # noqa: ANN401
    sums: Any,  # noqa: ANN401
    rows: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Add to each row of sums that of 8 channels, each times its factor for that row, times a unit.

    It is written for the compiler because none makes of loops over 16-bit numbers what processors have for them: an
    instruction that multiplies pairs of them and adds the two products.  Two rows are done at once, to load channels
    for both.

    Args:
        typing_context: The compiler's.
        pairs: Channels of tokens: for each two channels `CHUNK` pairs, int16.
        factors: For each row those of the 8 channels, int16.
        unit: Unit of the factors, float32.
        sums: For each row those of `CHUNK` tokens, float32.
        rows: How many rows there are; an even number.
    """
    del typing_context
    return types.void(pairs, factors, unit, sums, rows), _generate_products


def _generate_products(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ANN401
    pairs, factors, sums = (
        builder.bitcast(context.make_array(signature.args[k])(context, builder, arguments[k]).data, kind.as_pointer())
        for k, kind in ((0, _I32), (1, _I32), (3, _F32))
    )
    rows, index = arguments[4], arguments[4].type
    unit = _spread(builder, arguments[2], _SUMS)

    def number(value: int) -> Any:  # noqa: ANN401
        return ir.Constant(index, value)

    def at(start: Any, place: Any, kind: Any) -> Any:  # noqa: ANN401
        return builder.bitcast(builder.gep(start, [place]), kind.as_pointer())

    with cgutils.for_range(builder, builder.udiv(rows, number(2))) as half:
        row = builder.mul(half.index, number(2))
        first = builder.mul(row, number(4))
        spread = []
        for k in range(8):
            factor = builder.load(builder.gep(factors, [builder.add(first, number(k))]))
            spread.append(builder.bitcast(_spread(builder, factor, _DOTS), _PAIRS))
        with cgutils.for_range(builder, number(CHUNK // _LANES)) as loop:
            token = builder.mul(loop.index, number(_LANES))
            loaded = [builder.load(at(pairs, builder.add(token, number(k * CHUNK)), _PAIRS), align=2) for k in range(4)]
            for k in range(2):
                start = builder.mul(builder.add(row, number(k)), number(CHUNK))
                place = at(sums, builder.add(start, token), _SUMS)
                total = _dot(context, builder, loaded[0], spread[4 * k])
                for x, y in zip(loaded[1:], spread[4 * k + 1 : 4 * k + 4], strict=True):
                    total = builder.add(total, _dot(context, builder, x, y))
                added = builder.fmul(builder.sitofp(total, _SUMS), unit, flags=("contract",))
                builder.store(builder.fadd(builder.load(place, align=4), added, flags=("contract",)), place, align=4)
    return context.get_dummy_value()


_LANES = 8
_I32, _F32 = ir.IntType(32), ir.FloatType()
_PAIRS, _DOTS = ir.VectorType(ir.IntType(16), 2 * _LANES), ir.VectorType(_I32, _LANES)
_SUMS = ir.VectorType(_F32, _LANES)


def _spread(builder: Any, one: Any, kind: Any) -> Any:  # noqa: ANN401
    """Return a number in all lanes."""
    empty = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(empty, one, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(_DOTS, [0] * _LANES))


def _dot(context: Any, builder: Any, x: Any, y: Any) -> Any:  # noqa: ANN401
    """Return the sum of the two products of each lane."""
    if _has_dots(context):
        kind = ir.FunctionType(_DOTS, [_PAIRS, _PAIRS])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd"), [x, y])
    found = []
    for first in (0, 1):
        lanes = ir.Constant(_DOTS, [2 * lane + first for lane in range(_LANES)])
        a, b = (builder.sext(builder.shuffle_vector(z, z, lanes), _DOTS) for z in (x, y))
        found.append(builder.mul(a, b))
    return builder.add(*found)


def _has_dots(context: Any) -> bool:  # noqa: ANN401
    """Tell whether the processor has one instruction for that, by the name that we call."""
    return "+avx2" in context.codegen().magic_tuple()[2].split(",")
