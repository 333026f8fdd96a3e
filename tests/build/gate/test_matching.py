"""Parity: what is right although it differs passes, and every planted fault is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from build import contract
from build.contract import Nms, Target
from build.gate import matching, verify
from tests import ssd_nms_oracle as oracle

FP32, INT8 = (verify.tolerance(Target("onnxruntime", precision)) for precision in ("fp32", "int8"))
NMS = Nms(score_threshold=0.05, iou_threshold=0.5, max_detections=40)
Outputs = dict[str, np.ndarray]


def scene(nms: Nms = NMS, *, objects: int = 8, seed: int = 3) -> oracle.Case:
    """Clusters of anchors around objects of three classes, as a detector has them: a best one and worse neighbours."""
    random = np.random.default_rng(seed)
    centres = np.stack(np.meshgrid(np.linspace(0.05, 0.85, 4), np.linspace(0.2, 0.8, 2)), -1).reshape(-1, 2)[:objects]
    anchors = np.concatenate(
        [np.concatenate([np.repeat(centre[None], 9, 0), np.full((9, 2), 0.15)], 1) for centre in centres]
    )
    anchors[:, :2] += random.normal(0, 0.02, (len(anchors), 2))
    logits = random.normal(0, 0.3, (1, len(anchors), 4))
    logits[..., 0] += 2
    labels = np.repeat(np.arange(objects) % 3 + 1, 9)
    logits[0, np.arange(len(anchors)), labels] += random.uniform(1.5, 5, len(anchors))
    deltas = random.normal(0, 0.5, (1, len(anchors), 4))
    return oracle.Case("scene", nms, deltas.astype("f4"), logits.astype("f4"), anchors.astype("f4"))


def answer(case: oracle.Case) -> Outputs:
    return {name: array[0].copy() for name, array in zip(contract.OUTPUTS, oracle.expected(case)[0], strict=True)}


def differences(
    case: oracle.Case, outputs: Outputs, within: verify.Tolerance = FP32, threshold: float | None = None
) -> matching.Differences:
    found = matching.candidates(case.nms, case.anchors, case.box_deltas[0], case.class_logits[0])
    threshold = case.nms.score_threshold if threshold is None else threshold
    return matching.compare(case.nms, found, outputs, threshold, within.detection_boxes, within.detection_scores)


def refused(differs: matching.Differences, within: verify.Tolerance = FP32) -> bool:
    return (
        differs.lonely > within.num_detections
        or differs.boxes > within.detection_boxes
        or differs.scores > within.detection_scores
        or differs.lonely / max(differs.total, 1) > within.detection_classes
    )


def changed(**values: Any) -> oracle.Case:
    """The scene in which something upstream of suppression went wrong."""
    return dataclasses.replace(scene(), **values)


def with_nms(**values: Any) -> Outputs:
    return answer(scene(dataclasses.replace(NMS, **values)))


def edited(edit: Callable[[Outputs], Any]) -> Outputs:
    """The right answer with a change."""
    outputs = answer(scene())
    edit(outputs)
    return outputs


def without(row: int) -> Outputs:
    outputs = answer(scene())
    for name in contract.OUTPUTS[1:]:
        rest = np.delete(outputs[name], row, 0)
        outputs[name] = np.concatenate([rest, np.full_like(rest[:1], -1 if name == contract.OUTPUTS[3] else 0)])
    outputs["num_detections"] -= 1
    return outputs


def doubled(row: int) -> Outputs:
    outputs = answer(scene())
    for name in contract.OUTPUTS[1:]:
        outputs[name] = np.insert(outputs[name], row, outputs[name][row], 0)[:-1]
    outputs["num_detections"] += 1
    return outputs


def logits(edit: Callable[[np.ndarray], Any]) -> Outputs:
    values = scene().class_logits.copy()
    result = edit(values)
    return answer(changed(class_logits=(values if result is None else result).astype("f4")))


def deltas(edit: Callable[[np.ndarray], Any]) -> Outputs:
    values = scene().box_deltas.copy()
    result = edit(values)
    return answer(changed(box_deltas=(values if result is None else result).astype("f4")))


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def classes(order: list[int]) -> Outputs:
    def edit(outputs: Outputs) -> None:
        given = outputs["detection_classes"]
        outputs["detection_classes"] = np.where(given >= 0, np.array(order)[given], given)

    return edited(edit)


FAULTS: dict[str, Callable[[], Outputs]] = {
    # the labels
    "two classes swapped": lambda: classes([1, 0, 2]),
    "labels in another order": lambda: classes([2, 0, 1]),
    "labels counted from 1": lambda: classes([1, 2, 3]),
    "one detection with another class": lambda: edited(lambda out: out["detection_classes"].__setitem__(0, 2)),
    "background column is the last": lambda: logits(lambda x: np.roll(x, -1, -1)),
    # the scores
    "scores halved": lambda: edited(lambda out: out["detection_scores"].__imul__(0.5)),
    "softmax missing": lambda: with_nms(score_activation="none", score_threshold=0.5),
    "softmax twice": lambda: logits(softmax),
    "sigmoid in place of softmax": lambda: with_nms(score_activation="sigmoid"),
    "scores squared": lambda: edited(lambda out: out["detection_scores"].__ipow__(2)),
    "one score off by 1e-4": lambda: edited(
        lambda out: out["detection_scores"].__setitem__(2, 0.0001 + out["detection_scores"][2])
    ),
    "logits of half precision": lambda: logits(lambda x: x.astype("f2")),
    # the boxes
    "boxes shifted by 1e-3": lambda: edited(lambda out: out["detection_boxes"].__iadd__(1e-3)),
    "one box shifted by 1e-3": lambda: edited(lambda out: out["detection_boxes"][3].__iadd__(1e-3)),
    "boxes half a pixel off": lambda: edited(lambda out: out["detection_boxes"].__iadd__(0.5 / 300)),
    "x and y swapped": lambda: edited(lambda out: out.update(detection_boxes=out["detection_boxes"][:, [1, 0, 3, 2]])),
    "centre and size in place of corners": lambda: edited(
        lambda out: out.update(
            detection_boxes=np.concatenate(
                [
                    (out["detection_boxes"][:, :2] + out["detection_boxes"][:, 2:]) / 2,
                    out["detection_boxes"][:, 2:] - out["detection_boxes"][:, :2],
                ],
                1,
            )
        )
    ),
    "boxes in pixels": lambda: edited(lambda out: out["detection_boxes"].__imul__(300)),
    "variances missing": lambda: with_nms(box_scales=(1.0, 1.0, 1.0, 1.0)),
    "other variances": lambda: with_nms(box_scales=(10.0, 10.0, 10.0, 10.0)),
    "sizes without exp": lambda: deltas(
        lambda x: x.__setitem__((..., slice(2, 4)), 5 * np.log1p(np.maximum(x[..., 2:] / 5, -0.9)))
    ),
    "anchors of the next row": lambda: answer(changed(anchors=np.roll(scene().anchors, 1, 0))),
    "deltas in another order": lambda: deltas(lambda x: x[..., [1, 0, 3, 2]]),
    "boxes of another detection": lambda: edited(
        lambda out: out["detection_boxes"].__setitem__(slice(0, 2), out["detection_boxes"][[1, 0]])
    ),
    "not clipped": lambda: with_nms(clip_boxes=False),
    # suppression
    "the best is dropped": lambda: without(0),
    "one in the middle is dropped": lambda: without(3),
    "the last is dropped": lambda: without(int(answer(scene())["num_detections"][0]) - 1),
    "a detection twice": lambda: doubled(1),
    "nothing is suppressed": lambda: with_nms(iou_threshold=1.0),
    "suppressed too much": lambda: with_nms(iou_threshold=0.2),
    "suppressed across classes": lambda: with_nms(class_agnostic=True, iou_threshold=0.02),
    "another score threshold": lambda: with_nms(score_threshold=0.3),
    "only the best of each class": lambda: with_nms(topk_per_class=1),
    "nothing at all": lambda: with_nms(score_threshold=1.0),
    # rows and pictures
    "another picture's answer": lambda: answer(scene(seed=4)),
    "heads of another anchor": lambda: answer(
        changed(box_deltas=np.roll(scene().box_deltas, 1, 1), class_logits=np.roll(scene().class_logits, 1, 1))
    ),
    "half the anchors": lambda: logits(lambda x: x.__setitem__((slice(None), slice(0, 36), 0), 99)),
}


def test_the_right_answer_passes() -> None:
    for nms in (
        NMS,
        dataclasses.replace(NMS, class_agnostic=True),
        dataclasses.replace(NMS, max_detections=5),
        dataclasses.replace(NMS, topk_per_class=2),
        dataclasses.replace(NMS, score_activation="sigmoid", score_threshold=1e-8),
        dataclasses.replace(NMS, box_coding="corner", clip_boxes=False),
    ):
        case = scene(nms)
        outputs = answer(case)
        differs = differences(case, outputs)
        assert not differs.lonely, (nms, differs.first)
        assert differs.total == outputs["num_detections"][0] > 4
        assert max(differs.boxes, differs.scores) < 1e-6


def test_there_are_enough_planted_faults() -> None:
    assert len(FAULTS) >= 30


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_refused(fault: str) -> None:
    assert refused(differences(scene(), FAULTS[fault]())), fault


GROSS = [
    name
    for name in FAULTS
    if name
    not in {
        # smaller than what INT8 may differ by: a code of a logit moves a score by up to 0.12, a box by 0.02
        "one score off by 1e-4",
        "logits of half precision",
        "boxes shifted by 1e-3",
        "one box shifted by 1e-3",
        "boxes half a pixel off",
        "not clipped",
        "the last is dropped",
        "sizes without exp",
        "only the best of each class",
        # one of 39 detections: less than the share that INT8 may lose
        "the best is dropped",
        "one in the middle is dropped",
        "other variances",
        "another score threshold",
    }
]


@pytest.mark.parametrize("fault", GROSS)
def test_gross_faults_are_refused_with_the_tolerance_of_int8(fault: str) -> None:
    assert refused(differences(scene(), FAULTS[fault](), INT8), INT8), fault


@pytest.mark.parametrize("fault", ["the best is dropped", "one in the middle is dropped"])
def test_a_wide_tolerance_hides_no_missing_detection(fault: str) -> None:
    """It counts, though one of 39 is less than INT8 may lose: a neighbour that is clearly worse excuses nothing."""
    assert differences(scene(), FAULTS[fault](), INT8).lonely == 1


def tied(gap: float) -> tuple[oracle.Case, oracle.Case]:
    """Two anchors that suppress each other and a third that only one of them suppresses; the tie the other way round.

    Boxes of side 0.4 at x = 0, 0.1 and 0.2: IoU 0.6 between neighbours, 1/3 between the first and the third.
    """
    anchors = np.array([[0.2 + 0.1 * i, 0.5, 0.4, 0.4] for i in range(3)], "f4")
    sides = []
    for sign in (1, -1):
        values = np.zeros((1, 3, 2), "f4")
        values[0, :, 1] = [2 + sign * gap, 2 - sign * gap, 1]
        sides.append(oracle.Case("tied", NMS, np.zeros((1, 3, 4), "f4"), values, anchors))
    return sides[0], sides[1]


def test_either_of_two_tied_candidates_may_win_with_all_that_follows() -> None:
    """The first suppresses the second only; the second suppresses both others. Both answers are right."""
    case, other = tied(1e-6)
    assert [int(answer(side)["num_detections"][0]) for side in (case, other)] == [2, 1]
    for outputs in (answer(case), answer(other)):
        differs = differences(case, outputs)
        assert not refused(differs), differs.first
        assert differs.boxes < 1e-6


def test_who_is_clearly_better_must_win() -> None:
    case, other = tied(1e-3)
    outputs = answer(other)
    outputs["detection_scores"][0] = 1 / (1 + np.exp(-case.class_logits[0, 1, 1]))
    differs = differences(case, outputs)
    assert refused(differs)
    assert "anchor 0 is missing" in differs.first
    assert differs.scores < 1e-6


def test_a_tie_excuses_no_moved_box() -> None:
    case, other = tied(1e-6)
    outputs = answer(other)
    outputs["detection_boxes"][0] += 1e-3
    assert refused(differences(case, outputs))


def test_what_lies_at_the_threshold_or_at_the_end_of_a_full_list_may_differ() -> None:
    case = scene()
    outputs = answer(case)
    last = float(outputs["detection_scores"][int(outputs["num_detections"][0]) - 1])
    assert not refused(differences(case, FAULTS["the last is dropped"](), threshold=last - 1e-6))
    full = scene(dataclasses.replace(NMS, max_detections=5))
    assert not refused(differences(full, answer(full)))


def test_boxes_without_area_are_compared_too() -> None:
    """They suppress nothing, so many of them may be at one place."""
    anchors = np.tile(np.array([[0.5, 0.5, 1e-30, 1e-30]], "f4"), (3, 1))
    values = np.zeros((1, 3, 2), "f4")
    values[0, :, 1] = [2, 1.5, 1]
    case = oracle.Case("flat", NMS, np.zeros((1, 3, 4), "f4"), values, anchors)
    assert answer(case)["num_detections"] == 3
    assert not refused(differences(case, answer(case)))
    outputs = answer(case)
    outputs["detection_scores"][1] += np.float32(1e-3)
    assert refused(differences(case, outputs))
