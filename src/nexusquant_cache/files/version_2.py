"""What files of version 2 hold otherwise: rows that kept fewer tokens than others were filled up with hidden ones."""

import torch

from nexusquant_cache.files.contents import HIDDEN
from nexusquant_cache.files.state import Source
from nexusquant_cache.layer.state import LayerState


def drop_hidden(state: LayerState, source: Source) -> None:
    """Let go of the hidden tokens of a layer that has everything else."""
    assert state.body is not None
    positions = state.body.positions
    assert positions.bitmap is not None
    hidden = positions.bits_of(source.tensor(f"layers.{state.layer_idx}.{HIDDEN}"))
    kept = positions.bits_of(positions.bitmap)
    stay = torch.ones(*kept.shape[:2], positions.tokens, dtype=torch.bool, device=kept.device)
    stay[..., : positions.kept] = ~hidden[kept].view(*kept.shape[:2], positions.kept)
    later = torch.ones(*kept.shape[:2], positions.dense, dtype=torch.bool, device=kept.device)
    positions.dense = 0
    positions.cover(torch.cat([kept & ~hidden, later], -1))
    state.body.choose(stay)
