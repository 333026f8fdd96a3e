"""The highest rate of requests that a server holds under a bound on latency.

    find_rate(bench, bound_ms=20)["rate"]      # Poisson arrivals with p99 <= 20 ms, sent by perf_analyzer
    highest(held, 10, 100, 0.05)               # the search alone, for whatever says whether a rate is held

Every measurement goes through `bench.point`, and the next point depends on earlier results alone: a resumed run repeats
the same probes and takes their results from its journal.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from build.errors import OptionError, SSDError
from perf.load import Load, PerfError

if TYPE_CHECKING:
    from perf.bench import Bench

PERCENTILES = ("p50", "p90", "p95", "p99")
CLIENTS = 4
ATTEMPTS = 3  # measurements of a rate that is neither clearly held nor clearly lost; their majority decides

_BEHIND = 0.03  # of the offered rate
_GROWTH, _STEPS = 1.5, 6  # of the bracket, while its upper end holds
_ENOUGH = 200  # requests: a 99th percentile of fewer is hardly more than the slowest of them
_SERIES = "poisson"  # one name for all searches: those with other bounds share their probes


class BoundError(SSDError):
    """A bound on latency that cannot be held at any rate that was tried."""


def find_rate(
    bench: Bench,
    bound_ms: float,
    *,
    percentile: str = "p99",
    low: float | None = None,
    high: float | None = None,
    tolerance: float = 0.05,
    seconds: float = 3.0,
    load: Load | None = None,
) -> dict[str, Any]:
    """The highest rate of Poisson arrivals at which the server holds a bound: bracket, then binary search.

    A rate is held if the percentile is within the bound, no request failed, and answers fall no more than 3 % behind
    (more only by as much as Poisson arrivals scatter in so short a time). One measurement decides where it is plain:
    the percentile at most 80 % of the bound, or the median request beyond the bound, or answers 15 % behind. Else a
    rate is measured up to three times and the majority decides: one stall of the machine costs no rate its place.

    Args:
        bench: the running server.
        bound_ms: for the percentile of the latency.
        percentile: p50, p90, p95 or p99.
        low: lowest rate of interest, requests/s; None = a tenth of `high`.
        high: a first guess of a rate that is too high; None = what four clients get that send as fast as they can.
        tolerance: how close to the limit, as a share of the rate; 0.05 takes five probes from bracket to answer.
        seconds: of each measurement; longer, up to fourfold, where fewer than 200 requests would arrive.
        load: gives batch size, protocol and shared memory of the requests.

    Returns:
        `bound_ms`, `percentile`, `rate` (requests/s, the highest that was held), `note` (where no limit was met) and
        `probes` in order: `rate`, `<percentile>_ms` (median), `throughput` (images/s, median), `held`, `measured` (how
        many times), `why` (it was not held). Both figures are None where perf_analyzer
        could not measure.

    Raises:
        BoundError: not even `low` is held; says what a single client gets.
        OptionError: a value that makes no sense.
        PerfError: not even `low` could be measured.
        ServeError: the server is gone.
    """
    load = load or Load()
    _check(bound_ms, percentile, low, high, tolerance, seconds)
    if high is None:
        closed = _closed(load, CLIENTS, load.batch_size)
        high = _point(bench, "closed", closed, seconds)["throughput"] / load.batch_size
        high = max(high, 2 * low) if low else high
    lower, upper = low or high / 10, high
    probes: list[dict[str, Any]] = []
    result = {"bound_ms": bound_ms, "percentile": percentile, "probes": probes}

    def held(rate: float) -> bool:
        arriving = dataclasses.replace(load, concurrency=None, rate=rate, arrivals="poisson")
        probes.append(_probe(bench, arriving, bound_ms, percentile, seconds, must_measure=not probes))
        return bool(probes[-1]["held"])

    rate, capped = highest(held, lower, upper, tolerance)
    if rate is None:
        raise _cannot(bench, bound_ms, percentile, probes[-1], load, seconds)
    note = f"still held at {rate:g} requests/s, the highest rate that was tried" if capped else ""
    return {**result, "rate": rate, "note": note}


def highest(held: Callable[[float], bool], lower: float, upper: float, tolerance: float) -> tuple[float | None, bool]:
    """The highest rate that is held, by bracketing and binary search, and whether no limit was met.

    Args:
        held: measures a rate.
        lower: a rate that should be held; where it is not, the result is None.
        upper: a first guess of a rate that is too high; raised while it is held.
        tolerance: how close to the limit, as a share of the rate.
    """
    lower, upper = _rounded(lower), _rounded(upper)
    if not held(lower):
        return None, False
    for _ in range(_STEPS):
        if not held(upper):
            break
        lower, upper = upper, _rounded(upper * _GROWTH)
    else:
        return lower, True
    while upper - lower > tolerance * upper:
        middle = _rounded((lower + upper) / 2)
        if middle in (lower, upper):
            break
        lower, upper = (middle, upper) if held(middle) else (lower, middle)
    return lower, False


def single_stream(bench: Bench, *, seconds: float, load: Load | None = None) -> dict[str, float]:
    """Milliseconds of one client that sends one picture after another: {avg, p50, p90, p95, p99, …}."""
    latency: dict[str, float] = _point(bench, "single stream", _closed(load, 1, 1), seconds)["latency_ms"]
    return latency


def default_bound(p50_ms: float) -> float:
    """A bound for who names none: four times the median of a single stream, rounded up to 5 ms."""
    return 5.0 * math.ceil(4 * p50_ms / 5 - 1e-9)


def _probe(
    bench: Bench, load: Load, bound_ms: float, percentile: str, seconds: float, *, must_measure: bool
) -> dict[str, Any]:
    """Whether the server holds the bound under this load, by one measurement or by the majority of up to three.

    Above a rate that was held, one that cannot be measured is lost: requests are refused, or answers never come.
    """
    assert load.rate is not None
    points, problems, failure = list[dict[str, Any]](), list[str](), None
    for repeat in range(ATTEMPTS):
        try:
            point = _point(bench, _SERIES, load, _length(load.rate, seconds), repeat=repeat)
        except PerfError as error:
            failure = error
            problem, plain = error.what.splitlines()[-1].strip(), False
        else:
            points.append(point)
            problem, plain = _judge(point, load, bound_ms, percentile)
        problems.append(problem)
        agreed = repeat == 1 and bool(problems[0]) == bool(problem)
        if (plain and repeat == 0) or agreed:
            break
    if must_measure and failure is not None and not points:
        raise failure
    lost = [problem for problem in problems if problem]
    held = 2 * len(lost) < len(problems)
    return {
        "rate": load.rate,
        f"{percentile}_ms": _median(point["latency_ms"][percentile] for point in points),
        "throughput": _median(point["throughput"] for point in points),
        "held": held,
        "measured": len(problems),
        "why": "" if held else lost[0],
    }


def _median(values: Iterable[float]) -> float | None:
    return statistics.median(known) if (known := list(values)) else None


def _judge(point: Mapping[str, Any], load: Load, bound_ms: float, percentile: str) -> tuple[str, bool]:
    """What is wrong with a measured point, if anything, and whether this one measurement leaves no doubt."""
    assert load.rate is not None
    offered, throughput = load.rate * load.batch_size, point["throughput"]
    # In so short a time Poisson arrivals are themselves off their rate: by two standard deviations of their number.
    scatter = 2 / math.sqrt(max(1.0, load.rate * point["seconds"])) if load.arrivals == "poisson" else 0.0
    tail, median = point["latency_ms"][percentile], point["latency_ms"]["p50"]
    if point["errors"]:
        return f"{point['errors']} of {point['errors'] + point['requests']} requests failed", False
    if throughput < offered * (1 - _BEHIND - scatter):
        return f"answered {throughput:.0f} of {offered:.0f} images/s", throughput < 0.85 * offered * (1 - scatter)
    if tail > bound_ms:
        return f"{percentile} was {tail:.1f} ms", median > bound_ms
    return "", tail <= 0.8 * bound_ms


def _cannot(
    bench: Bench, bound_ms: float, percentile: str, probe: Mapping[str, Any], load: Load, seconds: float
) -> BoundError:
    single = single_stream(bench, seconds=seconds, load=load)
    enough = max(default_bound(single["p50"]), 5.0 * math.ceil((probe[f"{percentile}_ms"] or 0.0) / 5))
    alone = f"a single client gets its answers within {single['p50']:.1f} ms (p50), {single['p99']:.1f} ms (p99)"
    return BoundError(
        f"{bench.model} ({bench.precision}) cannot hold {percentile} <= {bound_ms:g} ms even at "
        f"{probe['rate']:g} requests/s: {probe['why']}",
        why=f"{alone}; requests that arrive together also wait for one another",
        fix=f"ask for a bound of {enough:g} ms or more, serve a faster precision (int8), or look for a faster setting: "
        "invoke perf --tune",
    )


def _point(bench: Bench, series: str, load: Load, seconds: float, repeat: int = 0) -> dict[str, Any]:
    """A point without checked answers, which would come between the requests whose 99th percentile this is about."""
    point: dict[str, Any] = bench.point(series, load, seconds=seconds, repeat=repeat, check=False)["point"]
    return point


def _closed(load: Load | None, clients: int, batch_size: int) -> Load:
    """So many clients instead of a rate, by the same protocol and memory."""
    return dataclasses.replace(
        load or Load(), concurrency=clients, rate=None, arrivals="constant", batch_size=batch_size
    )


def _length(rate: float, seconds: float) -> float:
    """Seconds to measure a rate for: what was asked, or as many (up to fourfold) as 200 requests take."""
    return round(min(4 * seconds, max(seconds, _ENOUGH / rate)), 3)


def _rounded(rate: float) -> float:
    """Three digits: a rate that people can read and that is the same again after a detour through JSON."""
    return float(f"{rate:.3g}")


def _check(
    bound_ms: float, percentile: str, low: float | None, high: float | None, tolerance: float, seconds: float
) -> None:
    for name, value in {"bound": bound_ms, "seconds": seconds, "low": low, "high": high}.items():
        if value is not None and not 0 < value < math.inf:
            raise OptionError(f"{name} is {value!r}, but must be a number greater than 0")
    if percentile not in PERCENTILES:
        raise OptionError(f"percentile is {percentile!r}, but must be one of {', '.join(PERCENTILES)}")
    if low is not None and high is not None and low >= high:
        raise OptionError(f"low is {low:g} requests/s, but must be less than high, {high:g}")
    if not 0.001 <= tolerance < 1:
        raise OptionError(f"tolerance is {tolerance!r}, but must be in 0.001..1")
