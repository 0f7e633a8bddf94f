"""One specialisation of a kernel, to compile it without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One specialisation of a kernel, to compile without a GPU.

    Attributes:
        name: For reports.
        function: The jitted function.
        signature: Type of every parameter, ``"constexpr"`` for those in ``constexprs``.
        constexprs: Values of the compile-time parameters.
        options: Such as ``num_warps``.
        rows: Tokens per iteration of the longest loop.
        attrs: What the launcher would find out about the arguments (`triton.compiler.ASTSource`).
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]
    rows: int
    attrs: Mapping[tuple[int, ...], Any] = field(default_factory=dict)


def compile_case(
    name: str,
    function: Any,  # noqa: ANN401 - a jitted function
    types: Mapping[str, str],
    constexprs: Mapping[str, Any],
    options: Mapping[str, int],
    rows: int,
) -> CompileCase:
    """Return a case for which pointers are aligned; parameters without a type are 32-bit integers."""
    names: list[str] = function.arg_names
    signature = {each: "constexpr" if each in constexprs else types.get(each, "i32") for each in names}
    attrs: dict[tuple[int, ...], Any] = {
        (place,): [["tt.divisibility", 16]] for place, kind in enumerate(signature.values()) if kind.startswith("*")
    }
    return CompileCase(name, function, signature, constexprs, options, rows, attrs)
