"""A made-up run of `invoke perf`, complete and broken off: what its report is tested with."""

from __future__ import annotations

import random
from typing import Any

from perf.mlperf.runs import SCENARIOS
from perf.statistics import aggregate

_SERVICE = {"fp32": 9.6, "int8": 5.1}  # milliseconds of one picture on one core; there are two
_SENDING = {"shm": 0.25, "grpc": 0.7, "http": 1.1}
_PARTS = ("client_send", "network", "server_queue", "server_input", "server_infer", "server_output", "client_receive")


def load(**fields: Any) -> dict[str, Any]:
    """A load's dict."""
    plain = {"concurrency": 1, "rate": None, "batch_size": 1, "protocol": "grpc"}
    return {**plain, "shared_memory": None, **fields}


def record(precision: str, asked: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """What `Bench.point` returns, out of a small model of a queue with two servers."""
    transport = "shm" if asked["shared_memory"] else {"stream": "grpc"}.get(asked["protocol"], asked["protocol"])
    size, noise = asked["batch_size"], rng.gauss(1, 0.015)
    infer = _SERVICE[precision] * size * noise
    sending = _SENDING[transport] * size
    most = 2e3 / (_SERVICE[precision] + 0.12 + _SENDING[transport] * 0.5) / noise
    if asked["rate"] is None:
        throughput = min(most, asked["concurrency"] * size * 1e3 / (infer + sending + 0.3))
        average = asked["concurrency"] * size * 1e3 / throughput
    else:
        busy = min(asked["rate"] / most, 0.995)
        throughput = min(asked["rate"], most)
        average = infer + sending + 0.3 + infer * busy**2 / (1 - busy) * 0.5
    queue = max(0.02, average - infer - sending - 0.28)
    parts = (sending * 0.25, sending * 0.7 + 0.1, queue, 0.06 * size, infer, 0.05 * size, 0.07 + sending * 0.05)
    spread = {"avg": 1, "p50": 0.97, "p90": 1.12, "p95": 1.2, "p99": 1.45, "max": 2.6}
    served = throughput / most
    return {
        "load": asked,
        "point": {
            "requests": round(throughput * 3 / size),
            "throughput": throughput,
            "latency_ms": {name: average * factor for name, factor in spread.items()},
            "parts_ms": dict(zip(_PARTS, parts, strict=True)),
            "seconds": 3.0,
        },
        "resources": {"cores": 1.82 * served, "images_per_core": throughput / (1.82 * served), "rss_mib": 212.0},
    }


def row(precision: str, rng: random.Random, repeats: int = 3, **fields: Any) -> dict[str, Any]:
    """One point of load, measured `repeats` times."""
    return aggregate([record(precision, load(**fields), rng) for _ in range(repeats)], precision)


def summary(seed: int = 0) -> dict[str, Any]:
    """Everything that a whole run can find."""
    rng = random.Random(seed)
    kinds = ("fp32", "int8")
    shm = {"protocol": "http", "shared_memory": "system"}
    concurrency = [row(kind, rng, concurrency=n, **shm) for kind in kinds for n in (1, 2, 4, 8, 16)]
    batch = [row("fp32", rng, concurrency=2, batch_size=n, **shm) for n in (1, 2, 4, 8, 16, 32, 64)]
    protocols = [("http", None), ("grpc", None), ("stream", None), ("http", "system"), ("grpc", "system")]
    ratios = {"fp32": {"shm": 0.978, "grpc": 0.931, "http": 0.842}, "int8": {"shm": 0.94, "grpc": 0.86, "http": 0.79}}
    precisions: dict[str, dict[str, Any]] = {}
    for kind, direct in (("fp32", 206.4), ("int8", 384.0)):
        rounds = {
            transport: [value * rng.gauss(1, 0.012) for _ in range(5)] for transport, value in ratios[kind].items()
        }
        medians = {transport: sorted(values)[2] for transport, values in rounds.items()}
        served, floor = _SERVICE[kind] + 1.1, _SERVICE[kind] + 0.38
        precisions[kind] = {
            "served_ratio": medians,
            "ratio_rounds": rounds,
            "served_ips": {transport: direct * value for transport, value in medians.items()},
            "direct_ips": direct,
            "direct_threads": "2 x 1",
            "backend": "ssd_onnxruntime",
            "single_stream": {
                "served_ms": {"p50": served, "p90": served * 1.06, "p99": served * 1.31},
                "direct_ms": {"p50": floor, "p90": floor * 1.05, "p99": floor * 1.22},
                "overhead_ms": served - floor,
                "overhead_rounds": [(served - floor) * rng.gauss(1, 0.05) for _ in range(5)],
            },
        }
        batches = {transport: [value * 1.02 for value in values] for transport, values in rounds.items()}
        precisions[kind]["batches"] = {
            "batch_size": 8,
            "served_ratio": {transport: sorted(values)[2] for transport, values in batches.items()},
            "ratio_rounds": batches,
            "served_ips": {transport: direct * sorted(values)[2] for transport, values in batches.items()},
            "direct_ips": direct,
            "direct_threads": "2 x 1",
        }
    return {
        "run": "2026-11-22-15-40-01",
        "model": "shapes",
        "quick": False,
        "complete": True,
        "problems": [],
        "environment": {
            "cpu": "AMD EPYC 7B13",
            "cores": 4,
            "cores_allowed": 2,
            "memory_gib": 7.8,
            "system": "Linux-6.1.0-x86_64-with-glibc2.36",
            "load_average": [0.12, 0.08, 0.05],
            "other_load": 0.01,
            "gpus": [],
            "commit": {"sha": "f5d07c7c24bfd2c3d4a6d5d1f5c7fca0c8dcd1a2", "dirty": False},
            "versions": {
                "tritonserver": "2.51.0",
                "perf_analyzer": "2.51.0",
                "onnxruntime": "1.23.2",
                "python": "3.11.7",
            },
        },
        "settings": {"seconds": 3.0, "repeats": 3, "precisions": ["fp32", "int8"], "slo_ms": 40.0},
        "served_ratio": precisions["fp32"]["served_ratio"],
        "precisions": precisions,
        "answers": {"checked": 11200, "wrong": 0, "missing": 0},
        "series": {
            "concurrency": concurrency,
            "batch": batch,
            "rate": [row("fp32", rng, rate=float(rate), **shm) for rate in (40, 80, 120, 150, 170, 185)],
            "protocol": [
                row("fp32", rng, concurrency=4, protocol=protocol, shared_memory=memory)
                for protocol, memory in protocols
            ],
        },
        "mlperf": {kind: {name: loadgen(kind, name) for name in SCENARIOS} for kind in kinds},
        "peak": {kind: [{"bound_ms": 100.0, "rate": 150.0, "note": "", "probes": [{}, {}]}] for kind in kinds},
    }


def loadgen(kind: str, scenario: str) -> dict[str, Any]:
    """What `perf.mlperf.measure.measure` returns."""
    p50 = _SERVICE[kind] * 1.1
    figures = {"p50_ms": p50, "p90_ms": p50 * 1.1, "p99_ms": p50 * 1.4, "max_ms": p50 * 3}
    if scenario == "server":
        figures |= {"rate": 80.0, "bound_ms": 100.0, "samples_per_second": 79.9}
    if scenario == "offline":
        figures = {"samples_per_second": 1900 / _SERVICE[kind]}
    value = figures[SCENARIOS[scenario].figure]
    return {
        "scenario": scenario,
        "metric": SCENARIOS[scenario].metric,
        "value": value,
        "figures": figures,
        "beside": {"perf_analyzer": value * 1.01, "in_process": value * 0.96, "ratio": 1 / 0.96},
        "null": {"p50_ms": 0.012},
        "accuracy": {"map": 0.8921, "map50": 0.9817, "images": 500, "compared": 101, "different": []},
        "log": [f"Scenario : {SCENARIOS[scenario].member}", "Result is : VALID"],
        "queries": 1400,
        "answered": 1400,
        "wrong": 0,
        "failed": 0,
        "valid": True,
        "problems": [],
    }


def partial() -> dict[str, Any]:
    """A run in whose middle the server was killed, and which had found wrong answers before."""
    rng = random.Random(1)
    whole = summary()
    names = ("run", "model", "environment", "settings", "served_ratio", "precisions")
    return {name: whole[name] for name in names} | {
        "quick": True,
        "complete": False,
        "problems": ["tritonserver ended in the middle of 8 clients, batch 1, gRPC (killed by signal 9)"],
        "precisions": {"fp32": whole["precisions"]["fp32"]},
        "answers": {"checked": 48, "wrong": 3, "missing": 1},
        "series": {"concurrency": [row("fp32", rng, concurrency=n) for n in (1, 4)]},
    }
