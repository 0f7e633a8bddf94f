"""Attention while nothing is coded, which is torch's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.attention import SDPBackend

_FLASH: Callable[..., tuple[Tensor, Tensor]] | None = getattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None
)
_SUMMED = {torch.float32, torch.bfloat16, torch.float16}  # the sums are float32 for all


@dataclass(frozen=True)
class ExactAttention:
    """How `scaled_dot_product_attention` was asked to attend: its arguments."""

    attn_mask: Shaped[Tensor, "*mask"] | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool

    def attend(
        self,
        function: Callable[..., Tensor],
        query: Float[Tensor, "b q m d"],
        key: Float[Tensor, "b h n d"],
        value: Float[Tensor, "b h n dv"],
    ) -> tuple[Float[Tensor, "b q m dv"], Float[Tensor, "b q m"] | None]:
        """Return what the function does, and the logarithm of the sum that each query's softmax divides by.

        torch has the sums where it computes a whole prompt on a CPU, but keeps them to itself; so what it would call
        there is called here.  Elsewhere they are None.
        """
        if _FLASH is None or not self._is_flash_on_cpu(query, key, value):
            return function(query, key, value, **vars(self)), None
        return _FLASH(query, key, value, is_causal=True, scale=self.scale)

    def _is_flash_on_cpu(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Tell whether torch would take this way, for a causal prompt that needs no gradients."""
        given = query, key, value
        if not self.is_causal or self.attn_mask is not None or self.dropout_p or query.shape[2] != key.shape[2]:
            return False
        if any(x.device.type != "cpu" or x.dtype not in _SUMMED for x in given) or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            return False
        choice: int = torch._fused_sdp_choice(  # noqa: SLF001 - it has no public name
            *given, is_causal=True, scale=self.scale, enable_gqa=self.enable_gqa
        )
        flash: int = SDPBackend.FLASH_ATTENTION.value
        return choice == flash
