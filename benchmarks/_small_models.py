"""Small random models of any type of transformers, made from its config class alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 256
_MOST_PARAMETERS = 30_000_000

# What configs call their sizes.
_NAMES: dict[int, str] = {
    64: "hidden_size d_model n_embd dim embed_dim dim_model word_embed_proj_dim embedding_size projection_dim "
    "out_hidden_size decoder_hidden_size",
    96: "intermediate_size ffn_dim d_ff dim_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "intermediate_size_mlp",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "image_size global_head_dim",
    16: "head_dim v_head_dim qk_nope_head_dim kv_channels kv_lora_rank q_lora_rank mamba_d_state state_size "
    "ssm_state_size linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_head mamba_head_dim",
    12: "sliding_window window_size attention_window",
    8: "qk_rope_head_dim rotary_dim hidden_size_per_layer_input laurel_rank patch_size",
    # Every kind of layer comes up among so many, in most models.
    4: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads n_routed_experts "
    "num_experts num_local_experts moe_num_experts linear_num_value_heads linear_num_key_heads",
    3: "num_channels",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts depth index_n_heads",
    1: "n_group topk_group n_shared_experts first_k_dense_replace",
    VOCABULARY: "vocab_size vocab_size_per_layer_input n_vocab",
}
_SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
_OTHERS: dict[str, Any] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # attention looks at few tokens
}
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"num_hidden_layers": 2},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4},
    {"sliding_window": None},
    {"num_hidden_layers": None},
)
"""Options to try one after the other, for what does not fit together; None leaves a size as it is."""


def model_types() -> dict[str, str]:
    """Return every model type that writes text, with the name of its class."""
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {name: made if isinstance(made, str) else made[0] for name, made in sorted(found.items())}


def build(model_type: str, attention: str, options: dict[str, Any]) -> PreTrainedModel:
    """Return a small model, the same each time.

    Raises:
        ValueError: If it would be large, or has no such attention.
        Exception: Whatever the model's own code raises where its sizes do not fit each other.
    """
    config = small_config(type(AutoConfig.for_model(model_type)), options)
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING if is_causal else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    found = mapping[type(config)]
    make: Any = found[0] if isinstance(found, tuple) else found
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make(config).parameters())
    if size > _MOST_PARAMETERS:
        msg = f"too large: {size:,} parameters"
        raise ValueError(msg)
    torch.manual_seed(7)
    model: PreTrainedModel = make._from_config(config, attn_implementation=attention)  # noqa: SLF001 - as AutoModel does
    return model.eval().requires_grad_(requires_grad=False)


def small_config(kind: type[PreTrainedConfig], options: dict[str, Any]) -> PreTrainedConfig:
    """Return a config in which everything that has a size is small, its parts too."""
    default = kind()
    wanted = {name: value for name, value in (_SIZES | _OTHERS | options).items() if value is not None}
    given = {
        name: value
        for name, value in wanted.items()
        if hasattr(default, name) and not isinstance(getattr(default, name), list | tuple | dict | PreTrainedConfig)
    }
    kinds = getattr(default, "layer_types", None)
    if isinstance(kinds, list):  # each kind comes up
        kinds = list(dict.fromkeys(kinds))
        given["layer_types"] = [kinds[index % len(kinds)] for index in range(given.get("num_hidden_layers", 4))]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and "mrope_section" in rope:
        given["rope_parameters"] = rope | {"mrope_section": [2, 3, 3]}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            given[name] = small_config(type(value), options)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            given[name] = VOCABULARY - 1
    return kind(**given)
