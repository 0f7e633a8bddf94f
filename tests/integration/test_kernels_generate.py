"""Whole generations with kernels, in triton's interpreter: the same as in plain torch."""

import copy
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from integration.packed import logits_of
from integration.tiny import SMALL, prompt, tiny_llama
from torch import Tensor

from nexusquant_cache import LeveragePolicy, NexusQuantCache
from nexusquant_cache.codec.triton import support
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.layer.parts import part_of

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from nexusquant_cache.codec import impl as selector
from nexusquant_cache.codec.triton import kernels_attend as kernel
from nexusquant_cache.codec.triton import kernels_decode as dense
from nexusquant_cache.codec.triton import kernels_encode as encode_kernel
from nexusquant_cache.releases import CACHE

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1",
    reason="the interpreter of triton must be chosen before torch is imported",
)


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter takes as long for a large tile as for a small one.
    monkeypatch.setattr(encode_kernel, "_ROWS", 64)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the queries of each attention by kernels."""
    found: list[tuple[int, ...]] = []

    def spy(query: Tensor, *given: Any, **options: Any) -> Any:
        found.append(tuple(query.shape))
        return whole(query, *given, **options)

    whole = kernel.attend_packed
    monkeypatch.setattr(kernel, "attend_packed", spy)
    return found


@pytest.mark.parametrize(
    ("preset", "rotary", "dtype", "pads", "options"),
    [
        pytest.param("balanced", True, torch.float32, 0, {}, marks=pytest.mark.grid),  # the others, taken together
        ("balanced", True, torch.float32, 12, {}),
        ("quant", True, torch.bfloat16, 0, {"transform": "principal"}),
        ("quant", False, torch.float16, 0, {"transform": "hadamard"}),
        ("max", False, torch.float32, 12, {"transform": "principal"}),
    ],
)
def test_generation_by_kernels(  # noqa: PLR0917 - the columns of the table
    preset: str, rotary: bool, dtype: torch.dtype, pads: int, options: dict[str, Any], launches: list[tuple[int, ...]]
) -> None:
    """With eviction and without, padded, several tokens at once, tokens encoded on the way."""
    expected = logits_of("torch", preset, rotary, dtype, pads, **options)
    assert not launches
    found = logits_of("triton", preset, rotary, dtype, pads, **options)
    assert len(launches) == 3
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.max() < (0.01 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("what", ["attend", "encode", "decode"])
def test_a_kernel_that_is_wrong_is_not_used(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a compiler or a card might make it: `auto` computes in plain torch and says so, `triton` refuses."""
    expected = logits_of("torch", "quant", rotary=False, dtype=torch.float32)
    monkeypatch.setattr(selector, "_ERRORS", {})
    selector._say_once.cache_clear()
    if what == "attend":
        monkeypatch.setattr(kernel, "combine", lambda query, *_: torch.zeros_like(query))
    elif what == "encode":
        monkeypatch.setattr(encode_kernel, "encode", lambda *given: given[-1].words.zero_())
    else:
        monkeypatch.setattr(dense, "decode", lambda _packed, out: out.zero_())
    with pytest.raises(UnsupportedError, match=f"a kernel differs from plain torch on this device.*{what}"):
        logits_of("triton", "quant", rotary=False, dtype=torch.float32)
    # On this machine `auto` has no kernels; as if it had.
    monkeypatch.setattr(support, "is_wanted", lambda _device: True)
    found = logits_of("auto", "quant", rotary=False, dtype=torch.float32)
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert any(f"'{what}'" in message for message in caplog.messages)


def test_a_card_that_is_too_small(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that needs more shared memory than there is: as above."""

    def fails(*_given: Any, **_options: Any) -> None:
        raise OutOfResources(150_000, 100_000, "shared memory")

    selector._say_once.cache_clear()
    monkeypatch.setattr(kernel, "attend_packed", fails)
    with pytest.raises(UnsupportedError, match="the card is too small for a kernel: out of resource: shared memory"):
        logits_of("triton", "quant", rotary=True, dtype=torch.float32)
    expected = logits_of("torch", "quant", rotary=True, dtype=torch.float32)
    monkeypatch.setattr(support, "is_wanted", lambda _device: True)
    assert torch.equal(logits_of("auto", "quant", rotary=True, dtype=torch.float32), expected)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("kind", ["heads differ", "queries differ"])
def test_masks_that_kernels_do_not_know_are_for_plain_torch(kind: str, launches: list[tuple[int, ...]]) -> None:
    model = tiny_llama()
    settings = SMALL | {"policy": LeveragePolicy(), "impl": "triton"}
    cache = NexusQuantCache("balanced", config=model.config, **settings)
    with torch.no_grad():
        model(prompt(60), **{CACHE: cache})
        cache.compress()
        held = part_of(cache.layers[0], 0).held()
        assert selector._choose_for_attention(held) == "triton"
        heads, queries = (4, 1) if kind == "heads differ" else (1, 2)
        mask = torch.ones(1, heads, queries, held.seen + queries, dtype=torch.bool)
        mask[:, -1, -1, 2:40] = False
        other, plain = copy.deepcopy(cache), copy.deepcopy(cache)
        for layer in plain.layers:
            layer.state.codecs = tuple(replace(codec, impl="torch") for codec in layer.state.codecs)
        out = model(prompt(queries), **{CACHE: cache}, attention_mask=mask).logits
        assert not launches
        expected = model(prompt(queries), **{CACHE: plain}, attention_mask=mask).logits
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        without = model(prompt(queries), **{CACHE: other}, attention_mask=torch.ones_like(mask[:, :1])).logits
        assert launches
        assert not torch.allclose(without, expected, rtol=1e-3, atol=1e-3)


def test_rows_of_different_length_are_attended_to_by_kernels(launches: list[tuple[int, ...]]) -> None:
    """The long row keeps 10 of 50, fewer than the 14 of the short one: its heads have empty places."""
    model = tiny_llama(num_hidden_layers=1)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :36] = 0
    settings = SMALL | {"policy": LeveragePolicy(), "impl": "triton", "keep_ratio": 0.2}
    cache = NexusQuantCache("balanced", config=model.config, **settings)
    with torch.no_grad():
        model(prompt(60, batch=2), **{CACHE: cache}, attention_mask=mask)
        cache.compress()
        visible = part_of(cache.layers[0], 0).held().visible
        assert visible.logical_not().sum(-1).flatten(1).tolist() == [[0, 0], [4, 4]]
        plain = copy.deepcopy(cache)
        plain.layers[0].state.codecs = tuple(replace(codec, impl="torch") for codec in plain.layers[0].state.codecs)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        out, expected = (
            model(prompt(1, batch=2), **{CACHE: each}, attention_mask=mask).logits for each in (cache, plain)
        )
    assert launches
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
