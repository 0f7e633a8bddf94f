"""The rotation read from a config is the one the model applies, for every kind of rope and layout.

A trick makes one test serve all models: at position 0 every rotation is the identity.  The first layer
sees embeddings only, so its keys at position 0 are the keys before rotation, times the constant
attention scaling that some rope types put on them, whatever else the model does on the way (norms,
biases, clipping).  With the output of attention set to zero, this holds for the deeper layers too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from nexusquant_cache import NexusQuantCache
from nexusquant_cache.cache.rotary import rotary_phase, rotary_phases
from nexusquant_cache.releases import CACHE

POSITIONS = [0, 1, 2, 17, 63, 64, 65, 100, 200, 255, 256, 500]
TINY = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_TINY = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 32, "n_positions": 1024, "n_ctx": 1024}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
# What projects the attention's output back, in the families below.
OUTPUTS = ("o_proj", "out_proj", "dense.", "c_proj")


def scaled(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}}


LONGROPE = scaled(
    "longrope",
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    long_factor=[2.0 + i for i in range(8)],
    original_max_position_embeddings=512,
) | {"original_max_position_embeddings": 512}  # Phi 3 reads it here
PER_TYPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}


@dataclass(frozen=True)
class Family:
    """A tiny model, and what its config says about rope: pairs of channels per layer (0 for none), and their layout."""

    name: str
    options: dict[str, Any]
    pairs: tuple[int, ...] = (8, 8, 8, 8)
    interleaved: bool = False
    last_position: int = 500

    def config(self) -> PreTrainedConfig:
        return getattr(transformers, f"{self.name}Config")(**self.options)


FAMILIES = {
    "llama": Family("Llama", TINY),
    "llama head_dim": Family("Llama", TINY | {"head_dim": 32}, (16,) * 4),
    "llama linear": Family("Llama", TINY | scaled("linear", factor=4.0)),
    "llama dynamic": Family("Llama", TINY | scaled("dynamic", factor=4.0)),
    "llama yarn": Family("Llama", TINY | scaled("yarn", factor=4.0, original_max_position_embeddings=256)),
    "llama3": Family(
        "Llama",
        TINY
        | scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256),
    ),
    "phi3 longrope short": Family("Phi3", TINY | LONGROPE),
    "phi3 longrope long": Family("Phi3", TINY | LONGROPE, last_position=512),
    "gpt_oss yarn": Family("GptOss", TINY | MOE | {"head_dim": 16, "num_local_experts": 2}),
    "mistral": Family("Mistral", TINY),
    "qwen2": Family("Qwen2", TINY),
    "qwen3": Family("Qwen3", TINY | {"head_dim": 16}),
    "gemma3": Family("Gemma3Text", TINY | SLIDING | PER_TYPE | {"head_dim": 16}),
    "gemma4 proportional": Family(
        "Gemma4Text",
        TINY
        | SLIDING
        | {"head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 32},
        (8, 16, 8, 16),
    ),
    "hunyuan fixed ntk": Family("HunYuanDenseV1", TINY | {"head_dim": 16} | scaled("dynamic", factor=1.0, alpha=50.0)),
    "olmo2": Family("Olmo2", TINY),
    "phi": Family("Phi", TINY | {"partial_rotary_factor": 0.5}, (4,) * 4),
    "gpt_neox": Family("GPTNeoX", TINY | {"rotary_pct": 0.25}, (2,) * 4),
    "stablelm": Family("StableLm", TINY | {"partial_rotary_factor": 0.25}, (2,) * 4),
    "nemotron": Family("Nemotron", TINY | {"partial_rotary_factor": 0.5, "head_dim": 16}, (4,) * 4),
    "nanochat": Family("NanoChat", TINY),
    "granite": Family("Granite", TINY),
    "gptj": Family("GPTJ", GPT_TINY | {"rotary_dim": 8}, (4,) * 4, interleaved=True),
    "codegen": Family("CodeGen", GPT_TINY | {"rotary_dim": 8}, (4,) * 4, interleaved=True),
    "cohere": Family("Cohere", TINY, interleaved=True),
    "cohere2": Family("Cohere2", TINY | SLIDING, (8, 0, 8, 0), interleaved=True),
    "glm": Family("Glm", TINY | {"head_dim": 16, "partial_rotary_factor": 0.5}, (4,) * 4, interleaved=True),
    "glm4": Family("Glm4", TINY | {"head_dim": 16, "partial_rotary_factor": 0.5}, (4,) * 4, interleaved=True),
    "helium": Family("Helium", TINY | {"head_dim": 16}, interleaved=True),
    "ernie4_5": Family("Ernie4_5", TINY | {"head_dim": 16}, interleaved=True),
    "llama4": Family(
        "Llama4Text",
        TINY | MOE | {"head_dim": 16, "intermediate_size_mlp": 32, "no_rope_layers": [1, 1, 0, 1]},
        (8, 8, 0, 8),
        interleaved=True,
    ),
    "smollm3": Family("SmolLM3", TINY | {"no_rope_layers": [1, 0, 1, 1]}, (8, 0, 8, 8)),
    "exaone4": Family("Exaone4", TINY | SLIDING, (8, 0, 8, 0)),
    "exaone4 no window": Family("Exaone4", TINY | {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "falcon": Family("Falcon", TINY | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon alibi": Family("Falcon", TINY | {"alibi": True}, (0,) * 4),
    "bloom": Family("Bloom", TINY, (0,) * 4),
    "gpt2": Family("GPT2", GPT_TINY, (0,) * 4),
    "opt": Family("OPT", TINY | {"ffn_dim": 32, "word_embed_proj_dim": 64}, (0,) * 4),
}
ROTARY = {name: family for name, family in FAMILIES.items() if any(family.pairs)}


class RecordingCache(DynamicCache):
    """Keep the keys as they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.arrived[layer_idx] = key_states.clone()
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a random model whose layers all see the embeddings, because attention adds nothing to them."""
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if any(output in name for output in OUTPUTS):
            nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def arriving_keys(model: PreTrainedModel, positions: Tensor) -> list[Tensor]:
    cache = RecordingCache()
    ids = torch.arange(positions.numel())[None] % 29 + 3
    model(input_ids=ids, position_ids=positions[None], **{CACHE: cache}, use_cache=True)
    return [cache.arrived[layer_idx] for layer_idx in sorted(cache.arrived)]


def angle_rounding(positions: Tensor) -> float:
    """Bound the error of an angle: models round frequency x position to float32, and so does a sine's argument."""
    return float(positions.max() + 8) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("family", ROTARY.values(), ids=ROTARY.keys())
def test_removing_the_rotation_gives_the_keys_of_position_zero(family: Family) -> None:
    """R(-p) k_p = k_0, in every layer, where k_0 includes the constant attention scaling."""
    config, positions = family.config(), torch.tensor([*POSITIONS, family.last_position])
    model = tiny_model(config)
    turned, plain = arriving_keys(model, positions), arriving_keys(model, torch.zeros_like(positions))
    assert len(turned) == len(family.pairs)
    for layer_idx, (keys, expected) in enumerate(zip(turned, plain, strict=True)):
        phase = rotary_phase(config, layer_idx, seen_tokens=int(positions.max()) + 1)
        if phase is None:
            removed = keys
        else:
            assert not torch.allclose(keys, expected, atol=0.05)
            removed = phase.rotate(keys, positions, inverse=True)
        error = (removed - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() <= angle_rounding(positions)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_what_the_config_says(family: Family) -> None:
    for layer_idx, pairs in enumerate(family.pairs):
        phase = rotary_phase(family.config(), layer_idx, seen_tokens=family.last_position + 1)
        if pairs == 0:
            assert phase is None
        else:
            assert phase is not None
            assert (phase.rotary_dim, phase.interleaved) == (2 * pairs, family.interleaved)


@pytest.mark.parametrize("family", ROTARY.values(), ids=ROTARY.keys())
def test_removing_and_restoring_is_the_identity_to_rounding(family: Family) -> None:
    """R(p) R(-p) k = k."""
    keys, positions = torch.randn(2, 2, len(POSITIONS), 64), torch.tensor(POSITIONS)
    config = family.config()
    layers = range(config.get_text_config(decoder=True).num_hidden_layers)
    for phase in (rotary_phase(config, layer_idx, seen_tokens=501) for layer_idx in layers):
        if phase is not None:
            back = phase.rotate(phase.rotate(keys, positions, inverse=True), positions)
            assert (back - keys).norm() <= 8 * torch.finfo(torch.float32).eps * keys.norm()


def test_keys_of_all_layers_of_a_real_forward_pass() -> None:
    """Without any trick: what `k_proj` computes is what the cache receives, turned."""
    config = transformers.LlamaConfig(**TINY)
    model = transformers.LlamaForCausalLM(config).eval()
    projected: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda _, __, output: projected.append(output))
    positions = torch.arange(64)
    for layer_idx, keys in enumerate(arriving_keys(model, positions)):
        expected = projected[layer_idx].view(1, 64, 2, 16).transpose(1, 2)
        phase = rotary_phase(config, layer_idx, seen_tokens=64)
        assert phase is not None
        removed = phase.rotate(keys, positions, inverse=True)
        assert (removed - expected).norm() <= angle_rounding(positions) * expected.norm()


def test_longrope_changes_factors_beyond_the_original_context() -> None:
    short, long = (rotary_phase(FAMILIES["phi3 longrope short"].config(), 0, seen) for seen in (512, 513))
    assert short is not None
    assert not short.matches(long)


def test_layers_with_equal_rotations_share_one_object() -> None:
    cache = NexusQuantCache(config=FAMILIES["gemma3"].config())
    phases = [cache.make_phase(layer_idx, seen_tokens=8) for layer_idx in range(4)]
    assert phases[0] is phases[2]
    assert phases[1] is phases[3]
    assert phases[0] is not phases[1]
    assert NexusQuantCache(config=FAMILIES["cohere2"].config()).make_phase(1, seen_tokens=8) is None


def test_text_part_of_a_multimodal_config() -> None:
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(**TINY), vision_config={})
    phase = rotary_phase(config, 0, seen_tokens=8)
    assert phase is not None
    assert phase.rotary_dim == 16


@pytest.mark.parametrize(
    ("change", "rotary"),
    [
        (lambda config: setattr(config, "position_embedding_type", None), False),
        (lambda config: setattr(config, "position_embedding_type", "rope"), True),
        (lambda config: setattr(config, "use_mem_rope", False), False),
        (lambda config: setattr(config, "rope_parameters", None), False),
        (lambda config: setattr(config, "layer_rope_theta", [0.0, 1e4, 1e4, 1e4]), False),
        (lambda config: setattr(config, "layer_rope_theta", [1e4, 0.0, 0.0, 0.0]), True),
    ],
)
def test_ways_to_say_that_a_layer_has_no_rope(change: Callable[[PreTrainedConfig], None], rotary: bool) -> None:
    config = transformers.LlamaConfig(**TINY)
    change(config)
    assert (rotary_phase(config, 0, seen_tokens=8) is not None) == rotary


@pytest.mark.parametrize("rope", [scaled("default"), scaled("linear", factor=2.0)])
def test_a_base_per_layer(rope: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(**TINY | rope)
    config.layer_rope_theta = [500.0] * 4
    phase = rotary_phase(config, 0, seen_tokens=8)
    expected = rotary_phase(
        transformers.LlamaConfig(**TINY | {"rope_parameters": rope["rope_parameters"] | {"rope_theta": 500.0}}), 0, 8
    )
    assert phase is not None
    assert phase.matches(expected)
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_dense_prefix_of_cohere2_moe_is_rotary_without_a_window() -> None:
    config = transformers.LlamaConfig(**TINY | SLIDING)
    config.model_type = "cohere2_moe"
    config.mlp_layer_types, config.prefix_dense_sliding_window_pattern = ["dense", "dense", "sparse", "sparse"], 1
    assert [phase is not None for phase in rotary_phases(config, seen_tokens=8)] == [True, True, True, False]
