"""What may be said of repeated measurements."""

from __future__ import annotations

import math
import random

import pytest

from perf.load import Load
from perf.statistics import aggregate, curves, ratio_interval, saturation, verdict
from tests.perf import example_run


def repeats(rng: random.Random, count: int, middle: float, spread: float = 0.03) -> list[float]:
    return [rng.gauss(middle, middle * spread) for _ in range(count)]


@pytest.mark.parametrize("count", [3, 5, 10])
def test_equal_things_differ_in_less_than_one_case_of_twenty(count: int) -> None:
    rng = random.Random(count)
    cases = [verdict(repeats(rng, count, 100), repeats(rng, count, 100))["verdict"] for _ in range(300)]
    assert cases.count("no difference shown") >= 0.96 * len(cases)


@pytest.mark.parametrize("higher", [True, False])
def test_a_tenth_is_mostly_found_in_five_repeats(higher: bool) -> None:
    rng = random.Random(5)
    cases = [
        verdict(repeats(rng, 5, 100), repeats(rng, 5, 110), higher_is_better=higher)["verdict"] for _ in range(300)
    ]
    right, wrong = ("faster", "slower") if higher else ("slower", "faster")
    assert cases.count(right) >= 0.75 * len(cases)
    assert wrong not in cases


def test_what_is_noise_free_is_judged_from_one_percent_on() -> None:
    assert verdict([100.0] * 3, [100.9] * 3)["verdict"] == "no difference shown"
    judged = verdict([100.0] * 3, [101.1] * 3)
    assert (judged["verdict"], judged["low"], judged["high"]) == ("faster", pytest.approx(1.011), pytest.approx(1.011))
    assert verdict([100.0] * 3, [98.0] * 3)["verdict"] == "slower"


def test_too_few_repeats_give_no_verdict() -> None:
    few = verdict([100.0, 101.0], [200.0, 201.0, 202.0])
    assert (few["verdict"], few["low"], few["high"]) == ("too few repeats", None, None)
    assert few["ratio"] == pytest.approx(2.0, rel=1e-4)
    nothing = verdict([], [1.0, 2.0, 3.0])
    assert (nothing["verdict"], nothing["ratio"]) == ("too few repeats", None)
    # A repeat without a figure is none.
    assert verdict([100.0, 101.0, math.nan], [1.0, 2.0, 3.0])["verdict"] == "too few repeats"
    assert verdict([100.0, 101.0, 0.0], [1.0, 2.0, 3.0])["verdict"] == "too few repeats"


def test_the_interval_holds_the_ratio_and_is_the_same_every_time() -> None:
    a, b = [98.0, 100.0, 103.0, 99.0, 101.0], [118.0, 122.0, 120.0, 119.0, 125.0]
    low, high = ratio_interval(a, b)
    assert low < 1.2 < high
    assert (low, high) == ratio_interval(a, b)
    inverse = ratio_interval(b, a)
    assert inverse == pytest.approx((1 / high, 1 / low))


def test_aggregate_takes_medians_and_sums() -> None:
    rng = random.Random(0)
    records = [example_run.record("fp32", example_run.load(concurrency=2), rng) for _ in range(3)]
    for record, throughput in zip(records, (90.0, 110.0, 100.0), strict=True):
        record["point"]["throughput"] = throughput
    records[0]["point"]["latency_ms"]["p99"], records[2]["resources"]["images_per_core"] = 1e6, None
    del records[1]["point"]["latency_ms"]["max"]
    row = aggregate(records, "fp32")
    assert row["throughput"] == {"median": 100.0, "low": 90.0, "high": 110.0, "values": [90.0, 110.0, 100.0]}
    assert row["label"] == str(Load(concurrency=2))
    assert row["latency_ms"]["p99"] < 1e6
    assert row["latency_ms"]["max"] > row["latency_ms"]["p50"]
    assert len(row["latency_values"]["p99"]) == 3
    assert row["resources"]["rss_mib"] == 212.0
    assert row["resources"]["images_per_core"] > 0


def rows(*throughputs: float) -> list[dict[str, object]]:
    series = []
    for power, throughput in enumerate(throughputs):
        load = example_run.load(concurrency=2**power)
        figures = {"throughput": {"median": throughput}, "latency_ms": {"p99": 10.0 * 2**power}}
        series.append({"precision": "fp32", "load": load, "label": str(Load(**load)), **figures})
    return series


def test_saturation_is_the_smallest_load_with_nearly_all() -> None:
    series = rows(100, 190, 196, 200, 170)
    knee = saturation(series)
    assert knee is not None
    assert knee["label"] == "2 clients, batch 1, gRPC"
    assert knee["share"] == pytest.approx(0.95)
    assert knee["latency_ms"]["p99"] == 20.0
    assert not knee["ends"]
    rising = saturation(rows(100, 200, 400))
    assert rising is not None
    assert rising["ends"]
    assert saturation(rows(100)) is None
    assert saturation([]) is None


def test_curves_are_named_by_what_they_differ_in() -> None:
    assert list(curves(rows(1, 2), "concurrency")) == ["fp32"]
    mixed = example_run.summary()["series"]
    assert list(curves(mixed["concurrency"], "concurrency")) == ["fp32", "int8"]
    points = curves(mixed["batch"][::-1], "batch_size")["fp32"]
    assert [point["load"]["batch_size"] for point in points] == [1, 2, 4, 8, 16, 32, 64]
