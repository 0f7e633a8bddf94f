"""What every policy gets from the base class, and which tokens the built-in ones keep."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nexusquant_cache.errors import NonFiniteError, OptionError, ShapeError
from nexusquant_cache.layer.selection import Scores
from nexusquant_cache.policy import EvictionPolicy, KeyKeyPolicy, KeyNormPolicy, MeanKeyKeyPolicy, ScoreInputs
from nexusquant_cache.policy.keys import key_attention


@dataclass(frozen=True)
class Fixed(EvictionPolicy):
    """Returns the scores it is given."""

    scores: Tensor

    def score(self, inputs: ScoreInputs) -> Tensor:
        del inputs
        return self.scores


def inputs_of(keys: Tensor, protected: Tensor | None = None, sinks: int = 0, recent: int = 0) -> ScoreInputs:
    tokens = keys.shape[2]
    order = torch.arange(tokens)
    if protected is None:
        protected = (order < sinks) | (order >= tokens - recent)
    return ScoreInputs(keys=keys, values=keys, positions=order, protected=protected, layer_idx=3)


def inputs_for(scores: Tensor, protected: Tensor | None = None, sinks: int = 0, recent: int = 0) -> ScoreInputs:
    return inputs_of(torch.zeros(*scores.shape, 8), protected, sinks, recent)


def kept_by(policy: EvictionPolicy, inputs: ScoreInputs, count: int) -> Tensor:
    """Return which tokens stay if each head keeps so many that are not protected."""
    scores = policy.checked_scores(inputs).double().masked_fill(inputs.protected, -torch.inf)
    counts = torch.full(scores.shape[:2], min(count, int((~inputs.protected).sum())))
    return Scores(scores, (), is_comparable=False).best(counts) | inputs.protected


@st.composite
def scored(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Draw scores ``[b, h, n]`` with many ties, protected tokens, and how many others to keep."""
    batch, heads, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    scores = torch.randint(-levels, levels + 1, (batch, heads, tokens), generator=generator).float()
    protected = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    return scores, protected, draw(st.integers(0, tokens + 1))


def best_by_sorting(scores: list[float], protected: list[bool], count: int) -> list[bool]:
    """Return the choice by the text: protected ones and the best others, earlier ones first."""
    others = sorted((-score, i) for i, (score, safe) in enumerate(zip(scores, protected, strict=True)) if not safe)
    chosen = {i for _, i in others[:count]}
    return [safe or i in chosen for i, safe in enumerate(protected)]


@given(scored())
def test_keeps_protected_tokens_and_the_best_others(case: tuple[Tensor, Tensor, int]) -> None:
    """Protected ones and the count best others of each head; ties go to the earlier token."""
    scores, protected, count = case
    keep = kept_by(Fixed(scores), inputs_for(scores, protected), count)
    for b, h in torch.cartesian_prod(torch.arange(scores.shape[0]), torch.arange(scores.shape[1])).tolist():
        assert keep[b, h].tolist() == best_by_sorting(scores[b, h].tolist(), protected.tolist(), count)


@given(scored())
def test_kept_count_is_exact_and_equal_in_all_heads(case: tuple[Tensor, Tensor, int]) -> None:
    """#kept = #protected + min(count, #others) in every head, and the protected tokens are among them."""
    scores, protected, count = case
    keep = kept_by(Fixed(scores), inputs_for(scores, protected), count)
    others = int((~protected).sum())
    assert (keep.sum(-1) == len(protected) - others + min(count, others)).all()
    assert keep[..., protected].all()


@given(scored())
def test_a_larger_budget_keeps_more_of_the_same(case: tuple[Tensor, Tensor, int]) -> None:
    """kept(count) is a subset of kept(count + 1)."""
    scores, protected, count = case
    policy, inputs = Fixed(scores), inputs_for(scores, protected)
    assert (kept_by(policy, inputs, count) <= kept_by(policy, inputs, count + 1)).all()


def test_scoring_changes_nothing_that_it_is_given() -> None:
    scores = torch.randn(1, 2, 12)
    inputs = inputs_for(scores, sinks=1)
    protected = inputs.protected.clone()
    kept_by(Fixed(scores), inputs, 3)
    assert torch.equal(inputs.protected, protected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_may_have_any_floating_dtype(dtype: torch.dtype) -> None:
    scores = torch.tensor([[[1.0, 3.0, 2.0, 3.0]]])
    keep = kept_by(Fixed(scores.to(dtype)), inputs_for(scores), 2)
    assert keep.tolist() == [[[False, True, False, True]]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_scores_that_are_not_finite(bad: float) -> None:
    scores = torch.zeros(1, 2, 8)
    scores[0, 1, 5] = bad
    with pytest.raises(NonFiniteError, match=r"Fixed\.score returned NaN or infinity in layer 3"):
        kept_by(Fixed(scores), inputs_for(scores), 4)


def test_scores_of_protected_tokens_are_ignored() -> None:
    scores = torch.zeros(1, 1, 8)
    scores[..., 0], scores[..., -1] = float("nan"), float("inf")
    keep = kept_by(Fixed(scores), inputs_for(scores, sinks=1, recent=1), 2)
    assert keep[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 7]


@pytest.mark.parametrize("shape", [(1, 2, 7), (1, 1, 8), (1, 2, 8, 1), (8,)])
def test_refuses_scores_of_another_shape(shape: tuple[int, ...]) -> None:
    inputs = inputs_for(torch.zeros(1, 2, 8))
    with pytest.raises(ShapeError, match=r"Fixed\.score must return .* = \(1, 2, 8\), got shape"):
        kept_by(Fixed(torch.zeros(shape)), inputs, 4)


def test_a_policy_must_score() -> None:
    with pytest.raises(TypeError, match="score"):
        EvictionPolicy()


@pytest.mark.parametrize(
    ("protected", "sinks"), [([1, 1, 0, 0, 1], 2), ([0, 1, 1], 0), ([0, 0], 0), ([1, 1, 1], 0), ([1, 0, 1, 0], 1)]
)
def test_sinks_are_the_protected_tokens_at_the_beginning(protected: list[int], sinks: int) -> None:
    """All tokens are not sinks: a mean without sinks would be one of nothing."""
    inputs = inputs_of(torch.zeros(1, 1, len(protected), 8), torch.tensor(protected, dtype=torch.bool))
    assert inputs.sink_tokens == sinks


class TestKeyNormPolicy:
    def test_keeps_small_keys(self) -> None:
        keys = torch.ones(1, 2, 6, 8) * torch.tensor([[5.0, 1, 4, 2, 6, 3], [1, 2, 3, 4, 5, 6]])[None, :, :, None]
        keep = kept_by(KeyNormPolicy(), inputs_of(keys), 2)
        assert [head.nonzero()[:, 0].tolist() for head in keep[0]] == [[1, 3], [0, 1]]

    def test_half_precision_norms_do_not_overflow(self) -> None:
        scores = KeyNormPolicy().score(inputs_of(torch.full((1, 1, 3, 64), 30000.0, dtype=torch.float16)))
        assert scores.isfinite().all()


def planted(tokens: int = 400, window: int = 32, seed: int = 0) -> tuple[Tensor, list[int]]:
    """Return keys of which the last ones ask for three tokens of a span of nine, and the span.

    The six tokens between them are like any other: a fact whose name attracts attention and whose digits do not.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 2, tokens, 64, generator=generator)
    asked = torch.randn(1, 2, 1, 64, generator=generator)
    keys[:, :, -window:] = 0.2 * keys[:, :, -window:] + 2 * asked
    span = list(range(150, 159))
    keys[:, :, span[::4]] += 2 * asked
    return keys, span


class TestKeyKeyPolicy:
    @pytest.mark.parametrize("seed", range(3))
    def test_a_planted_span_stays_together(self, seed) -> None:
        """Three strong tokens reach 10 tokens far: with 29 = 9 + 20 tokens to keep, all of the span is."""
        keys, span = planted(seed=seed)
        keep = kept_by(KeyKeyPolicy(), inputs_of(keys, sinks=4, recent=64), 29)
        assert keep[..., span].all()
        assert keep[..., 140:169].all()

    @pytest.mark.parametrize("seed", range(3))
    def test_without_pooling_the_span_is_split(self, seed) -> None:
        """The same budget, token by token: the strong ones are kept and others between them are not."""
        keys, span = planted(seed=seed)
        for policy in (MeanKeyKeyPolicy(pool=1), KeyKeyPolicy(pool=1)):
            kept = kept_by(policy, inputs_of(keys, sinks=4, recent=64), 29)[..., span]
            assert kept[..., ::4].all()
            assert not kept.all(-1).any()

    def test_the_maximum_keeps_what_a_single_key_asks_for(self) -> None:
        """One key of the window asks for token 50 alone, all others for tokens 100-109 together."""
        keys = 0.1 * torch.randn(1, 1, 200, 64)
        rare, common = torch.eye(64)[:2]
        keys[:, :, 50] += 24 * rare
        keys[:, :, 100:110] += 16 * common
        keys[:, :, -32:] += 3 * common
        keys[:, :, -7] += 3 * rare - 3 * common
        inputs = inputs_of(keys, recent=32)
        assert kept_by(KeyKeyPolicy(pool=1), inputs, 10)[0, 0, 50]
        assert kept_by(MeanKeyKeyPolicy(pool=1), inputs, 10)[0, 0, 100:110].all()

    def test_scores_are_attention_weights(self) -> None:
        """By hand: two tokens per axis, one query; the common part of the keys does not count."""
        keys = torch.tensor([[[[2.0, 0], [-2, 0], [0, 2], [0, -2], [2, 0], [-2, 0]]]])
        keys = torch.nn.functional.pad(keys, (0, 6))
        for offset in (0.0, 50.0):
            scores = KeyKeyPolicy(observation_window=1, pool=1).score(inputs_of(keys + offset))
            logits = torch.tensor([-4.0, 4, 0, 0, -4, 4]) * 8**-0.5
            torch.testing.assert_close(scores[0, 0], logits.softmax(0), rtol=1e-4, atol=1e-6)

    def test_sinks_do_not_move_the_centre(self) -> None:
        keys, _ = planted()
        moved = keys.clone()
        moved[:, :, :4] += 3
        chosen = [key_attention(inputs_of(k, sinks=4, recent=32), 32)[..., 4:] for k in (keys, moved)]
        normed = [a / a.sum(-1, keepdim=True) for a in chosen]  # the sinks still take part in the softmax
        torch.testing.assert_close(*normed, rtol=1e-3, atol=1e-9)

    def test_each_head_chooses_for_itself(self) -> None:
        keys, _ = planted()
        inputs = inputs_of(keys, sinks=4, recent=32)
        both = KeyKeyPolicy().score(inputs)
        alone = KeyKeyPolicy().score(inputs_of(keys[:, 1:], sinks=4, recent=32))
        torch.testing.assert_close(both[:, 1:], alone)

    @pytest.mark.parametrize("policy", [KeyKeyPolicy(), MeanKeyKeyPolicy(), KeyNormPolicy()])
    @pytest.mark.parametrize("tokens", [1, 5, 31, 33])
    def test_short_prompts(self, policy, tokens) -> None:
        """Fewer tokens than the window or the pool are no special case."""
        scores = policy.score(inputs_of(torch.randn(2, 2, tokens, 16)))
        assert scores.shape == (2, 2, tokens)
        assert scores.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_float32(self, dtype) -> None:
        keys = (50 * torch.randn(1, 1, 60, 128)).to(dtype)
        assert torch.equal(KeyKeyPolicy().score(inputs_of(keys)), KeyKeyPolicy().score(inputs_of(keys.float())))

    @pytest.mark.parametrize("window", [0, -1])
    def test_refuses_an_empty_window(self, window) -> None:
        with pytest.raises(OptionError, match=f"observation_window must be at least 1 token, got {window}"):
            KeyKeyPolicy(observation_window=window)

    @pytest.mark.parametrize("pool", [0, 2, -3, 20])
    def test_refuses_an_even_width(self, pool) -> None:
        with pytest.raises(OptionError, match=f"pool must be an odd number of tokens, at least 1, got {pool}"):
            MeanKeyKeyPolicy(pool=pool)
