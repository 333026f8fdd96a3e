"""SSDNMS's executors agree: C++ reference, ONNX function and NumPy oracle; the emulated kernels and the reference."""

from __future__ import annotations

import collections
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from build.contract import Nms
from tests import ssd_nms_oracle as oracle
from tests.build.graph.test_ssd_nms import run as run_function
from tests.plugins.library import Library
from tests.ssd_nms_oracle import Case, Outputs

# Orders in which the emulator runs a block's threads: first to last, last to first, and at random with this seed.
SCHEDULES = (0, 1, 7)


def run_emulated(library: Library, case: Case, schedule: int) -> Outputs:
    library.c.emulatorSetSchedule(schedule)
    return library.run(case)


def assert_same_bits(case: Case, got: Outputs, want: Outputs) -> None:
    for name, a, b in zip(("number", "boxes", "scores", "labels"), got, want, strict=True):
        differ = np.argwhere((a.view(np.int32) != b.view(np.int32)) & ~(np.isnan(a) & np.isnan(b)))
        assert len(differ) == 0, f"{case.name}: {name} differ at {differ[:3].tolist()}"


@pytest.mark.slow
def test_reference_onnx_function_and_oracle_agree_on_1000_cases(reference: Library) -> None:
    tallies: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in oracle.cases(1000):
        from_reference, from_function = reference.run(case), run_function(case)
        outcomes = {
            "reference": oracle.agree(case, from_reference),
            "function": oracle.agree(case, from_function),
        }
        for executor, outcome in outcomes.items():
            tallies[executor][outcome] += 1
        if "ambiguous" not in outcomes.values():
            assert np.array_equal(from_reference[0], from_function[0]), case.name
            assert np.array_equal(from_reference[3], from_function[3]), case.name
    for tally in tallies.values():
        assert tally.total() == 1000
        assert tally["exact"] >= 1000 / 6, tallies  # without exp all bits are equal
        assert tally["ambiguous"] <= 1000 // 50, tallies


def test_kernels_equal_the_reference_bit_for_bit(reference: Library, emulated: Library) -> None:
    # Few: where there is nvcc, test_ptx.py runs many more. Here the sanitizer for undefined behaviour looks on.
    for index, case in enumerate(oracle.cases(78, seed=1)):
        want = reference.run(case)
        assert oracle.agree(case, want)
        assert_same_bits(case, run_emulated(emulated, case, SCHEDULES[index % 3] + index // 3), want)


def large(name: str, batch: int, anchors: int, classes: int, **settings: Any) -> Case:
    """A case with more candidates than a chunk holds.

    Args:
        name: begins with how the logits are distributed.
        settings: of Nms; `half` for FP16.
    """
    random = np.random.default_rng(len(name))
    half = settings.pop("half", False)
    settings.setdefault("lowest_score_threshold", 0.0)
    corners = [random.uniform(0, 1, (anchors, 2)), random.uniform(0.05, 0.3, (anchors, 2))]
    deltas, logits = random.normal(0, 1, (batch, anchors, 4)), random.normal(0, 2, (batch, anchors, classes))
    if name.startswith("background"):
        logits[..., 0] += 7
    elif name.startswith("ties"):
        logits = np.round(logits * 0.2)
    elif name.startswith("equal"):
        logits[:] = 0
    elif name.startswith("narrow"):  # scores that differ in their last bits only
        logits = 0.5 + logits * 1e-6
    dtype = np.float16 if half else np.float32
    return Case(
        name, Nms(**settings), deltas.astype(dtype), logits.astype(dtype), np.concatenate(corners, 1, dtype=np.float32)
    )


LARGE = (
    large("background", 2, 1000, 21, max_detections=200),
    large("background, FP16", 1, 1000, 81, half=True, score_threshold=0.01),
    large("background, every candidate", 1, 700, 21, max_detections=5000, iou_threshold=1.0),
    large("sigmoid, every candidate", 1, 700, 6, max_detections=5000, iou_threshold=1.0, score_activation="sigmoid"),
    large("dense", 1, 700, 21, score_threshold=0.01, max_detections=1000, iou_threshold=0.3),
    large(
        "dense, every candidate",
        1,
        700,
        6,
        score_threshold=0.0,
        lowest_score_threshold=0.0,
        max_detections=5000,
        iou_threshold=1.0,
    ),
    large("ties", 1, 900, 6, score_activation="sigmoid", background_class=-1, score_threshold=0.1, max_detections=700),
    large("equal", 1, 900, 6, score_activation="sigmoid", score_threshold=0.1, max_detections=600, class_agnostic=True),
    large("equal, capped", 1, 900, 6, score_threshold=0.1, max_detections=600, topk_per_class=37),
    large(
        "narrow",
        1,
        900,
        6,
        score_activation="none",
        score_threshold=0.1,
        max_detections=2000,
        topk_per_class=300,
        iou_threshold=0.9,
    ),
    large("capped", 1, 1500, 3, score_activation="none", max_detections=500, topk_per_class=400, iou_threshold=0.2),
    large(
        "logits beyond shared memory, FP16", 1, 20, 30000, half=True, score_activation="sigmoid", score_threshold=0.9
    ),
    large("huge rows", 2, 5, 9000, score_threshold=1e-4, max_detections=50),
    large("many classes", 1, 60, 1204, score_threshold=1e-3, max_detections=300, topk_per_class=2),
    large("one anchor", 3, 1, 2, score_threshold=0.1, max_detections=1),
)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_kernels_equal_the_reference_where_there_is_much(reference: Library, emulated: Library, case: Case) -> None:
    want = reference.run(case)
    assert want[0].max() > 0
    schedule = SCHEDULES[LARGE.index(case) % len(SCHEDULES)]
    assert_same_bits(case, run_emulated(emulated, case, schedule), want)


def test_rows_do_not_influence_each_other(reference: Library, emulated: Library) -> None:
    case = LARGE[0]
    quiet = case.class_logits.copy()
    quiet[0] = -50  # a row without detections before one with some
    case = replace(case, class_logits=quiet)
    batch = run_emulated(emulated, case, 2)
    assert batch[0].ravel().tolist() == [0, 200]
    for row in range(2):
        alone = case.row(row)
        for library in (reference, emulated):
            assert_same_bits(alone, library.run(alone), tuple(array[row : row + 1] for array in batch))  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["score", "iou"])
def test_one_threshold_can_be_an_input_alone(reference: Library, emulated: Library, which: str) -> None:
    case = LARGE[0]
    values = np.array([[0.2], [0.6]], np.float32)
    nms = replace(case.nms, **{f"{which}_threshold": 0.01})
    mixed = replace(case, nms=nms, **{f"{which}_threshold": values})
    got = run_emulated(emulated, mixed, 0)
    assert_same_bits(mixed, reference.run(mixed), got)
    for row in range(2):
        fixed = replace(case.row(row), nms=replace(nms, **{f"{which}_threshold": float(values[row, 0])}))
        assert_same_bits(fixed, reference.run(fixed), tuple(array[row : row + 1] for array in got))  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [np.nan, -1.0, 2.0, np.inf])
def test_a_strange_runtime_threshold_does_no_harm(reference: Library, emulated: Library, threshold: float) -> None:
    case = replace(
        large("many classes", 1, 40, 60, score_activation="sigmoid", max_detections=5000, topk_per_class=2),
        score_threshold=np.full((1, 1), threshold, np.float32),
        iou_threshold=np.ones((1, 1), np.float32),
    )
    got = run_emulated(emulated, case, 0)
    assert_same_bits(case, got, reference.run(case))
    assert got[0].item() == (2 * 59 if threshold == -1.0 else 0)  # two of each class at most
