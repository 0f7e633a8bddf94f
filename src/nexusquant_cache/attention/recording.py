"""`record_queries`: look at the queries of any model, whatever its cache."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nexusquant_cache.attention.enable import attention_modules, enabled
from nexusquant_cache.attention.function import OBSERVERS, Observer
from nexusquant_cache.errors import OptionError


@contextmanager
def record_queries(model: nn.Module, window: int | None) -> Iterator[Mapping[int, Tensor]]:
    """Record the last queries of each layer, over all forwards of a model in this thread inside a ``with`` block.

    For experiments, with any cache or none::

        with torch.no_grad(), record_queries(model, 64) as queries:
            model(input_ids, cache=cache)
        queries[0]  # of layer 0: [batch, query_heads, 64, head_dim]

    The batch has to stay the same.  What a `crop` takes out of a cache stays recorded.

    Args:
        model: The model; `enable` selects the attention for the time of the block.
        window: How many queries to keep; None for all.

    Yields:
        The queries of each layer by index, ``[batch, query_heads, up to window, head_dim]``: as attention sees them
        (with their rotary phase), scaled so that ``queries @ keys.mT / head_dim**0.5`` are the logits of the model.

    Raises:
        OptionError: If the window is empty, or this is no model of transformers.
        UnsupportedError: If the model is one that `enable` refuses.
    """
    if window is not None and window < 1:
        msg = f"window must be at least 1 query, got {window}"
        raise OptionError(msg)
    recorder = _Recorder(attention_modules(model), window)
    with observing(model, recorder):
        yield recorder.queries


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Let an observer see what a model computes attention from in this thread inside a ``with`` block."""
    with enabled(model):
        OBSERVERS.all.append(observer)
        try:
            yield
        finally:
            OBSERVERS.all.remove(observer)


class _Recorder(Observer):
    """Keeps the last queries of each layer."""

    def __init__(self, modules: dict[nn.Module, int], window: int | None) -> None:
        super().__init__(modules)
        self.window = window
        self.queries: dict[int, Tensor] = {}

    def observe(self, layer_idx: int, queries: Tensor, keys: Tensor) -> None:
        """Append queries to those of the layer."""
        del keys
        known, last = self.queries.get(layer_idx, queries[:, :, :0]), slice(self.window and -self.window, None)
        self.queries[layer_idx] = torch.cat([known, queries[:, :, last]], 2)[:, :, last].clone()
