"""Tiny random models, one of every kind of family: rotary layouts, layer kinds, shapes of keys and values, and images.

The weights depend on the family alone.  They are larger than at the start of a training, so that attention looks
at few tokens and logits lie far apart: then a token shows what the cache did, and rounding does not choose it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from integration.tiny import TINY
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.gptj import modeling_gptj

VOCABULARY = TINY["vocab_size"]
IMAGE_TOKEN, VISION_START = VOCABULARY - 1, VOCABULARY - 2
IMAGE_SIZE = 32
IMAGE_LENGTH = 4  # tokens of an image, in all models

BASE = TINY | {"initializer_range": 0.2, "tie_word_embeddings": False}
GPT = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCABULARY,
    "n_positions": 1024,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Windows shorter than the prompts of the tests.
SLIDING = {"sliding_window": 12}
MIXED = SLIDING | {"layer_types": ["sliding_attention", "full_attention"]}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
LONGROPE_PAIRS = 96 // 2
LONGROPE = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 2048,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(LONGROPE_PAIRS)],
        "long_factor": [2.0 + i for i in range(LONGROPE_PAIRS)],
        "original_max_position_embeddings": 2048,
    },
}


@dataclass(frozen=True)
class Family:
    """A tiny model: its config's name in transformers, what the config takes, and the attention that it can run."""

    what: str
    config: str
    options: Mapping[str, Any]
    attentions: tuple[str, ...] = ("eager", "sdpa")
    vision: Mapping[str, Any] | None = None  # of the part that reads images
    auto: str = "AutoModelForCausalLM"

    def make_config(self) -> PreTrainedConfig:
        make = getattr(transformers, self.config)
        if self.vision is None:
            return make(**self.options)
        return make(text_config=dict(self.options), vision_config=dict(self.vision), **IMAGE_TOKENS)


def family(what: str, name: str, attentions: tuple[str, ...] = ("eager", "sdpa"), **options: Any) -> Family:
    return Family(what, f"{name}Config", BASE | options, attentions)


EAGER = ("eager",)  # transformers has no sdpa for them
IMAGE_TOKENS = {
    "image_token_index": IMAGE_TOKEN,
    "image_token_id": IMAGE_TOKEN,
    "vision_start_token_id": VISION_START,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, Family] = {
    "llama": family("Llama", "Llama"),
    "mistral": family("Mistral, all layers with a sliding window", "Mistral", **SLIDING),
    "mistral_no_window": family("Mistral without a window", "Mistral", sliding_window=None),
    "mixtral": family("Mixtral, experts", "Mixtral", **EXPERTS),
    "qwen2": family("Qwen2 and 2.5, key biases", "Qwen2"),
    "qwen3": family("Qwen3, normed queries and keys", "Qwen3", head_dim=16),
    "phi3": family(
        "Phi-3, head_dim 96, longrope",
        "Phi3",
        hidden_size=192,
        num_attention_heads=2,
        num_key_value_heads=1,
        **LONGROPE,
    ),
    "phi": family("Phi, rotary in half of the channels", "Phi", partial_rotary_factor=0.5),
    "gemma2": family(
        "Gemma 2, sliding and full layers, head_dim 256",
        "Gemma2",
        EAGER,
        head_dim=256,
        num_attention_heads=2,
        num_key_value_heads=1,
        **MIXED,
    ),
    "gemma3": family("Gemma 3, sliding and full layers", "Gemma3Text", head_dim=16, query_pre_attn_scalar=4, **MIXED),
    "gemma4": family(
        "Gemma 4, layers that share keys and values",
        "Gemma4Text",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=16,
        global_head_dim=32,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        **SLIDING,
    ),
    "gpt_neox": family("GPT-NeoX, rotary in a quarter of the channels", "GPTNeoX", rotary_pct=0.25),
    "gptj": Family("GPT-J, interleaved rotary", "GPTJConfig", GPT | {"rotary_dim": 8}, EAGER),
    "gpt_oss": family(
        "GPT-OSS, attention sinks, sliding and full layers", "GptOss", EAGER, head_dim=16, **EXPERTS, **MIXED
    ),
    "cohere": family("Cohere, interleaved rotary", "Cohere"),
    "olmo2": family("OLMo 2", "Olmo2"),
    "smollm3": family("SmolLM3, a layer without positions", "SmolLM3", no_rope_layers=[1, 0]),
    "gpt2": Family("GPT-2, learned positions", "GPT2Config", GPT),
    "falcon_alibi": family("Falcon with ALiBi", "Falcon", alibi=True),
    "bloom": family("BLOOM, ALiBi", "Bloom", EAGER),
    "qwen3_next": family(
        "Qwen3-Next, linear and full attention",
        "Qwen3Next",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    "lfm2": family("LFM2, convolutions and full attention", "Lfm2", layer_types=["conv", "full_attention"]),
    "falcon_h1": family(
        "Falcon-H1, state space and attention in each layer",
        "FalconH1",
        head_dim=16,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "deepseek_v2": family("DeepSeek V2, latent attention", "DeepseekV2", **LATENT),
    "deepseek_v3": family("DeepSeek V3 and R1, latent attention", "DeepseekV3", **LATENT),
    "llava": Family(
        "LLaVA, images before Llama",
        "LlavaConfig",
        BASE | {"model_type": "llama"},
        vision={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": IMAGE_SIZE,
            "patch_size": 16,
            "projection_dim": 32,
        },
        auto="AutoModelForImageTextToText",
    ),
    "qwen2_vl": Family(
        "Qwen2-VL, images, positions of three axes",
        "Qwen2VLConfig",
        BASE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision={"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "hidden_size": 64},
        auto="AutoModelForImageTextToText",
    ),
}

# Attention that cannot be replaced by name; that of GPT-J can be from transformers 5.24 on.
WITHOUT_INTERFACE = {"falcon_alibi", "bloom"}
if not hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):
    WITHOUT_INTERFACE.add("gptj")


@cache
def build(name: str, attention: str = "sdpa") -> PreTrainedModel:
    """Return the model of a family; always the same object, so leave it as it is."""
    made = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = made.make_config()
        model = getattr(transformers, made.auto).from_config(config, attn_implementation=attention).eval()
        model.requires_grad_(requires_grad=False)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0 and norms at 1, which would hide them
                nn.init.normal_(parameter.data, float(parameter.data.mean()), 0.2)
        model.get_input_embeddings().weight.data *= 0.5  # less of the token itself, more of what it attends to
    assert model.config.get_text_config()._attn_implementation == attention
    return model


def inputs(model: PreTrainedModel, tokens: int, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Draw a prompt, all its rows with the same first token; with an image in it if the model reads images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VISION_START, (batch, tokens), generator=generator)
    ids[:, 0] = 2
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return {"input_ids": ids}
    ids[:, 3], ids[:, 4 : 4 + IMAGE_LENGTH] = VISION_START, IMAGE_TOKEN
    if model.config.model_type == "llava":
        pixels = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels}
    side = IMAGE_SIZE // vision.patch_size
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(batch * side**2, patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        "mm_token_type_ids": (ids == IMAGE_TOKEN).long(),
    }
