"""What Prometheus reads, and what a health check wants to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The counters of one server; `gauges` have a text and what they stand at."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        registry = self._registry = CollectorRegistry()
        self.seconds = Histogram(
            "cembed_request_seconds", "Time of a request.", ("route", "status"), buckets=SECONDS, registry=registry
        )
        self.refused = Counter("cembed_refused", "Requests that were not begun.", ("status",), registry=registry)
        self.busy = self.refused.labels("429")
        self.left = Counter("cembed_left", "Requests whose client left before the answer.", registry=registry)
        self._pages = Counter("cembed_pages_added", "Pages that were added to the index.", registry=registry)
        self._success = Gauge("cembed_last_success_timestamp_seconds", "The last answer with 200.", registry=registry)
        for name, (text, value) in gauges.items():
            Gauge(name, text, registry=registry).set_function(value)
        self._about = Info("cembed", "What serves.", registry=registry)

    def tell(self, **about: str) -> None:
        """What serves, as it is."""
        self._about.info(about)

    def added(self) -> None:
        self._pages.inc()

    def answered(self, route: str, status: int, seconds: float) -> None:
        self.seconds.labels(route, str(status)).observe(seconds)
        if status == 200:
            self._success.set(time.time())
        if status in (413, 408, 429, 503):
            self.refused.labels(str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
