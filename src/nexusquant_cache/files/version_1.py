"""What files of version 1 say otherwise: which tokens are padding, as a mask or the keys themselves had told."""

import torch
from jaxtyping import Int
from torch import Tensor

from nexusquant_cache.files.schema import LayerMeta, PaddingMeta
from nexusquant_cache.files.state import Source
from nexusquant_cache.layer.host import HOST
from nexusquant_cache.layer.state import LayerState


def sink_positions(places: Int[Tensor, "b 2"], sinks: int) -> Int[Tensor, "b s"]:
    """Return the positions of the sinks; a file says where the first one of each row is, and how many pads it keeps."""
    return places[:, :1] + torch.arange(sinks, device=places.device)


def restore_padding(state: LayerState, meta: LayerMeta, padding: PaddingMeta, source: Source) -> None:
    """Put what the file says of padding in a layer that has everything else."""
    if state.tail is None:
        return
    if meta.sink_place:
        places = source.tensors[f"layers.{state.layer_idx}.sink_place"]
        if state.sink_tokens:
            state.sink_positions = sink_positions(places, state.sink_tokens).to(source.device)
        # Where a row has more pads than could be coded, its sinks are pads, and its text begins behind them.
        state.origins = source.tensor("padding.pads").clone()
    if not padding.certain or padding.settled_at is None:
        return
    state.shown = (0, state.seen)  # so that a prompt that waits is evicted from, as its cache would have done
    if padding.pads is not None:
        order = torch.arange(state.seen - state.tail_tokens, state.seen, device=HOST)
        pads = order < source.tensors["padding.pads"][:, None]
        state.pads = pads.to(source.device) if bool(pads.any()) else None
