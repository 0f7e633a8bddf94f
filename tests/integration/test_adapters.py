"""PEFT's adapters: those that change weights, those that put embeddings before the prompt, those that hold a cache."""

from typing import Any

import pytest
import torch
from integration.tiny import SMALL, balanced, generate, kept_mask, lossless_cache, prompt, tiny_llama
from torch import Tensor
from transformers import DynamicCache

from nexusquant_cache import NexusQuantCache, UnsupportedError, compressed_generation
from nexusquant_cache.releases import CACHE

peft = pytest.importorskip("peft", reason="PEFT is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
# PEFT 0.21 looks for the cache under the name that it had before transformers 5.24, whichever cache it is.
sees_no_cache = pytest.mark.xfail(
    CACHE != "past_key_values", reason="PEFT looks for the cache under its former name", strict=True
)
VIRTUAL = 10  # tokens


def adapted(config: Any) -> Any:
    """Return a tiny Llama with a random adapter."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_llama(), config).eval()
    return model.requires_grad_(requires_grad=False)


def answer(model: Any, cache: object, ids: Tensor | None = None, **options: Any) -> Tensor:
    """Generate with keywords alone, as PEFT's wrappers want it; return what is new."""
    ids = prompt(60) if ids is None else ids
    given = {CACHE: cache, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
    return model.generate(input_ids=ids, **(given | options))[:, ids.shape[1] :]


# Weights


def lora() -> Any:
    return adapted(
        peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
        )
    )


def test_lora_is_the_merged_model() -> None:
    """The cache sees the keys and values of the adapted weights, whether they are merged or not."""
    model, cache, again = lora(), balanced(tiny_llama()), balanced(tiny_llama())
    said = answer(model, cache)
    assert cache.layers[0].state.kept < cache.get_seq_length() == 71
    with model.disable_adapter():
        assert not torch.equal(answer(model, balanced(tiny_llama())), said)
    assert torch.equal(answer(model.merge_and_unload(), again), said)
    assert torch.equal(kept_mask(again, 0), kept_mask(cache, 0))


def test_lora_without_loss_is_the_plain_cache() -> None:
    model = lora()
    assert torch.equal(answer(model, lossless_cache(model.config)), answer(model, DynamicCache()))


def test_lora_where_no_cache_can_be_passed() -> None:
    model, cache = lora(), balanced(tiny_llama())
    with compressed_generation(model, "balanced", **SMALL) as compressed:
        said = answer(model, None)
    assert torch.equal(said, answer(model, cache))
    assert torch.equal(kept_mask(compressed.cache, 1), kept_mask(cache, 1))


# Embeddings before the prompt


def prompt_tuned() -> Any:
    return adapted(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))


def answer_embedded(model: Any, cache: object) -> Tensor:
    """Put the virtual tokens before the prompt by hand, as the documentation shows."""
    base, ids = model.get_base_model(), prompt(60)
    embeds = torch.cat([model.get_prompt(batch_size=1), base.get_input_embeddings()(ids)], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    return base.generate(
        inputs_embeds=embeds, attention_mask=mask, **{CACHE: cache}, do_sample=False, max_new_tokens=12
    )


def test_virtual_tokens_put_there_by_hand_are_coded_like_others() -> None:
    model, plain, cache = prompt_tuned(), DynamicCache(), balanced(tiny_llama())
    said = answer_embedded(model, plain)
    assert torch.equal(answer_embedded(model, lossless_cache(model.get_base_model().config)), said)
    answer_embedded(model, cache)
    assert cache.layers[0].state.kept < cache.get_seq_length() == plain.get_seq_length() == VIRTUAL + 71


def test_prompt_tuning_is_that_of_the_plain_cache() -> None:
    """Whatever PEFT does with the virtual tokens, it does the same with ours."""
    model, plain = prompt_tuned(), DynamicCache()
    whole = lossless_cache(model.get_base_model().config)
    assert torch.equal(answer(model, whole), answer(model, plain))
    assert whole.get_seq_length() == plain.get_seq_length()


@sees_no_cache
def test_prompt_tuning_puts_its_tokens_there_once() -> None:
    model, plain = prompt_tuned(), DynamicCache()
    assert torch.equal(answer(model, plain), answer_embedded(model, DynamicCache()))


# A cache of its own


def prefix_tuned() -> Any:
    return adapted(peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL))


def answer_behind_prefix(model: Any, cache: Any) -> Tensor:
    """Let a cache begin with the prefix, as the documentation shows."""
    for index, layer in enumerate(model.get_prompt(batch_size=1).layers):
        cache.update(layer.keys, layer.values, index)
    ids = torch.cat([torch.zeros(1, VIRTUAL, dtype=torch.long), prompt(60)], dim=1)  # nobody looks at the first ones
    return answer(model.get_base_model(), cache, ids)


def test_a_cache_may_begin_with_a_prefix() -> None:
    """The tokens of the plain cache, which are not those without the prefix; and every token is coded and kept."""
    model = prefix_tuned()
    config = model.get_base_model().config
    said = answer_behind_prefix(model, DynamicCache())
    assert torch.equal(answer_behind_prefix(model, lossless_cache(config)), said)
    assert not torch.equal(generate(tiny_llama(), prompt(60), DynamicCache())[:, 60:], said)
    cache = NexusQuantCache("quant", config=config, **SMALL)
    answer_behind_prefix(model, cache)
    assert cache.layers[0].state.kept == cache.get_seq_length() == VIRTUAL + 71
    assert cache.layers[0].state.tail_tokens < 20


@sees_no_cache
def test_prefix_tuning_uses_its_prefix_and_no_cache_of_ours() -> None:
    model = prefix_tuned()
    cache = balanced(tiny_llama())
    assert torch.equal(answer(model, cache), answer_behind_prefix(model, DynamicCache()))
    assert cache.get_seq_length() == 0


def test_prefix_tuning_is_refused_where_no_cache_can_be_passed() -> None:
    model = prefix_tuned()
    with (
        pytest.raises(UnsupportedError, match="prefix tuning puts a cache of its own in the place of any other"),
        compressed_generation(model),
    ):
        pass
    with compressed_generation(model.get_base_model(), "balanced", **SMALL) as compressed:
        answer(model.get_base_model(), None)
    assert compressed.cache.get_seq_length() == 71
