"""Models that most of these tests share, and tables made anew."""

from collections.abc import Iterator
from typing import Any

import pytest
from integration.simulated import forget_tables
from integration.tiny import tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from nexusquant_cache.layer import selection


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    """Return a tiny Llama, once with each attention; a module that wants another one says so itself."""
    return tiny_llama(request.param)


@pytest.fixture(scope="module")
def sdpa() -> LlamaForCausalLM:
    return tiny_llama("sdpa")


@pytest.fixture
def choosing(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Something is in this list while a layer's tokens are decoded to choose from."""
    found: list[Any] = []
    newest = selection.newest

    def noted(*given: Any) -> Tensor:
        found.append(given)
        try:
            return newest(*given)
        finally:
            found.pop()

    monkeypatch.setattr(selection, "newest", noted)
    return found


@pytest.fixture
def fresh_tables() -> Iterator[None]:
    """Compute all tables within this test, and keep none of them."""
    forget_tables()
    yield
    forget_tables()
