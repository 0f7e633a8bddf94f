"""Attention on packed tokens by kernels is that over the decoded ones, in the interpreter of triton."""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from integration.packed import codec_of, correlated, packed_side, phase_of, side_of

pytest.importorskip("triton", reason="triton is for Linux")

from nexusquant_cache.codec.operands import ExactTokens, PackedOperand
from nexusquant_cache.codec.positions import PositionMap
from nexusquant_cache.codec.softmax import Softmax
from nexusquant_cache.codec.triton import kernels_attend as kernel
from nexusquant_cache.codec.triton import kernels_positions as positions_kernel
from nexusquant_cache.codec.triton.compile_case import CompileCase
from nexusquant_cache.errors import ShapeError, UnsupportedError

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton must be chosen before torch is imported",
)
# Operands are rounded to float16, by 2 ** -12 at most; of many such errors little is left, but for that of the output.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """One attention; the defaults are the plainest."""

    tokens: int = 65
    head_dim: int = 64
    value_dim: int | None = None
    batch: int = 1
    heads: int = 1
    group: int = 2
    queries: int = 1
    key_bits: float = 1.75
    value_bits: float = 2.25
    transform: str = "principal"
    center: bool = True
    rotary_dim: int = 0
    interleaved: bool = False
    start: int | None = None  # of contiguous positions; by default each head has its own
    softcap: float | None = None
    sinks: bool = False
    hidden: str | None = None  # from all heads of a row, or from each head others
    mask: str | None = None
    exact: int = 5
    dtype: torch.dtype = torch.float32
    splits: int | None = 1


def attended(query, keys, values, mask, softmax):
    """Return attention in float64; the mask is added to the logits."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (keys, values))
    logits = query.double() @ keys.mT * softmax.scaling
    if softmax.softcap is not None:
        logits = softmax.softcap * torch.tanh(logits / softmax.softcap)
    logits = logits + mask
    if softmax.sink_logits is not None:
        sinks = softmax.sink_logits.double()[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    weights = torch.softmax(logits, -1)[..., : keys.shape[2]]
    return weights.nan_to_num() @ values


def exact_tokens(case):
    """Return exact tokens with poison around them, and what is added to their logits."""
    shape = (case.batch, case.heads, case.exact)
    sides = []
    for channels in (case.head_dim, case.value_dim or case.head_dim):
        buffer = torch.full((shape[0], shape[1], shape[2] + 2, channels), torch.nan, dtype=case.dtype)
        buffer[:, :, : case.exact] = torch.randn(*shape, channels)
        sides.append(buffer[:, :, : case.exact])
    visible = torch.ones(case.batch, case.queries, case.exact, dtype=torch.bool)
    visible = visible.tril(case.exact - case.queries)
    added = torch.zeros(visible.shape, dtype=torch.float64).masked_fill_(~visible, -torch.inf)
    if case.mask is None:
        return ExactTokens(*sides), torch.zeros(1, 1, 1)
    if case.mask == "boolean":
        return ExactTokens(*sides, visible), added
    added[..., 0] = 0.75
    return ExactTokens(*sides, added[:1].to(case.dtype)), added[:1]


def run(case, **options):
    """Return what the kernels compute and what they should."""
    value_dim = case.value_dim or case.head_dim
    shape = (case.batch, case.heads, case.tokens)
    keys = packed_side(codec_of(case.head_dim, case.key_bits, case.transform, center=case.center), *shape)
    values = packed_side(codec_of(value_dim, case.value_bits, case.transform, center=case.center), *shape)
    decoded, options = keys.decoded, dict(options)
    if case.rotary_dim:
        phase = phase_of(shape, case.rotary_dim, interleaved=case.interleaved, start=case.start)
        decoded = phase.rotary.rotate(decoded, phase.positions)
        options |= {"rope": phase.rope, "places": phase.places}
    hidden = torch.zeros(case.batch, case.heads, case.tokens, dtype=torch.bool)
    if case.hidden == "row":  # all heads of a row have one part of memory
        hidden = hidden[:, :1]
    if case.hidden:
        for row, heads in enumerate(hidden):
            for head, tokens in enumerate(heads):
                tokens[7 * head : 1 + 7 * head + 60 * row] = True
        options["hidden"] = hidden
    query_heads = case.heads * case.group
    query = torch.randn(case.batch, case.queries, query_heads, case.head_dim).to(case.dtype).transpose(1, 2)
    sinks = torch.randn(query_heads) + 2 if case.sinks else None
    softmax = Softmax(case.head_dim**-0.5, case.softcap, sinks)
    exact, added = exact_tokens(case)

    partial = kernel.attend_packed(query, keys.operand, values.operand, softmax, splits=case.splits, **options)
    found = kernel.combine(query, partial, values.operand.plan, exact, softmax)
    assert found.dtype == case.dtype

    mask = torch.zeros(case.batch, case.heads, case.queries, case.tokens, dtype=torch.float64)
    mask = mask.masked_fill_(hidden[:, :, None], -torch.inf)
    mask = torch.cat([mask, added[:, None].expand(case.batch, case.heads, case.queries, case.exact)], -1)
    mask = mask.repeat_interleave(case.group, 1)
    expected = attended(
        query, torch.cat([decoded, exact.keys], 2), torch.cat([values.decoded, exact.values], 2), mask, softmax
    )
    return found.double(), expected, values.decoded.abs().max()


def assert_alike(case, **options):
    found, expected, size = run(case, **options)
    assert (found - expected).abs().max() <= TOLERANCE[case.dtype] * size


PLAIN = Case()


@interpreted
@pytest.mark.parametrize("tokens", [1, 7, 63, 65, 1000])
def test_any_number_of_tokens(tokens):
    assert_alike(replace(PLAIN, tokens=tokens, splits=3 if tokens > 65 else 1))


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(heads=4, transform="principal", head_dim=128, tokens=70),  # other plans in other heads
        Case(heads=3, batch=2, transform="hadamard", group=1),
        Case(head_dim=128, value_dim=64, key_bits=2.0, value_bits=3.0, transform="hadamard", center=False),
        Case(head_dim=64, value_dim=128, key_bits=2.625, value_bits=1.0),  # rows of 21 bytes, and of one rate
        Case(head_dim=80, transform="hadamard"),
        Case(head_dim=96, key_bits=4.0, value_bits=4.0, heads=2),
        Case(head_dim=256, tokens=40, key_bits=0.5),
    ],
    ids=lambda case: f"{case.transform}-{case.head_dim}-{case.key_bits}",
)
def test_transforms_and_plans(case):
    assert_alike(case)


def test_heads_have_plans_of_their_own():
    """What the cases above count on."""
    plan = packed_side(codec_of(128, 1.75), 1, 4, 70).operand.plan
    assert len(plan.plans.unique()) > 1
    assert plan.rates == 0b11110


@interpreted
@pytest.mark.parametrize(("group", "queries"), [(1, 1), (3, 1), (4, 5), (8, 1), (9, 1), (9, 5)])
def test_queries_of_a_group(group, queries):
    assert_alike(replace(PLAIN, group=group, queries=queries, mask="boolean", exact=7))


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(rotary_dim=64, start=0, tokens=130),
        Case(rotary_dim=64, start=501, interleaved=True, heads=2, splits=2, tokens=130),
        Case(rotary_dim=64, heads=2, batch=2, splits=2),
        Case(rotary_dim=128, head_dim=128, interleaved=True),
        Case(rotary_dim=20, head_dim=80, start=3),  # most channels do not turn
        Case(rotary_dim=32, head_dim=80, interleaved=True, center=False),
        Case(rotary_dim=48, head_dim=64, queries=3, mask="boolean", transform="hadamard"),
        Case(rotary_dim=256, head_dim=256, tokens=33, center=False),
    ],
    ids=lambda case: f"{case.rotary_dim}of{case.head_dim}-{'row' if case.start is not None else 'each'}",
)
def test_keys_turned_in_the_loop(case):
    assert_alike(case)


@interpreted
def test_a_large_mean_beside_small_keys():
    """Neither part of a turned key may leave the range of float16."""
    tokens, phase = 40, phase_of((1, 1, 40), 64)
    vectors = torch.randn(1, 1, tokens, 64) * 1e-4
    vectors[..., 3] += 3e4
    vectors[:, :, ::2] *= 1e-3
    keys, values = side_of(codec_of(64, 4.0), vectors), side_of(codec_of(64, 2.0), correlated(1, 1, tokens, 64))
    query = torch.randn(1, 1, 1, 64) * 1e-4
    softmax = Softmax(0.125)
    turned = phase.rotary.rotate(keys.decoded, phase.positions)
    partial = kernel.attend_packed(
        query, keys.operand, values.operand, softmax, rope=phase.rope, places=phase.places, splits=1
    )
    nothing = ExactTokens(query[:, :, :0], query[:, :, :0])
    found = kernel.combine(query, partial, values.operand.plan, nothing, softmax)
    expected = attended(query, turned, values.decoded, 0.0, softmax)
    assert (found - expected).abs().max() <= 4e-3 * values.decoded.abs().max()


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case(softcap=2.0),
        Case(softcap=5.0, rotary_dim=64),
        Case(sinks=True, group=4),
        Case(sinks=True, exact=0),
        Case(hidden="row", batch=2, heads=2, mask="boolean", queries=2),
        Case(hidden="head", batch=2, heads=2, mask="boolean", queries=2, splits=2, tokens=150),
        Case(hidden="head", batch=2, rotary_dim=32, mask="added", queries=4),
        Case(exact=0, splits=2, tokens=150),
        Case(exact=70),
        Case(dtype=torch.float16, rotary_dim=64),
        Case(dtype=torch.bfloat16, mask="added"),
        Case(dtype=torch.bfloat16, softcap=20.0, sinks=True, head_dim=128, group=4, splits=2, tokens=140),
    ],
    ids=str,
)
def test_kinds_of_attention(case):
    assert_alike(case)


@interpreted
def test_all_packed_tokens_of_a_row_hidden():
    case = replace(PLAIN, batch=2, tokens=60, hidden="row")  # 61 of the second row's
    found, expected, size = run(case)
    assert (found - expected).abs().max() <= 2e-3 * size


@interpreted
def test_nothing_to_attend_to_gives_zeros():
    found, _, _ = run(replace(PLAIN, batch=2, tokens=60, hidden="row", exact=0))
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert found[0].abs().max() > 0


@interpreted
def test_large_queries_and_keys_stay_in_range():
    keys, values = (side_of(codec_of(64, 3.0), correlated(1, 1, 40, 64) * 3e3) for _ in range(2))
    query = torch.randn(1, 2, 1, 64) * 2e3
    softmax = Softmax(1e-7)
    partial = kernel.attend_packed(query, keys.operand, values.operand, softmax, splits=1)
    empty = torch.zeros(1, 1, 0, 64)
    found = kernel.combine(query, partial, values.operand.plan, ExactTokens(empty, empty), softmax)
    expected = attended(query, keys.decoded, values.decoded, 0.0, softmax)
    assert (found - expected).abs().max() <= 2e-3 * values.decoded.abs().max()


@interpreted
def test_queries_of_zeros_give_the_mean_value():
    keys, values = (packed_side(codec_of(64, 3.0), 1, 1, 40) for _ in range(2))
    phase = phase_of((1, 1, 40), 32)
    query = torch.zeros(1, 2, 1, 64)
    softmax, empty = Softmax(0.125), torch.zeros(1, 1, 0, 64)
    for options in ({}, {"rope": phase.rope, "places": phase.places}):
        partial = kernel.attend_packed(query, keys.operand, values.operand, softmax, **options)
        found = kernel.combine(query, partial, values.operand.plan, ExactTokens(empty, empty), softmax)
        assert torch.allclose(found.double(), values.decoded.mean(2, keepdim=True), atol=2e-3)


@interpreted
def test_only_exact_tokens():
    case = Case(exact=40, sinks=True, mask="boolean", queries=2)
    plan = packed_side(codec_of(64, 2.0), 1, 1, 40).operand.plan
    exact, added = exact_tokens(case)
    query = torch.randn(1, 2, 2, 64)
    softmax = Softmax(0.125, None, torch.randn(2))
    out = torch.full((1, 2, 2, 64), torch.nan)
    assert kernel.combine(query, None, plan, exact, softmax, out) is out
    assert torch.allclose(out.double(), attended(query, exact.keys, exact.values, added[:, None], softmax), atol=1e-5)


@interpreted
def test_splits_change_nothing():
    found = []
    for splits in (1, 2, 7, None):
        torch.manual_seed(1)
        found.append(run(replace(PLAIN, tokens=400, splits=splits))[0])
    for other in found[1:]:
        assert torch.allclose(other, found[0], atol=1e-3)


@interpreted
@pytest.mark.parametrize("dense", [0, 9, 2500])
def test_positions_of_the_kept(dense):
    kept = torch.zeros(2, 2, 2500, dtype=torch.bool)
    for row in kept.flatten(0, 1):
        row[torch.randperm(2500)[:700]] = True
    where = PositionMap(start=4)
    where.append(kept)
    where.append_all(dense)
    found = positions_kernel.kept_positions(
        (2, 2), where.bitmap, start=where.start, covered=where.covered, tokens=where.tokens
    )
    assert torch.equal(found, where.positions(found.device).int())
    origins = torch.tensor([0, 900], dtype=torch.int32)
    padded = positions_kernel.kept_positions(
        (2, 2), where.bitmap, start=where.start, covered=where.covered, tokens=where.tokens, origins=origins
    )
    assert torch.equal(padded, (found - origins[:, None, None]).clamp_min(0))


@interpreted
def test_positions_of_all_tokens():
    origins = torch.tensor([3, 0], dtype=torch.int32)
    found = positions_kernel.kept_positions((2, 1), None, start=2, covered=0, tokens=70, origins=origins)
    assert torch.equal(found[:, 0], (torch.arange(2, 72) - origins[:, None]).clamp_min(0).int())
    without = positions_kernel.kept_positions((1, 1), None, start=2, covered=0, tokens=0, device=origins.device)
    assert without.shape == (1, 1, 0)


def refused(**changed):
    keys = packed_side(codec_of(64, 2.0), 1, 2, 6).operand
    given = {"query": torch.randn(1, 4, 1, 64), "keys": keys, "values": keys, "softmax": Softmax(0.125)} | changed
    return kernel.attend_packed(**given)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ShapeError, match="do not fit"):
        refused(query=torch.randn(1, 3, 1, 64))
    with pytest.raises(ShapeError, match="32 channels"):
        refused(query=torch.randn(1, 4, 1, 32))
    with pytest.raises(UnsupportedError, match="places"):
        refused(rope=phase_of((1, 2, 6), 64, start=0).rope)
    keys = packed_side(codec_of(64, 2.0), 1, 2, 6).operand
    none = PackedOperand(keys.plan, keys.words[:, :, :0], keys.scales[:, :, :0])
    with pytest.raises(UnsupportedError, match="no packed token"):
        refused(keys=none, values=none)


def test_cases_to_compile_name_every_parameter():
    for case in kernel.compile_cases():
        assert isinstance(case, CompileCase)
        assert list(case.signature) == case.function.arg_names
        assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)
