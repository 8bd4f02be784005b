"""Counters and histograms as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper ends in seconds."""

PREFIX = "ds_gradprune_serve_"

COUNTERS = {
    "requests": ("Requests by path and HTTP status.", ["path", "status"]),
    "replies": ("Replies by how they ended.", ["reason"]),
    "prompt_tokens": ("Tokens of prompts that were read.", []),
    "reply_tokens": ("Tokens of replies.", []),
    "reloads": ("Newer models taken, by outcome.", ["outcome"]),
}
"""Prometheus' client puts `_total` behind their names."""

TIMES = {
    "first_token_seconds": "From the request to the first token.",
    "reply_seconds": "From the request to the end of the reply.",
}
GAUGES = {
    "waiting": "Requests in the queue.",
    "running": "Replies that are being written.",
    "draining": "1 while replies of an older model are being written.",
}


class Metrics:
    """What has happened since the start, and the memory of this process. Safe from any thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = all_of_it = CollectorRegistry()
        ProcessCollector(registry=all_of_it)
        self._counters = {
            name: Counter(PREFIX + name, text, labels, registry=all_of_it)
            for name, (text, labels) in COUNTERS.items()
        }
        self._times = {
            name: Histogram(PREFIX + name, text, buckets=BUCKETS, registry=all_of_it)
            for name, text in TIMES.items()
        }
        self._gauges = {
            name: Gauge(PREFIX + name, text, registry=all_of_it) for name, text in GAUGES.items()
        }

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        counter = self._counters[name]
        (counter.labels(**labels) if labels else counter).inc(value)

    def time(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        self._times[name].observe(seconds)

    def text(self, **gauges: float) -> str:
        """Everything, in Prometheus' text format.

        Args:
            gauges: what holds now, by name.
        """
        for name, value in gauges.items():
            self._gauges[name].set(value)
        return generate_latest(self._registry).decode()
