"""Small random models of any type of transformers, made from its config class alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as _CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as _IMAGE_TEXT

VOCABULARY = 256
_MOST_PARAMETERS = 30_000_000

# What configs call their sizes.
_NAMES: dict[int, str] = {
    64: "hidden_size d_model n_embd dim embed_dim dim_model word_embed_proj_dim embedding_size projection_dim "
    "out_hidden_size decoder_hidden_size text_hidden_size hidden_size_global adapter_in_dim adapter_out_dim "
    "adapter_input_size codebook_dim image_token_embed_dim moe_hidden_size",
    128: "mamba_d_ssm",
    96: "intermediate_size ffn_dim d_ff dim_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "intermediate_size_mlp",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size shared_intermediate_size "
    "image_size global_head_dim base_channels",
    16: "head_dim v_head_dim qk_nope_head_dim kv_channels kv_lora_rank q_lora_rank mamba_d_state state_size "
    "ssm_state_size linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_head mamba_head_dim "
    "swa_head_dim swa_v_head_dim",
    12: "sliding_window window_size attention_window",
    8: "mamba_n_heads n_mamba_heads qk_rope_head_dim rotary_dim hidden_size_per_layer_input laurel_rank patch_size",
    # Every kind of layer comes up among so many, in most models.
    4: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads n_routed_experts "
    "num_experts num_local_experts moe_num_experts linear_num_value_heads linear_num_key_heads "
    "swa_num_attention_heads n_layers_per_attn_res_block",
    3: "num_channels",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts depth index_n_heads "
    "swa_num_key_value_heads attn_layer_period expert_layer_period n_recurrent_layers",
    1: "n_group topk_group n_shared_experts first_k_dense_replace attn_layer_offset expert_layer_offset "
    "n_input_layers n_output_layers num_codebooks num_kv_shared_layers",
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
    {"mrope_section": True},
    {"head_dim": 8, "num_key_value_heads": 4},
    {"sliding_window": None},
    {"num_hidden_layers": None},
)
"""Options to try one after the other, for what does not fit together; None leaves a size as it is.

``mrope_section`` is made to fit the heads; some models expect it and do not say so in their config.
"""

_OF_CONFIGS: dict[str, dict[str, Any]] = {
    "Apertus1p5Config": {"image_token_offset": 100, "audio_token_offset": 150},
    "Apertus1p5VisionTokenizerConfig": {"codebook_size": 50},
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "ChameleonConfig": {"vocabulary_map": {"<image>": VOCABULARY - 1}},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "DbrxAttentionConfig": {"rope_theta": 1e4, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    "Dots3NoteTextConfig": {
        "num_key_value_heads": 4,
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "Emu3Config": {"vocabulary_map": {"<image>": VOCABULARY - 1, "<|extra_200|>": VOCABULARY - 2}},
    "Florence2VisionConfig": {"depths": (1, 1, 1, 1), "embed_dim": (16, 16, 32, 64), "num_heads": (1, 1, 2, 4)},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "Glm5NextTextConfig": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "head_dim": 0},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "GraniteMoeHybridConfig": {"layers_block_type": ["linear_attention", "full_attention"] * 2},
    "Inkling2LoopTextConfig": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2Config": {"num_heads": 8},
    "MuseSparkAudioConfig": {"hidden_sizes": (16, 16, 32, 64), "depths": (1, 1, 1, 1)},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "ReformerConfig": {"axial_pos_embds_dim": (16, 48)},
    "WavTokenizerEncoderConfig": {"codebook_size": 50},
    "XmodConfig": {"default_language": "en_XX"},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
"""What some kinds of config need besides: sizes under names of their own, and what has to fit several of them."""


def model_types() -> list[str]:
    """Return every model type that writes text."""
    return sorted({*_CAUSAL, *_IMAGE_TEXT})


def build(model_type: str, attention: str, options: dict[str, Any]) -> PreTrainedModel:
    """Return a small model, the same each time.

    Raises:
        ValueError: If it would be large, or has no such attention.
        Exception: Whatever the model's own code raises where its sizes do not fit each other.
    """
    make, config = _fitting(model_type, small_config(AutoConfig.for_model(model_type), options))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make(config).parameters())
    if size > _MOST_PARAMETERS:
        msg = f"too large: {size:,} parameters"
        raise ValueError(msg)
    torch.manual_seed(7)
    model: PreTrainedModel = make._from_config(config, attn_implementation=attention)  # noqa: SLF001 - as AutoModel does
    return model.eval().requires_grad_(requires_grad=False)


def _fitting(model_type: str, config: PreTrainedConfig) -> tuple[Any, PreTrainedConfig]:
    """Return the class that writes text, and the config, or the part of it, that this class is made from."""
    names = [each[model_type] for each in (_CAUSAL, _IMAGE_TEXT) if model_type in each]
    found: list[Any] = [getattr(transformers, name if isinstance(name, str) else name[0]) for name in names]
    configs = [config, *_parts(config).values()]
    fitting = [(make, each) for each in configs for make in found if isinstance(each, make.config_class)]
    return fitting[0] if fitting else (found[0], config)


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    return {name: value for name, value in vars(config).items() if isinstance(value, PreTrainedConfig)}


def small_config(default: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedConfig:
    """Return a config of the same kind in which everything that has a size is small, its parts too."""
    kind = type(default)
    default.allow_global_per_layer_attribute_access = True  # layers may have sizes of their own
    usual, fields = vars(kind()), {field.name for field in dataclasses.fields(kind)}
    parts = _parts(default)
    # What the whole wants of its parts, where that is not what they are by themselves.
    given = {
        name: value
        for name, value in vars(default).items()
        if name in fields and name not in parts and value != usual.get(name)
    }
    wanted = {name: value for name, value in (_SIZES | _OTHERS | options).items() if _takes(default, name, value)}
    # A name may stand for another one, which comes first: Whisper's `num_key_value_heads` are its encoder's heads.
    given |= {name: value for name, value in wanted.items() if kind.attribute_map.get(name) not in wanted}
    layers = wanted.get("num_hidden_layers") or getattr(default, "num_hidden_layers", 4)
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(default, name, None)
        if isinstance(kinds, list) and _is_writable(default, name):  # each kind comes up
            kinds = list(dict.fromkeys(kinds))
            given[name] = [kinds[index % len(kinds)] for index in range(layers)]
    rope = getattr(default, "rope_parameters", None)
    if isinstance(rope, dict) and ("mrope_section" in rope or ("mrope_section" in options and "rope_type" in rope)):
        given["rope_parameters"] = rope | {"mrope_section": _sections(wanted, rope)}
    for name, value in vars(default).items():
        if name in parts:
            given[name] = small_config(value, options)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            given[name] = VOCABULARY - 1
    return kind(**(given | _OF_CONFIGS.get(kind.__name__, {})))


def _takes(config: PreTrainedConfig, name: str, value: Any) -> bool:
    """Tell whether the config has such an attribute, a single one, to be written."""
    if value is None or not hasattr(config, name) or not _is_writable(config, name):
        return False
    return not isinstance(getattr(config, name), list | tuple | dict | PreTrainedConfig)


def _is_writable(config: PreTrainedConfig, name: str) -> bool:
    found = getattr(type(config), type(config).attribute_map.get(name, name), None)
    return not isinstance(found, property) or found.fset is not None


def _sections(sizes: dict[str, Any], rope: dict[str, Any]) -> list[int]:
    """Return how many of a head's frequencies turn by time, height and width."""
    head = sizes.get("qk_rope_head_dim") or sizes.get("head_dim") or 16
    half = int(head * rope.get("partial_rotary_factor", 1)) // 2
    return [3 * half // 8, 3 * half // 8, half - 2 * (3 * half // 8)]
