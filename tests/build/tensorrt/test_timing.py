"""Summaries and profiles follow trtexec's rules."""

from __future__ import annotations

import pytest

from build.tensorrt.timing import Summary, profile_rows


def test_summary_follows_trtexec() -> None:
    summary = Summary.of([float(value) for value in range(100, 0, -1)])
    assert (summary.min, summary.mean, summary.median, summary.p90, summary.p99, summary.max) == (
        1,
        50.5,
        50.5,
        90,
        99,
        100,
    )
    assert Summary.of([3.0, 1.0, 2.0]).median == 2.0
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0, 7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def test_profile_rows_are_trtexecs() -> None:
    rows = profile_rows({"conv": [1.0, 3.0, 2.0], "nms": [2.0, 2.0, 2.0]})
    assert rows[0] == {"count": 3}
    assert rows[1] == {"name": "conv", "timeMs": 6.0, "averageMs": 2.0, "medianMs": 2.0, "percentage": 50.0}
    assert sum(row.get("percentage", 0) for row in rows) == 100
