"""Hashes: of a model's config, of a prompt, and of the content of a file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.serialization.schema import ModelMeta

TokenIds: TypeAlias = Int[Tensor, "*shape"] | Sequence[int]

# What decides the keys and values of a model, other than its weights.  A list of what counts, not of what does not:
# later releases of transformers add fields, which must not make old files unreadable.
_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "n_embd",
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "num_key_value_heads",
    "multi_query",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "layer_types",
    "sliding_window",
    "num_kv_shared_layers",
    "rope_parameters",
    "rotary_dim",
    "no_rope_layers",
    "layer_rope_theta",
    "alibi",
)


def describe_model(config: Mapping[str, Any]) -> ModelMeta:
    """Return the identity of a model: the fields of its config, as a dictionary, that decide keys and values.

    Two models that differ in their weights alone have the same.
    """
    known = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    text = json.dumps(known, sort_keys=True, default=str)
    return ModelMeta(hashlib.sha256(text.encode()).hexdigest(), json.loads(text))


def check_model(meta: ModelMeta | None, config: Mapping[str, Any]) -> None:
    """Raise FormatError if a file belongs to another model than this config's."""
    if meta is None:
        msg = "the file was saved without a config and does not say of which model: load it without config, too"
        raise FormatError(msg)
    ours = describe_model(config)
    if ours.fingerprint == meta.fingerprint:
        return
    names = sorted(set(ours.fields) | set(meta.fields))
    wrong = [
        f"{name} {str(meta.fields.get(name))[:60]} (here {str(ours.fields.get(name))[:60]})"
        for name in names
        if ours.fields.get(name) != meta.fields.get(name)
    ]
    msg = f"the file belongs to another model: {'; '.join(wrong) or 'its fingerprint differs'}"
    raise FormatError(msg)


def hash_tokens(token_ids: TokenIds) -> str:
    """Return the hash of token ids: SHA-256 of the shape and the ids as little-endian 64-bit integers.

    Args:
        token_ids: Integers, ``[tokens]`` or ``[batch, tokens]``; one row counts like no batch.

    Raises:
        OptionError: If they are anything else.
    """
    ids = torch.as_tensor(token_ids)
    if ids.ndim == 1:
        ids = ids[None]
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:  # noqa: PLR2004
        msg = f"token_ids must be integers [batch, tokens], got {ids.dtype} of shape {tuple(ids.shape)}"
        raise OptionError(msg)
    ids = ids.detach().to("cpu", torch.int64).contiguous()
    head = b"".join(length.to_bytes(8, "little") for length in ids.shape)
    return hashlib.sha256(head + ids.numpy().tobytes()).hexdigest()


def content_hash(cache: str, digests: Mapping[str, str]) -> str:
    """Return the hash of a file's content, which does not depend on how its tensors are coded.

    Args:
        cache: The metadata as JSON, as it stands in the file.
        digests: SHA-256 of the bytes of every tensor, by its name without a code.
    """
    total = hashlib.sha256(cache.encode())
    for name in sorted(digests):
        total.update(f"\n{name} {digests[name]}".encode())
    return total.hexdigest()
