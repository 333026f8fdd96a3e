"""Whether a list of detections is right, given the raw heads that it was made from.

Detections are not compared with another list. Where two candidates are tied within the tolerance, either may suppress
the other, and what follows differs though both lists are right. So each detection is paired with the candidate (anchor
and class) that it comes from, and the list is checked against the definition of suppression (docs/design.md):

- no detection suppresses another one of the list;
- each candidate that is not in the list is suppressed by a detection of it that is at least as good within the
  tolerance, or the list is full of better ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build import contract
from build.contract import Nms

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PAIRED_IOU = 0.5
_ROUNDING = 1e-5  # of an IoU in FP32
_LEAST_TIE = 0.1  # of a tolerance
_MOST_SLACK = 0.1  # of an IoU, however far boxes may be off


@dataclass(frozen=True)
class Candidates:
    """All candidates of a picture before suppression.

    Attributes:
        boxes: FP64 [N,4] x1,y1,x2,y2 in 0..1 of the image.
        scores: FP64 [N, foreground classes].
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Differences:
    """How a list of detections of one picture differs from a right one.

    Attributes:
        lonely: detections that come from no candidate or should have been suppressed, and candidates that are missing.
        total: how many detections there are, the missing ones included.
        boxes: the largest difference of a coordinate from the candidate's.
        scores: likewise of a score.
        first: the first fault in words; empty without one.
    """

    lonely: int
    total: int
    boxes: float
    scores: float
    first: str = ""


def candidates(nms: Nms, anchors: NDArray[np.float32], deltas: NDArray[Any], logits: NDArray[Any]) -> Candidates:
    """Steps 1 and 2 of SSDNMS for one picture, in NumPy: activation and decoding.

    Args:
        nms: the attributes, with `box_coding` and `box_scales` as the node has them.
        anchors: [N,4] cx,cy,w,h.
        deltas: [N,4].
        logits: [N,C].
    """
    import numpy as np

    values = nms.attributes()
    logits = logits.astype(np.float32)
    scores: NDArray[Any] = logits
    if nms.score_activation == "softmax":
        powers: NDArray[Any] = np.exp(logits - logits.max(-1, keepdims=True))
        scores = powers / powers.sum(-1, keepdims=True)
    elif nms.score_activation == "sigmoid":
        with np.errstate(over="ignore"):
            scores = 1 / (1 + np.exp(-logits))
    if nms.background_class >= 0:
        scores = np.delete(scores, nms.background_class, axis=-1)
    moved = deltas.astype(np.float32) / np.asarray(values["box_scales"], np.float32)
    centres: NDArray[Any] = anchors[:, :2]
    sizes: NDArray[Any] = anchors[:, 2:]
    if values["box_coding"] == "center_size":
        centres = moved[:, :2] * sizes + centres
        with np.errstate(over="ignore"):
            sizes = np.exp(moved[:, 2:]) * sizes
        moved = np.zeros_like(moved)
    boxes: NDArray[Any] = np.concatenate([centres - 0.5 * sizes, centres + 0.5 * sizes], 1) + moved
    if nms.clip_boxes:
        boxes = np.where(boxes > 0, np.minimum(boxes, 1), 0)  # NaN becomes 0
    return Candidates(boxes.astype(np.float64), np.where(np.isnan(scores), -1, scores).astype(np.float64))


def compare(
    nms: Nms,
    found: Candidates,
    outputs: dict[str, NDArray[Any]],
    threshold: float,
    most_boxes: float,
    most_scores: float,
) -> Differences:
    """Checks one picture's detections.

    Args:
        nms: the attributes.
        found: the picture's candidates.
        outputs: the four outputs of the contract for this picture, without the batch.
        threshold: the score threshold that was asked for.
        most_boxes, most_scores: the tolerance. Candidates count as tied within twice the largest difference that this
            picture shows, at least a tenth of the tolerance and at most all of it.
    """
    import numpy as np

    number = int(outputs[contract.OUTPUTS[0]][0])
    boxes, scores, classes = (outputs[name][:number].astype(np.float64) for name in contract.OUTPUTS[1:])
    classes = classes.astype(int)
    faults: list[str] = []
    partner, far_boxes, far_scores = _paired(found, boxes, scores, classes, most_boxes, most_scores)
    full = number == nms.max_detections
    border = max([threshold, *(scores[-1:] if full else [])]) + most_scores
    # What is tied at the threshold or at the end of a full list may be there or not.
    faults += [
        f"a detection of class {classes[i]} with score {scores[i]:.4f} comes from no anchor"
        for i in np.flatnonzero((partner < 0) & (scores > border))
    ]
    # What was seen to differ here tells how near a tie is; a tolerance is far wider than most of what it allows.
    tied = float(np.clip(2 * far_scores, _LEAST_TIE * most_scores, most_scores))
    moved = float(np.clip(2 * far_boxes, _LEAST_TIE * most_boxes, most_boxes))
    same = np.ones((number, number), bool) if nms.class_agnostic else classes[:, None] == classes
    slack = _slack(boxes, moved)
    both = np.triu(same & (overlaps(boxes, boxes) > nms.iou_threshold + _ROUNDING + slack[:, None]), 1)
    faults += [
        f"detections {i} and {j} overlap more than the IoU threshold {nms.iou_threshold:g}"
        for i, j in np.argwhere(both)
    ]
    missing = 0
    for label in range(found.scores.shape[1]):
        own = found.scores[:, label]
        eligible = np.flatnonzero(own > border)
        eligible = np.setdiff1d(eligible, partner[(classes == label) & (partner >= 0)])
        if nms.topk_per_class:  # those that the cap may have cut off
            better = np.sort(own)
            ahead = len(own) - np.searchsorted(better, own[eligible] - most_scores, side="left") - 1
            eligible = eligible[ahead < nms.topk_per_class]
        kept = np.arange(number) if nms.class_agnostic else np.flatnonzero(classes == label)
        over = overlaps(found.boxes[eligible], boxes[kept]) > nms.iou_threshold - _ROUNDING - slack[kept]
        good = scores[kept] >= own[eligible][:, None] - tied
        lost = eligible[~(over & good).any(1)] if len(eligible) else eligible
        missing += len(lost)
        faults += [f"class {label} with score {own[i]:.4f} at anchor {i} is missing" for i in lost]
    return Differences(len(faults), number + missing, float(far_boxes), float(far_scores), faults[0] if faults else "")


def _paired(
    found: Candidates,
    boxes: NDArray[np.float64],
    scores: NDArray[np.float64],
    classes: NDArray[Any],
    most_boxes: float,
    most_scores: float,
) -> tuple[NDArray[Any], float, float]:
    """For each detection the candidate of its class that it is nearest to, each taken once; the largest differences."""
    import numpy as np

    partner = np.full(len(boxes), -1)
    far_boxes = far_scores = 0.0
    free = np.ones(found.scores.shape, bool)
    for i, (box, score, label) in enumerate(zip(boxes, scores, classes, strict=True)):
        if not 0 <= label < found.scores.shape[1]:
            continue
        close = (ious(box[None], found.boxes)[0] >= PAIRED_IOU) | (np.abs(found.boxes - box).max(1) <= most_boxes)
        near = np.flatnonzero(free[:, label] & close)
        if not len(near):
            continue
        away = np.abs(found.boxes[near] - box).max(1)
        off = np.abs(found.scores[near, label] - score)
        best = int(np.argmin(np.maximum(away / most_boxes, off / most_scores)))
        partner[i] = near[best]
        free[near[best], label] = False
        far_boxes, far_scores = max(far_boxes, float(away[best])), max(far_scores, float(off[best]))
    return partner, far_boxes, far_scores


def _slack(boxes: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """How far an IoU with each box moves at most when each coordinate of both boxes moves by `most`."""
    import numpy as np

    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 1e-9)
    return np.asarray(np.minimum((4 * most / sides).sum(1), _MOST_SLACK))


def ious(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """[n,m] of boxes [n,4] and [m,4]; equal boxes without area count as the same."""
    import numpy as np

    equal = (np.abs(first[:, None] - second[None]) < 1e-6).all(-1)
    return np.asarray(np.where(equal, 1.0, overlaps(first, second)))


def overlaps(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """The same as suppression has it: a box without area overlaps nothing."""
    import numpy as np

    a, b = first[:, None], second[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inside = np.prod(np.maximum(sides, 0), -1)
    areas = [np.prod(np.maximum(box[..., 2:] - box[..., :2], 0), -1) for box in (a, b)]
    union = areas[0] + areas[1] - inside
    ratio = np.divide(inside, union, out=np.zeros_like(inside), where=(areas[0] > 0) & (areas[1] > 0))
    return np.asarray(ratio)
