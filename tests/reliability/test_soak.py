"""A short soak of a supervised server; `python -m tests.reliability.soak --minutes 120` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.soak import KILL, KILL_SHARING, Soak


@pytest.mark.triton
@pytest.mark.parametrize("seconds", [5.0, pytest.param(180.0, marks=pytest.mark.long)])
def test_no_answer_is_wrong_and_none_is_lost(native: None, tmp_path: Path, seconds: float) -> None:
    totals = Soak(tmp_path, seed=1).run(seconds, every=0.5)
    shown = (tmp_path / "shown").read_text()
    assert (totals.wrong, totals.failed) == (0, 0), shown
    assert totals.answered > 100
    assert totals.events[KILL] >= 1
    assert totals.sharing or not totals.events[KILL_SHARING]
    assert shown.count("the server is up again") == totals.events[KILL]
    assert max(totals.rss_mib) < min(totals.rss_mib) + 40
