"""Trains the shapes model from nothing on two CPU cores and writes model.onnx, anchors.npy and labels.txt.

    .venv/bin/python -m models.shapes.train            (needs the `train` extra: torch)

Seeded; the time it took and the accuracy it reached are in README.md beside this file.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.shapes.anchors import anchors
from models.shapes.network import CLASSES, ShapesSSD, export
from models.shapes.scenes import LABELS, SIZE, scene

HERE = Path(__file__).parent
BOX_SCALES = torch.tensor([10.0, 10.0, 5.0, 5.0])
MATCH_IOU = 0.5
NEGATIVES_PER_POSITIVE = 3
EMA_DECAY = 0.998


def _draw(index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    one = scene("train", index)
    return np.asarray(one.image), one.boxes / SIZE, one.classes


def _corners(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def _pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    return inter / (area_a[:, None] + area_b[None] - inter)


def _match(boxes: Tensor, classes: Tensor, anchor_corners: Tensor) -> tuple[Tensor, Tensor]:
    """Per anchor: class (0 = background) and box; every box keeps the anchor that fits it best (SSD, section 2.2)."""
    iou = _pairwise_iou(boxes, anchor_corners)
    best_iou, best_box = iou.max(0)
    favourite = iou.argmax(1)
    best_iou[favourite] = 1.0
    best_box[favourite] = torch.arange(len(boxes))
    return torch.where(best_iou >= MATCH_IOU, classes[best_box] + 1, 0), boxes[best_box]


def _encode(corners: Tensor, anchor: Tensor) -> Tensor:
    center, size = (corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]
    return torch.cat([(center - anchor[..., :2]) / anchor[..., 2:], (size / anchor[..., 2:]).log()], -1) * BOX_SCALES


def _decode(deltas: Tensor, anchor: Tensor) -> Tensor:
    scaled = deltas / BOX_SCALES
    center = scaled[..., :2] * anchor[..., 2:] + anchor[..., :2]
    return _corners(torch.cat([center, scaled[..., 2:].clamp(max=4).exp() * anchor[..., 2:]], -1))


def _giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of paired boxes (Rezatofighi et al. 2019)."""
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1) + (b[:, 2:] - b[:, :2]).prod(-1) - inter
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(-1)
    return inter / union - (hull - union) / hull


def _loss(deltas: Tensor, logits: Tensor, target_class: Tensor, target_box: Tensor, anchor: Tensor) -> Tensor:
    """MultiBox loss (SSD, section 2.2) with a GIoU term beside smooth L1, which tightens the boxes."""
    positive = target_class > 0
    count = positive.sum().clamp(min=1)
    cross_entropy = functional.cross_entropy(logits.flatten(0, 1), target_class.flatten(), reduction="none").view_as(
        positive
    )
    negative_loss = cross_entropy.detach().masked_fill(positive, -1.0)
    rank = negative_loss.argsort(1, descending=True).argsort(1)
    negative = (rank < NEGATIVES_PER_POSITIVE * positive.sum(1, keepdim=True).clamp(min=1)) & ~positive
    class_loss = cross_entropy[positive | negative].sum() / count
    matched_anchor = anchor.expand(*positive.shape, 4)[positive]
    smooth = (
        functional.smooth_l1_loss(deltas[positive], _encode(target_box[positive], matched_anchor), reduction="sum")
        / count
    )
    overlap = (1 - _giou(_decode(deltas[positive], matched_anchor), target_box[positive])).sum() / count
    return class_loss + smooth + 2.0 * overlap


def _augment(pixels: Tensor, boxes: list[Tensor], rng: np.random.Generator) -> tuple[Tensor, list[Tensor]]:
    """Mirrors and turns for the batch; colours, brightness, inversion per picture. `pixels` UINT8 [B,3,H,W]."""
    if rng.random() < 0.5:
        pixels, boxes = pixels.flip(3), [torch.stack([1 - b[:, 2], b[:, 1], 1 - b[:, 0], b[:, 3]], 1) for b in boxes]
    if rng.random() < 0.5:
        pixels, boxes = pixels.flip(2), [torch.stack([b[:, 0], 1 - b[:, 3], b[:, 2], 1 - b[:, 1]], 1) for b in boxes]
    if rng.random() < 0.5:
        pixels, boxes = pixels.transpose(2, 3), [b[:, [1, 0, 3, 2]] for b in boxes]
    channels = torch.from_numpy(np.stack([rng.permutation(3) for _ in boxes]))
    pixels = pixels[torch.arange(len(boxes))[:, None], channels].float()
    gain = torch.from_numpy(rng.uniform(0.8, 1.1, (len(boxes), 1, 1, 1)).astype(np.float32))
    flip = torch.from_numpy((rng.random((len(boxes), 1, 1, 1)) < 0.3).astype(np.float32))
    pixels = (flip * 255 + (1 - 2 * flip) * pixels) * gain
    return (pixels.clamp(0, 255) - 127.5) / 127.5, boxes


def train(scenes: int, steps: int, batch: int, rate: float, checkpoints: Path) -> ShapesSSD:
    """Trains and returns the network whose weights are the moving average over the steps."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    started = time.monotonic()
    with ProcessPoolExecutor() as pool:
        drawn = list(pool.map(_draw, range(scenes), chunksize=50))
    pictures = torch.from_numpy(np.stack([d[0] for d in drawn])).permute(0, 3, 1, 2)
    all_boxes = [torch.from_numpy(d[1]) for d in drawn]
    all_classes = [torch.from_numpy(d[2]) for d in drawn]
    del drawn
    print(f"{scenes} scenes drawn in {time.monotonic() - started:.0f} s", flush=True)

    anchor = torch.from_numpy(anchors())
    anchor_corners = _corners(anchor)
    network = ShapesSSD().to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(EMA_DECAY), use_buffers=True
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
    warm_up = min(300, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps))) + 1e-3,
    )
    order: list[int] = []
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = rng.permutation(scenes).tolist()
        chosen = [order.pop() for _ in range(batch)]
        pixels, boxes = _augment(pictures[chosen], [all_boxes[i] for i in chosen], rng)
        matched = [_match(b, all_classes[i], anchor_corners) for b, i in zip(boxes, chosen, strict=True)]
        target_class, target_box = (torch.stack(part) for part in zip(*matched, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            deltas, logits = network(pixels.contiguous(memory_format=torch.channels_last))
        loss = _loss(deltas.float(), logits.float(), target_class, target_box, anchor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
        if step % 1000 == 0:
            checkpoints.mkdir(parents=True, exist_ok=True)
            torch.save(average.module.state_dict(), checkpoints / "average.pt")
    return average.module


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=6_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for model.onnx, anchors.npy, labels.txt")
    parser.add_argument("--checkpoints", type=Path, default=Path("artifacts/train"))
    options = parser.parse_args()
    network = train(options.scenes, options.steps, options.batch, options.rate, options.checkpoints)
    options.out.mkdir(parents=True, exist_ok=True)
    np.save(options.out / "anchors.npy", anchors())
    (options.out / "labels.txt").write_text("\n".join(LABELS) + "\n")
    export(network.to(memory_format=torch.contiguous_format), options.out / "model.onnx")
    print(f"{CLASSES} classes with the background; wrote {options.out}/model.onnx")


if __name__ == "__main__":
    main()
