"""Tiny random models, prompts and codecs for the tests of the cache, and two ways to look inside it."""

import gc
import hashlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.codec.base import PackedVectors, VectorCodec
from nexusquant_cache.codec.rotation import HadamardRotation
from nexusquant_cache.codec.transform import VectorTransform
from nexusquant_cache.releases import CACHE

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # generation runs to its full length
    "initializer_range": 0.1,  # logits far enough apart that rounding does not choose the token
}
# A few roundings of float32 in logits of unit size, over two layers.
ROUNDING = 2e-5
# Settings under which a prompt of some fifty tokens is compressed.
SMALL: dict[str, Any] = {
    "sink_tokens": 2,
    "residual_length": 8,
    "flush_length": 4,
    "min_tokens": 16,
    "min_kept": 0,
    "short_text_bits": 0.0,
}


def tiny_config(**options: Any) -> LlamaConfig:
    return LlamaConfig(**(TINY | options))


def tiny_llama(attention: str = "sdpa", **options: Any) -> LlamaForCausalLM:
    """Build a random Llama; the weights depend on the options alone, whatever the attention."""
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = LlamaForCausalLM(tiny_config(**options)).eval()
    torch.set_rng_state(state)
    model.set_attn_implementation(attention)
    return model.requires_grad_(requires_grad=False)


def prompt(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Draw random token ids behind the token that begins a text, as tokenizers put it there."""
    ids = torch.randint(3, TINY["vocab_size"], (batch, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = TINY["bos_token_id"]
    return ids


def random_states(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Draw keys with a common component, as real ones have, and values; all rows of a prompt begin alike."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(shape, generator=generator) + 3 * torch.randn(shape[-1], generator=generator)
    values = torch.randn(shape, generator=generator)
    if shape[2] > 1:
        keys[1:, :, 0], values[1:, :, 0] = keys[0, :, 0], values[0, :, 0]
    return keys.to(dtype), values.to(dtype)


class LosslessCodec(VectorCodec):
    """Stores the bytes of float32 in place of codes, so that only the bookkeeping of the cache is left to test."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    def fit(self, vectors: Tensor) -> VectorTransform:
        return VectorTransform(HadamardRotation(self.head_dim), None, torch.ones(*vectors.shape[:2], 1))

    def encode(self, vectors: Tensor, transform: VectorTransform) -> PackedVectors:
        del transform
        words = vectors.to(torch.float32, copy=True).contiguous().view(torch.uint8)
        return PackedVectors(words, torch.zeros(vectors.shape[:3], dtype=torch.uint8))

    def decode(self, packed: PackedVectors, transform: VectorTransform) -> Tensor:
        del transform
        return packed.words.clone(memory_format=torch.contiguous_format).view(torch.float32)

    @property
    def bytes_per_vector(self) -> int:
        return 4 * self.head_dim + 1


class LosslessCache(NexusQuantCache):
    """A cache that loses nothing but what it evicts."""

    def make_codec(self, side: str, head_dim: int, layer_idx: int) -> VectorCodec:
        del side, layer_idx
        return LosslessCodec(head_dim)


def balanced(model: PreTrainedModel, **options: Any) -> NexusQuantCache:
    """Return a cache that codes and evicts, from some thirty tokens on."""
    return NexusQuantCache("balanced", config=model.config, **(SMALL | options))


def lossless_cache(config: PreTrainedConfig | None = None, **overrides: Any) -> LosslessCache:
    return LosslessCache("quant", config=config, **(SMALL | overrides))


def reachable_tensors(thing: object) -> Iterator[Tensor]:
    """Yield every tensor that Python's garbage collector reaches from here, not going through classes and code."""
    opaque = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType)
    seen, stack = {id(thing)}, [thing]
    while stack:
        for item in gc.get_referents(stack.pop()):
            if id(item) not in seen and not isinstance(item, opaque):
                seen.add(id(item))
                stack.append(item)
                if isinstance(item, Tensor):
                    yield item


def reachable_bytes(thing: object) -> int:
    """Return the bytes of all storages reachable from here, each counted once."""
    storages = (tensor.untyped_storage() for tensor in reachable_tensors(thing))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def fingerprint(cache: NexusQuantCache) -> list[object]:
    """Return all that a cache holds and counts, in a form that compares with ``==``, NaN included."""

    def frozen(x: object) -> object:
        if isinstance(x, Tensor):
            content = x.contiguous().view(torch.uint8).numpy().tobytes()
            return (x.dtype, tuple(x.shape), hashlib.sha256(content).hexdigest()[:12])
        return tuple(frozen(y) for y in x) if isinstance(x, tuple) else x

    def side(packed: Any) -> object:
        transform = packed.transform
        return frozen((packed.words.stored(), packed.scales.stored(), transform.mean, transform.reference))

    rows: list[object] = [cache.shared.has_warned, cache.shared.mask_shape]
    for layer in cache.layers:
        flags = (
            layer.record_past,
            layer.state.turn.expects_prompt,
            layer.state.turn.updated_since_crop,
            layer.state.turn.pending_from,
        )
        row = [
            layer.is_initialized,
            layer.state.seen,
            layer.state.kept,
            flags,
            frozen(layer.state.sinks),
            frozen(layer.state.tail),
        ]
        row += [frozen(x) for x in (layer.state.sink_positions, layer.state.origins, layer.state.pads)]
        row.append(layer.state.shown)
        if layer.state.body is not None:
            positions = layer.state.body.positions.positions(torch.device("cpu"))
            row += [side(layer.state.body.keys), side(layer.state.body.values), frozen(positions)]
        rows.append(row)
    return rows


def kept_mask(cache: NexusQuantCache, layer_idx: int) -> Tensor:
    """Return which of the tokens seen are kept, ``[batch, kv_heads, seen]``."""
    state = cache.layers[layer_idx].state
    kept = torch.zeros(*state.tail[0].shape[:2], state.seen, dtype=torch.bool)
    kept[..., state.seen - state.tail_tokens :] = True
    if state.body is None:
        return kept
    if state.sink_positions is None:
        kept[..., : state.sink_tokens] = True
    else:  # each row's sinks are its first real tokens
        kept.scatter_(2, state.sink_positions[:, None].expand(-1, kept.shape[1], -1), value=True)
    positions = state.body.positions
    covered = kept[..., positions.start : positions.end]
    covered[..., positions.covered :] = True
    if positions.bitmap is not None:
        covered[..., : positions.covered] |= positions.bits_of(positions.bitmap)
    return kept


def kept_positions(cache: NexusQuantCache, layer_idx: int) -> Tensor:
    """Return the positions of all kept tokens, ``[batch, kv_heads, most]``, -1 before those of heads with fewer."""
    kept = kept_mask(cache, layer_idx)
    order = torch.arange(kept.shape[2]).expand_as(kept).masked_fill(~kept, -1)
    return order.sort(-1).values[..., -int(kept.sum(-1).max()) :]


def generate(model: LlamaForCausalLM, ids: Tensor, cache: object, tokens: int = 12, **options: Any) -> Tensor:
    """Generate greedily (unless told otherwise) and return the full sequence."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    settings = {"do_sample": False, "max_new_tokens": tokens} | options
    return model.generate(ids, attention_mask=mask, **{CACHE: cache}, **settings)


@torch.no_grad()
def logits(model: LlamaForCausalLM, ids: Tensor, cache: object, **options: Any) -> Tensor:
    return model(input_ids=ids, **{CACHE: cache}, use_cache=True, **options).logits


@contextmanager
def masks(model: LlamaForCausalLM, per_layer: list[Tensor]) -> Iterator[None]:
    """Give every layer a mask ``[batch, heads, queries, tokens]`` of its own."""

    def use(mask: Tensor) -> Any:
        def hook(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return args, kwargs | {"attention_mask": mask}

        return hook

    layers = zip(model.model.layers, per_layer, strict=True)
    handles = [layer.self_attn.register_forward_pre_hook(use(mask), with_kwargs=True) for layer, mask in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def visible_mask(cache: NexusQuantCache, layer_idx: int, queries: int, heads_per_kv_head: int) -> Tensor:
    """Return the mask that hides what the cache has evicted, and the future."""
    visible, seen = kept_mask(cache, layer_idx), cache.get_seq_length()
    visible = visible.repeat_interleave(heads_per_kv_head, 1)[:, :, None]
    causal = torch.arange(seen)[None] <= torch.arange(seen - queries, seen)[:, None]
    return torch.zeros(()).masked_fill(~(visible & causal), torch.finfo(torch.float32).min)
