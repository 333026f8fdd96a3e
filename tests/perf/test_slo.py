"""The searches on a simulated server whose limits are known, through a journal as a run has it."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from build.errors import OptionError
from perf import slo
from perf.load import Load, PerfError
from perf.slo import BoundError, default_bound, find_rate, highest, single_stream


class FakeBench:
    """A server that takes `service_ms` for an image, answers `capacity` images/s at most, and is a little noisy.

    Its p99 under Poisson load is 2 × service_ms / (1 - share of the capacity): an M/M/1's shape.
    """

    model, precision = "shapes", "fp32"
    config = SimpleNamespace(max_batch_size=32)

    def __init__(self, capacity: float = 500.0, service_ms: float = 4.0, noise: float = 0.0, seed: int = 0) -> None:
        self.capacity, self.service_ms, self.noise = capacity, service_ms, noise
        self.random = random.Random(seed)
        self.journal: dict[str, dict[str, Any]] = {}
        self.measured: list[Load] = []
        self.stalls: set[int] = set()  # numbers of measurements that the machine spoils
        self.errors = 0
        self.refuses_from = math.inf  # requests/s
        self.fails: set[int] = set()  # numbers of calls at which perf_analyzer gives up for reasons of its own
        self.calls = 0

    def limit(self, bound_ms: float) -> float:
        """The rate at which p99 is the bound, without noise."""
        return self.capacity * (1 - 2 * self.service_ms / bound_ms)

    def point(self, series: str, load: Load, *, seconds: float, repeat: int = 0, **key: Any) -> dict[str, Any]:
        name = json.dumps([series, load.as_dict(), seconds, repeat, key], sort_keys=True)
        if name not in self.journal:
            self.journal[name] = self.measure(load, seconds)
        return self.journal[name]

    def measure(self, load: Load, seconds: float) -> dict[str, Any]:
        self.calls += 1
        if load.rate is not None and (load.rate >= self.refuses_from or self.calls in self.fails):
            raise PerfError("perf_analyzer gave no figures (exit code 1)\n  Exceeds maximum queue size")
        number = len(self.measured)
        self.measured.append(load)
        capacity = self.capacity * (1 - 0.1 / load.batch_size)  # larger batches get a little more through
        if load.rate is None:
            throughput = min(capacity, load.concurrency * load.batch_size * 1000 / self.service_ms)
            p50 = 1000 * load.concurrency * load.batch_size / throughput
            p99 = 1.5 * p50
        else:
            share = min(load.rate * load.batch_size / self.capacity, 1.0)
            throughput = min(load.rate * load.batch_size, self.capacity)
            p99 = 2 * self.service_ms / (1 - share) if share < 1 else 1000.0
            p50 = p99 / 3
        p99 *= math.exp(self.random.gauss(0, self.noise))
        if number in self.stalls:
            p99 += 100
        return {
            "point": {
                "latency_ms": {"p50": p50, "p90": (p50 + p99) / 2, "p95": p99, "p99": p99},
                "throughput": throughput,
                "requests": round(throughput * seconds),
                "errors": self.errors,
                "seconds": seconds,
            }
        }


@pytest.mark.parametrize("bound_ms", [10, 20, 60])
def test_the_rate_that_just_holds_the_bound(bound_ms: float) -> None:
    bench = FakeBench()
    result = find_rate(bench, bound_ms, tolerance=0.02)
    assert result["rate"] == pytest.approx(bench.limit(bound_ms), rel=0.025)
    assert result["bound_ms"] == bound_ms
    assert len(result["probes"]) <= 12
    for probe in result["probes"]:
        assert probe["held"] == (probe["p99_ms"] <= bound_ms) == (not probe["why"])
        assert probe["held"] == (probe["rate"] <= result["rate"])
    assert [load.arrivals for load in bench.measured[1:]] == ["poisson"] * (len(bench.measured) - 1)


def test_a_rate_is_found_above_the_first_guess() -> None:
    bench = FakeBench()
    result = find_rate(bench, 20, low=10, high=50, tolerance=0.02)
    assert result["rate"] == pytest.approx(bench.limit(20), rel=0.025)
    assert len(bench.measured) <= 3 * len(result["probes"])


def test_no_end_in_sight() -> None:
    result = find_rate(FakeBench(capacity=1e6), 20, low=10, high=50)
    assert result["rate"] == result["probes"][-1]["rate"] > 350
    assert len(result["probes"]) == 7
    assert "highest rate that was tried" in result["note"]


@pytest.mark.parametrize("seed", range(20))
def test_noise_moves_the_rate_little(seed: int) -> None:
    bench = FakeBench(noise=0.1, seed=seed)
    result = find_rate(bench, 20, tolerance=0.05)
    assert result["rate"] == pytest.approx(bench.limit(20), rel=0.2)
    assert len(bench.measured) <= 25


@pytest.mark.parametrize("call", range(1, 14))
def test_one_failure_of_perf_analyzer_changes_nothing(call: int) -> None:
    bench = FakeBench()
    bench.fails = {call}
    assert find_rate(bench, 20)["rate"] == find_rate(FakeBench(), 20)["rate"]


@pytest.mark.parametrize("stalled", range(12))
def test_one_stall_changes_nothing(stalled: int) -> None:
    quiet, stalls = FakeBench(), FakeBench()
    stalls.stalls = {stalled}
    result = find_rate(stalls, 20)
    assert result["rate"] == find_rate(quiet, 20)["rate"]
    assert stalled >= len(quiet.measured) or len(stalls.measured) >= len(quiet.measured)


def test_what_was_measured_is_not_measured_again() -> None:
    bench = FakeBench(noise=0.2, seed=3)
    first = find_rate(bench, 20)
    measured = len(bench.measured)
    assert find_rate(bench, 20) == first
    assert len(bench.measured) == measured
    # Cut off in the middle: the same probes in the same order, and only what is missing is measured.
    bench.journal = dict(list(bench.journal.items())[: measured // 2])
    assert [probe["rate"] for probe in find_rate(bench, 20)["probes"]][:2] == [p["rate"] for p in first["probes"]][:2]
    assert len(bench.measured) > measured


def test_a_search_for_another_bound_shares_probes() -> None:
    bench = FakeBench()
    find_rate(bench, 20)
    measured = len(bench.measured)
    other = find_rate(bench, 40)
    assert len(bench.measured) - measured < sum(probe["measured"] for probe in other["probes"])


def test_failed_requests_lose() -> None:
    bench = FakeBench()
    bench.errors = 3
    with pytest.raises(BoundError, match=r"3 of \d+ requests failed"):
        find_rate(bench, 20)


def test_a_rate_at_which_perf_analyzer_gives_up_is_lost() -> None:
    bench = FakeBench()
    bench.refuses_from = 200
    result = find_rate(bench, 20, tolerance=0.02)
    assert result["rate"] == pytest.approx(200, rel=0.025)
    lost = [probe for probe in result["probes"] if not probe["held"]]
    assert {probe["why"] for probe in lost} == {"Exceeds maximum queue size"}
    assert {probe["p99_ms"] for probe in lost} == {None}
    with pytest.raises(PerfError, match="Exceeds maximum"):  # no rate is too high for this: something else is wrong
        find_rate(bench, 20, low=200)


def test_what_is_plain_and_what_is_not() -> None:
    load = Load(concurrency=None, rate=100)
    point = {"latency_ms": {"p50": 3, "p99": 5}, "requests": 400, "errors": 0, "seconds": 4.0}
    assert slo._judge({**point, "throughput": 98}, load, 20, "p99") == ("", True)
    assert slo._judge({**point, "throughput": 95}, load, 20, "p99") == ("answered 95 of 100 images/s", False)
    assert slo._judge({**point, "throughput": 60}, load, 20, "p99") == ("answered 60 of 100 images/s", True)
    near = {**point, "throughput": 98, "latency_ms": {"p50": 3, "p99": 18}}
    assert slo._judge(near, load, 20, "p99") == ("", False)  # held, but another time it might not be
    # 400 Poisson arrivals are 20 more or fewer (one standard deviation).
    poisson = Load(concurrency=None, rate=100, arrivals="poisson")
    assert slo._judge({**point, "throughput": 95}, poisson, 20, "p99")[0] == ""
    assert slo._judge({**point, "throughput": 81}, poisson, 20, "p99")[0] != ""


def test_a_bound_that_nobody_holds() -> None:
    with pytest.raises(BoundError, match=r"(?s)cannot hold p99 <= 3 ms .*p99 was .*single client .*4\.0 ms.*20 ms"):
        find_rate(FakeBench(), 3)


def test_a_bound_that_would_do_is_more_than_what_was_seen() -> None:
    bench = FakeBench()
    bench.stalls = set(range(1, 9))
    with pytest.raises(BoundError, match=r"(?s)p99 <= 80 ms even at .*p99 was 10\d\.\d ms.*a bound of 110 ms or more"):
        find_rate(bench, 80)


def test_slow_rates_are_measured_for_longer() -> None:
    assert slo._length(1000, 2) == 2
    assert slo._length(50, 2) == 4
    assert slo._length(1, 2) == 8


@pytest.mark.parametrize(
    "wrong", [{"bound_ms": 0}, {"bound_ms": math.nan}, {"percentile": "p98"}, {"low": 9, "high": 5}, {"tolerance": 0}]
)
def test_values_that_make_no_sense(wrong: dict[str, Any]) -> None:
    bench = FakeBench()
    with pytest.raises(OptionError):
        find_rate(bench, **{"bound_ms": 20, **wrong})
    assert not bench.measured


def test_single_stream() -> None:
    bench = FakeBench()
    result = single_stream(bench, seconds=3, load=Load(rate=8, arrivals="poisson", batch_size=4, protocol="http"))
    assert bench.measured == [Load(concurrency=1, protocol="http")]
    assert result["p50"] < result["p90"] < result["p99"]


@pytest.mark.parametrize("limit", [12.0, 99.0, 140.0])
def test_the_search_alone(limit: float) -> None:
    asked: list[float] = []

    def held(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    rate, capped = highest(held, 10, 100, 0.05)
    assert rate is not None
    assert 0.94 * limit <= rate <= limit
    assert not capped
    assert len(asked) == len(set(asked)) <= 12
    assert highest(lambda rate: False, 10, 100, 0.05) == (None, False)
    assert highest(lambda rate: True, 10, 100, 0.05)[1]


@pytest.mark.parametrize(("p50_ms", "bound_ms"), [(1.0, 5), (1.25, 5), (1.26, 10), (3.1, 15), (40, 160)])
def test_default_bound(p50_ms: float, bound_ms: float) -> None:
    assert default_bound(p50_ms) == bound_ms
