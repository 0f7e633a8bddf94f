"""What caches of a model hold at a length, without its weights: the work behind ``nexusquant-cache fit``."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.evaluation.caches import PLAIN, update
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.steps import Report, Step, no_report
from nexusquant_cache.layer.parts import part_of
from nexusquant_cache.policy import RecentAttentionPolicy
from nexusquant_cache.presets import PRESETS, preset_names

_HALF_BYTES = 2
_WINDOW = 64  # queries that the policy looks at
_KEY_OCTAVES = 7.5
_MOST_CHANNELS = 1 << 26  # of the keys of one head, which are really made and coded


@dataclass(frozen=True)
class Shape:
    """What of a model decides the bytes of its cache.

    Attributes:
        compressed: Layers that a `NexusQuantCache` compresses.
        window_tokens: Of each other layer how many tokens it holds at most; 0 for linear attention, whose states hold
            none, and are not counted.
        kv_heads: Key heads of a layer.
        head_dim: Channels of a head.
    """

    compressed: int
    window_tokens: tuple[int, ...]
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "Shape":
        """Return the shape of a model.

        Raises:
            EvaluationError: If the config does not say it.
        """
        text = config.get_text_config(decoder=True)
        cache = NexusQuantCache("quant", config=text)
        parts = [part_of(layer, index) for index, layer in enumerate(cache.layers)]
        windows = tuple(int(getattr(part.layer, "sliding_window", 0) or 0) for part in parts if part.state is None)
        heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
        head_dim = getattr(text, "head_dim", None)
        if head_dim is None and getattr(text, "num_attention_heads", None):
            head_dim = text.hidden_size // text.num_attention_heads
        if not isinstance(heads, int) or not isinstance(head_dim, int):
            msg = f"the config of {text.model_type} does not say how many key heads of how many channels a layer has"
            raise EvaluationError(msg)
        return cls(len(parts) - len(windows), windows, heads, head_dim)

    def layer_bytes(self, tokens: int) -> int:
        """Return the bytes of so many tokens of one layer in 16 bit."""
        return 2 * _HALF_BYTES * self.kv_heads * self.head_dim * tokens

    def window_bytes(self, tokens: int) -> int:
        """Return the bytes of the layers that are not compressed."""
        return sum(self.layer_bytes(min(window, tokens)) for window in self.window_tokens)


@dataclass(frozen=True)
class Fit:
    """What one cache holds of one prompt, in bytes.

    Attributes:
        name: The preset, or ``"plain"``.
        held_bytes: Once the prompt is read and a token generated.
        reading_bytes: The most while the prompt is read in one piece: the codes of all its tokens, and a layer in full
            precision.
    """

    name: str
    held_bytes: int
    reading_bytes: int


def fit(
    shape: Shape, tokens: int, presets: Iterable[str] = (), *, batch: int = 1, report: Report = no_report
) -> list[Fit]:
    """Return what the plain cache and presets hold of prompts of so many tokens.

    One head of one layer is really compressed, from random numbers; all others hold as much, on average.

    Args:
        shape: Of the model.
        tokens: Tokens of each prompt.
        presets: The presets, all if none is named.
        batch: Prompts at once.
        report: Called as work goes on.

    Raises:
        EvaluationError: If a number is below 1, or the prompt too long to be tried.
        OptionError: If there is no such preset.
    """
    for what, value in (("tokens", tokens), ("batch", batch)):
        if value < 1:
            msg = f"{what} must be at least 1, got {value}"
            raise EvaluationError(msg)
    if tokens * shape.head_dim > _MOST_CHANNELS:
        most = _MOST_CHANNELS // shape.head_dim
        msg = f"tokens may be {most:,} at most for heads of {shape.head_dim} channels, got {tokens:,}"
        raise EvaluationError(msg)
    names = preset_names(presets) or tuple(PRESETS)
    windows, dense = shape.window_bytes(tokens), shape.compressed * shape.layer_bytes(tokens)
    found = [Fit(PLAIN, batch * (windows + dense), batch * (windows + dense))]
    for done, name in enumerate(names):
        report(Step("compressing a head", done, len(names), name))
        kept, coded = (shape.compressed * shape.kv_heads * x for x in head_bytes(name, tokens, shape.head_dim))
        reading = min(windows + coded + shape.layer_bytes(tokens), windows + dense)
        found.append(Fit(name, batch * (windows + kept), batch * reading))
    return found


def random_tokens(
    heads: int, tokens: int, head_dim: int, random: torch.Generator
) -> tuple[Float[Tensor, "1 h n d"], Float[Tensor, "1 h n d"]]:
    """Return random keys and values that hold as many bytes as a model's.

    The variance of the keys falls by 7.5 octaves over the pairs of channels that the rotary phase turns: principal axes
    then save 0.7 bits per channel, about as many as of a model's keys, and are worth their bytes as often.
    """
    keys, values = torch.randn(2, 1, heads, tokens, head_dim, generator=random)
    deviations = torch.exp2(-_KEY_OCTAVES / 2 * torch.linspace(0, 1, head_dim // 2).repeat(2))
    return keys * deviations, values


@torch.no_grad()
def head_bytes(preset: str, tokens: int, head_dim: int) -> tuple[int, int]:
    """Return the bytes that a head of a layer holds of a prompt, in a 16-bit model.

    Returns:
        Those with a generated token, and those of the codes of all tokens, before it is decided what is kept.
    """
    config = LlamaConfig(
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        hidden_size=head_dim,
        max_position_embeddings=2 * tokens,
    )
    # Which tokens stay is nothing to bytes, and the default policy would look at all pairs of them.
    policy = RecentAttentionPolicy(observation_window=_WINDOW, aggregate="max")
    cache = NexusQuantCache(preset, config=config, policy=policy)
    random = torch.Generator().manual_seed(0)
    held = []
    for count in (tokens, 1):
        keys, values = (x.bfloat16() for x in random_tokens(1, count, head_dim, random))
        update(cache, keys, values, 0, keys[:, :, -_WINDOW:])
        layer: Any = cache.layers[0]
        layer.encode()  # as when the next layer is given the prompt
        held.append(cache.memory_report().layers[0].held_bytes)
    return held[1], held[0]
