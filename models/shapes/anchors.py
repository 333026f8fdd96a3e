"""The classic 8,732 anchors of SSD300 over six maps (Liu et al. 2016, section 2.2, box sizes of its COCO model)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 300
MAP_SIZES = (38, 19, 10, 5, 3, 1)
STRIDES = (8, 16, 32, 64, 100, 300)
BOX_SIZES = (21, 45, 99, 153, 207, 261, 315)  # pixels: map k has sizes k and sqrt(k * (k+1))
ASPECT_RATIOS: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
ANCHORS_PER_CELL = tuple(2 + 2 * len(ratios) for ratios in ASPECT_RATIOS)
ANCHORS_PER_MAP = tuple(cells * cells * each for cells, each in zip(MAP_SIZES, ANCHORS_PER_CELL, strict=True))


def anchors() -> NDArray[np.float32]:
    """FP32 [8732,4], cx,cy,w,h in 0..1; order: map, row, column, then box 1, sqrt, and each ratio with its inverse."""
    rows: list[tuple[float, float, float, float]] = []
    for k, (cells, stride, ratios) in enumerate(zip(MAP_SIZES, STRIDES, ASPECT_RATIOS, strict=True)):
        side = BOX_SIZES[k] / IMAGE_SIZE
        between = math.sqrt(BOX_SIZES[k] * BOX_SIZES[k + 1]) / IMAGE_SIZE
        shapes = [(side, side), (between, between)]
        for ratio in ratios:
            root = math.sqrt(ratio)
            shapes += [(side * root, side / root), (side / root, side * root)]
        for row in range(cells):
            for column in range(cells):
                cx, cy = (column + 0.5) * stride / IMAGE_SIZE, (row + 0.5) * stride / IMAGE_SIZE
                rows += [(cx, cy, width, height) for width, height in shapes]
    return np.clip(np.asarray(rows, np.float32), 0.0, 1.0)
