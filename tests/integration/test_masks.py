"""Any mask, in any turn: what is left of a prompt is attended to as the plain cache attends to it under that mask.

The law: logits equal those of the plain cache under the mask, restricted to the tokens that are kept.
"""

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from integration.tiny import ROUNDING, SMALL, TINY, LosslessCache, kept_mask, masks, prompt, tiny_llama
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from nexusquant_cache.releases import CACHE

GROUP = TINY["num_attention_heads"] // TINY["num_key_value_heads"]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return with_pad_embedding(tiny_llama(request.param))


def with_pad_embedding(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Give pads an embedding: nn.Embedding starts them at zero, which would hide mistakes."""
    model.model.embed_tokens.weight[:3] = torch.randn(
        3, TINY["hidden_size"], generator=torch.Generator().manual_seed(5)
    )
    return model


class WatchedCache(LosslessCache):
    """Notes which tokens each layer keeps when it is attended to; later in the same forward it may evict."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.__dict__.setdefault("kept", {})[layer_idx] = kept_now(self, layer_idx)
        return states


class Both:
    """A plain cache and one of ours, given the same tokens under the same masks."""

    def __init__(self, model: LlamaForCausalLM, batch: int, **options: Any) -> None:
        self.model, self.plain = model, DynamicCache()
        self.ours = WatchedCache("balanced", config=model.config, **(SMALL | options))
        self.columns = torch.ones(batch, 0, dtype=torch.bool)  # which tokens the text may see, of those so far

    def read(
        self, ids: Tensor, real: Tensor, *, dense: Tensor | None = None, positions: bool = True
    ) -> tuple[Any, Any]:
        """Let both read tokens of which these are real; return the logits of those, of ours and of the plain cache.

        Args:
            ids: The tokens.
            real: Which are no padding.
            dense: Which of all tokens so far each of these sees, causality aside; given to the model as a 4D mask.
            positions: Whether the model is told the positions, which leave out padding.
        """
        self.columns = torch.cat([self.columns, real], 1)
        seen, queries = self.columns.shape[1], ids.shape[1]
        causal = torch.arange(seen)[None] <= torch.arange(seen - queries, seen)[:, None]
        visible = (self.columns[:, None] & causal)[:, None]
        if dense is not None:
            own = torch.arange(seen)[None] == torch.arange(seen - queries, seen)[:, None]
            visible = visible & (dense | own)
        given: dict[str, Any] = {"attention_mask": self.columns.long() if dense is None else additive(visible)}
        if positions:
            given["position_ids"] = self.columns.long().cumsum(1).sub(1).clamp_min(0)[:, -queries:]
        found = self.model(input_ids=ids, **{CACHE: self.ours}, **given).logits
        restricted = [additive(visible & self.ours.kept[i]) for i in range(2)]
        with masks(self.model, restricted):
            right = self.model(input_ids=ids, **{CACHE: self.plain}, **given).logits
        return found[real], right[real]


def additive(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def kept_now(cache: LosslessCache, layer_idx: int) -> Tensor:
    """Return which tokens a layer keeps and shows, ``[batch, query_heads, 1, seen]``."""
    return kept_mask(cache, layer_idx).repeat_interleave(GROUP, 1)[:, :, None]


def rows_of_padding(draw: Any, batch: int, tokens: int) -> Tensor:
    """Draw which tokens are real: padding on the left, the right, anywhere, or none; never a row of padding alone."""
    real = torch.ones(batch, tokens, dtype=torch.bool)
    for row in range(batch):
        kind = draw(st.sampled_from(["none", "left", "right", "inner", "any"]))
        if kind == "any":
            real[row] = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool)
        elif kind != "none" and tokens > 1:
            count = draw(st.integers(1, tokens - 1))
            start = {"left": 0, "right": tokens - count, "inner": (tokens - count) // 2}[kind]
            real[row, start : start + count] = False
        if not real[row].any():
            real[row, draw(st.integers(0, tokens - 1))] = True
    return real


@given(data=st.data())
def test_the_law(model: LlamaForCausalLM, data: st.DataObject) -> None:
    batch, tokens = data.draw(st.integers(1, 3), "rows"), data.draw(st.integers(1, 70), "tokens")
    options = {
        "keep_ratio": data.draw(st.sampled_from([0.3, 0.6, 1.0]), "keep"),
        "when": data.draw(st.sampled_from(["post_prefill", "during_prefill"]), "when"),
        "remove_rope": data.draw(st.booleans(), "without phase"),
    }
    both = Both(model, batch, **options)
    seed = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for turn in range(data.draw(st.integers(2, 9), "turns")):
            count = tokens if turn == 0 else data.draw(st.sampled_from([1, 1, 1, 2, 7, 20, 40]), "new tokens")
            real = rows_of_padding(data.draw, batch, count)
            dense = None
            if data.draw(st.booleans(), "dense mask"):
                generator = torch.Generator().manual_seed(seed)
                shape = (batch, data.draw(st.sampled_from([1, 4]), "mask heads"), count, both.columns.shape[1] + count)
                dense = torch.rand(shape, generator=generator) < 0.8
            seed += 1
            found, right = both.read(
                prompt(count, batch, seed), real, dense=dense, positions=data.draw(st.booleans(), "positions")
            )
            note(f"kept {both.ours.layers[0].state.kept} of {both.ours.get_seq_length()}")
            torch.testing.assert_close(found, right, atol=ROUNDING, rtol=1e-4)
