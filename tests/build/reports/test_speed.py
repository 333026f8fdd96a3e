"""Whether INT8 pays: the table of times, on a little model; test_audit.py times the real one."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from build import spec
from build.quantization.candidates import candidates
from build.reports import cpu, speed
from tests.build import pictures, tiny_model


@pytest.fixture
def tiny(tmp_path: Path) -> spec.Spec:
    """The tiny model with pictures to calibrate on and to time."""
    path = tiny_model.write(tmp_path / "tiny")
    pictures.write(tmp_path / "tiny" / "calibration", 120, tiny_model.LABELS, seed=1)
    pictures.write(tmp_path / "tiny" / "held_out", 4, tiny_model.LABELS, seed=2)
    path.write_text(f'{path.read_text()}\n[data]\ncalibration = "calibration"\nheld_out = "held_out"\n')
    return spec.load(path)


def test_precisions_are_timed_side_by_side(tiny: spec.Spec, tmp_path: Path) -> None:
    shown = io.StringIO()
    result = speed.measure(tiny, tmp_path, rounds=2, console=Console(file=shown, width=150))
    assert json.loads((tmp_path / "audit" / "speed.json").read_text()) == result
    for precision in ("fp32", "int8"):
        row = result[precision]
        for part in ("whole", "before_nms"):
            assert row[f"{part}_ratio"] == pytest.approx(result["fp32"][f"{part}_ms"] / row[f"{part}_ms"])
        assert f"{row['whole_ms']:.2f}" in shown.getvalue()
    assert {row["conv"] for row in result["layers"]} >= {"conv", "other"}
    assert result["cpu"] == cpu.int8()
    rows = result["kernels"]["int8"]
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert any(row["what"] == "conversion" and row["kernel"] == "QuantizeLinear" for row in rows)
    assert f"{rows[0]['kernel']} {rows[0]['node']}: {rows[0]['advice']}" in shown.getvalue()


def test_kernels_that_stay_float_are_named_with_what_to_do(tiny: spec.Spec, tmp_path: Path) -> None:
    (candidate,) = candidates(
        tiny, "int8", tmp_path, calibrators=("minmax",), exclude=["conv"], console=Console(quiet=True)
    )
    rows = speed.kernels(candidate, np.zeros((1, 8, 8, 3), np.uint8), runs=2)
    advices = sorted(row["advice"] for row in rows if row["what"] == "float" and "Conv" in row["kernel"])
    head = "a small head: rounding its answer would cost more accuracy than time"
    assert advices == [head, head, "left unquantised: exclude_nodes of spec.toml names it"]


def test_a_conv_that_is_not_faster_has_a_reason(tiny: spec.Spec, tmp_path: Path) -> None:
    (candidate,) = candidates(tiny, "int8", tmp_path, calibrators=("minmax",), console=Console(quiet=True))
    name = candidate.quantised[0]
    slower = speed._compared(candidate, {name: 1.0, "left": 3.0, "other": 2.0}, {name: 2.0, "left": 3.0, "other": 1.0})
    reasons = {row["conv"]: row["why"] for row in slower}
    assert list(reasons) == ["left", "other", name]  # the longest first
    assert reasons["left"] == "left unquantised"
    assert reasons[name].startswith("3 input channels: too few")
    assert reasons["other"].startswith("layout changes")
    (faster,) = speed._compared(candidate, {name: 2.0}, {name: 1.0})
    assert faster == {"conv": name, "before_ms": 2.0, "after_ms": 1.0, "why": ""}


def test_each_conv_has_its_own_time(tiny: spec.Spec, tmp_path: Path) -> None:
    (candidate,) = candidates(tiny, "fp32", tmp_path, console=Console(quiet=True))
    times = speed.layer_times(candidate, np.zeros((1, 8, 8, 3), np.uint8), runs=3)
    assert "conv" in times
    assert len(times) == 4  # three Convs and the rest
    assert all(value >= 0 for value in times.values())
