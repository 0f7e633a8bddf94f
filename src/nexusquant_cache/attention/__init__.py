"""The attention implementation `nexusquant`: stock attention that lets a compressed cache see the queries.

transformers shows a cache keys and values, never queries.  With this implementation selected, attention is computed by
the implementation that the model had before, bit for bit, and the last queries of a prompt reach the cache, for
policies that choose tokens by them::

    attention.enable(model)
    cache = NexusQuantCache(config=model.config, policy=WindowAttentionPolicy())
    model.generate(**inputs, past_key_values=cache)

Nothing is registered when this package is imported: `enable` does it, through transformers' `AttentionInterface` and
`AttentionMaskInterface`.
"""

from nexusquant_cache.attention.reconstruction import reconstruct
from nexusquant_cache.attention.recording import record_queries
from nexusquant_cache.attention.selection import disable, enable

__all__ = ["disable", "enable", "reconstruct", "record_queries"]
