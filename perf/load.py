"""A point of load: what is put on a server, and what one run of perf_analyzer measured of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from build.errors import SSDError

PROTOCOLS = {"http": "HTTP", "grpc": "gRPC", "stream": "gRPC stream"}


class PerfError(SSDError):
    """Something could not be measured, or what was measured does not count."""


@dataclass(frozen=True)
class Load:
    """What is put on the server: so many clients, or so many requests per second.

    Attributes:
        concurrency: closed loop: clients that each have one request on the way. Without meaning where there is a rate.
        rate: open loop: requests per second as a Poisson process, sent whether or not earlier ones were answered.
        batch_size: images per request.
        protocol: stream is gRPC with one bidirectional stream per client.
        shared_memory: how pictures and detections are handed over, on one machine; None = inside the requests.
    """

    concurrency: int = 1
    rate: float | None = None
    batch_size: int = 1
    protocol: Literal["http", "grpc", "stream"] = "grpc"
    shared_memory: Literal["system", "cuda"] | None = None

    def __str__(self) -> str:
        if self.rate is None:
            amount = f"{self.concurrency} client{'s' if self.concurrency != 1 else ''}"
        else:
            amount = f"{self.rate:g} requests/s (Poisson)"
        memory = f", {self.shared_memory.replace('cuda', 'CUDA')} shared memory" if self.shared_memory else ""
        return f"{amount}, batch {self.batch_size}, {PROTOCOLS[self.protocol]}{memory}"


@dataclass(frozen=True)
class Point:
    """What one run of perf_analyzer measured. It ends at the first failed request, so there are no errors to count.

    Attributes:
        requests: how many were measured: those that ended in its windows.
        throughput: images per second.
        latency_ms: avg, p50, p90, p95, p99 of a request as its client sees it; max only where every request is known
            (with shared memory).
        parts_ms: the average request by where its time went, from client_send to client_receive; 0 where a server
            without statistics does not say.
        seconds: measured time.
    """

    requests: int
    throughput: float
    latency_ms: dict[str, float]
    parts_ms: dict[str, float]
    seconds: float
