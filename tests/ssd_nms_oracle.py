"""SSDNMS by brute force: plain loops over FP32 numbers, written after docs/design.md and nothing else.

Also the cases that every executor is tried on, and the rule by which two answers agree. An executor's test is

    for case in ssd_nms_oracle.cases(1000):
        tally[ssd_nms_oracle.agree(case, executor(case))] += 1

Cases and the oracle's answers are kept, so any number of tests can ask for them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from build.contract import Nms

F = np.float32
Array = NDArray[np.float32]
Outputs = tuple[NDArray[np.int32], Array, Array, NDArray[np.int32]]

# How near to a decision a score or an IoU makes it a matter of rounding, and how far values may lie apart, where a
# transcendental function is involved.
NEAR = 1e-6
CLOSE = 1e-5


@dataclass(frozen=True, eq=False)
class Case:
    """One call of SSDNMS. Equal to itself alone, so answers can be kept by case.

    Attributes:
        box_deltas: FP32 or FP16 [B,N,4]; class_logits: the same type [B,N,C]; anchors: FP32 [N,4].
        score_threshold, iou_threshold: FP32 [B,1] exactly if `nms.runtime_thresholds`, else None.
    """

    name: str
    nms: Nms
    box_deltas: NDArray[np.floating]
    class_logits: NDArray[np.floating]
    anchors: Array
    score_threshold: Array | None = None
    iou_threshold: Array | None = None

    def inputs(self) -> dict[str, NDArray[np.floating]]:
        """The inputs by their names, without those that are absent."""
        names = ("box_deltas", "class_logits", "anchors", "score_threshold", "iou_threshold")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def row(self, index: int) -> Case:
        """The same call for one row of the batch alone."""
        changes = {name: value[index : index + 1] for name, value in self.inputs().items() if name != "anchors"}
        return replace(self, name=f"{self.name} row {index}", **changes)


def activate(logits: Array, kind: str) -> Array:
    """Step 1 for one anchor: the scores of all C classes."""
    if kind == "none":
        return logits
    if kind == "sigmoid":
        return F(1) / (F(1) + np.exp(-logits))
    powers = np.exp(logits - logits.max())
    return powers / powers.sum(dtype=F)


def decode(deltas: Array, anchor: Array, nms: Nms) -> list[np.float32]:
    """Step 2 for one anchor: x1, y1, x2, y2."""
    acx, acy, aw, ah = anchor
    d = [delta / F(scale) for delta, scale in zip(deltas, nms.box_scales, strict=True)]
    half = F(0.5)
    if nms.box_coding == "decoded":
        box = list(deltas)
    elif nms.box_coding == "center_size":
        cx, cy = d[0] * aw + acx, d[1] * ah + acy
        w, h = np.exp(d[2]) * aw, np.exp(d[3]) * ah
        box = [cx - half * w, cy - half * h, cx + half * w, cy + half * h]
    else:
        box = [(acx - half * aw) + d[0], (acy - half * ah) + d[1], (acx + half * aw) + d[2], (acy + half * ah) + d[3]]
    if nms.clip_boxes:
        box = [value if value > 0 else F(0) for value in box]
        box = [value if value < 1 else F(1) for value in box]
    return box


def area(box: list[np.float32]) -> np.float32:
    """Step 4: 0 for whatever has no area."""
    x1, y1, x2, y2 = box
    if not (x2 > x1 and y2 > y1):
        return F(0)
    size = (x2 - x1) * (y2 - y1)
    return size if size > 0 else F(0)


def iou(a: list[np.float32], b: list[np.float32]) -> np.float32:
    """Step 4: 0 for no overlap."""
    area_a, area_b = area(a), area(b)
    if area_a == 0 or area_b == 0:
        return F(0)
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if not (width > 0 and height > 0):
        return F(0)
    inter = width * height
    union = (area_a + area_b) - inter
    return inter / union if inter > 0 and union > 0 else F(0)


@dataclass(frozen=True)
class _Candidate:
    score: np.float32
    label: int
    anchor: int
    same: bytes  # equal for candidates whose scores are computed from equal bits: an exact tie in every executor

    def order(self) -> tuple[float, int, int]:
        return (-float(self.score), self.label, self.anchor)


def _row(case: Case, row: int) -> tuple[list[tuple[_Candidate, list[np.float32]]], bool]:
    """The detections of one image, and whether a decision on the way was a matter of rounding."""
    nms = case.nms
    score_threshold, iou_threshold = F(nms.score_threshold), F(nms.iou_threshold)
    if case.score_threshold is not None and case.iou_threshold is not None:
        score_threshold, iou_threshold = case.score_threshold[row, 0], case.iou_threshold[row, 0]
    if score_threshold < F(nms.lowest_score_threshold):
        score_threshold = F(nms.lowest_score_threshold)
    rounded_scores, rounded_boxes = nms.score_activation != "none", nms.box_coding == "center_size"
    near = False

    by_class: dict[int, list[_Candidate]] = {}
    boxes: dict[int, list[np.float32]] = {}
    for anchor in range(len(case.anchors)):
        logits = case.class_logits[row, anchor].astype(F)
        scores = activate(logits, nms.score_activation)
        for column, score in enumerate(scores):
            if column == nms.background_class:
                continue
            near |= rounded_scores and abs(float(score) - float(score_threshold)) <= NEAR
            if score > score_threshold:
                label = column - (0 <= nms.background_class < column)
                same = (logits if nms.score_activation == "softmax" else logits[:0]).tobytes() + logits[
                    column
                ].tobytes()
                by_class.setdefault(label, []).append(_Candidate(score, label, anchor, same))
                if anchor not in boxes:
                    boxes[anchor] = decode(case.box_deltas[row, anchor].astype(F), case.anchors[anchor], nms)

    for candidates in by_class.values():
        candidates.sort(key=_Candidate.order)
        near |= rounded_scores and _near_ties(candidates)
        if nms.topk_per_class:
            del candidates[nms.topk_per_class :]

    groups = list(by_class.values())
    if nms.class_agnostic:
        groups = [sorted(itertools.chain(*groups), key=_Candidate.order)]
        near |= rounded_scores and _near_ties(groups[0])
    kept: list[_Candidate] = []
    for group in groups:
        winners: list[_Candidate] = []
        for candidate in group:
            overlaps = [iou(boxes[winner.anchor], boxes[candidate.anchor]) for winner in winners]
            near |= rounded_boxes and any(
                abs(float(overlap) - float(iou_threshold)) <= NEAR and winner.anchor != candidate.anchor
                for overlap, winner in zip(overlaps, winners, strict=True)
                if overlap > 0
            )
            if not any(overlap > iou_threshold for overlap in overlaps):
                winners.append(candidate)
        kept += winners
    kept.sort(key=_Candidate.order)
    near |= rounded_scores and _near_ties(kept)
    return [(candidate, boxes[candidate.anchor]) for candidate in kept[: nms.max_detections]], near


def _near_ties(ordered: list[_Candidate]) -> bool:
    return any(float(a.score) - float(b.score) <= NEAR and a.same != b.same for a, b in itertools.pairwise(ordered))


@functools.cache
def expected(case: Case) -> tuple[Outputs, bool]:
    """What SSDNMS answers: num_detections, detection_boxes, detection_scores, detection_classes.

    Also whether some score or IoU lies so near to a decision that another rounding of a transcendental function may
    turn it.
    """
    rows, most = len(case.box_deltas), case.nms.max_detections
    number = np.zeros((rows, 1), np.int32)
    boxes = np.zeros((rows, most, 4), F)
    scores = np.zeros((rows, most), F)
    classes = np.full((rows, most), -1, np.int32)
    near = False
    with np.errstate(all="ignore"):
        for row in range(rows):
            detections, near_row = _row(case, row)
            near |= near_row
            number[row] = len(detections)
            for place, (candidate, box) in enumerate(detections):
                boxes[row, place], scores[row, place], classes[row, place] = box, candidate.score, candidate.label
    return (number, boxes, scores, classes), near


def agree(case: Case, got: Outputs) -> str:
    """Compares an executor's answer with the oracle's.

    Exact bits are asked of scores with activation `none` and of boxes with corner coding; elsewhere the same selection
    and values within `CLOSE`.

    Returns:
        "exact", "close", or "ambiguous" where the selections differ and a decision was a matter of rounding.

    Raises:
        AssertionError: the answer is wrong.
    """
    want, near = expected(case)
    for name, a, b in zip(("number", "boxes", "scores", "classes"), got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{case.name}: {name}"
    with np.errstate(invalid="ignore"):
        same = np.array_equal(got[0], want[0]) and np.array_equal(got[3], want[3])
        same = same and all(_close(a, b) for a, b in zip(got[1:3], want[1:3], strict=True))
    if not same and near:
        return "ambiguous"
    assert same, f"{case.name}: {case.nms}\ngot  {_text(got)}\nwant {_text(want)}"
    exact_boxes, exact_scores = _bits(got[1], want[1]), _bits(got[2], want[2])
    assert exact_boxes or case.nms.box_coding == "center_size", f"{case.name}: boxes differ in their last bits"
    assert exact_scores or case.nms.score_activation != "none", f"{case.name}: scores differ in their last bits"
    return "exact" if exact_boxes and exact_scores else "close"


def _close(a: Array, b: Array) -> bool:
    return bool(np.all((np.abs(a - b) <= CLOSE * np.maximum(1, np.abs(b))) | (a == b) | (np.isnan(a) & np.isnan(b))))


def _bits(a: Array, b: Array) -> bool:
    return bool(np.all((a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))))


def _text(outputs: Outputs) -> str:
    number, boxes, scores, classes = outputs
    return "; ".join(
        f"row {row}: " + " ".join(f"{classes[row, i]}@{scores[row, i]:.7f}{boxes[row, i]}" for i in range(int(count)))
        for row, count in enumerate(number[:, 0])
    )


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Random and adversarial cases: the same for the same seed, and a longer run begins with the shorter one's."""
    for index in range(count):
        yield _case(index, seed)


# What is peculiar about a case; every kind comes with every activation, coding and set of switches.
KINDS = (
    "random",
    "ties",
    "not finite",
    "empty",
    "no area",
    "flipped",
    "all suppressed",
    "one class",
    "few candidates",
    "threshold 0",
    "threshold 1",
    "crowded",
    "half",
)


@functools.cache
def _case(index: int, seed: int) -> Case:
    random = np.random.default_rng([seed, index])
    kind = KINDS[index % len(KINDS)]
    activation = ("softmax", "sigmoid", "none")[index // len(KINDS) % 3]
    coding = ("center_size", "corner")[index // len(KINDS) // 3 % 2]
    rows = int(random.choice([1, 1, 2, 3, 5]))
    count = int(random.integers(1, 40))
    background = random.choice(["none", "first", "last", "middle"])
    labels = 1 if kind == "one class" else int(random.integers(1, 6))
    columns = labels + (background != "none")
    if activation == "softmax" and columns == 1:
        background, columns = "first", 2
    background_class = {"none": -1, "first": 0, "last": columns - 1, "middle": columns // 2}[str(background)]
    nms = Nms(
        score_threshold=float(random.choice([0.05, 0.25, 0.5])),
        iou_threshold=float(random.choice([0.2, 0.45, 0.7])),
        max_detections=int(random.choice([1, 3, 10, 100])),
        topk_per_class=int(random.choice([0, 0, 1, 3, 20])),
        background_class=background_class,
        score_activation=activation,
        box_coding=coding,
        box_scales=(10.0, 10.0, 5.0, 5.0) if random.random() < 0.7 else (3.0, 1.0, 7.0, 1.3),
        clip_boxes=bool(random.random() < 0.6),
        class_agnostic=bool(random.random() < 0.3),
        lowest_score_threshold=(0.01, 0.0, 0.01, 0.3)[index % 4],
        runtime_thresholds=bool(random.random() < 0.4),
    )
    # Few centres for many anchors, so that boxes overlap.
    centres = random.uniform(0.2, 0.8, (3, 2))[random.integers(0, 3, count)] + random.normal(0, 0.03, (count, 2))
    anchors = np.concatenate([centres, random.uniform(0.15, 0.5, (count, 2))], 1).astype(F)
    deltas = random.normal(0, 1, (rows, count, 4)).astype(F)
    spread = 2.0 if activation != "none" else 0.3
    logits = random.normal(0.3 if activation == "none" else 0, spread, (rows, count, columns)).astype(F)

    if kind == "ties":  # equal scores and equal boxes, in and across classes
        logits = logits[:, random.integers(0, min(3, count), count)]
        if activation != "softmax":
            logits = np.round(logits * 2) / F(2)
        if random.random() < 0.5:
            deltas, anchors = np.zeros_like(deltas), anchors[random.integers(0, min(3, count), count)]
        if random.random() < 0.3:  # the IoU is the threshold exactly, and does not suppress
            nms = replace(nms, iou_threshold=1.0)
    elif kind == "not finite":
        strange = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, 3e-39], F)
        for array, share in ((deltas, 0.1), (logits, 0.1 / columns if activation == "softmax" else 0.15)):
            hit = random.random(array.shape) < share
            array[hit] = random.choice(strange, int(hit.sum()))
    elif kind == "empty":
        logits = np.full_like(logits, -30 if activation != "none" else 0)
        logits[..., background_class if background_class >= 0 else 0] += 30 if activation == "softmax" else 0
        if activation == "softmax" and background_class < 0:
            nms = replace(nms, score_threshold=1.0)
        if rows > 1:  # a row with detections between rows without
            logits[1, :, columns - 1] += F(35)
            logits[1] += random.normal(0, 0.5, logits[1].shape).astype(F)
    elif kind == "no area":
        if coding == "corner":  # both corners in one place, on one line, or (clipped) at one border
            scales = np.array(nms.box_scales, F)
            hit = random.random((rows, count)) < 0.5
            deltas[..., 2][hit] = ((deltas[..., 0] / scales[0] - anchors[:, 2]) * scales[2])[hit]
            deltas[..., 3] += np.where(random.random((rows, count)) < 0.3, F(-3) * scales[3], F(0)).astype(F)
        else:
            deltas[..., 2][random.random((rows, count)) < 0.5] = F(-1000)
            deltas[..., 0][random.random((rows, count)) < 0.2] = F(1000)
    elif kind == "flipped":
        deltas[..., 2:] -= np.where(random.random((rows, count, 2)) < 0.5, F(6), F(0)).astype(F)
        if coding == "center_size":
            anchors[:, 2:] *= np.where(random.random((count, 2)) < 0.3, F(-1), F(1)).astype(F)
    elif kind == "all suppressed":
        anchors = np.repeat(anchors[:1], count, 0)
        deltas = (deltas * F(0.05)).astype(F)
        nms = replace(nms, iou_threshold=float(random.choice([0.0, 0.3])))
    elif kind == "few candidates":
        nms = replace(nms, max_detections=1000, topk_per_class=int(random.choice([0, 500])))
    elif kind == "threshold 0":
        nms = replace(nms, score_threshold=0.0, iou_threshold=float(random.choice([0.0, 0.45])))
    elif kind == "threshold 1":
        nms = replace(nms, iou_threshold=1.0, score_threshold=float(random.choice([1.0, 0.25])))
    elif kind == "crowded":
        count = int(random.integers(100, 160))
        pick = random.integers(0, len(anchors), count)
        anchors, deltas, logits = anchors[pick], deltas[:, pick], logits[:, pick]
        deltas = (deltas + random.normal(0, 0.5, deltas.shape)).astype(F)
        logits = (logits + random.normal(0, 0.5, logits.shape)).astype(F)
    elif kind == "half":
        deltas, logits = deltas.astype(np.float16), logits.astype(np.float16)

    thresholds: dict[str, Array] = {}
    if nms.runtime_thresholds:  # another pair in every row; the attributes must then not matter
        fixed = (nms.score_threshold, nms.iou_threshold)
        scores = random.choice([fixed[0], 0.1, 0.3, 0.6, 1.0 if kind == "threshold 1" else 0.2], (rows, 1))
        overlaps = random.choice([fixed[1], 0.0, 0.3, 0.5, 1.0], (rows, 1))
        thresholds = {"score_threshold": scores.astype(F), "iou_threshold": overlaps.astype(F)}
        nms = replace(nms, score_threshold=0.99, iou_threshold=0.01)
    name = f"{index} {kind} {activation} {coding}"
    return Case(name, nms, deltas, logits, anchors, **thresholds)


def realistic(rows: int = 1, anchors: int = 8732, classes: int = 21, seed: int = 0) -> dict[str, Array]:
    """Inputs of SSDNMS: nearly all anchors are background, about 200 of each image are not."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1, (rows, anchors, classes)).astype(F)
    logits[..., 0] += 7
    for row in logits:
        hits = random.integers(0, anchors, 200)
        row[hits, 0] -= 7
        row[hits, random.integers(1, classes, 200)] += 6
    boxes = np.concatenate([random.uniform(0, 1, (anchors, 2)), random.uniform(0.05, 0.5, (anchors, 2))], 1)
    deltas = random.normal(0, 1, (rows, anchors, 4)).astype(F)
    return {"box_deltas": deltas, "class_logits": logits, "anchors": boxes.astype(F)}
