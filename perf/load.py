"""A point of load: what is put on a server, and what one run of perf_analyzer measured of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from build.errors import SSDError

Arrivals = Literal["constant", "poisson"]
Protocol = Literal["http", "grpc", "stream"]
SharedMemory = Literal["system", "cuda"]

PROTOCOLS = {"http": "HTTP", "grpc": "gRPC", "stream": "gRPC stream"}
_CHOICES = {
    "arrivals": ("constant", "poisson"),
    "protocol": tuple(PROTOCOLS),
    "shared_memory": (None, "system", "cuda"),
}


class PerfError(SSDError):
    """perf_analyzer is missing or could not measure."""


@dataclass(frozen=True)
class Load:
    """What is put on the server: so many clients, or so many requests per second.

    Attributes:
        concurrency: closed loop: clients that each have one request on the way. 1 where no rate is given.
        rate: open loop: requests per second, sent whether or not earlier ones were answered.
        arrivals: of a rate: evenly spaced, or a Poisson process, drawn anew for every run.
        batch_size: images per request.
        protocol: stream is gRPC with one bidirectional stream per client.
        shared_memory: how pictures and detections are handed over, on one machine; None = inside the requests.

    Raises:
        PerfError: a value that cannot be.
    """

    concurrency: int | None = None
    rate: float | None = None
    arrivals: Arrivals = "constant"
    batch_size: int = 1
    protocol: Protocol = "grpc"
    shared_memory: SharedMemory | None = None

    def __post_init__(self) -> None:
        if self.concurrency is None and self.rate is None:
            object.__setattr__(self, "concurrency", 1)
        if self.concurrency is not None and self.rate is not None:
            raise PerfError(
                f"a load of {self.concurrency} clients and of {self.rate:g} requests/s", fix="give one of the two"
            )
        if self.concurrency is not None and self.concurrency < 1:
            raise PerfError(f"a load of {self.concurrency} clients", fix="give at least 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise PerfError(f"a load of {self.rate:g} requests/s", fix="give a rate above 0")
        if self.batch_size < 1:
            raise PerfError(f"a batch of {self.batch_size} images", fix="give at least 1")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise PerfError(f"{name} {getattr(self, name)!r} is not known", fix=f"choose from {known}")
        if self.arrivals == "poisson" and self.rate is None:
            raise PerfError("Poisson arrivals from a number of clients", fix="give a rate instead of concurrency")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Load:
        return cls(**values)

    def __str__(self) -> str:
        if self.rate is None:
            amount = f"{self.concurrency} client{'s' if self.concurrency != 1 else ''}"
        else:
            amount = f"{self.rate:g} requests/s" + (" (Poisson)" if self.arrivals == "poisson" else "")
        parts = [amount, f"batch {self.batch_size}", PROTOCOLS[self.protocol]]
        if self.shared_memory:
            parts.append(f"{self.shared_memory.replace('cuda', 'CUDA')} shared memory")
        return ", ".join(parts)


@dataclass(frozen=True)
class Point:
    """What one run of perf_analyzer measured.

    Attributes:
        load: what it put on the server.
        requests: how many were measured: those that ended in its windows, the warm-up's not counted.
        errors: how many requests failed. perf_analyzer 2.51 to 2.60 ends at the first, so this is 0: a server that
            answers with errors is a PerfError.
        throughput: images per second.
        latency_ms: avg, p50, p90, p95, p99 of a request as its client sees it; p99.9 and max only where every request
            is known.
        parts_ms: the average request by where its time went, from client_send to client_receive; 0 where a server
            without statistics does not say.
        latencies_ms: every measured request, in order of sending. Empty without shared memory: perf_analyzer would
            write out every request's bytes beside its times, as decimal numbers.
        sent_s: when each was sent, in seconds from the first; same length.
        seconds: measured time.
        stable: the windows' throughput was the same within 10 % (and what chance alone does to so few requests).
    """

    load: Load
    requests: int
    errors: int
    throughput: float
    latency_ms: dict[str, float]
    parts_ms: dict[str, float]
    latencies_ms: list[float]
    sent_s: list[float]
    seconds: float
    stable: bool

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        return cls(**{**values, "load": Load.from_dict(values["load"])})
