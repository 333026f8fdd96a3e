"""How an answer differs from the expected one, on one picture's detections; tests of whole runs are in test_runs.py."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from build.contract import Target
from build.gate.verify import tolerance
from perf.mlperf import answers
from perf.mlperf.answers import difference

WITHIN = tolerance(Target("onnxruntime"))

# -- one answer --------------------------------------------------------------------------------------------------------


def answer(number: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    """One picture with `number` detections."""
    rng = np.random.default_rng(seed)
    return {
        "detection_boxes": rng.random((number, 4)).astype(np.float32),
        "detection_scores": np.sort(rng.random(number))[::-1].astype(np.float32),
        "detection_classes": rng.integers(0, 3, number).astype(np.int32),
    }


def test_the_same_answer_has_no_difference() -> None:
    assert difference(answer(4), answer(4), WITHIN) == ""
    assert difference(answer(0), answer(0, seed=1), WITHIN) == ""


def test_what_is_within_the_tolerance_is_no_difference() -> None:
    given = answer(4)
    given["detection_boxes"] += 0.9 * WITHIN.detection_boxes
    given["detection_scores"] -= 0.9 * WITHIN.detection_scores
    assert difference(given, answer(4), WITHIN) == ""


def test_scores_that_are_as_good_as_equal_may_change_places() -> None:
    wanted = answer(4)
    wanted["detection_scores"][1:3] = 0.5
    given = {name: array.copy() for name, array in wanted.items()}
    for name in ("detection_boxes", "detection_classes"):
        given[name][[1, 2]] = given[name][[2, 1]]
    assert difference(given, wanted, WITHIN) == ""
    wanted["detection_scores"][1] = 0.6
    given["detection_scores"][1] = 0.6
    assert difference(given, wanted, WITHIN) != ""


FAULTS = {
    "detection_boxes": (0.21, r"detection 1: .*, its box off by 0\.21, .*"),
    "detection_scores": (-1e-3, r"detection 1: .* its score 0\.\d+ instead of 0\.\d+"),
    "detection_classes": (1, r"detection 1: class \d instead of \d, .*"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_wrong_value(name: str) -> None:
    change, sentence = FAULTS[name]
    given = answer(4)
    given[name][1] += np.asarray(change, given[name].dtype)
    text = difference(given, answer(4), WITHIN)
    assert re.fullmatch(sentence, text), text


def test_nan_is_wrong() -> None:
    for name in ("detection_boxes", "detection_scores"):
        given = answer(4)
        given[name][0] = np.nan
        assert "detection 0: " in difference(given, answer(4), WITHIN)


def test_two_boxes_cannot_stand_for_one() -> None:
    given = answer(2)
    for name in ("detection_boxes", "detection_scores", "detection_classes"):
        given[name][1] = given[name][0]
    assert difference(given, answer(2), WITHIN)


def test_another_number() -> None:
    assert difference(answer(2), answer(5), WITHIN) == "2 detections instead of 5"


def reference(path: Path) -> answers.Reference:
    values = {"runtime_thresholds": True, "score_threshold": 0.25, "iou_threshold": 0.45, "preprocessing": None}
    known: Any = SimpleNamespace(**{**values, "precision": "fp16", "runtime": "tensorrt"})
    return answers.Reference(path, known, ["a.png"], 0.01)


def test_what_a_plan_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a stand-in: the API's shape, no GPU."""

    class FakePlan:
        def __init__(self, path: Path, engine: dict[str, Any], plugin: Path) -> None:
            assert (path.name, engine, plugin.name) == ("model.plan", {"tensorrt": "10.9"}, "libssd_nms.so")

        def __enter__(self) -> FakePlan:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
            return {"of": inputs["images"]}

    monkeypatch.setattr("build.tensorrt.plan.Plan", FakePlan)
    (tmp_path / "model.plan").touch()
    (tmp_path / "manifest.json").write_text('{"engine": {"tensorrt": "10.9"}}')
    assert list(reference(tmp_path / "model.plan")._run([{"images": 1}, {"images": 2}])) == [{"of": 1}, {"of": 2}]
