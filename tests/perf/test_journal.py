"""The journal: what was measured is never measured again, nor lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perf.journal import Journal
from perf.load import PerfError

KEY = {"series": "ratio", "repeat": 0}


def counted(values: list[float]) -> Any:
    """A measurement that gives another of `values` at each call."""
    return lambda: {"throughput": values.pop(0)}


def test_a_key_is_measured_once(tmp_path: Path) -> None:
    journal, left = Journal(tmp_path / "points.jsonl"), [1.0, 2.0]
    measure = counted(left)
    assert journal.measure(KEY, measure) == {"throughput": 1.0}
    assert journal.measure(dict(reversed(KEY.items())), measure) == {"throughput": 1.0}
    assert journal.measure({**KEY, "repeat": 1}, measure) == {"throughput": 2.0}
    assert (left, journal.reused) == ([], 1)


def test_a_later_run_reads_what_an_earlier_one_measured(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    Journal(path).measure(KEY, lambda: {"a": (1, 2), "b": None})
    begun: list[Any] = []
    again = Journal(path, begun.append)
    assert again.measure(KEY, lambda: {}) == {"a": [1, 2], "b": None}
    assert begun == []
    again.measure({"series": "new"}, lambda: {})
    assert begun == [{"series": "new"}]


def test_every_measurement_is_on_disk_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    journal = Journal(path)
    journal.measure(KEY, lambda: {"throughput": 1.0})
    seen = journal.measure({"series": "next"}, lambda: {"lines": len(path.read_text().splitlines())})
    assert seen == {"lines": 1}
    entry = json.loads(path.read_text().splitlines()[0])
    assert entry["key"] == KEY
    assert entry["result"] == {"throughput": 1.0}
    assert entry["seconds"] >= 0
    assert entry["at"].endswith("Z")


def test_what_failed_is_noted_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"

    def fail() -> dict[str, Any]:
        raise PerfError("no request ended")

    with pytest.raises(PerfError):
        Journal(path).measure(KEY, fail)
    assert json.loads(path.read_text())["error"] == "no request ended"
    assert Journal(path).measure(KEY, lambda: {"throughput": 3.0}) == {"throughput": 3.0}
    assert Journal(path).measure(KEY, fail) == {"throughput": 3.0}


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    journal = Journal(path)
    journal.measure(KEY, lambda: {"throughput": 1.0})
    journal.measure({"series": "cut"}, lambda: {"throughput": 2.0})
    path.write_text(path.read_text()[:-20])
    again = Journal(path)
    assert again.measure(KEY, lambda: {}) == {"throughput": 1.0}
    assert again.measure({"series": "cut"}, lambda: {"throughput": 5.0}) == {"throughput": 5.0}
    assert Journal(path).measure({"series": "cut"}, lambda: {}) == {"throughput": 5.0}


def test_what_cannot_be_read_counts_as_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text('hello\n[1]\n{"key": 3}\n')
    assert Journal(path).measure(KEY, lambda: {"a": 1}) == {"a": 1}
    assert Journal(path).measure(KEY, lambda: {"a": 2}) == {"a": 1}


def test_a_result_that_does_not_count_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    Journal(path).measure(KEY, lambda: {"valid": False})
    again = Journal(path)
    assert again.measure(KEY, lambda: {"valid": True}, counts=lambda result: bool(result["valid"])) == {"valid": True}
    assert again.reused == 0
    assert Journal(path).measure(KEY, lambda: {}, counts=lambda result: bool(result["valid"])) == {"valid": True}


def test_nothing_is_kept_without_a_file() -> None:
    journal = Journal()
    assert journal.measure(KEY, lambda: {"a": 1}) == {"a": 1}
    assert journal.measure(KEY, lambda: {"a": 2}) == {"a": 1}


def test_what_was_measured_elsewhere_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    Journal(path, where={"cpu": "a"}).measure(KEY, lambda: {"a": 1})
    assert Journal(path, where={"cpu": "b"}).measure(KEY, lambda: {"a": 2}) == {"a": 2}
    assert Journal(path, where={"cpu": "a"}).measure(KEY, lambda: {"a": 3}) == {"a": 1}
