"""A served model against the same model in this process, in turn within each round: throughput and latency.

Every served run lies between two direct ones: whatever else the machine does affects both sides alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
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

Run = Callable[[], dict[str, Any]]  # measures in process
Pair = tuple[dict[str, Any], list[dict[str, Any]]]  # a served point, and the two direct measurements around it
Rounds = tuple[dict[str, list[Pair]], list[dict[str, Any]]]


def _in_turn(bench: Bench, series: str, loads: Mapping[str, Load], run: Run, rounds: int, seconds: float) -> Rounds:
    """Each load's pairs, and all direct measurements."""
    key = bench.key(series, seconds=seconds, batch_size=next(iter(loads.values())).batch_size)
    pairs: dict[str, list[Pair]] = {name: [] for name in loads}
    direct = [bench.journal.measure({**key, "direct": 0}, run)]
    for repeat in range(rounds):
        for name, load in loads.items():
            record = bench.point(series, load, seconds=seconds, repeat=repeat)
            direct.append(bench.journal.measure({**key, "direct": len(direct)}, run))
            pairs[name].append((record["point"], direct[-2:]))
    return pairs, direct


def served_ratio(bench: Bench, raw: Direct, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Served throughput of each transport over that of the same model in this process.

    Args:
        bench: the served side.
        raw: the direct side; its batch size is that of the requests.
        rounds: how many; the medians count.
        seconds: of each run.

    Returns:
        `batch_size`, `served_ratio` {shm, grpc, http}, `ratio_rounds` {transport: each round's}, `served_ips` and
        `direct_ips`, the medians behind it in images/s, `direct_rounds`, and `direct_threads`: the fastest split of the
        threads into sessions.
    """
    loads = {name: replace(load, batch_size=raw.batch_size) for name, load in TRANSPORTS.items()}
    pairs, direct = _in_turn(bench, "ratio", loads, lambda: {"ips": raw.throughput(seconds)}, rounds, seconds)
    ratios = {
        name: [served["throughput"] / statistics.mean(run["ips"] for run in around) for served, around in rows]
        for name, rows in pairs.items()
    }
    between = [run["ips"] for run in direct]
    return {
        "batch_size": raw.batch_size,
        "served_ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_rounds": ratios,
        "served_ips": {
            name: statistics.median(served["throughput"] for served, _ in rows) for name, rows in pairs.items()
        },
        "direct_ips": statistics.median(between),
        "direct_rounds": between,
        "direct_threads": str(raw),
    }


def single_stream(bench: Bench, raw: Direct, *, rounds: int, seconds: float) -> dict[str, Any]:
    """What serving adds to one client's latency, with shared memory.

    Returns:
        `served_ms` and `direct_ms` {p50, p90, p99}: medians of the rounds; `overhead_ms`: median of the rounds'
        differences of the p50, each against the two direct runs around it; `overhead_rounds`.
    """
    alone = {"shm": replace(TRANSPORTS["shm"], concurrency=1)}
    pairs, direct = _in_turn(bench, "single stream", alone, lambda: raw.latency(seconds), rounds, seconds)
    sides = {"served_ms": [served["latency_ms"] for served, _ in pairs["shm"]], "direct_ms": direct}
    overhead = [
        served["latency_ms"]["p50"] - statistics.mean(run["p50"] for run in around) for served, around in pairs["shm"]
    ]
    medians = {
        side: {name: statistics.median(run[name] for run in runs) for name in ("p50", "p90", "p99")}
        for side, runs in sides.items()
    }
    return {**medians, "overhead_ms": statistics.median(overhead), "overhead_rounds": overhead}
