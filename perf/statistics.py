"""What may be said of repeated measurements: medians, how sure a ratio of two is, where a load saturates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from perf.load import Load

ENOUGH = 0.95  # of the best throughput of a series: there it is saturated
LEAST_REPEATS = 3
# A smaller difference is none: where a program happens to lie in memory changes as much (Mytkowicz et al. 2009).
LEAST_DIFFERENCE = 0.01
# Of the interval of a ratio: a comparison has a hundred of them, and equal things shall rarely look different.
CONFIDENCE = 0.98
_Z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def aggregate(records: Sequence[Mapping[str, Any]], precision: str) -> dict[str, Any]:
    """The repeats of one point of load as one row.

    Args:
        records: what `Bench.point` returned, for one load; at least one.
        precision: of the model.

    Returns:
        `precision`, `load`, `label`; `throughput` {median, low, high, values} in images/s; the medians `latency_ms`,
        `parts_ms` and `resources`; `latency_values` {p50, p99}: each repeat's, in ms; `requests`.
    """
    load, points = records[0]["load"], [record["point"] for record in records]
    values, latency = [point["throughput"] for point in points], [point["latency_ms"] for point in points]
    return {
        "precision": precision,
        "load": load,
        "label": str(Load(**load)),
        "throughput": {"median": statistics.median(values), "low": min(values), "high": max(values), "values": values},
        "latency_values": {name: [row[name] for row in latency if name in row] for name in ("p50", "p99")},
        **{name: _medians([point[name] for point in points]) for name in ("latency_ms", "parts_ms")},
        "requests": sum(point["requests"] for point in points),
        "resources": _medians([record["resources"] for record in records]),
    }


def _medians(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The median of each figure; what is in no record, or None in all of them, is None."""
    names = dict.fromkeys(name for record in records for name in record)
    values = {name: [record[name] for record in records if record.get(name) is not None] for name in names}
    return {name: statistics.median(known) if known else None for name, known in values.items()}


def saturation(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The smallest load that reaches 95 % of the best throughput.

    Args:
        rows: of one curve, in order of their loads.

    Returns:
        The row, and `share` (of the best) and `ends`: whether it is the largest load of all (a larger one might reach
        more). None where there are fewer than two loads.
    """
    if len(rows) < 2:
        return None
    best = max(row["throughput"]["median"] for row in rows)
    first = next(row for row in rows if row["throughput"]["median"] >= ENOUGH * best)
    return {**first, "share": first["throughput"]["median"] / best if best else 1.0, "ends": first is rows[-1]}


def curves(rows: Sequence[dict[str, Any]], axis: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a series by their precision, in order of the field `axis` of their loads."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["load"][axis] or 0):
        named.setdefault(row["precision"], []).append(row)
    return named


def verdict(a: Sequence[float], b: Sequence[float], *, higher_is_better: bool = True) -> dict[str, Any]:
    """Whether B is faster than A, as far as their repeats can show it.

    Args:
        a, b: repeats of the same measurement; what is not a positive figure does not count.
        higher_is_better: False for times.

    Returns:
        `ratio`: of the geometric means, B over A, None where that cannot be had; `low` and `high`: its 98 % interval,
        None with too few repeats; `verdict`: faster, slower, no difference shown or too few repeats.
    """
    a, b = ([value for value in values if math.isfinite(value) and value > 0] for values in (a, b))
    ratio = statistics.geometric_mean(b) / statistics.geometric_mean(a) if a and b else None
    if ratio is None or min(len(a), len(b)) < LEAST_REPEATS:
        return {"ratio": ratio, "low": None, "high": None, "verdict": "too few repeats"}
    low, high = ratio_interval(a, b)
    said = "faster" if (ratio > 1) == higher_is_better else "slower"
    if low <= 1 <= high or abs(ratio - 1) < LEAST_DIFFERENCE:
        said = "no difference shown"
    return {"ratio": ratio, "low": low, "high": high, "verdict": said}


def ratio_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """98 % interval of the ratio B / A of geometric means: Student's t on the logarithms, variances taken as one.

    Args:
        a, b: positive figures, two or more each.
    """
    of_a, of_b = ([math.log(value) for value in values] for values in (a, b))
    freedom = len(a) + len(b) - 2
    squares = statistics.variance(of_a) * (len(a) - 1) + statistics.variance(of_b) * (len(b) - 1)
    wide = _student(freedom) * math.sqrt(squares / freedom * (1 / len(a) + 1 / len(b)))
    middle = statistics.fmean(of_b) - statistics.fmean(of_a)
    return math.exp(middle - wide), math.exp(middle + wide)


def _student(freedom: int) -> float:
    """99th percentile of Student's t (Abramowitz and Stegun 26.7.5); within 4 % from 4 degrees of freedom on."""
    z = _Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
