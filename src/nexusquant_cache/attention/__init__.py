"""For models whose attention is not torch's own, and two ways to look at attention.

A cache sees attention by itself where models compute it with `scaled_dot_product_attention` or with two matrix products
around a softmax (``"sdpa"`` and ``"eager"`` of transformers); then none of this is needed.  It cannot see flash and
flex attention and the kernels of other libraries.  For these, `enable` puts a function in front that shows the cache
its queries and its mask, and answers from the codes where there are any::

    attention.enable(model)
    model.generate(**inputs, cache=NexusQuantCache(config=model.config))

Everything else (the prefill, other caches, other layers) is computed by the implementation that the model had before,
bit for bit.  Nothing is registered when this package is imported: `enable` does it, through transformers'
`AttentionInterface` and `AttentionMaskInterface`.

`reconstruct` has a model read a prompt once more; `record_queries` records queries, whatever the cache.
"""

from nexusquant_cache.attention.enable import disable, enable
from nexusquant_cache.attention.reconstruction import reconstruct
from nexusquant_cache.attention.recording import record_queries

__all__ = ["disable", "enable", "reconstruct", "record_queries"]
