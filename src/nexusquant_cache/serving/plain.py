"""The same chat through the plain cache, to compare with."""

from typing import Any

from transformers import DynamicCache

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.serving.chat_model import ChatModel
from nexusquant_cache.serving.conversation import Conversation


class PlainCache(NexusQuantCache):
    """A cache whose layers are all transformers' own, so that nothing is coded; it reports and goes back like ours."""

    def _make_layers(self) -> list[Any]:
        return list(DynamicCache(config=self.model_config).layers)


class PlainChatModel(ChatModel):
    """A model that answers through plain caches."""

    def new_conversation(self) -> Conversation:
        """Return an empty one."""
        return Conversation(PlainCache("quant", config=self.model.config))
