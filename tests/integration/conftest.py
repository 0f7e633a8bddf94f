"""Models that most of these tests share."""

import pytest
from integration.tiny import tiny_llama
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """Return a tiny Llama, once with each attention; a module that wants another one says so itself."""
    return tiny_llama(request.param)


@pytest.fixture(scope="module")
def sdpa() -> LlamaForCausalLM:
    return tiny_llama("sdpa")
