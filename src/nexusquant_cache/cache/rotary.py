"""Read from a transformers config which rotation each layer applies to its keys.

transformers offers the frequencies of every scaled rope type (`ROPE_INIT_FUNCTIONS`), but keeps three
things in its modeling files: the plain frequencies, which channels form a pair, and which layers have no
rotary embedding at all.  They are written down here, as found in transformers 5.17 to 5.24.

A model that is missing from these lists is taken for the common case (channel ``i`` paired with
``i + pairs``, every layer rotary).  Nothing breaks if that is wrong: what is removed before encoding is
put back after decoding, whatever it is; only the quality suffers.  The same holds for positions that
are not the token's index in its row (images in multimodal rope).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nexusquant_cache.codec.rope import RotaryPhase

# Channels (2 i, 2 i + 1) form a pair.  Models with latent attention are not listed: what they cache as
# keys is not rotated at all.
INTERLEAVED = frozenset(
    {
        "blt",
        "blt_global_transformer",
        "blt_local_decoder",
        "blt_local_encoder",
        "blt_patcher",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe_text",
        "glm",
        "glm4",
        "glm4v_text",
        "glm_ocr_text",
        "gptj",
        "helium",
        "llama4_text",
        "moonshine",
        "moonshine_streaming",
    }
)

# The rotation goes the other way round.
BACKWARDS = frozenset({"nanochat"})

# Only the sliding-window layers are rotary.
ROTARY_IF_SLIDING = frozenset({"afmoe", "cohere2", "cohere2_moe", "flint"})

# The same, provided that the config has a window at all; otherwise every layer is rotary.
ROTARY_IF_SLIDING_OR_NO_WINDOW = frozenset({"exaone4", "exaone4_5", "exaone_moe", "kolibri1"})

# Attention with a bias by distance (ALiBi); Falcon's config says for each model.
ALIBI = frozenset({"bloom", "mpt"})

# What configs call the buckets of a bias by distance: T5 and its relatives, CPM-Ant, ProphetNet.
_RELATIVE_BUCKETS = ("relative_attention_num_buckets", "position_bias_num_buckets", "relative_max_distance")

# Rotary before `rope_parameters` existed: fixed base, `rotary_dim` channels.
SINUSOIDAL = frozenset({"codegen", "gptj"})
_SINUSOIDAL_BASE = 10000.0


def rotary_phase(config: PreTrainedConfig, layer_idx: int, seen_tokens: int) -> RotaryPhase | None:
    """Return the rotation that a layer of the model applies to its keys.

    Args:
        config: Configuration of the model, or of a multimodal model around it.
        layer_idx: Index of the attention layer.
        seen_tokens: Tokens that the model has processed when the rotation is to be removed.  Only
            longrope depends on it: its long factors hold for all positions of a forward pass that goes
            beyond the original context.  Dynamic NTK scaling is taken at its base frequencies.

    Returns:
        The rotation without its constant attention scaling, or None if the layer has none.
    """
    text = config.get_text_config(decoder=True)
    inv_freq = _frequencies(text, layer_idx, seen_tokens) if _is_rotary(text, layer_idx) else None
    if inv_freq is None or inv_freq.numel() == 0:
        return None
    inv_freq = inv_freq.detach().to("cpu", torch.float32)
    return RotaryPhase(-inv_freq if text.model_type in BACKWARDS else inv_freq, text.model_type in INTERLEAVED)


def rotary_phases(config: PreTrainedConfig, seen_tokens: int) -> list[RotaryPhase | None]:
    """Return `rotary_phase` of every layer; equal rotations are one object and share their tables."""
    found: list[RotaryPhase] = []
    phases: list[RotaryPhase | None] = []
    for layer_idx in range(config.get_text_config(decoder=True).num_hidden_layers):
        phase = rotary_phase(config, layer_idx, seen_tokens)
        known = next((known for known in found if known.matches(phase)), None)
        if phase is not None and known is None:
            found.append(phase)
        phases.append(known or phase)
    return phases


def bias_by_distance(config: PreTrainedConfig) -> str | None:
    """Return what the model's attention does with distances besides its positions, or None if it does nothing such.

    Distances stay right when tokens are evicted, since states and masks have a place for every token seen.  But scores
    know nothing of the bias, so a policy may keep what attention will never look at.
    """
    if _has_distance_biases(config):
        return "weighs tokens by their distance (ALiBi)"
    if any(getattr(config, name, None) is not None for name in _RELATIVE_BUCKETS):
        return "weighs tokens by their distance (relative position buckets)"
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo, whose layers look like full attention
        return "cuts a local window"
    return None


def is_self_attention(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Tell whether a layer attends to the text itself, and not to an image."""
    return layer_idx not in (getattr(config, "cross_attention_layers", None) or ())  # Llama 3.2 Vision


def _has_distance_biases(config: PreTrainedConfig) -> bool:
    return config.model_type in ALIBI or bool(getattr(config, "alibi", False))


def _is_rotary(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Tell whether the layer applies any rotary embedding."""
    if _has_distance_biases(config):
        return False
    # Multi-head latent attention caches latents that are not rotary in the place of keys.
    if getattr(config, "kv_lora_rank", None):
        return False
    if getattr(config, "position_embedding_type", "rope") != "rope":  # hybrid Granite models without positions
        return False
    if not getattr(config, "use_mem_rope", True):  # Zamba 2
        return False
    # Lists of truth values or thetas per layer, where zero means none (SmolLM3, Llama 4; Granite SWA).
    for name in ("no_rope_layers", "layer_rope_theta"):
        uses_rope = _entry(getattr(config, name, None), layer_idx)
        if uses_rope is not None and not uses_rope:
            return False
    return _layer_type_is_rotary(config, layer_idx)


def _layer_type_is_rotary(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Tell whether the layer's kind of attention is rotary in this model."""
    if config.model_type in ROTARY_IF_SLIDING_OR_NO_WINDOW and getattr(config, "sliding_window", None) is None:
        return True
    if config.model_type not in ROTARY_IF_SLIDING | ROTARY_IF_SLIDING_OR_NO_WINDOW:
        return True
    return _layer_type(config, layer_idx) == "sliding_attention" or _is_rotary_prefix(config, layer_idx)


def _is_rotary_prefix(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Tell whether the layer is one of Cohere 2 MoE's dense first layers, which may be rotary without a window."""
    is_dense = _entry(getattr(config, "mlp_layer_types", None), layer_idx) == "dense"
    return is_dense and getattr(config, "prefix_dense_sliding_window_pattern", None) == 1


def _frequencies(config: PreTrainedConfig, layer_idx: int, seen_tokens: int) -> Float[Tensor, " pairs"] | None:
    """Return the layer's frequencies as the model computes them, or None if the config has none."""
    if config.model_type in SINUSOIDAL:
        return _plain(_SINUSOIDAL_BASE, config.rotary_dim or config.hidden_size)
    parameters, layer_type = _rope_parameters(config, layer_idx)
    if parameters is None or parameters.get("rope_theta") is None:
        return None
    rope_type = parameters.get("rope_type", "default")
    has_fixed_ntk = rope_type == "dynamic" and bool(parameters.get("alpha"))  # HunYuan's own variant
    if rope_type not in ROPE_INIT_FUNCTIONS or has_fixed_ntk:
        return _default(config, layer_idx, parameters)
    theta = _entry(getattr(config, "layer_rope_theta", None), layer_idx)
    if theta:
        config = copy.deepcopy(config)
        config.rope_parameters = {**parameters, "rope_theta": theta}
    # Dynamic NTK moves with the length of each forward pass, so no one setting fits all keys.
    seq_len = seen_tokens if rope_type == "longrope" else None
    extra = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len, **extra)
    return inv_freq


def _rope_parameters(config: PreTrainedConfig, layer_idx: int) -> tuple[dict[str, Any] | None, str | None]:
    """Return the layer's rope parameters, and its layer type if the config has parameters for each type."""
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    layer_type = _layer_type(config, layer_idx)
    if layer_type is not None and layer_type in parameters:
        return parameters[layer_type], layer_type
    return parameters, None


def _default(config: PreTrainedConfig, layer_idx: int, parameters: dict[str, Any]) -> Float[Tensor, " pairs"]:
    """Return unscaled frequencies, which transformers computes in each model's own file."""
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer_idx]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary_dim = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    theta = _entry(getattr(config, "layer_rope_theta", None), layer_idx) or parameters["rope_theta"]
    if parameters.get("alpha"):
        theta *= parameters["alpha"] ** (rotary_dim / (rotary_dim - 2))
    return _plain(theta, rotary_dim)


def _plain(theta: float, rotary_dim: int) -> Float[Tensor, " pairs"]:
    """Return the frequencies of the original paper, rounded as the models round them."""
    return 1.0 / theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32, device="cpu") / rotary_dim)


def _layer_type(config: PreTrainedConfig, layer_idx: int) -> str | None:
    """Return the layer's kind of attention, where the config names kinds."""
    layer_type = _entry(getattr(config, "layer_types", None), layer_idx)
    return layer_type if isinstance(layer_type, str) else None


def _entry(per_layer: Sequence[Any] | None, layer_idx: int) -> Any:  # noqa: ANN401 - a config may hold anything
    """Return the layer's entry of a list in the config, or None where there is no list or no entry."""
    return per_layer[layer_idx] if per_layer and layer_idx < len(per_layer) else None
