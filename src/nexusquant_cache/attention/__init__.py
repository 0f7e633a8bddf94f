"""The attention implementation `nexusquant`: reads the codes of a compressed cache, and lets it see the queries.

Without it each generation step decodes a layer, attends, and drops what was decoded.  With it, steps of a few tokens
read the codes where they lie, by Triton kernels on a GPU that can run them and else in plain torch.  Everything else
(the prefill, many tokens at once, other caches, other layers) is computed by the implementation that the model had
before, bit for bit.  The last queries of a prompt reach the cache, for policies that choose tokens by them::

    attention.enable(model)
    cache = NexusQuantCache(config=model.config, policy=WindowAttentionPolicy())
    model.generate(**inputs, cache=cache)

Nothing is registered when this package is imported: `enable` does it, through transformers' `AttentionInterface` and
`AttentionMaskInterface`.
"""

from nexusquant_cache.attention.enable import disable, enable
from nexusquant_cache.attention.reconstruction import reconstruct
from nexusquant_cache.attention.recording import record_queries

__all__ = ["disable", "enable", "reconstruct", "record_queries"]
