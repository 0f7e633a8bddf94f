"""How far a cache moves the model's predictions of a text's continuation."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from nexusquant_cache.evaluation.caches import (
    Candidate,
    Compressed,
    Footprint,
    Prefilled,
    Progress,
    fill_and_compress,
    footprint,
    prefill,
)
from nexusquant_cache.evaluation.errors import EvaluationError
from nexusquant_cache.evaluation.intervals import Interval, mean_interval
from nexusquant_cache.evaluation.models import LoadedModel
from nexusquant_cache.releases import CACHE

_KL_ROWS = 32  # rows of a vocabulary's width in float32 at a time


@dataclass(frozen=True)
class Continuation:
    """A text in two parts: a prefix that goes into the cache and what follows it.

    Attributes:
        name: What to call the text.
        prefix_ids: Tokens to prefill, ``[1, prefix]``.
        next_ids: Tokens after the prefix, ``[1, m + 1]``: the first m are fed, the last m are predicted.
    """

    name: str
    prefix_ids: Int[Tensor, "1 n"]
    next_ids: Int[Tensor, "1 m"]

    @classmethod
    def split(cls, name: str, window: Int[Tensor, "1 n"], predictions: int) -> "Continuation":
        """Split a window so that its last tokens give this many predictions.

        Raises:
            EvaluationError: If the window is not longer than that.
        """
        cut = window.shape[1] - predictions - 1
        if cut < 1 or predictions < 1:
            msg = f"{name}: {window.shape[1]} tokens cannot give a prefix and {predictions} predictions"
            raise EvaluationError(msg)
        return cls(name, window[:, :cut], window[:, cut:])


@dataclass(frozen=True)
class PlainRun:
    """What the plain cache gives for one text, computed once and shared by all caches compared with it."""

    text: Continuation
    prefilled: Prefilled
    log_probs: Float[Tensor, "m vocab"]
    footprint: Footprint


@dataclass(frozen=True)
class TextQuality:
    """One cache on one text, against the plain cache.

    Attributes:
        text: Name of the text.
        nll: Mean negative log likelihood of the continuation, in nats per token.
        plain_nll: The same with the plain cache.
        kl: Mean Kullback-Leibler divergence KL(plain || cache) of the predictions, in nats.
        top1: Part of the predictions whose most likely token is the plain cache's.
        footprint: What the cache held when the continuation began.
        compress_seconds: Time that preparing and compressing the cache took; None if there was nothing to do.
    """

    text: str
    nll: float
    plain_nll: float
    kl: float
    top1: float
    footprint: Footprint
    compress_seconds: float | None = None

    @property
    def dppl_percent(self) -> float:
        """Change of the perplexity against the plain cache, in percent."""
        return _percent(self.nll - self.plain_nll)


@dataclass(frozen=True)
class QualitySummary:
    """Several texts together, with 95 % confidence intervals over texts.

    The perplexities of the texts are compared by their geometric mean, so that each text weighs the same.
    """

    texts: int
    dppl_percent: Interval
    kl: Interval
    top1: Interval
    held_bytes: float
    compression_factor: float


@torch.no_grad()
def run_plain(
    model: PreTrainedModel, text: Continuation, *, prefilled: Prefilled | None = None, progress: Progress | None = None
) -> PlainRun:
    """Prefill the prefix and predict the continuation with the plain cache.

    Args:
        model: A causal language model of transformers.
        text: Prefix and continuation.
        prefilled: Exactly the prefix, if it has been read already; it is read here if None.
        progress: See `prefill`.
    """
    prefilled = prefill(model, text.prefix_ids, progress=progress) if prefilled is None else prefilled
    cache = prefilled.cache
    seen = cache.get_seq_length()
    log_probs = predict(model, text.next_ids, cache)
    cache.crop(seen - cache.get_seq_length())
    return PlainRun(text, prefilled, log_probs, footprint(cache))


@torch.no_grad()
def measure_quality(loaded: LoadedModel, plain: PlainRun, candidate: Candidate) -> TextQuality:
    """Fill a new cache with the prefix, compress it, and compare its predictions with the plain cache's."""
    return quality_of(loaded.model, plain, fill_and_compress(loaded, candidate, plain.prefilled))


@torch.no_grad()
def quality_of(model: PreTrainedModel, plain: PlainRun, held: Compressed) -> TextQuality:
    """Compare the predictions of a cache that holds the prefix with the plain cache's; it reads the continuation."""
    log_probs = predict(model, plain.text.next_ids, held.cache)
    return _compare(plain, log_probs, held.footprint, held.seconds)


@torch.no_grad()
def predict(model: PreTrainedModel, next_ids: Int[Tensor, "1 n"], cache: Cache) -> Float[Tensor, "m vocab"]:
    """Feed all tokens but the last and return the log probabilities after each, in float32.

    The first token goes alone: a cache that compresses at the first generation step does so before the rest.
    """
    ids = next_ids[:, :-1].to(model.device)
    parts: Sequence[Tensor] = (ids[:, :1], ids[:, 1:]) if ids.shape[1] > 1 else (ids,)
    logits = [model(input_ids=part, **{CACHE: cache}, use_cache=True).logits[0] for part in parts]
    return torch.cat(logits).float().log_softmax(-1)


def plain_quality(plain: PlainRun) -> TextQuality:
    """Return the plain cache's own row: no divergence, all tokens kept."""
    nll = _nll(plain.log_probs, plain.text)
    return TextQuality(plain.text.name, nll, nll, 0.0, 1.0, plain.footprint)


def summarize(results: Iterable[TextQuality]) -> QualitySummary:
    """Return the means over texts with their intervals.

    Raises:
        EvaluationError: If there are no results.
    """
    rows = list(results)
    if not rows:
        msg = "no results to summarize"
        raise EvaluationError(msg)
    held = sum(row.footprint.held_bytes for row in rows)
    return QualitySummary(
        texts=len(rows),
        dppl_percent=mean_interval([row.nll - row.plain_nll for row in rows]).map(_percent),
        kl=mean_interval([row.kl for row in rows]),
        top1=mean_interval([row.top1 for row in rows]),
        held_bytes=held / len(rows),
        compression_factor=sum(row.footprint.dense_bytes for row in rows) / held,
    )


def _compare(
    plain: PlainRun, log_probs: Float[Tensor, "m vocab"], held: Footprint, seconds: float | None
) -> TextQuality:
    divergence = 0.0
    agreed = 0
    for ours, theirs in zip(log_probs.split(_KL_ROWS), plain.log_probs.split(_KL_ROWS), strict=True):
        divergence += float((theirs.exp() * (theirs - ours)).sum(-1).double().sum())
        agreed += int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    count = len(log_probs)
    return TextQuality(
        text=plain.text.name,
        nll=_nll(log_probs, plain.text),
        plain_nll=_nll(plain.log_probs, plain.text),
        kl=divergence / count,
        top1=agreed / count,
        footprint=held,
        compress_seconds=seconds,
    )


def _nll(log_probs: Float[Tensor, "m vocab"], text: Continuation) -> float:
    targets = text.next_ids[0, 1:, None].to(log_probs.device)
    return -float(log_probs.gather(1, targets).double().mean())


def _percent(nll_difference: float) -> float:
    return 100 * math.expm1(nll_difference)
