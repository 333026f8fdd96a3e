"""Inputs for checks and measurements: what a detector gives for a picture, and small cases that are easily wrong."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from calls import Inputs
from params import Settings

GRIDS = {
    "SSD300-COCO": ((38, 4), (19, 6), (10, 6), (5, 6), (3, 4), (1, 4)),
    "SSD-MobileNet": ((19, 3), (10, 6), (5, 6), (3, 6), (2, 6), (1, 6)),
}
CLASSES = {"SSD300-COCO": 81, "SSD-MobileNet": 91}


@functools.cache
def grid_anchors(model: str, device: str) -> torch.Tensor:
    """FP32 [N,4]: centres on the grids of the model's feature maps, sizes and shapes as SSD has them."""
    rows = []
    for level, (cells, count) in enumerate(GRIDS[model]):
        size = 0.1 + 0.8 * level / (len(GRIDS[model]) - 1)
        for y, x, k in itertools.product(range(cells), range(cells), range(count)):
            ratio = (1.0, 2.0, 0.5, 3.0, 1 / 3, 1.0)[k]
            scale = size * (1.15 if k == 5 else 1.0)
            rows.append(((x + 0.5) / cells, (y + 0.5) / cells, scale * ratio**0.5, scale / ratio**0.5))
    return torch.tensor(rows, device=device)


def scene(model: str, batch: int, dtype: torch.dtype, device: str, seed: int, kind: str = "scene") -> Inputs:
    """What a trained detector gives for images with eight objects; `noise`: what an untrained one gives."""
    random = torch.Generator(device).manual_seed(seed)
    anchors, classes = grid_anchors(model, device), CLASSES[model]
    count = len(anchors)
    logits = torch.randn(batch, count, classes, generator=random, device=device)
    deltas = torch.randn(batch, count, 4, generator=random, device=device)
    if kind == "scene":
        logits, deltas = logits * 0.7, deltas * 0.5
        logits[..., 0] += 8
        centre = torch.rand(batch, 8, 2, generator=random, device=device) * 0.6 + 0.2
        size = torch.rand(batch, 8, 2, generator=random, device=device) * 0.4 + 0.1
        labels = torch.randint(1, classes, (batch, 8), generator=random, device=device)
        low, high = anchors[:, :2] - anchors[:, 2:] / 2, anchors[:, :2] + anchors[:, 2:] / 2
        for index in range(8):
            c, s = centre[:, None, index], size[:, None, index]
            overlap = (torch.minimum(high, c + s / 2) - torch.maximum(low, c - s / 2)).clamp(min=0).prod(-1)
            iou = overlap / (anchors[:, 2:].prod(-1) + s.prod(-1) - overlap)
            near = ((iou - 0.35) / 0.3).clamp(0, 1)
            logits[..., 0] -= 7 * near
            logits.scatter_add_(2, labels[:, index, None, None].expand(batch, count, 1), (6 * near)[..., None])
            target = torch.cat([(c - anchors[:, :2]) / anchors[:, 2:] * 10, (s / anchors[:, 2:]).log() * 5], -1)
            deltas = torch.where(near[..., None] > 0, target + deltas, deltas)
    return Inputs(deltas.to(dtype).contiguous(), logits.to(dtype).contiguous(), anchors)


def adversarial(index: int) -> tuple[str, Settings, Inputs]:
    """One of many small cases: sizes, types, settings and peculiarities at random."""
    random = torch.Generator().manual_seed(index)

    def pick(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=random))]

    kind = ("random", "background", "ties", "equal", "narrow", "not finite", "one box")[index % 7]
    batch, count, classes = pick(1, 2, 3, 8, 128), pick(1, 63, 64, 65, 300, 900), pick(2, 3, 21, 81, 91, 400)
    if batch * count * classes > 2_000_000:
        batch = 2
    activation = pick(0, 0, 1, 2)
    dtype = pick(torch.float16, torch.float32)
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
    logits = torch.randn(batch, count, classes, generator=random) * 2
    deltas = torch.randn(batch, count, 4, generator=random)
    anchors = torch.cat(
        [torch.rand(count, 2, generator=random), torch.rand(count, 2, generator=random) * 0.3 + 0.05], 1
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
        strange = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e38, -1e38])
        for tensor in (logits, deltas):
            hit = torch.rand(tensor.shape, generator=random) < 0.02
            tensor[hit] = strange[torch.randint(5, (int(hit.sum()),), generator=random)]
    elif kind == "one box":
        deltas[:], anchors[:] = 0, anchors[0].clone()
    inputs = Inputs(deltas.to(dtype), logits.to(pick(dtype, dtype, torch.float32)), anchors)
    if pick(False, True):
        inputs.score_thresholds = torch.rand(batch, 1, generator=random)
    if pick(False, True):
        inputs.iou_thresholds = torch.rand(batch, 1, generator=random)
    return f"{index} {kind} B={batch} N={count} C={classes} {dtype}", settings, inputs
