"""The highest rate of Poisson arrivals that a server holds under a bound on the p99, by LoadGen's server scenario.

Bracketing and binary search, a run of LoadGen for each probe; a rate is held if LoadGen calls the run VALID and no
answer is wrong or missing. LoadGen's own FindPeakPerformance was tried beside it: docs/perf.md, "LoadGen".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import SSDError
from perf.mlperf import runs

if TYPE_CHECKING:
    from perf.mlperf.measure import Stage

TOLERANCE = 0.05  # of the highest rate: takes about five probes from bracket to answer
_GROWTH, _STEPS = 1.5, 6  # of the bracket, while its upper end holds


class BoundError(SSDError):
    """A bound on latency that is held at no rate that was tried."""


def find_peak(stage: Stage, folder: Path, bound_ms: float, *, seconds: float) -> dict[str, Any]:
    """The highest rate of the server scenario under a bound.

    Args:
        stage: the running server.
        folder: gets the logs, a folder for each probe.
        bound_ms: of the p99; 0 = 4 × the latency of a request alone, which fits the model better than the rules' bound.
        seconds: of each probe, at least; longer where so few queries would not be enough for a p99.

    Returns:
        `bound_ms`; `rate` (queries/s); `note` (where no limit was met); `probes` [{rate, valid, p99_ms, problems}].

    Raises:
        BoundError: not even a quarter of what several clients get is held; says what a single client gets.
    """
    probes: list[dict[str, Any]] = []
    bound_ms = bound_ms or default_bound(stage.pace.latency_ms)

    def held(rate: float) -> bool:
        for _ in range(2):
            logs = folder / f"{bound_ms:g}-ms-{len(probes)}"
            run = runs.run(stage.served, "server", logs, seconds=seconds, pace=stage.pace, bound_ms=bound_ms, rate=rate)
            problems, figures = run["problems"] + stage.reference.check(logs, run), run["figures"]
            probes.append({"rate": rate, "valid": not problems, "p99_ms": figures.get("p99_ms"), "problems": problems})
            # One stall of the machine costs a rate nothing: where the median is far from the bound, it has another try.
            if not problems or figures.get("p50_ms", math.inf) > bound_ms / 2:
                return not problems
        return False

    most = stage.pace.images_per_second
    rate, capped = highest(held, 0.25 * most, most, TOLERANCE)
    if rate is None:
        lost, alone = probes[-1], stage.pace.latency_ms
        raise BoundError(
            f"no rate holds p99 <= {bound_ms:g} ms, not even {lost['rate']:g} queries/s: {'; '.join(lost['problems'])}",
            why=f"a single client waits {alone:.1f} ms (p50), and requests that arrive together wait for one another",
            fix=f"ask for {default_bound(alone):g} ms or more, serve a faster precision (int8), or try other instances "
            "and threads in [serving] of spec.toml",
        )
    note = f"still held at {rate:g} queries/s, the highest rate that was tried" if capped else ""
    return {"bound_ms": bound_ms, "rate": rate, "note": note, "probes": probes}


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


def default_bound(p50_ms: float) -> float:
    """A bound for who names none: four times the median of a single stream, rounded up to 5 ms."""
    return 5.0 * math.ceil(4 * p50_ms / 5 - 1e-9)


def _rounded(rate: float) -> float:
    """Three digits: a rate that people can read and that is the same again after a detour through JSON."""
    return float(f"{rate:.3g}")
