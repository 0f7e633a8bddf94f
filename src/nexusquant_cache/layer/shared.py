"""What the layers of a cache share."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from nexusquant_cache.codec.base import VectorCodec
from nexusquant_cache.codec.held import Side
from nexusquant_cache.codec.rope import RotaryPhase
from nexusquant_cache.layer.tokens import LayerTransforms
from nexusquant_cache.policy import EvictionPolicy
from nexusquant_cache.presets import CacheConfig

When = Literal["post_prefill", "during_prefill"]


@dataclass(eq=False)
class Shared:
    """What the layers of a cache share.

    Attributes:
        settings: How the cache spends its bytes.
        when: When it encodes a prompt.
        offloading: Whether codes, and exact tokens of a prompt that waits, stay in host memory.
        mask_shape: Shape of the prompt, if the user has given its mask; None once that was checked.
        make_policy: Returns the policy of a layer.
        make_codec: Returns the codec of a side, for vectors of this length, in a layer.
        compress_waiting: Compresses all layers that wait and are due before an update of so many tokens.
        make_phase: Returns the rotary phase to take off a layer's keys when so many tokens have been seen, or None.
        given_transforms: Of each layer, what it shall use in place of fitting its own; may be empty.
        phases: The rotary phases of the layers, each once.
        has_warned: Whether it was said that nothing is evicted because attention was not seen.
    """

    settings: CacheConfig
    when: When
    offloading: bool
    make_policy: Callable[[int], EvictionPolicy]
    make_codec: Callable[[Side, int, int], VectorCodec]
    make_phase: Callable[[int, int], RotaryPhase | None]
    compress_waiting: Callable[[int], None]
    given_transforms: tuple[LayerTransforms | None, ...] = ()
    phases: list[RotaryPhase] = field(default_factory=list)
    mask_shape: tuple[int, int] | None = None
    has_warned: bool = False

    @property
    def evicts(self) -> bool:
        """Whether a compression drops tokens where it may."""
        return self.settings.keep_ratio < 1

    def given_to(self, layer_idx: int) -> LayerTransforms | None:
        """Return the transforms that a layer shall use in place of fitting its own, if there are any."""
        return self.given_transforms[layer_idx] if layer_idx < len(self.given_transforms) else None

    def warn_code_error(self, layer_idx: int, error: float) -> None:
        """Warn that encoding changes what attention reads from a layer by more than is allowed."""
        warnings.warn(
            f"coding the prompt moves the attention output of layer {layer_idx} by {100 * error:.0f} % of its length, "
            f"also at the most bits its codec has; {100 * self.settings.most_code_error:.0f} % are allowed "
            "(most_code_error). Check the answers against a plain cache, or leave this model uncompressed.",
            stacklevel=2,
        )

    def warn_kept_whole(self, layer_idx: int) -> None:
        """Warn, once for each prompt, that nothing is evicted because attention was not seen."""
        if self.has_warned:
            return
        self.has_warned = True
        warnings.warn(
            f"the attention of layer {layer_idx} was not seen, so all tokens are kept and only quantized. Call "
            "nexusquant_cache.attention.enable(model) before the prompt, for attention that is not torch's own (flash, "
            "flex, kernels). Where the model changes keys between cache and attention, nothing can be evicted.",
            stacklevel=2,
        )
