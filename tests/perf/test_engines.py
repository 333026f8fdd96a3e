"""Models, precisions and engines side by side: the order of measuring and the arithmetic, without a server."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from build.errors import OptionError, VerifyError
from perf import engines
from perf.engines import Variant, side_by_side

PRECISIONS, ENGINES = ("fp32", "bf16", "int8"), ("onnxruntime", "openvino")
SERVED = {"onnxruntime fp32": 90.0, "openvino fp32": 100.0, "openvino bf16": 150.0, "openvino int8": 250.0}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, in order; ONNX Runtime has no BF16, and its INT8 fails the gate."""
    measured: list[str] = []

    def start(variant: Variant, stack: contextlib.ExitStack, *rest: Any) -> Any:
        name = f"{variant.engine} {variant.precision}"
        if name == "onnxruntime bf16":
            raise OptionError("there is none")
        if name == "onnxruntime int8":
            raise VerifyError("it fails its gate")

        def point(series: str, load: Any, *, seconds: float, repeat: int) -> Any:
            assert (load.concurrency, load.shared_memory) == (3, "system")
            measured.append(name)
            # The machine is half as fast in the second round.
            return {"point": {"throughput": SERVED[name] / (1 + repeat)}}

        return SimpleNamespace(point=point), SimpleNamespace(throughput=lambda seconds: SERVED[name])

    monkeypatch.setattr(engines, "_start", start)
    return measured


def measure(folder: Path, **options: Any) -> tuple[list[dict[str, Any]], str]:
    with (folder / "said.txt").open("w") as file:
        show = Console(file=file, width=80)
        asked: dict[str, Any] = {"precisions": PRECISIONS, "engines": ENGINES, "rounds": 1, "seconds": 0.1} | options
        rows = side_by_side(["tiny"], clients=3, artifacts=folder, console=show, **asked)
    return rows, (folder / "said.txt").read_text()


def test_every_round_measures_all_and_sets_them_against_fp32s_best(order: list[str], tmp_path: Path) -> None:
    rows, said = measure(tmp_path, rounds=2, seconds=0.1)
    assert order == [*SERVED] * 2
    assert "tiny bf16 onnxruntime: left out: there is none" in said
    assert re.search(r"tiny bf16 openvino\W+112\W+1\.50\W+150\W+0\.750", said)  # whole, on a narrow terminal
    assert "tiny int8 onnxruntime: left out: it fails its gate" in said
    assert {f"{row['engine']} {row['precision']}": row["gain"] for row in rows} == pytest.approx(
        {"onnxruntime fp32": 0.9, "openvino fp32": 1.0, "openvino bf16": 1.5, "openvino int8": 2.5}
    )
    assert rows[0]["served_direct"] == pytest.approx((1 + 0.5) / 2)
    written = json.loads((tmp_path / "perf" / "engines.json").read_bytes())
    assert written["rows"] == rows
    assert (written["clients"], written["rounds"]) == (3, 2)


def test_without_fp32_there_is_no_gain(order: list[str], tmp_path: Path) -> None:
    rows, _ = measure(tmp_path, rounds=1, precisions=["int8"])
    assert [row["gain"] for row in rows] == [None]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"rounds": 0}, "at least 1"), ({"precisions": ["bf16"], "engines": ["onnxruntime"]}, "no engine here has any")],
)
def test_nothing_to_measure_is_one_error(
    order: list[str], tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(OptionError, match=complaint):
        measure(tmp_path, **options)
