"""What transformers calls a cache, in the release that is installed."""

import inspect

import pytest
import transformers
from torch import nn
from transformers import BertConfig, BertModel, LlamaForCausalLM
from transformers.generation import GenerationMixin

from nexusquant_cache.releases import CACHE, CACHE_NAMES, cache_names, is_continuous_batching

RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None, **kwargs):
        raise NotImplementedError


class Nameless(nn.Module):
    def forward(self, *args, **kwargs):
        raise NotImplementedError


class PagedAttentionCache:
    """Named as that of transformers, which is heavy to import."""


def test_the_names_are_those_of_the_release():
    assert CACHE_NAMES == (("cache", "past_key_values") if RELEASE >= (5, 24) else ("past_key_values",))
    assert CACHE == CACHE_NAMES[0]
    assert CACHE in inspect.signature(LlamaForCausalLM.forward).parameters
    assert CACHE in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters


def test_names_that_a_forward_takes():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    assert cache_names(BertModel(config)) == CACHE_NAMES
    assert cache_names(Old()) == ("past_key_values",)
    assert cache_names(Nameless()) == ()


@pytest.mark.parametrize("given", [None, 3, "PagedAttentionCache"])
def test_other_forwards_are_no_continuous_batching(given):
    assert not is_continuous_batching({})
    assert not is_continuous_batching({"cache": given})


def test_continuous_batching():
    assert is_continuous_batching({"cache": PagedAttentionCache()})
