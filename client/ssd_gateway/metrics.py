"""The gateway's own Prometheus metrics, of all its workers together."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

# Where the workers keep their values; prometheus_client reads it when it is imported.
SHARED = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4"  # what generate_latest writes
_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_COUNTS = (0, 1, 2, 5, 10, 20, 50, 100, 200)


class Metrics:
    """What one gateway counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        if SHARED in os.environ:
            MultiProcessCollector(self._registry)  # type: ignore[no-untyped-call]
            registry = None
        else:
            ProcessCollector(registry=self._registry)
            registry = self._registry
        self.requests = Counter(
            "ssd_gateway_requests", "Answered requests.", ["route", "method", "status"], registry=registry
        )
        self.seconds = Histogram(
            "ssd_gateway_request_seconds",
            "From a request's header to the end of its handling.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.detections = Histogram(
            "ssd_gateway_detections_per_picture",
            "Detections in a picture.",
            ["model"],
            buckets=_COUNTS,
            registry=registry,
        )
        self.in_hand = Gauge(
            "ssd_gateway_pictures_in_hand",
            "Pictures that are being read, decoded or asked for.",
            multiprocess_mode="livesum",
            registry=registry,
        )

    def text(self) -> bytes:
        """The metrics in Prometheus's text format."""
        return generate_latest(self._registry)
