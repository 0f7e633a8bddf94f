"""Hashes: of a model's config, of a prompt, and of the content of a file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.errors import FormatError, OptionError
from nexusquant_cache.files.schema import ModelMeta
from nexusquant_cache.layer.checks import are_integers

TokenIds: TypeAlias = Int[Tensor, "*shape"] | Sequence[int]

# What decides the keys and values of a model, other than its weights.  A list of what counts, not of what does not:
# later releases of transformers add fields, which must not make old files unreadable.  Of these, a file has all that
# the config has.
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
# These came later than the format: they are compared where both the file and the config have them.
_LATER_FIELDS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
    "norm_eps",
    "attention_bias",
    "mlp_bias",
    "use_qk_norm",
    "clip_qkv",
    "q_lora_rank",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "attention_chunk_size",
    "attention_multiplier",
    "embedding_multiplier",
    "residual_multiplier",
    "index_head_dim",
    "index_n_heads",
    "index_topk",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "lru_width",
    "conv1d_width",
    "conv_L_cache",
    "state_size",
    "conv_kernel",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_d_head",
    "mamba_n_heads",
    "mamba_n_groups",
    "mamba_expand",
)


def describe_model(config: Mapping[str, Any]) -> ModelMeta:
    """Return the identity of a model: the fields of its config, as a dictionary, that decide keys and values.

    Two models that differ in their weights alone have the same.
    """
    known = {name: config[name] for name in (*_FIELDS, *_LATER_FIELDS) if config.get(name) is not None}
    fields = json.loads(json.dumps(known, sort_keys=True, default=str))
    return ModelMeta(_hash_fields(fields), fields)


def _hash_fields(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_fingerprint(meta: ModelMeta | None) -> None:
    """Raise FormatError if a file's fingerprint is not that of the fields beside it."""
    if meta is not None and _hash_fields(meta.fields) != meta.fingerprint:
        msg = "the model's fingerprint in the file is not that of its fields"
        raise FormatError(msg)


def check_model(meta: ModelMeta | None, config: Mapping[str, Any]) -> None:
    """Raise FormatError if a file belongs to another model than this config's."""
    if meta is None:
        msg = "the file was saved without a config and does not say of which model: load it without config, too"
        raise FormatError(msg)
    ours, theirs = describe_model(config).fields, meta.fields
    # Not the fingerprints: those of files that know fewer fields differ.
    names = (*_FIELDS, *(name for name in _LATER_FIELDS if name in ours and name in theirs))
    wrong = [
        f"{name} {str(theirs.get(name))[:60]} (here {str(ours.get(name))[:60]})"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        msg = f"the file belongs to another model: {'; '.join(wrong)}"
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
    if ids.ndim != 2 or not are_integers(ids):  # noqa: PLR2004
        msg = f"token_ids must be integers [batch, tokens], got {ids.dtype} of shape {tuple(ids.shape)}"
        raise OptionError(msg)
    ids = ids.detach().to("cpu", torch.int64).contiguous()
    head = b"".join(length.to_bytes(8, "little") for length in ids.shape)
    return hashlib.sha256(head + ids.numpy().tobytes()).hexdigest()


Besides: TypeAlias = Mapping[str, Tensor | bytes | str]
"""What a prompt is made of besides token ids, by name: pixel values, audio, embeddings, the name of an adapter."""


def first_placeholder(token_ids: TokenIds, placeholders: frozenset[int]) -> int | None:
    """Return where the first place of an image or a sound is among the tokens of a prompt; None if there is none."""
    if not placeholders:
        return None
    ids = torch.as_tensor(token_ids).to("cpu")
    found = torch.isin(ids, torch.tensor(sorted(placeholders))).view(-1, ids.shape[-1]).any(0).nonzero()
    return int(found[0, 0]) if len(found) else None


def hash_besides(besides: Besides | None) -> str:
    """Return the hash of what a prompt is made of besides token ids; an empty text if there is nothing.

    Raises:
        OptionError: If something is no tensor, bytes or text, or has no name.
    """
    given: object = besides  # whatever the annotation says
    if given is not None and not (isinstance(given, Mapping) and all(isinstance(name, str) for name in given)):
        msg = f"besides must name what it holds, like {{'pixel_values': pixel_values}}; got {type(given).__name__}"
        raise OptionError(msg)
    if not besides:
        return ""
    total = hashlib.sha256()
    for name in sorted(besides):
        part: object = besides[name]  # whatever the annotation says
        if isinstance(part, Tensor):
            plain = part.detach().to("cpu").contiguous()
            what, content = f"{plain.dtype} {list(plain.shape)}", plain.flatten().view(torch.uint8).numpy().tobytes()
        elif isinstance(part, bytes | str):
            what, content = type(part).__name__, part if isinstance(part, bytes) else part.encode()
        else:
            msg = f"besides[{name!r}] must be a tensor, bytes or a text, got {type(part).__name__}"
            raise OptionError(msg)
        total.update(f"{name} {what} {hashlib.sha256(content).hexdigest()}\n".encode())
    return total.hexdigest()


def hash_prompt(token_ids: TokenIds | None, besides: Besides | None) -> str | None:
    """Return the hash of all that a prompt is made of, that of the token ids if that is all; None without them.

    Raises:
        OptionError: As by `hash_tokens` and `hash_besides`, or if there are no token ids beside the rest.
    """
    rest = hash_besides(besides)
    if token_ids is None:
        if rest:
            msg = "besides tells what a prompt holds besides token_ids: give these, too"
            raise OptionError(msg)
        return None
    tokens = hash_tokens(token_ids)
    return hashlib.sha256(f"{tokens} {rest}".encode()).hexdigest() if rest else tokens


def content_hash(cache: str, digests: Mapping[str, str]) -> str:
    """Return the hash of a file's content, which does not depend on how its tensors are packed.

    Args:
        cache: The metadata as JSON, as it stands in the file.
        digests: SHA-256 of the bytes of every tensor, by its name without a packing.
    """
    total = hashlib.sha256(cache.encode())
    for name in sorted(digests):
        total.update(f"\n{name} {digests[name]}".encode())
    return total.hexdigest()
