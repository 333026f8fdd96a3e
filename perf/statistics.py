"""What may be said of repeated measurements: medians, how sure a ratio of two is, where a load saturates.

aggregate(records)                      the repeats of one point of load -> one row
saturation(rows)                        the smallest load that gets (nearly) all there is
verdict([98, 101, 100], [110, 112, 111])    "faster", "slower", "no difference shown" or "too few repeats"
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from perf.load import Load

ENOUGH = 0.95  # of the best throughput of a series: there it is saturated
LEAST_REPEATS = 3
# A smaller difference is none: where a program happens to lie in memory changes as much (Mytkowicz et al. 2009).
LEAST_DIFFERENCE = 0.01
REPLICATES = 2000
_Z = statistics.NormalDist().inv_cdf(0.975)

Verdict = Literal["faster", "slower", "no difference shown", "too few repeats"]


# -- one point of load, measured several times -------------------------------------------------------------------------


def aggregate(records: Sequence[Mapping[str, Any]], precision: str = "") -> dict[str, Any]:
    """The repeats of one point of load as one row.

    Args:
        records: what `Bench.point` returned, for one load; at least one.
        precision: of the model; empty where the records name it.

    Returns:
        `precision`, `load`, `label`; `throughput` {median, low, high, values} in images/s; the medians `latency_ms`,
        `parts_ms` and `resources`; `latency_values` {p50, p99}: each repeat's, in ms; the sum
        `answers`.
    """
    first, points = records[0], [record["point"] for record in records]
    values = [point["throughput"] for point in points]
    answers = [record["answers"] for record in records if record.get("answers")]
    latency = [point["latency_ms"] for point in points]
    return {
        "precision": precision or first.get("precision", ""),
        "load": first["load"],
        "label": str(Load.from_dict(first["load"])),
        "throughput": {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values},
        "latency_ms": _medians(latency),
        "latency_values": {name: [row[name] for row in latency if name in row] for name in ("p50", "p99")},
        "parts_ms": _medians([point["parts_ms"] for point in points]),
        "requests": sum(point.get("requests", 0) for point in points),
        "errors": sum(point.get("errors", 0) for point in points),
        "stable": all(point.get("stable", True) for point in points),
        "answers": summed_answers(answers),
        "resources": _medians([record["resources"] for record in records if record.get("resources")]) or None,
    }


def summed_answers(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Checked, wrong, dropped and late answers of several records; None where none were checked."""
    if not answers:
        return None
    sums: dict[str, Any] = {
        name: sum(record.get(name, 0) for record in answers) for name in ("checked", "wrong", "dropped", "late")
    }
    sums["examples"] = list(dict.fromkeys(text for record in answers for text in record.get("examples") or ()))[:5]
    return sums


def _medians(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each figure, inner ones included; what is no figure is the first's."""
    medians: dict[str, Any] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record[name] for record in records if record.get(name) is not None]
        if values and isinstance(values[0], Mapping):
            medians[name] = _medians(values)
        elif values and all(isinstance(value, (int, float)) for value in values):
            medians[name] = statistics.median(values)
        else:
            medians[name] = values[0] if values else None
    return medians


# -- series ------------------------------------------------------------------------------------------------------------


def amount(load: Mapping[str, Any]) -> float:
    """How much a load asks for at once: requests per second, or images on the way."""
    rate = load.get("rate")
    return float(rate) if rate is not None else float(load.get("concurrency") or 1) * float(load.get("batch_size") or 1)


def saturation(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The smallest load that reaches 95 % of the best throughput of its series.

    Args:
        rows: of one series; rows of another precision, protocol or memory than the first one's do not count.

    Returns:
        `precision`, `load`, `label`, `throughput` (images/s), `best` (likewise, of the series), `share` (of it),
        `p99_ms`, and `ends`: whether it is the largest load of all (a larger one might reach more). None where
        there are fewer than two loads.
    """
    curve = [row for row in rows if _kind(row) == _kind(rows[0])]
    if len(curve) < 2:
        return None
    best = max(row["throughput"]["median"] for row in curve)
    ordered = sorted(curve, key=lambda row: amount(row["load"]))
    first = next(row for row in ordered if row["throughput"]["median"] >= ENOUGH * best)
    return {
        "precision": first["precision"],
        "load": first["load"],
        "label": first["label"],
        "throughput": first["throughput"]["median"],
        "best": best,
        "share": first["throughput"]["median"] / best if best else 1.0,
        "p99_ms": first["latency_ms"].get("p99"),
        "ends": first is ordered[-1],
    }


def _kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
    load = row["load"]
    return row["precision"], load.get("protocol"), load.get("shared_memory"), load.get("rate") is None


def curves(rows: Sequence[dict[str, Any]], axis: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a series as named curves, each in order of its loads.

    Args:
        rows: of one series.
        axis: the field of a load that goes along a curve: concurrency, batch_size or rate.

    Returns:
        {name: rows}; a name tells what the curves differ in: the precision, and what else there is of several kinds.
    """
    fields = [name for name in ("concurrency", "batch_size", "protocol", "shared_memory", "arrivals") if name != axis]
    several = [name for name in fields if len({row["load"].get(name) for row in rows}) > 1]
    named: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["load"].get(axis) or 0):
        named.setdefault(", ".join([row["precision"], *(_said(name, row["load"]) for name in several)]), []).append(row)
    return named


def _said(name: str, load: Mapping[str, Any]) -> str:
    value = load.get(name)
    if name == "concurrency":
        return f"{value} client" + "s" * (value != 1)
    if name == "batch_size":
        return f"batch {value}"
    if name == "shared_memory":
        return f"{value} shared memory" if value else "no shared memory"
    known = {"http": "HTTP", "grpc": "gRPC", "stream": "gRPC stream", "poisson": "Poisson", "constant": "evenly spaced"}
    return known.get(str(value), str(value))


# -- two runs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """B against A.

    Attributes:
        ratio: median of B over median of A; None where that cannot be had.
        low, high: its 95 % interval; None with too few repeats.
        verdict: of B.
    """

    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict


def verdict(a: Sequence[float], b: Sequence[float], *, higher_is_better: bool = True) -> Comparison:
    """Whether B is faster than A, as far as their repeats can show it.

    Args:
        a, b: repeats of the same measurement; what is not a positive figure does not count.
        higher_is_better: False for times.
    """
    a, b = ([value for value in values if math.isfinite(value) and value > 0] for values in (a, b))
    if not a or not b:
        return Comparison(None, None, None, "too few repeats")
    ratio = statistics.median(b) / statistics.median(a)
    if min(len(a), len(b)) < LEAST_REPEATS:
        return Comparison(ratio, None, None, "too few repeats")
    low, high = ratio_interval(a, b)
    if low <= 1 <= high or abs(ratio - 1) < LEAST_DIFFERENCE:
        return Comparison(ratio, low, high, "no difference shown")
    return Comparison(ratio, low, high, "faster" if (ratio > 1) == higher_is_better else "slower")


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """95 % interval of median(b) / median(a): seeded bootstrap of both sides, on the logarithm.

    A percentile interval of a handful of values is too narrow: three against three equal ones would differ in one case
    of ten. So it is widened about its middle by t / z · √(n / (n - 1)) (Hesterberg 2015, "What teachers should know
    about the bootstrap", section 5.3), with n of the side that has fewer repeats.

    Args:
        a, b: positive figures, two or more each.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    of_a, of_b = (
        np.median(values[rng.integers(0, len(values), (REPLICATES, len(values)))], axis=1)
        for values in (np.asarray(a, float), np.asarray(b, float))
    )
    middle = math.log(statistics.median(b) / statistics.median(a))
    fewest = min(len(a), len(b))
    wider = _student(len(a) + len(b) - 2) / _Z * math.sqrt(fewest / (fewest - 1))
    low, high = np.percentile(np.log(of_b / of_a) - middle, [2.5, 97.5]) * wider + middle
    return math.exp(low), math.exp(high)


def _student(freedom: int) -> float:
    """97.5th percentile of Student's t (Abramowitz and Stegun 26.7.5); within 2 % from 4 degrees of freedom on."""
    z = _Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
