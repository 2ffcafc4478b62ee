"""What the server counts, in the text format of Prometheus.

An adapter's name is a label only while the adapter is loaded: no client can
make the list of labels grow.
Source: Prometheus docs, "Metric and label naming", "Histograms and summaries".
Taught in: notebooks/15_serving.ipynb
"""

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)

from lora_from_scratch.serving.engine import Engine

OTHER = "other"  # label of every name that is not loaded
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# These of engine.stats() only grow; the others go up and down.
GROWING = {
    "cache_hits",
    "decode_tokens",
    "disk_loads",
    "evictions",
    "prefill_tokens",
    "slot_hits",
    "steps",
}


class Metrics:
    """The counters of one app, in a registry of their own.

    Args:
        engine: asked for the names that are loaded and for ``stats()``.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(_Stats(engine))
        own = {"namespace": "lora", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests answered.", ["model", "status"], **own
        )
        self.tokens = Counter(
            "tokens", "Tokens read and written.", ["model", "kind"], **own
        )
        own["buckets"] = SECONDS
        self.first_token = Histogram(
            "first_token_seconds", "From a request to its first token.", **own
        )
        self.whole_answer = Histogram(
            "request_seconds", "From a request to the end of its answer.", **own
        )

    def count_request(self, model: str | None, status: int) -> None:
        """Count one answered request."""
        self.requests.labels(self._label(model), status).inc()

    def count_tokens(self, model: str, n_prompt: int, n_new: int) -> None:
        """Count the tokens of one request, read and written."""
        label = self._label(model)
        self.tokens.labels(label, "prompt").inc(n_prompt)
        self.tokens.labels(label, "completion").inc(n_new)

    def _label(self, model):
        # not engine.adapters, which waits for the engine's lock
        known = model in self.engine.slots.registered
        return model if known or model == self.engine.model_name else OTHER

    def forget(self, model: str) -> None:
        """Drop the series of an adapter that was unloaded."""
        for counter in (self.requests, self.tokens):
            counter.remove_by_labels({"model": model})

    def text(self) -> bytes:
        """Return all series in Prometheus' text format."""
        return generate_latest(self.registry)


class _Stats:
    """Asks the engine when somebody reads the metrics, not before."""

    def __init__(self, engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        for name, value in self.engine.stats().items():
            grows = name in GROWING
            family = CounterMetricFamily if grows else GaugeMetricFamily
            yield family(f"lora_engine_{name}", f"stats()['{name}']", value)
