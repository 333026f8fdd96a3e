"""A served model against the same model in this process, in turn within each round: throughput and latency."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from perf.direct import CLIENTS, Direct
from perf.load import Load

if TYPE_CHECKING:
    from perf.bench import Bench

# How pictures reach the server: what the served ratio is given for. With shared memory the requests go over HTTP, which
# costs client and server less than gRPC.
TRANSPORTS = {
    "shm": Load(concurrency=CLIENTS, protocol="http", shared_memory="system"),
    "grpc": Load(concurrency=CLIENTS, protocol="grpc"),
    "http": Load(concurrency=CLIENTS, protocol="http"),
}


def served_ratio(bench: Bench, raw: Direct, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Served throughput of each transport over that of the same model in this process, in turn within each round.

    Every served run lies between two direct ones: whatever else the machine does affects both sides alike.

    Args:
        one: the served side.
        raw: the direct side; its batch size is that of the requests.
        rounds: how many; the medians count.
        seconds: of each run.

    Returns:
        `served_ratio` {shm, grpc, http}, `ratio_rounds` {transport: each round's}, `served_ips` and `direct_ips`, the
        medians behind it in images/s, `direct_rounds`, and `direct_threads`: the fastest split of the threads into
        sessions.
    """
    batch = raw.batch_size
    key = {"series": "ratio", "precision": bench.precision, "batch_size": batch, "seconds": seconds}
    ratios: dict[str, list[float]] = {transport: [] for transport in TRANSPORTS}
    served: dict[str, list[float]] = {transport: [] for transport in TRANSPORTS}

    def in_process(number: int) -> float:
        measured = bench.journal.measure(
            {**key, "direct": number}, lambda: {"throughput": raw.throughput(seconds), "threads": str(raw)}
        )
        return float(measured["throughput"])

    between = [in_process(0)]
    for repeat in range(rounds):
        for transport, load in TRANSPORTS.items():
            full = replace(load, batch_size=batch)
            # Unchecked: the client that checks would take its share of the very cores that are compared. The same load
            # is checked in the sweep over concurrency.
            record = bench.point("ratio", full, seconds=seconds, repeat=repeat, check=False, retries=0)
            served[transport].append(record["point"]["throughput"])
            between.append(in_process(len(between)))
            ratios[transport].append(served[transport][-1] / statistics.mean(between[-2:]))
    return {
        "served_ratio": {transport: statistics.median(values) for transport, values in ratios.items()},
        "ratio_rounds": ratios,
        "served_ips": {transport: statistics.median(values) for transport, values in served.items()},
        "direct_ips": statistics.median(between),
        "direct_rounds": between,
        "direct_threads": str(raw),
    }


def single_stream(bench: Bench, raw: Direct, *, rounds: int, seconds: float) -> dict[str, Any]:
    """What serving adds to one client's latency, with shared memory: both sides in turn within each round.

    Returns:
        `served_ms` and `direct_ms` {p50, p90, p99}: medians of the rounds; `overhead_ms`: median of the rounds'
        differences of the p50, each against the two direct runs around it; `overhead_rounds`.
    """
    key = {"series": "single stream", "precision": bench.precision, "seconds": seconds}
    alone = replace(TRANSPORTS["shm"], concurrency=1)

    def in_process(number: int) -> dict[str, Any]:
        return bench.journal.measure({**key, "direct": number}, lambda: raw.latency(seconds))

    between = [in_process(0)]
    served, overhead = [], []
    for repeat in range(rounds):
        record = bench.point("single stream", alone, seconds=seconds, repeat=repeat, check=False, retries=0)
        served.append(record["point"]["latency_ms"])
        between.append(in_process(repeat + 1))
        overhead.append(served[-1]["p50"] - statistics.mean(run["p50"] for run in between[-2:]))
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in ("p50", "p90", "p99")}
        for side, runs in (("served_ms", served), ("direct_ms", between))
    }
    return {**medians, "overhead_ms": statistics.median(overhead), "overhead_rounds": overhead}
