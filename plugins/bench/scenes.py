"""Inputs for checks and measurements: what a detector gives for a picture, and small cases that are easily wrong."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
from calls import Inputs
from device import Array
from params import Settings

GRIDS = {
    "SSD300-COCO": ((38, 4), (19, 6), (10, 6), (5, 6), (3, 4), (1, 4)),
    "SSD-MobileNet": ((19, 3), (10, 6), (5, 6), (3, 6), (2, 6), (1, 6)),
}
CLASSES = {"SSD300-COCO": 81, "SSD-MobileNet": 91}
POOL = 32  # different images of a kind; a batch is drawn from them


@functools.cache
def grid_anchors(model: str) -> Array:
    """FP32 [N,4]: centres on the grids of the model's feature maps, sizes and shapes as SSD has them."""
    rows = []
    for level, (cells, count) in enumerate(GRIDS[model]):
        size = 0.1 + 0.8 * level / (len(GRIDS[model]) - 1)
        for y, x, k in itertools.product(range(cells), range(cells), range(count)):
            ratio = (1.0, 2.0, 0.5, 3.0, 1 / 3, 1.0)[k]
            scale = size * (1.15 if k == 5 else 1.0)
            rows.append(((x + 0.5) / cells, (y + 0.5) / cells, scale * ratio**0.5, scale / ratio**0.5))
    return np.array(rows, np.float32)


@functools.cache
def image(model: str, kind: str, seed: int) -> tuple[Array, Array]:
    """FP32 deltas [N,4] and logits [N,C] of one image: eight objects, or noise."""
    random = np.random.default_rng(seed)
    anchors, classes = grid_anchors(model), CLASSES[model]
    count = len(anchors)
    logits = random.standard_normal((count, classes), np.float32)
    deltas = random.standard_normal((count, 4), np.float32)
    if kind == "noise":
        return deltas, logits
    logits, deltas = logits * np.float32(0.7), deltas * np.float32(0.5)
    logits[:, 0] += 8
    low, high = anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2
    for _ in range(8):
        centre, size = random.uniform(0.2, 0.8, 2), random.uniform(0.1, 0.5, 2)
        overlap = np.clip(np.minimum(high, centre + size / 2) - np.maximum(low, centre - size / 2), 0, None).prod(-1)
        iou = overlap / (anchors[:, 2:].prod(-1) + size.prod() - overlap)
        near = np.clip((iou - 0.35) / 0.3, 0, 1).astype(np.float32)
        logits[:, 0] -= 7 * near
        logits[:, random.integers(1, classes)] += 6 * near
        target = np.concatenate(
            [(centre - anchors[:, :2]) / anchors[:, 2:] * 10, np.log(size / anchors[:, 2:]) * 5], -1
        )
        deltas = np.where(near[:, None] > 0, target.astype(np.float32) + deltas, deltas)
    return deltas, logits


def scene(model: str, batch: int, dtype: Any, seed: int, kind: str = "scene") -> Inputs:
    """What a trained detector gives for images with eight objects; `noise`: what an untrained one gives."""
    chosen = np.random.default_rng(seed).integers(0, POOL, batch)
    images = [image(model, kind, int(index)) for index in chosen]
    deltas, logits = (np.stack([arrays[k] for arrays in images]).astype(dtype) for k in (0, 1))
    return Inputs(deltas, logits, grid_anchors(model))


def candidates(inputs: Inputs, threshold: float) -> float:
    """How many anchors and classes of an image are above a threshold, on the average."""
    total = 0
    for logits in inputs.logits:
        powers = np.exp(logits.astype(np.float32) - logits.max(-1, keepdims=True).astype(np.float32))
        total += int(((powers / powers.sum(-1, keepdims=True))[:, 1:] > threshold).sum())
    return total / len(inputs.logits)


def adversarial(index: int) -> tuple[str, Settings, Inputs]:
    """One of many small cases: sizes, types, settings and peculiarities at random."""
    random = np.random.default_rng(index)

    def pick(*choices: Any) -> Any:
        return choices[int(random.integers(len(choices)))]

    kind = ("random", "background", "ties", "equal", "narrow", "not finite", "one box")[index % 7]
    batch, count, classes = pick(1, 2, 3, 8, 128), pick(1, 63, 64, 65, 300, 900), pick(2, 3, 21, 81, 91, 400)
    if batch * count * classes > 2_000_000:
        batch = 2
    activation = pick(0, 0, 1, 2)
    dtype = pick(np.float16, np.float32)
    settings = Settings(
        score_threshold=pick(0.0, 0.01, 0.05, 0.3, 0.5),
        iou_threshold=pick(0.0, 0.3, 0.45, 0.7, 1.0),
        max_detections=pick(1, 10, 100, 200, 512, 513, 3000),
        topk_per_class=pick(0, 0, 1, 40, 400),
        background_class=pick(-1, 0, 0, classes - 1),
        score_activation=activation,
        box_coding=pick(0, 1),
        box_scales=pick((10.0, 10.0, 5.0, 5.0), (3.0, 1.0, 7.0, 1.3)),
        clip_boxes=pick(0, 1),
        class_agnostic=pick(0, 0, 1),
        lowest_score_threshold=pick(0.0, 0.0, 0.01, 0.2),
    )
    logits = random.standard_normal((batch, count, classes), np.float32) * 2
    deltas = random.standard_normal((batch, count, 4), np.float32)
    anchors = np.concatenate(
        [random.random((count, 2), np.float32), random.random((count, 2), np.float32) * 0.3 + 0.05], 1, dtype=np.float32
    )
    if kind == "background":
        logits[..., max(settings.background_class, 0)] += 6
    elif kind == "ties":
        logits = (logits * 0.2).round()
    elif kind == "equal":
        logits[:] = 0.5
    elif kind == "narrow":
        logits = 0.5 + logits * 1e-6
    elif kind == "not finite":
        strange = np.array([np.nan, np.inf, -np.inf, 1e38, -1e38], np.float32)
        for array in (logits, deltas):
            hit = random.random(array.shape, np.float32) < 0.02
            array[hit] = strange[random.integers(0, 5, int(hit.sum()))]
    elif kind == "one box":
        deltas[:], anchors[:] = 0, anchors[0].copy()
    with np.errstate(over="ignore"):  # 1e38 is infinite in FP16: one more case
        inputs = Inputs(deltas.astype(dtype), logits.astype(pick(dtype, dtype, np.float32)), anchors)
    if pick(False, True):
        inputs.score_thresholds = random.random((batch, 1), np.float32)
    if pick(False, True):
        inputs.iou_thresholds = random.random((batch, 1), np.float32)
    return f"{index} {kind} B={batch} N={count} C={classes} {np.dtype(dtype)}", settings, inputs
