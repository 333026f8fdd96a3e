"""Cases for SSDNMS: small mixes of everything, and larger ones that reach each path of the kernels.

Each group is a list of functions that make a case, so a case costs nothing until it is wanted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.contract import Nms
from tests.ssd_nms_oracle import Case

F, H = np.float32, np.float16
TYPES = ((F, F), (H, H), (F, H), (H, F))
ACTIVATIONS = ("softmax", "sigmoid", "none")
CODINGS = ("center_size", "corner")
KINDS = (
    *("random", "ties", "not finite", "empty", "no area", "flipped", "suppressed", "background", "equal", "narrow"),
    "chain",
)
STRANGE = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38, 3e-39, -0.0, 0.0], F)

Array = NDArray[np.float32]
Maker = Callable[[], Case]


def _sprinkle(random: np.random.Generator, array: Array, share: float) -> None:
    """Puts strange numbers into a share of an array."""
    hit = random.random(array.shape) < share
    array[hit] = random.choice(STRANGE, int(hit.sum()))


def _detector(random: np.random.Generator, nms: Nms, shape: tuple[int, int, int]) -> Array:
    """Logits as of a trained network: background everywhere, and a few dozen objects."""
    rows, anchors, classes = shape
    logits = random.normal(0, 1, shape).astype(F)
    logits[..., max(nms.background_class, 0)] += 9
    for row in range(rows):
        hot = random.integers(0, anchors, max(1, anchors // 60))
        labels = random.integers(0, classes, len(hot))
        logits[row, hot, labels] += random.uniform(5, 14, len(hot)).astype(F)
    return logits


def make(
    name: str,
    random: np.random.Generator,
    shape: tuple[int, int, int],
    kind: str,
    nms: Nms,
    types: tuple[type[np.floating], type[np.floating]] = (F, F),
    scores: Array | None = None,
    ious: Array | None = None,
) -> Case:
    """One case.

    Args:
        name: its name.
        random: of what is random.
        shape: B, N, C.
        kind: what is peculiar: one of KINDS, or `detector`.
        nms: the attributes.
        types: of deltas and logits.
        scores: threshold inputs FP32 [B,1], or None.
        ious: likewise.
    """
    rows, count, classes = shape
    activation, background = nms.score_activation, nms.background_class
    centres = max(1, min(40, count // 8))
    places = random.uniform(0.05, 0.95, (centres, 2))[random.integers(0, centres, count)]
    places = places + random.normal(0, 0.03, (count, 2))
    anchors = np.concatenate([places, random.uniform(0.05, 0.45, (count, 2))], 1).astype(F)
    deltas = random.normal(0, 1, (rows, count, 4)).astype(F)
    mean, spread = (0.3, 0.3) if activation == "none" else (0, 2)
    logits = random.normal(mean, spread, shape).astype(F)
    if kind == "background" and background >= 0:
        logits[..., background] += 7
    elif kind == "detector":
        logits = _detector(random, nms, shape)
    elif kind == "ties":
        logits = np.round(logits * F(0.6 if activation == "softmax" else 2)) / F(2)
        if random.random() < 0.5:
            deltas, anchors = np.zeros_like(deltas), anchors[random.integers(0, min(5, count), count)]
    elif kind == "equal":
        logits[:] = F(0.5)
    elif kind == "narrow":
        logits = (0.5 + logits * 1e-6).astype(F)
    elif kind == "not finite":
        _sprinkle(random, deltas, 0.1)
        _sprinkle(random, logits, 0.1 / classes if activation == "softmax" else 0.15)
        _sprinkle(random, anchors, 0.02)
    elif kind == "empty":
        logits[:] = -30
        if activation == "softmax" and background >= 0:
            logits[..., background] = 30
        if rows > 1:
            logits[1, :, classes - 1] += 65
    elif kind == "no area":
        deltas[..., 2][random.random((rows, count)) < 0.5] = -1000 if nms.box_coding == "center_size" else -6
        deltas[..., 0][random.random((rows, count)) < 0.2] = 1000
    elif kind == "flipped":
        deltas[..., 2:] -= np.where(random.random((rows, count, 2)) < 0.5, F(6), F(0)).astype(F)
        anchors[:, 2:] *= np.where(random.random((count, 2)) < 0.3, F(-1), F(1)).astype(F)
    elif kind == "suppressed":
        anchors, deltas = np.repeat(anchors[:1], count, 0), (deltas * F(0.05)).astype(F)
    elif kind == "chain":  # each box overlaps its neighbours only: the longest chains of rounds
        x = np.linspace(0.1, 0.9, count)
        wide = np.full(count, 3 * 0.8 / max(count, 2))
        anchors = np.stack([x, np.full(count, 0.5), wide, np.full(count, 0.3)], 1).astype(F)
        deltas[:] = 0
        logits[..., 1 % classes] = np.linspace(9, 5, count).astype(F)
    with np.errstate(over="ignore"):
        return Case(name, nms, deltas.astype(types[0]), logits.astype(types[1]), anchors, scores, ious)


def small(index: int) -> Case:
    """A few anchors; every kind with every activation."""
    random = np.random.default_rng([0, index])
    pick = random.choice
    kind, activation = KINDS[index % len(KINDS)], ACTIVATIONS[index // len(KINDS) % 3]
    rows, count = int(pick([1, 1, 2, 3, 5])), int(random.integers(1, 150))
    classes = int(pick([2, 3, 4, 5, 7, 8, 9, 13, 21, 33]))
    if random.random() < 0.1:
        classes = 2 if activation == "softmax" else 1
    background = -1 if classes == 1 else int(pick([-1, 0, classes - 1, classes // 2]))
    scores = ious = None
    threshold, iou_threshold = float(pick([0.0, 0.01, 0.05, 0.25, 0.5, 1.0])), float(pick([0.0, 0.2, 0.45, 0.7, 1.0]))
    if random.random() < 0.35:
        scores, threshold = pick([0.0, 0.05, 0.1, 0.3, 0.5, 1.0], (rows, 1)).astype(F), 0.99
    if random.random() < 0.35:
        ious, iou_threshold = pick([0.0, 0.3, 0.5, 1.0], (rows, 1)).astype(F), 0.01
    if random.random() < 0.1:
        scores = np.full((rows, 1), pick([np.nan, -1.0, 2.0, np.inf]), F)
    if random.random() < 0.1:
        ious = np.full((rows, 1), pick([np.nan, -1.0, 2.0, np.inf]), F)
    nms = Nms(
        score_threshold=threshold,
        iou_threshold=iou_threshold,
        max_detections=int(pick([1, 2, 3, 10, 64, 65, 100, 200, 511, 512, 513, 600])),
        topk_per_class=int(pick([0, 0, 1, 3, 20, 400])),
        background_class=background,
        score_activation=activation,
        box_coding=str(pick(CODINGS)),
        box_scales=(10.0, 10.0, 5.0, 5.0) if random.random() < 0.7 else (3.0, 1.0, 7.0, 1.3),
        clip_boxes=bool(random.random() < 0.6),
        class_agnostic=bool(random.random() < 0.3),
        lowest_score_threshold=float(pick([0.0, 0.0, 0.01, 0.2])),
    )
    name = f"small {index} {kind} {activation}"
    return make(name, random, (rows, count, classes), kind, nms, TYPES[int(random.integers(4))], scores, ious)


def medium(index: int) -> Case:
    """Hundreds to thousands of anchors: more candidates than a chunk, more detections than shared memory holds."""
    random = np.random.default_rng([100, index])
    pick = random.choice
    kinds = ("random", "ties", "background", "narrow", "equal", "not finite", "chain", "detector")
    kind, activation = kinds[index % len(kinds)], ACTIVATIONS[index // len(kinds) % 3]
    rows, classes = int(pick([1, 1, 2])), int(pick([2, 6, 11, 21, 81, 91]))
    count = min(int(random.integers(200, 2200)), 60000 // classes)
    scores = pick([0.0, 0.05, 0.2], (rows, 1)).astype(F) if random.random() < 0.3 else None
    ious = pick([0.3, 0.6, 1.0], (rows, 1)).astype(F) if random.random() < 0.3 else None
    nms = Nms(
        score_threshold=float(pick([0.0, 1e-3, 0.01, 0.05, 0.5])),
        iou_threshold=float(pick([0.2, 0.45, 0.7, 0.9, 1.0])),
        max_detections=int(pick([1, 50, 100, 200, 300, 512, 513, 600, 1000, 3000])),
        topk_per_class=int(pick([0, 0, 2, 37, 400])),
        background_class=int(pick([-1, 0, classes - 1])),
        score_activation=activation,
        box_coding=str(pick(CODINGS)),
        clip_boxes=bool(random.random() < 0.7),
        class_agnostic=bool(random.random() < 0.3),
        lowest_score_threshold=float(pick([0.0, 0.0, 0.01])),
    )
    name = f"medium {index} {kind} {activation}"
    return make(name, random, (rows, count, classes), kind, nms, TYPES[int(random.integers(4))], scores, ious)


def _maker(
    name: str, shape: tuple[int, int, int], kind: str, types: tuple[Any, Any] = (F, F), **settings: Any
) -> Maker:
    """A case by name; `settings` are those of Nms, and the threshold inputs `scores` and `ious`."""
    inputs = {key: settings.pop(key) for key in ("scores", "ious") if key in settings}
    nms = Nms(**{"lowest_score_threshold": 0.0, **settings})
    return lambda: make(name, np.random.default_rng([7, len(name), *shape]), shape, kind, nms, types, **inputs)


def _column(*values: float) -> Array:
    return np.array(values, F)[:, None]


_ALL = {"background_class": -1, "score_threshold": 0.0}
_SIGMOID: dict[str, Any] = {"score_activation": "sigmoid"}

# Each reaches a path or a border of the kernels.
SPECIAL: tuple[Maker, ...] = (
    _maker("C beyond shared memory, FP16, sigmoid", (1, 20, 30000), "random", (H, H), **_SIGMOID, score_threshold=0.9),
    _maker(
        "odd C beyond shared memory, FP16", (2, 9, 17001), "random", (H, H), score_threshold=1e-4, max_detections=300
    ),
    _maker("C beyond shared memory, FP32", (2, 5, 9000), "random", score_threshold=1e-4, max_detections=50),
    _maker("a tile of one anchor", (1, 5, 8192), "random", score_threshold=1e-4, max_detections=600),
    _maker("one class more", (1, 3, 8193), "random", score_activation="none", score_threshold=0.5, max_detections=700),
    _maker("27 anchors a tile", (2, 130, 300), "random", (H, F), score_threshold=0.01, max_detections=200),
    _maker("many classes, capped", (1, 60, 1204), "random", score_threshold=1e-3, max_detections=300, topk_per_class=2),
    _maker("odd rows of halves", (1, 200, 255), "random", (H, H), score_threshold=0.01, background_class=-1),
    _maker("background in the middle", (2, 150, 21), "background", (H, H), background_class=11, score_threshold=0.01),
    _maker("all pass, none", (1, 3000, 2), "random", score_activation="none", max_detections=200, **_ALL),
    _maker("all pass, softmax", (1, 900, 6), "random", score_threshold=0.0, max_detections=5000, iou_threshold=1.0),
    _maker("all pass, sigmoid", (1, 1500, 4), "random", (H, H), **_SIGMOID, score_threshold=0.0, max_detections=600),
    _maker("all equal", (2, 2500, 3), "equal", **_SIGMOID, score_threshold=0.1, max_detections=600, iou_threshold=1.0),
    _maker("all equal, agnostic", (1, 1100, 5), "equal", **_SIGMOID, score_threshold=0.1, class_agnostic=True),
    _maker("all equal and suppressed", (1, 9000, 2), "equal", **_SIGMOID, score_threshold=0.1, topk_per_class=9),
    _maker(
        *("narrow", (1, 900, 6), "narrow"),
        **{"score_activation": "none", "score_threshold": 0.1, "max_detections": 2000, "topk_per_class": 300},
    ),
    _maker("all suppressed", (1, 5000, 2), "suppressed", **_SIGMOID, score_threshold=0.0, iou_threshold=0.0),
    _maker("a chain of 64", (1, 64, 2), "chain", iou_threshold=0.2),
    _maker("a chain of 2000", (1, 2000, 2), "chain", max_detections=600, iou_threshold=0.3),
    _maker("one anchor", (3, 1, 2), "random", score_threshold=0.1, max_detections=1),
    _maker("63 anchors", (2, 63, 21), "random", (H, H)),
    _maker("64 anchors", (1, 64, 21), "random", (H, H)),
    _maker("65 anchors", (1, 65, 21), "random", (H, H)),
    _maker("cap with many labels", (2, 300, 600), "random", score_threshold=1e-3, max_detections=500, topk_per_class=3),
    _maker("threshold 1", (1, 100, 5), "random", score_threshold=1.0, max_detections=10),
    _maker("sigmoid threshold 1", (1, 100, 5), "random", **_SIGMOID, score_threshold=1.0, max_detections=10),
    _maker("scores that are not finite", (1, 100, 5), "not finite", score_activation="none", score_threshold=0.0),
    *(
        _maker(
            *(f"threshold inputs {value} and {lowest}", (1, 60, 40), "random"),
            **{**_SIGMOID, "scores": _column(value), "ious": _column(1.0), "max_detections": 5000},
            **{"topk_per_class": 2, "lowest_score_threshold": lowest},
        )
        for value, lowest in itertools.product((np.nan, -1.0, 2.0, np.inf, -np.inf), (0.0, 0.3))
    ),
    *(
        _maker(
            *(f"softmax threshold inputs {value}", (2, 60, 12), "random", (H, H)),
            **{"scores": _column(value, value), "ious": _column(value, value), "max_detections": 513},
        )
        for value in (np.nan, -1.0, 2.0, np.inf, -np.inf)
    ),
    _maker("a row without candidates between rows", (3, 500, 21), "empty", (H, H)),
    _maker("5 rows", (5, 700, 21), "detector", (H, H), max_detections=200),
)

_COCO, _VOC = (1, 8732, 81), (1, 8732, 21)

# The sizes of real detectors.
FULL: tuple[Maker, ...] = (
    _maker("SSD300-COCO FP16", _COCO, "detector", (H, H)),
    _maker("SSD300-COCO FP32", _COCO, "detector"),
    _maker("SSD300-VOC FP16, 2 rows", (2, 8732, 21), "detector", (H, H), max_detections=200),
    _maker("SSD300-VOC FP32, capped", _VOC, "detector", score_threshold=0.01, max_detections=200, topk_per_class=400),
    _maker("SSD300-COCO FP16 at 0.5", _COCO, "detector", (H, H), score_threshold=0.5),
    _maker(
        *("SSD300-COCO FP16, threshold inputs", (2, 8732, 81), "detector", (H, H)),
        **{"scores": _column(0.05, 0.3), "ious": _column(0.5, 0.4)},
    ),
    _maker("SSD300-VOC FP16, noise", _VOC, "random", (H, H), max_detections=200),
    _maker(
        *("SSD300-COCO FP16, sigmoid", _COCO, "background", (H, H)),
        **{**_SIGMOID, "background_class": -1, "score_threshold": 0.5},
    ),
    _maker("SSD300-VOC FP32, all pass", _VOC, "random", score_threshold=0.0, max_detections=600),
    _maker("SSD300-COCO FP16, agnostic", _COCO, "detector", (H, H), class_agnostic=True),
    _maker("SSD300-COCO FP32, corner, background last", _COCO, "detector", box_coding="corner", background_class=80),
    _maker(
        *("90 classes, none", (1, 8732, 90), "random"),
        **{"score_activation": "none", "background_class": -1, "score_threshold": 0.9},
    ),
    _maker("SSD300-COCO FP16, noise", _COCO, "random", (H, H)),
    _maker("8731 anchors", (1, 8731, 21), "detector", (H, H), max_detections=200),
)
