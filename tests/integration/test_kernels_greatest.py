"""The kernels that look for the greatest attention find what plain torch finds, in the interpreter of triton."""

import os

import pytest
import torch

from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.observations import greatest_attention

pytest.importorskip("triton", reason="triton is for Linux")

from triton.runtime.errors import OutOfResources

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


@pytest.mark.parametrize("tokens", [5, 60, 150])
def test_a_wrong_kernel_is_not_used(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are compared with those of plain torch at the first use, also if that is a text too short to matter.

    Of 60 tokens none is 64 before another.
    """
    monkeypatch.setattr("nexusquant_cache.codec.impl._ERRORS", {})
    right = kernels_greatest.greatest_attention
    monkeypatch.setattr(kernels_greatest, "greatest_attention", lambda *given: 0.25 * right(*given))
    queries, keys = states((1, 4, 2, tokens, tokens, 16))
    real = torch.ones(1, tokens, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match=r"^impl='triton' was asked for, but a kernel differs from plain torch"):
        greatest_attention(queries, keys, real, least_distance=64, by="triton")


def test_autocast_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexusquant_cache.codec.impl._ERRORS", {})
    queries, keys = states((1, 4, 2, 200, 200, 16))
    real, by = torch.ones(1, 200, dtype=torch.bool), ("torch", "triton")
    queries, keys = queries + 8, keys + 8  # as with biases: where a rounding counts
    expected = [greatest_attention(queries, keys, real, by=each) for each in by]
    with torch.autocast("cpu", torch.bfloat16):
        found = [greatest_attention(queries, keys, real, by=each) for each in by]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_what_the_kernels_cannot_do_plain_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Insisting on them is an error; by default a line in the log says why."""
    queries, keys = states((1, 2, 1, 70, 70, 16))
    wide = torch.randn(1, 1, 3, 300)
    with pytest.raises(UnsupportedError, match="up to 256, not 300"):
        greatest_attention(wide, wide, torch.ones(1, 3, dtype=torch.bool), by="triton")

    def too_large(*_: object, **__: object) -> None:
        raise OutOfResources(132_096, 101_376, "shared memory")

    monkeypatch.setattr(kernels_greatest, "sums_kernel", {(2, 2): too_large})
    monkeypatch.setattr("nexusquant_cache.codec.impl._ERRORS", {})
    with pytest.raises(UnsupportedError, match="the card is too small for a kernel"):
        greatest_attention(queries, keys, torch.ones(1, 70, dtype=torch.bool), by="triton")


def test_no_query_is_asked() -> None:
    queries, keys = states((1, 2, 1, 1, 70, 16))
    found = greatest_attention(queries, keys, torch.ones(1, 70, dtype=torch.bool), every=2, by="triton")
    assert not found.any()
