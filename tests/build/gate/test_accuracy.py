"""COCO evaluation: a perfect, a shifted and a foreign set of detections."""

from __future__ import annotations

from typing import Any

import pytest

from build.errors import SSDError
from build.gate.accuracy import evaluate
from models.shapes.scenes import coco_ground_truth


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    return coco_ground_truth("held_out", 12)


def _as_detections(truth: dict[str, Any], shift: float = 0.0) -> list[dict[str, Any]]:
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": [a["bbox"][0] + shift * a["bbox"][2], *a["bbox"][1:]],
            "score": 0.9,
        }
        for a in truth["annotations"]
    ]


def test_truth_as_detections_scores_one(truth: dict[str, Any]) -> None:
    accuracy = evaluate(truth, _as_detections(truth))
    assert accuracy.map == pytest.approx(1.0)
    assert accuracy.images == 12
    assert accuracy.objects == len(truth["annotations"])
    assert set(accuracy.by_class) == {"circle", "square", "triangle", "star", "cross", "ring"}


def test_boxes_shifted_by_a_quarter_pass_at_50_and_fail_at_75(truth: dict[str, Any]) -> None:
    # A shift by s of the width leaves IoU (1-s)/(1+s) = 0.6.
    accuracy = evaluate(truth, _as_detections(truth, shift=0.25))
    assert accuracy.map50 == pytest.approx(1.0)
    assert accuracy.map75 == pytest.approx(0.0)
    assert accuracy.map == pytest.approx(0.3, abs=0.02)  # thresholds 0.50, 0.55 and (by rounding) 0.60 of ten


def test_no_detection_scores_zero(truth: dict[str, Any]) -> None:
    assert evaluate(truth, []).map == 0.0


def test_foreign_category_is_refused(truth: dict[str, Any]) -> None:
    with pytest.raises(SSDError, match="unknown image or category"):
        evaluate(truth, [{"image_id": 1, "category_id": 99, "bbox": [0, 0, 1, 1], "score": 1.0}])


def test_unlabelled_ground_truth_is_refused(truth: dict[str, Any]) -> None:
    with pytest.raises(SSDError, match="no annotation"):
        evaluate({**truth, "annotations": []}, [])
