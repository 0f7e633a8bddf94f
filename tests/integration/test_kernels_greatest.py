"""The kernels that look for the greatest attention find what plain torch finds, in the interpreter of triton."""

import os

import pytest
import torch

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.observations import greatest_attention

pytest.importorskip("triton", reason="triton is for Linux")

from nexusquant_cache.codec.triton import kernels_greatest

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton must be chosen before torch is imported",
)
# batch, query heads, KV heads, queries, tokens, head_dim
SHAPES = [
    (1, 4, 2, 150, 150, 16),
    (2, 6, 2, 37, 150, 80),
    (1, 3, 3, 70, 200, 64),
    (1, 2, 1, 5, 9, 8),
    (1, 2, 1, 1, 300, 40),
    (1, 2, 2, 65, 65, 256),
]


def states(shape: tuple[int, ...], spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries, token by token in memory as models have them, and keys."""
    batch, query_heads, heads, count, tokens, head_dim = shape
    queries = spread * torch.randn(batch, count, query_heads, head_dim)
    return queries.transpose(1, 2), torch.randn(batch, heads, tokens, head_dim)


@pytest.mark.parametrize(("distance", "every"), [(0, 1), (1, 2), (64, 1), (64, 3), (250, 2), (0, 400)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_that_of_plain_torch(shape: tuple[int, ...], distance: int, every: int) -> None:
    queries, keys = states(shape)
    real = torch.ones(len(keys), keys.shape[2], dtype=torch.bool)
    how = {"least_distance": distance, "every": every}
    expected = greatest_attention(queries, keys, real, **how)
    torch.testing.assert_close(greatest_attention(queries, keys, real, **how, by="triton"), expected)


def test_padded_rows_are_as_if_alone() -> None:
    queries, keys = states((2, 4, 2, 90, 100, 16))
    real = torch.ones(2, 100, dtype=torch.bool)
    real[1, :30] = real[1, 60] = False
    expected = greatest_attention(queries, keys, real, every=2)
    torch.testing.assert_close(greatest_attention(queries, keys, real, every=2, by="triton"), expected)


def test_huge_logits_give_no_more_than_all() -> None:
    queries, keys = states((1, 2, 2, 80, 80, 16), spread=1e4)
    found = greatest_attention(queries, keys, torch.ones(1, 80, dtype=torch.bool), by="triton")
    assert found.max() <= 1
    assert found.isfinite().all()


def test_half_precision_is_near() -> None:
    """The launch itself: on a CPU everything else is computed in float32.

    Not in bfloat16, of which the interpreter multiplies the bits.
    """
    queries, keys = (x.half() for x in states((1, 4, 2, 150, 150, 64), spread=1.0))
    expected = greatest_attention(queries, keys, torch.ones(1, 150, dtype=torch.bool))
    found = kernels_greatest.greatest_attention(queries, keys, range(150), 0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are compared with those of plain torch at the first use."""
    monkeypatch.setattr("nexusquant_cache.codec.impl._ERRORS", {})
    monkeypatch.setattr(kernels_greatest, "greatest_attention", lambda _, keys, *__: torch.ones(keys.shape[:3]))
    queries, keys = states((1, 4, 2, 150, 150, 16))
    real = torch.ones(1, 150, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="differs from plain torch"):
        greatest_attention(queries, keys, real, by="triton")
