"""The search for the highest rate, on a simulated server whose limit is known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perf.mlperf import peak, runs
from perf.mlperf.measure import Stage
from perf.mlperf.peak import BoundError, default_bound, find_peak, highest
from perf.mlperf.runs import Pace


@pytest.fixture
def stage() -> Stage:
    reference: Any = SimpleNamespace(check=lambda folder, result: [])
    return Stage(None, None, None, reference, Pace(13.0, 150.0), {})  # type: ignore[arg-type]


def simulate(monkeypatch: pytest.MonkeyPatch, limit: float, stalls: int = -1) -> list[float]:
    """LoadGen calls rates up to `limit` VALID, but for its run number `stalls`; the rates that it is asked for."""
    asked: list[float] = []

    def run(served: Any, scenario: str, folder: Path, *, rate: float, bound_ms: float, **_: Any) -> dict[str, Any]:
        asked.append(rate)
        lost = rate > limit or len(asked) == stalls + 1
        problems = ["LoadGen calls it INVALID: the latency is beyond its bound"] if lost else []
        p50 = 2 * bound_ms if rate > limit else bound_ms / 5
        return {"problems": problems, "figures": {"p50_ms": p50, "p99_ms": rate}, "answered": 1}

    monkeypatch.setattr(runs, "run", run)
    return asked


def test_the_highest_rate(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = simulate(monkeypatch, 100)
    result = find_peak(stage, tmp_path, 100.0, seconds=1.0)
    assert 94 < result["rate"] <= 100
    assert [probe["rate"] for probe in result["probes"]] == asked
    assert len(asked) == len(set(asked))  # what is plainly lost is not tried again
    assert find_peak(stage, tmp_path, 0.0, seconds=1.0)["bound_ms"] == 55.0  # 4 × 13 ms, rounded up


@pytest.mark.parametrize("stalls", range(6))
def test_one_stall_of_the_machine_changes_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stalls: int
) -> None:
    simulate(monkeypatch, 100)
    quiet = find_peak(stage, tmp_path, 100.0, seconds=1.0)["rate"]
    simulate(monkeypatch, 100, stalls)
    assert find_peak(stage, tmp_path, 100.0, seconds=1.0)["rate"] == quiet


def test_wrong_answers_lose_a_rate(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    simulate(monkeypatch, 100)
    monkeypatch.setattr(stage.reference, "check", lambda folder, result: ["1 of 1 answers were wrong: picture 3"])
    with pytest.raises(BoundError, match="1 of 1 answers were wrong: picture 3"):
        find_peak(stage, tmp_path, 100.0, seconds=1.0)


def test_a_bound_that_no_rate_holds(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    simulate(monkeypatch, 0)
    with pytest.raises(BoundError, match=r"(?s)p99 <= 5 ms, not even 37\.5 queries/s.*13\.0 ms.*ask for 55 ms or more"):
        find_peak(stage, tmp_path, 5.0, seconds=1.0)


def test_no_end_in_sight(stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    simulate(monkeypatch, 1e9)
    result = find_peak(stage, tmp_path, 100.0, seconds=1.0)
    assert result["rate"] == result["probes"][-1]["rate"] > 600
    assert "the highest rate that was tried" in result["note"]


@pytest.mark.parametrize("limit", [12.0, 99.0, 140.0])
def test_the_search_alone(limit: float) -> None:
    asked: list[float] = []

    def held(rate: float) -> bool:
        asked.append(rate)
        return rate <= limit

    rate, capped = highest(held, 10, 100, peak.TOLERANCE)
    assert rate is not None
    assert 0.94 * limit <= rate <= limit
    assert not capped
    assert len(asked) == len(set(asked)) <= 12


@pytest.mark.parametrize(("p50_ms", "bound_ms"), [(1.0, 5), (1.25, 5), (1.26, 10), (3.1, 15), (40, 160)])
def test_default_bound(p50_ms: float, bound_ms: float) -> None:
    assert default_bound(p50_ms) == bound_ms
