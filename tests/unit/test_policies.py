"""Every policy of the package: what they all promise, and what each of them keeps."""

import logging
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from transformers import Gemma3TextConfig, LlamaConfig

from nexusquant_cache import (
    DEFAULT_BESIDE_WINDOWS,
    DEFAULT_POLICY,
    Averaged,
    Combined,
    EqualBudgets,
    EvictionPolicy,
    ExpectedAttentionPolicy,
    FarAttentionPolicy,
    IfReadAgain,
    KeyDiffPolicy,
    KeyKeyPolicy,
    KeyNormPolicy,
    LeveragePolicy,
    MeanKeyKeyPolicy,
    NexusQuantCache,
    RecentAttentionPolicy,
    ReconstructionPolicy,
    ScoreInputs,
    SharedOverHeads,
    ValueAware,
    WindowAttentionPolicy,
)
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.errors import CacheStateError, NonFiniteError, OptionError, ShapeError
from nexusquant_cache.layer.selection import Scores
from nexusquant_cache.policy.base import _note_stand_ins
from nexusquant_cache.policy.combined import _less, _ranks
from nexusquant_cache.policy.queries import _mean_turn

POLICIES: dict[str, EvictionPolicy] = {
    "key_key": KeyKeyPolicy(),
    "mean_key_key": MeanKeyKeyPolicy(),
    "key_norm": KeyNormPolicy(),
    "key_diff": KeyDiffPolicy(),
    "leverage": LeveragePolicy(),
    "window": WindowAttentionPolicy(),
    "mean_window": WindowAttentionPolicy(aggregate="mean", observation_window=5, pool=7),
    "recent": RecentAttentionPolicy(),
    "expected": ExpectedAttentionPolicy(future_tokens=40),
    "reconstruction": ReconstructionPolicy(),
    "far": FarAttentionPolicy(),
    "averaged": Averaged((WindowAttentionPolicy(), FarAttentionPolicy(pool=5))),
    "value_aware": ValueAware(KeyNormPolicy(), pool=3),
    "shared": SharedOverHeads(KeyKeyPolicy()),
    "default": DEFAULT_POLICY,
    "beside_windows": DEFAULT_BESIDE_WINDOWS,
    "equal": EqualBudgets(FarAttentionPolicy()),
    "if_read_again": IfReadAgain(ReconstructionPolicy(), otherwise=KeyNormPolicy()),
    "combined": Combined([KeyDiffPolicy(), ValueAware(WindowAttentionPolicy(pool=1))]),
}
# What a token gets does not depend on its place, without pooling and rotary phase.
BLIND_TO_ORDER = [
    KeyNormPolicy(),
    KeyDiffPolicy(pool=1),
    LeveragePolicy(pool=1),
    ReconstructionPolicy(),
    FarAttentionPolicy(pool=1),
    ExpectedAttentionPolicy(pool=1),
    WindowAttentionPolicy(pool=1),
    WindowAttentionPolicy(aggregate="mean", pool=1),
    ValueAware(KeyNormPolicy()),
    SharedOverHeads(KeyNormPolicy(), "mean"),
    Combined([KeyNormPolicy(), LeveragePolicy(pool=1)], "mean"),
]
every = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def make_inputs(  # noqa: PLR0917 - mostly sizes
    tokens: int = 90,
    head_dim: int = 16,
    batch: int = 2,
    heads: int = 2,
    group: int = 3,
    window: int = 32,
    seed: int = 0,
    rotary: bool = True,
    **given: Any,
) -> ScoreInputs:
    generator = torch.Generator().manual_seed(seed)
    if "keys" in given:
        batch, heads, tokens, head_dim = given["keys"].shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    order = torch.arange(tokens)
    fields: dict[str, Any] = {
        "keys": draw(heads, tokens, head_dim) + 2 * torch.randn(head_dim, generator=generator),
        "values": draw(heads, tokens, head_dim),
        "positions": order,
        "protected": (order < 2) | (order >= tokens - 8),
        "layer_idx": 3,
        "queries": draw(heads * group, min(window, tokens), head_dim),
        "reconstruction": torch.rand(batch, heads, tokens, generator=generator),
        "far_attention": torch.rand(batch, heads, tokens, generator=generator),
        "phase": RotaryPhase(1 / 100 ** torch.linspace(0, 1, head_dim // 2)) if rotary else None,
    }
    return ScoreInputs(**(fields | given))


def select(policy: EvictionPolicy, inputs: ScoreInputs, count: int) -> Tensor:
    """Return which tokens stay if every head keeps so many that are not protected."""
    scores = policy.checked_scores(inputs).masked_fill(inputs.protected, -torch.inf)
    counts = torch.full(scores.shape[:2], count, device=scores.device)
    return Scores(scores, (), is_comparable=False).best(counts) | inputs.protected


@every
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"heads": 1, "group": 1},
        {"head_dim": 8},
        {"tokens": 12, "head_dim": 64},
        {"tokens": 1, "window": 1},
        {"batch": 1, "rotary": False},
        {"window": 1},
    ],
    ids=str,
)
def test_one_finite_score_for_each_token_and_head(policy: EvictionPolicy, sizes: dict[str, Any]) -> None:
    inputs = make_inputs(**sizes)
    scores = policy.checked_scores(inputs)
    assert scores.shape == inputs.keys.shape[:3]
    assert scores.isfinite().all()


@every
def test_scores_are_the_same_each_time(policy: EvictionPolicy) -> None:
    assert torch.equal(policy.score(make_inputs()), policy.score(make_inputs()))


@every
def test_changes_nothing_that_it_is_given(policy: EvictionPolicy) -> None:
    inputs, same = make_inputs(), make_inputs()
    policy.score(inputs)
    for name in ("keys", "values", "queries", "reconstruction", "far_attention", "positions", "protected"):
        assert torch.equal(getattr(inputs, name), getattr(same, name))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(policy: EvictionPolicy, dtype: torch.dtype) -> None:
    inputs = make_inputs()
    keys, values, queries = ((20 * x).to(dtype) for x in (inputs.keys, inputs.values, inputs.queries))
    half = replace(inputs, keys=keys, values=values, queries=queries)
    full = replace(inputs, keys=keys.float(), values=values.float(), queries=queries.float())
    scores = policy.score(half)
    assert scores.isfinite().all()
    assert torch.equal(scores, policy.score(full))


@every
@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64)])
def test_the_defaults_of_torch_decide_nothing(policy: EvictionPolicy, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs()
    expected = select(policy, inputs, 11)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            assert torch.equal(select(policy, inputs, 11), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@every
@pytest.mark.parametrize("value", [0.0, 1.0, 3e4])
def test_equal_keys_are_no_special_case(policy: EvictionPolicy, value: float) -> None:
    inputs = make_inputs(keys=torch.full((2, 2, 90, 16), value), values=torch.full((2, 2, 90, 16), value))
    keep = select(policy, inputs, 11)
    assert (keep.sum(-1) == 2 + 8 + 11).all()


@every
def test_rows_do_not_depend_on_each_other(policy: EvictionPolicy) -> None:
    inputs = make_inputs(batch=3)
    scores = policy.score(inputs)
    for row in range(3):
        of_rows = ("keys", "values", "queries", "reconstruction", "far_attention")
        alone = replace(inputs, **{name: getattr(inputs, name)[row : row + 1] for name in of_rows})
        torch.testing.assert_close(policy.score(alone), scores[row : row + 1], rtol=1e-4, atol=1e-6)


@every
def test_heads_choose_for_themselves_unless_they_share(policy: EvictionPolicy) -> None:
    inputs = make_inputs()
    scores = policy.score(inputs)
    other = replace(
        inputs,
        keys=torch.cat([inputs.keys[:, :1].flip(2), inputs.keys[:, 1:]], 1),
        values=torch.cat([inputs.values[:, :1].flip(2), inputs.values[:, 1:]], 1),
        reconstruction=torch.cat([inputs.reconstruction[:, :1].flip(2), inputs.reconstruction[:, 1:]], 1),
        far_attention=torch.cat([inputs.far_attention[:, :1].flip(2), inputs.far_attention[:, 1:]], 1),
    )
    moved = policy.score(other)
    assert not torch.allclose(moved[:, 0], scores[:, 0])
    assert torch.allclose(moved[:, 1], scores[:, 1], rtol=1e-4) != isinstance(policy, SharedOverHeads)


@pytest.mark.parametrize("policy", BLIND_TO_ORDER, ids=lambda policy: type(policy).__name__)
def test_what_stands_where_does_not_matter(policy: EvictionPolicy) -> None:
    """A permutation of the tokens before the window permutes their scores and leaves the others."""
    inputs = make_inputs(rotary=False)
    order = torch.arange(90)
    order[2:58] = 2 + torch.randperm(56)
    moved = replace(
        inputs,
        keys=inputs.keys[:, :, order],
        values=inputs.values[:, :, order],
        reconstruction=inputs.reconstruction[:, :, order],
        far_attention=inputs.far_attention[:, :, order],
    )
    torch.testing.assert_close(policy.score(moved), policy.score(inputs)[:, :, order], rtol=1e-3, atol=1e-6)


class TestScoreInputs:
    def test_unrotated_keys_are_those_before_the_rotation(self) -> None:
        inputs = make_inputs()
        before = torch.randn(2, 2, 90, 16)
        assert inputs.phase is not None
        rotated = replace(inputs, keys=inputs.phase.rotate(before, inputs.positions))
        torch.testing.assert_close(rotated.unrotated_keys, before)
        assert rotated.unrotated_keys is rotated.unrotated_keys

    def test_without_a_phase_they_are_the_keys(self) -> None:
        inputs = make_inputs(rotary=False)
        assert torch.equal(inputs.unrotated_keys, inputs.keys)

    def test_query_heads_that_share_a_key_stand_together(self) -> None:
        inputs = make_inputs()
        assert inputs.queries is not None
        assert inputs.grouped_queries.shape == (2, 2, 3, 32, 16)
        assert torch.equal(inputs.grouped_queries[:, 1, 2], inputs.queries[:, 5])

    def test_there_are_no_groups_of_no_queries(self) -> None:
        with pytest.raises(CacheStateError, match=r"layer 3 was shown no queries; test inputs\.queries"):
            _ = make_inputs(queries=None).grouped_queries


class TestRequirements:
    def test_most_policies_need_nothing(self) -> None:
        for policy in (KeyKeyPolicy(), LeveragePolicy(), ValueAware(KeyNormPolicy())):
            needs = policy.wants_queries, policy.requires_queries, policy.requires_reconstruction
            assert needs == (False, False, False)

    @pytest.mark.parametrize(
        "wrap", [lambda x: x, ValueAware, SharedOverHeads, lambda x: Combined([KeyNormPolicy(), x])]
    )
    def test_what_is_required_and_missing(self, wrap: Any) -> None:
        """Wrapped or not, the policy that misses something is named, and what to do about it."""
        window, reconstruction = wrap(WindowAttentionPolicy()), wrap(ReconstructionPolicy())
        assert window.requires_queries
        assert window.wants_queries
        assert reconstruction.requires_reconstruction
        message = r"WindowAttentionPolicy scores by queries.* layer 3 are not known.*a policy that does without"
        with pytest.raises(CacheStateError, match=message):
            select(window, make_inputs(queries=None), 5)
        message = r"ReconstructionPolicy .*cache\.read_again\(model, input_ids\)"
        with pytest.raises(CacheStateError, match=message):
            select(reconstruction, make_inputs(reconstruction=None), 5)

    def test_stand_ins_are_announced_once(self, caplog: pytest.LogCaptureFixture) -> None:
        _note_stand_ins.cache_clear()
        policy = ExpectedAttentionPolicy()
        assert policy.wants_queries
        assert not policy.requires_queries
        with caplog.at_level(logging.INFO, "nexusquant_cache"):
            select(policy, make_inputs(), 5)
            assert not caplog.records
            for wrapped in (policy, policy, ValueAware(policy)):
                select(wrapped, make_inputs(queries=None), 5)
        assert [record.levelname for record in caplog.records] == ["INFO"]
        assert caplog.messages[0].startswith(
            "ExpectedAttentionPolicy is shown no queries and takes keys in their place"
        )


class TestWindowAttentionPolicy:
    @pytest.mark.parametrize("aggregate", ["max", "mean"])
    @pytest.mark.parametrize("window", [1, 7, 64])
    def test_is_the_attention_of_the_last_queries(self, aggregate: Any, window: int) -> None:
        """By a loop over queries, each of which sees what comes before it."""
        inputs = make_inputs(tokens=30, window=10)
        assert inputs.queries is not None
        count = min(window, 10)
        weights = torch.zeros(2, 2, 3, count, 30)
        for row, head, at in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(count)).tolist():
            place = 30 - count + at
            keys = inputs.keys[row, head // 3, : place + 1]
            logits = keys @ inputs.queries[row, head, 10 - count + at] / 4
            weights[row, head // 3, head % 3, at, : place + 1] = logits.softmax(0)
        expected = (weights.amax(3) if aggregate == "max" else weights.mean(3)).amax(2)
        found = WindowAttentionPolicy(window, aggregate, pool=1).score(inputs)
        torch.testing.assert_close(found, expected)

    def test_a_span_stays_together(self) -> None:
        inputs = make_inputs(tokens=200, head_dim=64, batch=1)
        assert inputs.queries is not None
        keys, queries = 0.1 * inputs.keys, inputs.queries
        keys[:, :, [100, 104, 108]] += queries[:, ::3, -1:]  # asked for by the last query of one head
        keep = select(WindowAttentionPolicy(), replace(inputs, keys=keys), 29)
        assert keep[..., 90:119].all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"observation_window": 0}, "observation_window must be at least 1"),
            ({"pool": 4}, "pool must be an odd number"),
            ({"aggregate": "maximum"}, "unknown aggregate='maximum'. Did you mean 'max'"),
        ],
    )
    @pytest.mark.usefixtures("unchecked")
    def test_refuses_other_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            WindowAttentionPolicy(**options)


class TestRecentAttentionPolicy:
    def test_is_the_mean_over_the_last_queries(self) -> None:
        inputs = make_inputs()
        expected = WindowAttentionPolicy(64, "mean").score(inputs)
        assert torch.equal(RecentAttentionPolicy().score(inputs), expected)

    def test_or_over_the_last_keys(self) -> None:
        inputs = make_inputs(queries=None)
        policy = RecentAttentionPolicy(observation_window=32, pool=7)
        torch.testing.assert_close(policy.score(inputs), MeanKeyKeyPolicy().score(inputs))
        most = RecentAttentionPolicy(observation_window=32, aggregate="max")
        torch.testing.assert_close(most.score(inputs), KeyKeyPolicy().score(inputs))

    def test_wants_queries_and_does_not_require_them(self) -> None:
        policy = RecentAttentionPolicy()
        assert (policy.wants_queries, policy.requires_queries) == (True, False)
        assert (DEFAULT_POLICY.wants_queries, DEFAULT_POLICY.requires_queries) == (True, False)


class TestValueAware:
    def test_is_score_times_the_sum_of_magnitudes(self) -> None:
        inputs = make_inputs()
        plain = ReconstructionPolicy().score(inputs)
        expected = plain * inputs.values.abs().sum(-1)
        torch.testing.assert_close(ValueAware(ReconstructionPolicy()).score(inputs), expected)
        pooled = ValueAware(ReconstructionPolicy(), pool=5).score(inputs)
        torch.testing.assert_close(pooled, F.max_pool1d(expected, 5, stride=1, padding=2))

    def test_scores_below_zero_are_shifted(self) -> None:
        """Or a larger value would make a negative score smaller."""
        keys = torch.tensor([3.0, 1.0, 2.0])[None, None, :, None].expand(1, 1, 3, 8)
        values = torch.tensor([9.0, 1.0, 4.0])[None, None, :, None].expand(1, 1, 3, 8)
        inputs = make_inputs(keys=keys, values=values, protected=torch.zeros(3, dtype=torch.bool))
        scores = ValueAware(KeyNormPolicy()).score(inputs)
        torch.testing.assert_close(scores[0, 0], torch.tensor([0.0, 2.0, 1.0]) * 8**0.5 * torch.tensor([9.0, 1, 4]) * 8)

    def test_scores_of_protected_tokens_do_not_shift(self) -> None:
        inputs = make_inputs()
        scores = ReconstructionPolicy().score(inputs)
        odd = scores.clone()
        odd[..., 0], odd[..., -1] = -torch.inf, -1e9
        found = ValueAware(ReconstructionPolicy()).score(replace(inputs, reconstruction=odd))
        torch.testing.assert_close(found[..., 1:-1], (scores * inputs.values.abs().sum(-1))[..., 1:-1])

    def test_all_tokens_may_be_protected(self) -> None:
        inputs = make_inputs(protected=torch.ones(90, dtype=torch.bool))
        assert ValueAware(KeyNormPolicy()).score(inputs).isfinite().all()


class TestExpectedAttentionPolicy:
    def test_is_the_expectation_over_gaussian_queries(self) -> None:
        """Many queries drawn from the distribution pay, on average, what the policy says."""
        inputs = make_inputs(tokens=20, batch=1, heads=1, group=1, rotary=False, window=20)
        assert inputs.queries is not None
        mean, centred = inputs.queries.mean(2)[0, 0], inputs.queries[0, 0] - inputs.queries.mean(2)[0, 0]
        draws = mean + torch.randn(400_000, 20) @ centred / 20**0.5
        weights = (draws @ inputs.keys[0, 0, 2:].T / 4).exp().mean(0)
        found = ExpectedAttentionPolicy(pool=1).score(inputs)[0, 0]
        assert (found[:2] == 0).all()  # sinks
        torch.testing.assert_close(found[2:], weights / weights.sum(), rtol=0.1, atol=2e-3)

    def test_turns_queries_by_the_mean_of_the_next_phases(self) -> None:
        inputs = make_inputs(head_dim=8)
        assert inputs.phase is not None
        vectors = torch.randn(1, 1, 5, 8)
        expected = sum(inputs.phase.rotate(vectors, torch.full((5,), 90 + step)) for step in range(7)) / 7
        torch.testing.assert_close(vectors @ _mean_turn(inputs, 7), expected)

    def test_takes_the_phase_off_the_queries(self) -> None:
        """The same queries at other positions say the same."""
        inputs = make_inputs(tokens=90)
        assert inputs.phase is not None
        assert inputs.queries is not None
        rotated = [
            inputs.phase.rotate(x, inputs.positions[-x.shape[2] :] + shift)
            for shift in (0, 1000)
            for x in (inputs.keys, inputs.queries)
        ]
        near = replace(inputs, keys=rotated[0], queries=rotated[1])
        far = replace(inputs, keys=rotated[2], queries=rotated[3], positions=inputs.positions + 1000)
        policy = ExpectedAttentionPolicy(future_tokens=30)
        torch.testing.assert_close(policy.score(near), policy.score(far), rtol=1e-3, atol=1e-5)

    def test_keys_stand_in_for_queries(self) -> None:
        """A constant in all keys says nothing, then; keys along the widest direction get most."""
        keys = torch.randn(1, 1, 90, 8) * torch.tensor([4.0, *[1.0] * 7])
        inputs = make_inputs(keys=keys, queries=None, rotary=False)
        policy = ExpectedAttentionPolicy(pool=1)
        scores = policy.score(inputs)
        torch.testing.assert_close(policy.score(replace(inputs, keys=keys + 5)), scores, rtol=1e-3, atol=1e-6)
        best = scores[0, 0, 2:].topk(5).indices + 2
        assert (keys[0, 0, best, 0].abs() > keys[0, 0, :, 0].abs().median()).all()

    def test_refuses_no_future(self) -> None:
        with pytest.raises(OptionError, match="future_tokens must be at least 1, got 0"):
            ExpectedAttentionPolicy(future_tokens=0)


class TestLeveragePolicy:
    def test_is_the_ridge_leverage_of_centred_keys(self) -> None:
        inputs = make_inputs()
        found = LeveragePolicy(ridge=0.1, pool=1).score(inputs)
        keys = inputs.unrotated_keys.double()
        keys = keys - keys[:, :, 2:].mean(2, keepdim=True)
        covariance = keys[:, :, 2:].mT @ keys[:, :, 2:] / 88
        ridge = 0.1 * covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(16)
        expected = torch.einsum("bhnd,bhde,bhne->bhn", keys, (covariance + ridge.double()).inverse(), keys)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("scale", [1e-12, 1e12])
    def test_the_scale_of_keys_does_not_matter(self, scale: float) -> None:
        inputs = make_inputs()
        found = LeveragePolicy().score(replace(inputs, keys=inputs.keys * scale))
        torch.testing.assert_close(found, LeveragePolicy().score(inputs), rtol=1e-3, atol=1e-4)

    def test_keeps_the_key_that_no_other_resembles(self) -> None:
        keys = torch.randn(1, 2, 90, 16)
        keys[..., 15] *= 0.01
        keys[:, :, 40, 15] = 1
        keep = select(LeveragePolicy(pool=1), make_inputs(keys=keys, rotary=False), 1)
        assert keep[..., 40].all()

    @pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
    def test_refuses_no_ridge(self, ridge: float) -> None:
        with pytest.raises(OptionError, match="ridge must be positive"):
            LeveragePolicy(ridge=ridge)


def test_key_diff_by_hand() -> None:
    """Three keys one way and one across: the mean direction is (3, 1) / 4."""
    keys = torch.tensor([[5.0, 0], [1, 0], [2, 0], [0, 9]])
    inputs = make_inputs(keys=F.pad(keys, (0, 6))[None, None])
    expected = -torch.tensor([3.0, 3, 3, 1]) / 10**0.5
    torch.testing.assert_close(KeyDiffPolicy(pool=1).score(inputs)[0, 0], expected)


def test_reconstruction_is_what_it_is_given() -> None:
    inputs = make_inputs()
    assert inputs.reconstruction is not None
    assert torch.equal(ReconstructionPolicy().score(inputs), inputs.reconstruction)
    pooled = F.max_pool1d(inputs.reconstruction, 9, stride=1, padding=4)
    assert torch.equal(ReconstructionPolicy(pool=9).score(inputs), pooled)


@dataclass(frozen=True)
class Given(EvictionPolicy):
    """Returns these scores."""

    scores: Tensor

    def score(self, inputs: ScoreInputs) -> Tensor:
        del inputs
        return self.scores


def given_inputs(tokens: int) -> ScoreInputs:
    return make_inputs(tokens=tokens, batch=1, heads=2, protected=torch.zeros(tokens, dtype=torch.bool))


class TestRanks:
    def test_equal_scores_have_equal_ranks(self) -> None:
        scores = torch.tensor([[[5.0, 1, 5, 3], [0, 0, 0, 0]]])
        ranks = _ranks(Given(scores), given_inputs(4), _less)
        assert ranks.tolist() == [[[0.5, 0, 0.5, 0.25], [0, 0, 0, 0]]]

    def test_protected_tokens_have_none(self) -> None:
        scores = torch.tensor([[[float("nan"), 1, 5, 3], [float("inf"), 7, 1, 1]]])
        inputs = replace(given_inputs(4), protected=torch.tensor([True, False, False, False]))
        ranks = _ranks(Given(scores), inputs, _less)
        torch.testing.assert_close(ranks, torch.tensor([[[0, 0, 2, 1], [0, 2, 0, 0]]]) / 3)

    def test_all_may_be_protected(self) -> None:
        inputs = replace(given_inputs(4), protected=torch.ones(4, dtype=torch.bool))
        assert (_ranks(Given(torch.randn(1, 2, 4)), inputs, _less) == 0).all()

    @pytest.mark.parametrize("wrap", [ValueAware, SharedOverHeads, lambda x: Combined([x])])
    def test_bad_scores_do_not_hide_behind_ranks(self, wrap: Any) -> None:
        scores = torch.zeros(1, 2, 4)
        scores[0, 1, 2] = float("nan")
        with pytest.raises(NonFiniteError, match=r"Given\.score returned NaN or infinity in layer 3"):
            select(wrap(Given(scores)), given_inputs(4), 2)
        with pytest.raises(ShapeError, match=r"Given\.score must return .* = \(1, 2, 4\), got shape \(1, 2, 3\)"):
            select(wrap(Given(torch.zeros(1, 2, 3))), given_inputs(4), 2)


class TestSharedOverHeads:
    scores = torch.tensor([[[9.0, 8, 7, 0, 1], [0, 1, 7, 8, 90]]])

    def test_what_one_head_needs_all_keep(self) -> None:
        keep = select(SharedOverHeads(Given(self.scores)), given_inputs(5), 2)
        assert keep.tolist() == [[[True, False, False, False, True]] * 2]

    def test_or_what_they_agree_on(self) -> None:
        policy = SharedOverHeads(Given(self.scores), aggregate="mean")
        torch.testing.assert_close(policy.score(given_inputs(5))[0, 1], torch.tensor([0.4, 0.4, 0.4, 0.3, 0.5]))

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_other_ways(self) -> None:
        with pytest.raises(OptionError, match="unknown aggregate='sum'"):
            SharedOverHeads(KeyNormPolicy(), aggregate="sum")


class TestCombined:
    first = torch.tensor([[[9.0, 8, 7, 0], [1, 2, 3, 4]]])
    second = torch.tensor([[[0.0, 0, 0, 1e-9], [1, 2, 3, 4]]])

    def test_keeps_what_either_ranks_high(self) -> None:
        """However small the scores of one of them are."""
        keep = select(Combined([Given(self.first), Given(self.second)]), given_inputs(4), 2)
        assert keep.tolist() == [[[True, False, False, True], [False, False, True, True]]]

    def test_shares_are_parts_of_the_places(self) -> None:
        """Three of four places for the first, whose favourites the other ranks last."""
        order = torch.arange(80.0).expand(1, 2, 80)
        inputs = make_inputs(tokens=80, batch=1, protected=torch.zeros(80, dtype=torch.bool))
        keep = select(Combined([Given(order), Given(-order)], shares=(3.0, 1.0)), inputs, 20)
        for head in keep[0]:
            assert head.nonzero()[:, 0].tolist() == [*range(5), *range(65, 80)]

    def test_shares_are_weights_of_a_mean(self) -> None:
        policy = Combined([Given(self.first), Given(self.second)], "mean", (3.0, 1.0))
        expected = torch.tensor([[[9.0, 6, 3, 3], [0, 4, 8, 12]]]) / 16
        torch.testing.assert_close(policy.score(given_inputs(4)), expected)

    @pytest.mark.parametrize("shares", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, 1.0, 1.0), ()])
    def test_refuses_other_shares(self, shares: tuple[float, ...]) -> None:
        with pytest.raises(OptionError, match="shares must be one positive number for each of 2 policies"):
            Combined([KeyNormPolicy(), KeyDiffPolicy()], shares=shares)

    def test_equal_scores_fill_a_share_too(self) -> None:
        """Pooling makes whole stretches equal: none may be too wide for the places that are left to it."""
        plateau = torch.zeros(1, 2, 20)
        plateau[..., 5:15] = 1
        other = -torch.arange(20.0).expand(1, 2, 20)
        policy = Combined([Given(other), Given(plateau)], shares=(0.6, 0.4))
        assert select(policy, given_inputs(20), 10)[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 11, 12, 13, 14]

    def test_or_what_both_do(self) -> None:
        policy = Combined([Given(self.first), Given(self.second)], "mean")
        expected = torch.tensor([[[3.0, 2, 1, 3], [0, 2, 4, 6]]]) / 8
        torch.testing.assert_close(policy.score(given_inputs(4)), expected)

    @pytest.mark.usefixtures("unchecked")
    def test_refuses_nothing_to_combine(self) -> None:
        with pytest.raises(OptionError, match="Combined needs at least one policy"):
            Combined([])
        with pytest.raises(OptionError, match="unknown aggregate='min'"):
            Combined([KeyNormPolicy()], aggregate="min")


class TestAveraged:
    @property
    def parts(self) -> tuple[EvictionPolicy, EvictionPolicy]:
        scores = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([8.0, 4.0, 0.0, 0.0])
        first, second = (Given(x.expand(1, 2, 4)) for x in scores)
        return first, second

    def test_is_the_mean(self) -> None:
        found = Averaged(self.parts).score(given_inputs(4))
        assert found[0, 0].tolist() == [4.5, 3.0, 1.5, 2.0]

    def test_weights_count(self) -> None:
        found = Averaged(self.parts, weights=(3.0, 1.0)).score(given_inputs(4))
        assert found[0, 0].tolist() == [2.75, 2.5, 2.25, 3.0]

    @pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, float("inf")), (1.0, float("nan"))])
    def test_refuses_other_weights(self, weights: tuple[float, ...]) -> None:
        with pytest.raises(OptionError, match="one positive number for each of 2 policies"):
            Averaged((KeyNormPolicy(), KeyNormPolicy()), weights=weights)

    def test_refuses_nothing(self) -> None:
        with pytest.raises(OptionError, match="at least one policy"):
            Averaged(())


class TestIfReadAgain:
    def test_is_one_or_the_other(self) -> None:
        inputs, once = make_inputs(), KeyNormPolicy()
        policy = IfReadAgain(ReconstructionPolicy(), otherwise=once)
        assert torch.equal(policy.score(inputs), ReconstructionPolicy().score(inputs))
        assert torch.equal(policy.score(replace(inputs, reconstruction=None)), once.score(inputs))

    def test_needs_a_second_reading_only_if_both_do(self) -> None:
        again, once = ReconstructionPolicy(), KeyNormPolicy()
        assert not IfReadAgain(again, otherwise=once).requires_reconstruction
        assert IfReadAgain(once, otherwise=again).requires_reconstruction
        assert IfReadAgain(once, otherwise=once).wants_reconstruction
        assert Combined([once, again]).wants_reconstruction
        assert not Combined([once, FarAttentionPolicy()]).wants_reconstruction
        assert IfReadAgain(again, otherwise=FarAttentionPolicy()).scores_are_comparable
        assert not IfReadAgain(again, otherwise=once).scores_are_comparable
        assert DEFAULT_POLICY.scores_are_comparable
        assert not DEFAULT_POLICY.requires_reconstruction


def test_parts_of_attention_can_be_compared_and_nothing_else() -> None:
    window, far = WindowAttentionPolicy(), FarAttentionPolicy()
    parts = [window, far, RecentAttentionPolicy(), ReconstructionPolicy(), ValueAware(window), Averaged((window, far))]
    others = [
        KeyNormPolicy(),
        LeveragePolicy(),
        ValueAware(KeyNormPolicy()),
        SharedOverHeads(window),
        Combined([far]),
        EqualBudgets(far),
    ]
    assert all(policy.scores_are_comparable for policy in parts)
    assert not any(policy.scores_are_comparable for policy in [*others, Averaged((window, KeyNormPolicy()))])


def test_far_attention_is_what_it_is_given() -> None:
    inputs = make_inputs()
    assert torch.equal(FarAttentionPolicy(pool=1).score(inputs), inputs.far_attention)
    without = replace(inputs, far_attention=None)
    window = RecentAttentionPolicy(observation_window=64, aggregate="max")
    assert torch.equal(FarAttentionPolicy().score(without), window.score(without))


def test_a_wider_window_is_shown_more_queries() -> None:
    wide, narrow = WindowAttentionPolicy(observation_window=100), WindowAttentionPolicy(observation_window=3)
    assert (wide.most_queries, narrow.most_queries, KeyNormPolicy().most_queries) == (100, 64, 64)
    of_others = [Averaged((narrow, wide)), ValueAware(wide), EqualBudgets(wide), IfReadAgain(narrow, otherwise=wide)]
    assert [policy.most_queries for policy in of_others] == [100] * 4
    assert DEFAULT_BESIDE_WINDOWS.most_queries == 256


class TestDefaultPolicy:
    def test_serves_every_layer_of_a_cache_that_is_given_none(self) -> None:
        assert NexusQuantCache().make_policy(0) is DEFAULT_POLICY
        assert NexusQuantCache().make_policy(7) is DEFAULT_POLICY

    def test_tells_models_with_sliding_windows_from_others(self) -> None:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        mixed = Gemma3TextConfig(num_hidden_layers=3, layer_types=kinds)
        assert NexusQuantCache(config=mixed).make_policy(1) is DEFAULT_BESIDE_WINDOWS
        assert NexusQuantCache(config=LlamaConfig(num_hidden_layers=3)).make_policy(1) is DEFAULT_POLICY
        # All layers without a config are full ones.
        assert not DEFAULT_BESIDE_WINDOWS.scores_are_comparable
        assert DEFAULT_BESIDE_WINDOWS.wants_far_attention
        assert not DEFAULT_BESIDE_WINDOWS.requires_reconstruction

    def test_beside_windows_an_answer_of_many_tokens_stays_whole(self) -> None:
        """The end of a prompt looks at the first one; each of the others is looked for when one more has been said."""
        inputs = make_inputs(tokens=1200, batch=1, reconstruction=None)
        assert inputs.queries is not None
        assert inputs.far_attention is not None
        inputs.keys[:, :, 200] *= 4
        inputs.queries[:, :, -1] = 20 * inputs.keys[:, :1, 200]
        inputs.far_attention[..., 200:207] = 0
        kept = len(inputs.free) // 5
        last = DEFAULT_BESIDE_WINDOWS.score(inputs)[0, 0, inputs.free].sort().values[-kept]
        assert bool((DEFAULT_BESIDE_WINDOWS.score(inputs)[0, 0, 200:207] >= last).all())

        # Four of five places are still for single tokens.
        end = RecentAttentionPolicy(observation_window=256, aggregate="max", pool=1).score(inputs)
        single = (end + 0.3 * inputs.far_attention)[0, 0, inputs.free]
        best = inputs.free[single.argsort(descending=True)[: int(0.75 * kept)]]
        assert bool((DEFAULT_BESIDE_WINDOWS.score(inputs)[0, 0, best] >= last).all())
        assert not bool((single[198:205] >= single.sort().values[-kept]).all())  # two sinks come before the free ones

    def test_not_one_that_is_given_another(self) -> None:
        policy = KeyNormPolicy()
        assert NexusQuantCache(policy=policy).make_policy(0) is policy


@pytest.mark.parametrize("shares", [(1.0, float("nan")), (float("inf"), 1.0)])
def test_combined_refuses_shares_that_are_no_numbers(shares: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="shares must be one positive number for each of 2 policies"):
        Combined([KeyNormPolicy(), KeyDiffPolicy()], shares=shares)
