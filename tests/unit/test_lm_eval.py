"""The model class for lm-eval: what is scored and generated goes through compressed caches."""

import copy
from types import SimpleNamespace

import pytest
import torch
from unit.evaluation_tiny import build_model, build_tokenizer
from unit.serving_tiny import SMALL

from nexusquant_cache import CacheConfig, NexusQuantCache, OptionError, UnsupportedError
from nexusquant_cache.releases import CACHE

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from nexusquant_cache.evaluation.lm_eval import NexusQuantLM

CONTEXT = "The first sentence says little, and the second one says even less than the first one did." * 2
KEEPS_ALL = CacheConfig(min_tokens=10_000)
PAIRS = ((CONTEXT, "yes"), (CONTEXT, "n"), ("A short one.", "and a longer continuation"), (CONTEXT, "maybe"))


def instances(pairs):
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0, metadata=("task", 0, 1)) for pair in pairs
    ]


def loaded(kind=NexusQuantLM, **options):
    return kind(build_model(), tokenizer=build_tokenizer(), batch_size=1, **options)


def test_where_nothing_is_compressed_scores_are_those_of_hf():
    plain = loaded(HFLM).loglikelihood(instances(PAIRS), disable_tqdm=True)
    ours = loaded(preset=KEEPS_ALL).loglikelihood(instances(PAIRS), disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in plain]
    assert torch.allclose(*(torch.tensor([score for score, _ in scores]) for scores in (ours, plain)), atol=1e-3)


def test_every_score_comes_through_the_codes():
    """Also that of a continuation of one token."""
    model = loaded(preset=SMALL)
    scores = model.loglikelihood(instances(PAIRS), disable_tqdm=True)
    plain = loaded(HFLM).loglikelihood(instances(PAIRS), disable_tqdm=True)
    for (context, continuation), (score, _), (exact, _) in zip(PAIRS, scores, plain, strict=True):
        ids, next_ids = (torch.tensor([model.tok_encode(text)]) for text in (context, continuation))
        cache = NexusQuantCache(SMALL, config=model.model.config)
        with torch.no_grad():
            model.model(ids[:, :-1], **{CACHE: cache}, use_cache=True)
            cache.compress()
            fed = torch.cat([ids[:, -1:], next_ids[:, :-1]], 1)
            logits = model.model(fed, **{CACHE: cache}, use_cache=True).logits[0]
        expected = logits.log_softmax(-1).gather(-1, next_ids[0, :, None]).sum()
        assert score == pytest.approx(float(expected), abs=1e-4)
        assert context != CONTEXT or abs(score - exact) > 1e-3
    info = model.get_model_info()["nexusquant"]
    assert info["preset"] == "custom"
    assert info["seen_tokens"] == len(CONTEXT) - 1 + len("A short one.") - 1  # each context once
    assert info["kept_tokens"] < info["seen_tokens"]


def test_a_context_that_is_too_long_loses_its_beginning():
    model = loaded(preset=KEEPS_ALL, max_length=60)
    plain = loaded(HFLM, max_length=60).loglikelihood(instances(PAIRS), disable_tqdm=True)
    ours = model.loglikelihood(instances(PAIRS), disable_tqdm=True)
    assert torch.allclose(*(torch.tensor([score for score, _ in scores]) for scores in (ours, plain)), atol=1e-3)


def test_generation_goes_through_the_codes():
    model = loaded(preset=SMALL)
    options = {"until": ["\x00"], "max_gen_toks": 8, "do_sample": False}
    request = SimpleNamespace(args=(CONTEXT, copy.deepcopy(options)), request_type="generate_until")
    (text,) = model.generate_until([request], disable_tqdm=True)
    ids = torch.tensor([model.tok_encode(CONTEXT)])
    cache = NexusQuantCache(SMALL, config=model.model.config)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    output = model.model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE: cache}, **settings)
    assert text == model.tok_decode(output[0, ids.shape[1] :])
    assert model.get_model_info()["nexusquant"]["kept_tokens"] < len(CONTEXT)


def test_an_alias_of_a_preset_is_written_as_its_name():
    assert loaded(preset="keep-all").get_model_info()["nexusquant"]["preset"] == "quant"


def test_what_cannot_be_measured():
    with pytest.raises(OptionError, match="Did you mean 'balanced'"):
        loaded(preset="balnced")
    with pytest.raises(UnsupportedError, match="nexusquant-cache evaluate"):
        loaded(preset=SMALL).loglikelihood_rolling([])
