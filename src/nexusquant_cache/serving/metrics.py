"""What Prometheus is told."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from nexusquant_cache.serving.chat_model import Answer
from nexusquant_cache.serving.jobs import Failure
from nexusquant_cache.serving.worker import Worker

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of one server.

    Args:
        worker: Whose present state is shown.
    """

    def __init__(self, worker: Worker) -> None:
        """Count from 0."""
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.answers = Counter("nexusquant_answers", "Answers by how they ended", ["ended"], registry=registry)
        self.refusals = Counter(
            "nexusquant_refusals", "Requests that were refused, by HTTP status", ["status"], registry=registry
        )
        self.tokens = Counter(
            "nexusquant_tokens",
            "Tokens: of prompts, of these known to a cache, of answers",
            ["kind"],
            registry=registry,
        )
        self.first_token = Histogram(
            "nexusquant_first_token_seconds", "From the request to the first text", buckets=_SECONDS, registry=registry
        )
        self.whole_answer = Histogram(
            "nexusquant_answer_seconds", "From the request to the end", buckets=_SECONDS, registry=registry
        )
        for name, what, value in (
            ("nexusquant_waiting_prompts", "Prompts that wait for their turn", lambda: worker.waiting),
            ("nexusquant_idle_conversations", "Conversations kept between two prompts", lambda: len(worker.pool)),
            ("nexusquant_idle_bytes", "Bytes that their caches hold", lambda: worker.pool.held_bytes),
        ):
            Gauge(name, what, registry=registry).set_function(value)

    def count(self, prompt_tokens: int, end: Answer | Failure, seconds: float) -> None:
        """Count an answer that has ended."""
        self.whole_answer.observe(seconds)
        if isinstance(end, Failure):
            self.answers.labels("failed").inc()
            return
        self.answers.labels(end.ended).inc()
        for kind, tokens in (("prompt", prompt_tokens), ("known", end.known_tokens), ("answer", end.tokens)):
            self.tokens.labels(kind).inc(tokens)

    def text(self) -> bytes:
        """Return all in Prometheus' text format."""
        return generate_latest(self._registry)
