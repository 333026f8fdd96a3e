"""The ceilings of a machine: measured, and read from a file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from build.reports import roofline
from build.reports.roofline import FusionError


def test_ceilings_of_this_machine() -> None:
    ceilings = roofline.measure_ceilings(1, seconds=0.05)
    assert ceilings.operations > 1e8
    assert ceilings.int8 is not None
    assert ceilings.int8 > 1e8
    assert [size for size, _ in ceilings.bandwidth] == list(roofline.WORKING_SETS)
    assert all(speed > 1e8 and math.isfinite(speed) for _, speed in ceilings.bandwidth)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"operations": 0, "bandwidth": [[1, 1]], "method": "x"}', '{"operations": "a"}']
)
def test_wrong_ceilings_are_explained(text: str, tmp_path: Path) -> None:
    (tmp_path / "ceilings.json").write_text(text)
    with pytest.raises(FusionError, match="not a description of ceilings"):
        roofline.read_ceilings(tmp_path / "ceilings.json")
