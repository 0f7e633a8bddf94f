"""A model class for lm-evaluation-harness, whose contexts are in compressed caches (docs/evaluate.md).

``python -m nexusquant_cache.evaluation.lm_eval`` is the command of lm-eval with the model ``nexusquant``.  Importing
this module registers it, too, for `lm_eval.simple_evaluate`.
"""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from nexusquant_cache.cache.cache import NexusQuantCache
from nexusquant_cache.errors import UnsupportedError
from nexusquant_cache.presets import CacheConfig, preset_name
from nexusquant_cache.releases import CACHE

Scored = tuple[tuple[str, str], list[int], list[int]]
"""A context and a continuation, as texts and as ids."""


@register_model("nexusquant")
class NexusQuantLM(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """A model of transformers that reads every context into a compressed cache, and goes on from there.

    Of tasks with choices, all but the last token of the context are read and compressed; the cache then sees that one
    and the continuation, so that every score comes through the codes.  A context is read once for all its choices.
    Generation is that of ``model.generate`` with a `NexusQuantCache`.

    Args:
        pretrained: As for lm-eval's ``hf``, like everything else that is not named here.
        preset: A preset, or a `CacheConfig`.
        **options: As for ``hf``.

    Raises:
        OptionError: If there is no such preset.
    """

    def __init__(self, pretrained: Any, preset: str | CacheConfig = "balanced", **options: Any) -> None:
        """Load the model."""
        name = preset_name(preset)
        super().__init__(pretrained, **options)
        self._preset, self._preset_name = preset, name
        self._seen = self._kept = self._held = self._dense = 0  # of all contexts together

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes of a model, with what the caches held of all contexts together."""
        info: dict[str, Any] = super().get_model_info()
        factor = self._dense / self._held if self._held else 1.0
        held = {"seen_tokens": self._seen, "kept_tokens": self._kept, "compression_factor": factor}
        return {**info, "nexusquant": {"preset": self._preset_name, **held}}

    def _new_cache(self) -> NexusQuantCache:
        return NexusQuantCache(self._preset, config=self.model.config)

    def _note(self, cache: NexusQuantCache) -> None:
        report = cache.memory_report()
        self._seen += report.seen_tokens
        self._kept += report.kept_tokens
        self._held += report.held_bytes
        self._dense += report.dense_bytes

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generate, with a cache of its own for each batch."""
        cache = self._new_cache()
        tokens: Tensor = super()._model_generate(context, max_length, stop, **{CACHE: cache}, **options)
        self._note(cache)
        return tokens

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """Refuse: where every token is predicted, none is a context to compress.

        Raises:
            UnsupportedError: Always.
        """
        msg = (
            "tasks that predict every token of a text (loglikelihood_rolling) have no context to be compressed; "
            "nexusquant-cache evaluate measures perplexity behind a compressed text"
        )
        raise UnsupportedError(msg)

    def _loglikelihood_tokens(
        self,
        requests: list[Scored],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return for each continuation its log-probability, and whether it is the most likely one."""
        del override_bs  # one row at a time: every context has its own cache
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            by_context[tuple(self._fitting(context, continuation))].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        for context, indices in tqdm(by_context.items(), disable=disable_tqdm or self.rank != 0, desc="contexts"):
            cache = self._read(context[:-1])
            for index in indices:
                texts, _, continuation = requests[index]
                answers[index] = self._score(copy.deepcopy(cache), context[-1], continuation)
                self.cache_hook.add_partial("loglikelihood", texts, answers[index])
        return [answers[index] for index in range(len(requests))]

    def _fitting(self, context: Sequence[int], continuation: Sequence[int]) -> Sequence[int]:
        """Return the end of a context that fits into the model with its continuation."""
        return context[-max(self.max_length - len(continuation) + 1, 1) :]

    @torch.no_grad()
    def _read(self, context: Sequence[int]) -> NexusQuantCache:
        """Return a compressed cache that has read a context."""
        cache = self._new_cache()
        if context:
            self.model(input_ids=self._row(context), **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            cache.compress()
            self._note(cache)
        return cache

    @torch.no_grad()
    def _score(self, cache: NexusQuantCache, last: int, continuation: Sequence[int]) -> tuple[float, bool]:
        """Predict a continuation behind what a cache has read, and one token more."""
        ids = self._row([last, *continuation[:-1]])
        logits = self.model(input_ids=ids, **{CACHE: cache}, use_cache=True).logits[0].float()
        wanted = self._row(continuation)[0]
        scores = logits.log_softmax(-1).gather(-1, wanted[:, None])
        return float(scores.sum()), bool((logits.argmax(-1) == wanted).all())

    def _row(self, ids: Sequence[int]) -> Int[Tensor, "1 n"]:
        return torch.tensor([list(ids)], dtype=torch.long, device=self.device)


if __name__ == "__main__":
    cli_evaluate()
