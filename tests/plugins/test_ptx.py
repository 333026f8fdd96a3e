"""The compiled PTX of the kernels, interpreted: equal to the reference bit for bit, and nothing wrong on the way.

Evidence level: "compiled PTX, interpreted". Nothing here says how long a GPU takes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build.contract import Nms
from build.tensorrt.plugins import find_nvcc
from tests.plugins import cases, faults
from tests.plugins.conftest import cxx
from tests.plugins.interpreter import MODES, Interpreter, build_interpreter, build_kernels, difference
from tests.plugins.library import Library
from tests.ssd_nms_oracle import Case

# The oldest GPU that is built for, and one with what only newer ones have (a maximum of two halves).
OLD, NEW = "75", "100"


def start(architecture: str, *, reordered: bool = False) -> Interpreter:
    if find_nvcc() is None:
        pytest.skip("needs nvcc (PATH, CUDA_HOME or pip install nvidia-cuda-nvcc nvidia-cuda-runtime)")
    return Interpreter(build_interpreter(cxx()), build_kernels(architecture, cxx()), reordered=reordered)


@pytest.fixture(scope="module")
def interpreter() -> Interpreter:
    return start(OLD)


def check(interpreter: Interpreter, reference: Library, case: Case, mode: int, seed: int) -> int:
    """One call against the reference.

    Returns:
        how many detections there are.
    """
    want = reference.run(case)
    result = interpreter.run(case, MODES[mode], seed=seed)
    told = f"{case.name}, {MODES[mode]}, seed {seed}"
    assert not result.failure, f"{told}: {result.failure}"
    assert result.findings == [], told
    assert difference(result.outputs, want) == "", told
    return int(want[0].sum())


def test_small_cases_equal_the_reference(interpreter: Interpreter, reference: Library) -> None:
    # 66: every kind with every activation, twice
    found = [check(interpreter, reference, cases.small(i), i % len(MODES), seed=i) for i in range(66)]
    assert sum(count > 0 for count in found) > 40


def test_larger_cases_equal_the_reference(interpreter: Interpreter, reference: Library) -> None:
    found = [check(interpreter, reference, cases.medium(i), (0, 2, 5, 3)[i % 4], seed=i) for i in range(6)]
    assert sum(count > 0 for count in found) >= 4


@pytest.mark.parametrize("index", range(len(cases.SPECIAL)))
def test_each_path_equals_the_reference(interpreter: Interpreter, reference: Library, index: int) -> None:
    check(interpreter, reference, cases.SPECIAL[index](), 0 if index % 2 else 5, seed=index)


def test_a_detector_of_real_size_equals_the_reference(interpreter: Interpreter, reference: Library) -> None:
    assert check(interpreter, reference, cases.FULL[0](), 0, seed=1) == 100


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("architecture", [OLD, NEW])
def test_every_series_equals_the_reference(reference: Library, architecture: str) -> None:
    interpreter = start(architecture)
    for i in range(240):
        for mode in {i % len(MODES), (i * 5 + 1) % len(MODES)}:
            check(interpreter, reference, cases.small(i), mode, seed=i)
    for i in range(72):
        check(interpreter, reference, cases.medium(i), (0, 2, 5, 3, 4, 1)[i % len(MODES)], seed=i)
    for i, make in enumerate((*cases.SPECIAL, *cases.FULL)):
        for mode in (0, 5):
            check(interpreter, reference, make(), mode, seed=i)


# -- faults ------------------------------------------------------------------------------------------------------------


def notices(interpreter: Interpreter, reference: Library, fault: faults.Fault, folder: Path) -> bool:
    file = folder / "fault.ptx"
    file.write_text(fault.ptx)
    interpreter.load(file)
    return any(
        faults.noticed(interpreter, case, reference.run(case), mode)
        for mode in faults.RUNS
        for case in faults.fault_cases()
    )


def planted() -> list[faults.Fault]:
    return faults.plant((build_kernels(OLD, cxx()) / "kernels.ptx").read_text())


def test_planted_faults_are_noticed(interpreter: Interpreter, reference: Library, tmp_path: Path) -> None:
    everything = planted()
    barriers = [fault for fault in everything if "no barrier" in fault.name]
    others = [fault for fault in everything if fault not in barriers]
    chosen = [*others, *barriers[:6], *barriers[-3:]]
    assert len(chosen) >= 16
    missed = [fault.name for fault in chosen if not notices(interpreter, reference, fault, tmp_path)]
    interpreter.load(build_kernels(OLD, cxx()) / "kernels.ptx")
    assert missed == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_barrier_is_needed(interpreter: Interpreter, reference: Library, tmp_path: Path) -> None:
    missed = [fault.name for fault in planted() if not notices(interpreter, reference, fault, tmp_path)]
    interpreter.load(build_kernels(OLD, cxx()) / "kernels.ptx")
    # Of one barrier, in a part that few inputs reach, no case shows that it is needed; it stays.
    assert len(missed) <= 1, missed


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (r"rcp\.rn\.f32", "rcp.approx.f32"),
        (r"div\.rn\.f32", "div.full.f32"),
        (r"bar\.sync\s+0", "bar.arrive 0, 64"),
        (r"min\.f32", "sin.approx.f32"),
    ],
)
def test_what_is_not_known_is_refused_Negative(tmp_path: Path, change: str, complaint: str) -> None:  # noqa: N802
    interpreter = start(OLD)
    text, count = re.subn(change, complaint, (build_kernels(OLD, cxx()) / "kernels.ptx").read_text(), count=1)
    if count == 0:
        text = text.replace("bar.sync", f"{complaint} \t%f1, %f2;\n bar.sync", 1)
    (tmp_path / "other.ptx").write_text(text)
    with pytest.raises(AssertionError, match=r"not known|exact"):
        interpreter.load(tmp_path / "other.ptx")
    interpreter.load(build_kernels(OLD, cxx()) / "kernels.ptx")


# -- counters ----------------------------------------------------------------------------------------------------------


def counters(interpreter: Interpreter, case: Case, *, timing: bool = False) -> list[dict[str, Any]]:
    result = interpreter.run(case, timing=timing, checks=False)
    assert not result.failure
    launches: list[dict[str, Any]] = interpreter.report()["launches"]
    return launches


@pytest.mark.parametrize("kind", ["suppressed", "equal"])
def test_selection_is_linear_in_the_candidates(interpreter: Interpreter, kind: str) -> None:
    """Where next to nothing is kept, every candidate is looked at: twice as many may cost little more than twice."""
    nms = Nms(score_activation="sigmoid", background_class=-1, lowest_score_threshold=0.0, score_threshold=0.0)
    issues = []
    for anchors in (4000, 8000, 16000):
        random = np.random.default_rng(5)
        case = cases.make(kind, random, (1, anchors, 1), kind, replace(nms, iou_threshold=0.0))
        case = replace(case, box_deltas=case.box_deltas * 0, anchors=np.repeat(case.anchors[:1], anchors, 0))
        issues.append(counters(interpreter, case)[1]["issues"])
    # A part that is quadratic adds more and more to each candidate; that of the first chunk is paid once.
    steps = [issues[1] - issues[0], (issues[2] - issues[1]) / 2]
    # Counted, so exact: 0.98 and 1.00. One more reading of all keys for each chunk makes it 1.07.
    assert 0 < steps[1] < 1.03 * steps[0], issues


def test_the_common_case_keeps_its_counters() -> None:
    """SSD300-COCO in FP16, by the counters of README's table: a model, not a time."""
    interpreter = start(OLD, reordered=True)
    random = np.random.default_rng([9, 1])
    usual = cases.make("usual", random, (1, 8732, 81), "detector", Nms(), (np.float16, np.float16))
    lower = replace(usual, nms=Nms(score_threshold=0.01, max_detections=200))
    find, select = counters(interpreter, usual, timing=True)
    assert find["issues"] <= 480_000
    assert max(select["block_cycles"]) <= 8_500
    assert max(counters(interpreter, lower, timing=True)[1]["block_cycles"]) <= 15_000
