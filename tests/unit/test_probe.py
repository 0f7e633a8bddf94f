"""What coding does to attention, in examples computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from nexusquant_cache.layer.probe import attention_error, stand_in_queries


def pair(keys: list[list[float]], values: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return keys and values of one head."""
    return torch.tensor(keys)[None, None], torch.tensor(values)[None, None]


def random_pair(heads: int = 2, tokens: int = 40) -> tuple[Tensor, Tensor]:
    return torch.randn(2, heads, tokens, 8), torch.randn(2, heads, tokens, 16)


class TestStandInQueries:
    def test_are_the_newest_keys_without_the_mean_of_the_others(self) -> None:
        newest = torch.arange(20.0).view(1, 1, 20, 1).expand(1, 1, 20, 8)
        queries = stand_in_queries(newest, torch.tensor([1.0, 6.0]).view(1, 1, 2, 1).expand(1, 1, 2, 8))
        assert queries.shape == (1, 1, 16, 8)
        assert queries[0, 0, :, 0].tolist() == [token - 3.5 for token in range(4, 20)]

    def test_are_fewer_in_a_short_tail(self) -> None:
        newest, keys = (torch.randn(2, 3, tokens, 8, dtype=torch.bfloat16) for tokens in (5, 30))
        queries = stand_in_queries(newest, keys)
        assert queries.shape == (2, 3, 5, 8)
        assert queries.dtype == torch.float32


class TestAttentionError:
    def test_exact_is_zero(self) -> None:
        exact = random_pair()
        assert attention_error(torch.randn(2, 4, 3, 8), exact, exact) == 0

    def test_zeros_are_one(self) -> None:
        exact = random_pair()
        zeros = (exact[0], torch.zeros_like(exact[1]))
        assert attention_error(torch.randn(2, 4, 3, 8), exact, zeros) == pytest.approx(1, abs=1e-6)

    def test_by_hand(self) -> None:
        # Logits of the exact keys are log 3 and 0: weights 3/4 and 1/4, output (3, 1).  Coded keys are alike: (2, 2).
        # The distance is sqrt 2, the length sqrt 10.
        query = torch.tensor([[[[math.log(3) * math.sqrt(2), 0.0]]]])
        values = [[4.0, 0.0], [0.0, 4.0]]
        exact, coded = pair([[1.0, 0.0], [0.0, 0.0]], values), pair([[0.0, 0.0], [0.0, 0.0]], values)
        assert attention_error(query, exact, coded) == pytest.approx(math.sqrt(2 / 10), rel=1e-5)

    def test_half_the_values_is_half_the_output(self) -> None:
        keys, values = random_pair()
        assert attention_error(torch.randn(2, 2, 3, 8), (keys, values), (keys, values / 2)) == pytest.approx(0.5)

    def test_the_worst_head_of_the_worst_row_counts(self) -> None:
        keys, values = random_pair(heads=3)
        wrong = values.clone()
        wrong[0, 0] *= 0.9
        wrong[1, 2] *= 0.6
        assert attention_error(torch.randn(2, 3, 5, 8), (keys, values), (keys, wrong)) == pytest.approx(0.4, rel=1e-5)

    def test_query_heads_read_the_keys_of_their_group(self) -> None:
        """Query head i reads KV head i // 2: here each finds its key among those of its own head alone."""
        keys, values = torch.eye(4).view(1, 2, 2, 4) * 100, torch.ones(1, 2, 2, 4)
        values[:, :, 0] = -1
        queries = torch.eye(4)[None, :, None]  # heads 0 and 1 look for the tokens of KV head 0
        moved = keys.clone()
        moved[:, 1] = moved[:, 1].flip(1)  # KV head 1 finds the wrong one of -1 and 1
        assert attention_error(queries[:, :2].repeat(1, 2, 1, 1), (keys, values), (moved, values)) == 0
        assert attention_error(queries, (keys, values), (moved, values)) == pytest.approx(2)

    def test_of_many_queries_the_last_16_count(self) -> None:
        exact, coded = random_pair(), random_pair()
        queries = torch.randn(2, 4, 50, 8)
        assert attention_error(queries, exact, coded) == attention_error(queries[:, :, -16:], exact, coded)
        assert attention_error(queries, exact, coded) != attention_error(queries[:, :, -15:], exact, coded)

    def test_half_precision_is_computed_in_float32(self) -> None:
        exact, coded = ((keys.half(), values.half()) for keys, values in (random_pair(), random_pair()))
        queries = torch.randn(2, 2, 4, 8).half()
        single = [(keys.float(), values.float()) for keys, values in (exact, coded)]
        assert attention_error(queries, exact, coded) == attention_error(queries.float(), *single)

    def test_a_head_of_zeros_suffers_nothing_from_zeros(self) -> None:
        keys, values = random_pair()
        values[:, 1] = 0
        assert attention_error(torch.randn(2, 2, 4, 8), (keys, values), (keys, values)) == 0

    def test_hidden_tokens_do_not_count(self) -> None:
        exact, coded = random_pair(), random_pair()
        hidden = torch.zeros(2, 2, 40, dtype=torch.bool)
        hidden[:, :, :10] = True
        queries, (left, other) = torch.randn(2, 4, 4, 8), ((x[:, :, 10:] for x in pair) for pair in (exact, coded))
        alone = attention_error(queries, tuple(left), tuple(other))
        assert attention_error(queries, exact, coded, hidden) == pytest.approx(alone, rel=1e-5)

    def test_a_row_of_hidden_tokens_suffers_nothing(self) -> None:
        exact, coded = random_pair(), random_pair()
        coded[0][0], coded[1][0] = exact[0][0], exact[1][0]
        hidden = torch.zeros(2, 2, 40, dtype=torch.bool)
        hidden[1] = True
        assert attention_error(torch.randn(2, 4, 4, 8), exact, coded, hidden) == 0
        assert attention_error(torch.randn(2, 4, 4, 8), exact, coded) > 0.5

    def test_what_overflows_is_as_bad_as_can_be(self) -> None:
        """No number compares with a limit: an error that is none must not pass for a small one."""
        keys, values = random_pair()
        assert attention_error(1e30 * torch.randn(2, 2, 4, 8), (1e30 * keys, values), (keys, values)) == math.inf
