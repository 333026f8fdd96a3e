"""What a detection paints over: the four sides of its box, and its label. Pictures and films paint the same."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .fonts import fitting

Color = tuple[int, int, int]
_LONGEST = 200  # characters of a label that are drawn: the text of 100,000 took 23 s for every box


@dataclass(frozen=True)
class Mark:
    """A rectangle that lies inside the picture and has at least one pixel.

    Attributes:
        left, top: its first pixel.
        right, bottom: behind its last pixel.
        paint: a colour for all of it, or its pixels, RGB UINT8 [bottom - top, right - left, 3].
    """

    left: int
    top: int
    right: int
    bottom: int
    paint: Color | NDArray[np.uint8]


def color_of(class_id: int) -> Color:
    """A colour of its own for every class: hues a golden angle apart, bright."""
    rgb = colorsys.hsv_to_rgb((class_id * 0.618034) % 1.0, 0.85, 1.0 if class_id % 2 == 0 else 0.8)
    return (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))


def marks(
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    class_ids: NDArray[np.int32],
    labels: Sequence[str],
    image_size: tuple[int, int],
) -> Iterator[Mark]:
    """The rectangles in the order in which they are painted: the best detection last, labels over every box.

    Args:
        boxes: FP32 [n,4], x1,y1,x2,y2 in pixels.
        scores: FP32 [n].
        class_ids: INT32 [n].
        labels: n of them.
        image_size: (width, height) of the picture in pixels.
    """
    width, height = image_size
    line = max(1, round(min(width, height) / 200))
    size = max(10, round(min(width, height) / 32))
    worst_first = range(len(scores) - 1, -1, -1)
    corners = [_corners(box, image_size) for box in boxes]
    for k in worst_first:
        x1, y1, x2, y2 = corners[k]
        color = color_of(int(class_ids[k]))
        across, down = min(line, x2 - x1), min(line, y2 - y1)
        yield Mark(x1, y1, x2, y1 + down, color)
        yield Mark(x1, y2 - down, x2, y2, color)
        yield Mark(x1, y1, x1 + across, y2, color)
        yield Mark(x2 - across, y1, x2, y2, color)
    for k in worst_first:
        x1, y1, _, _ = corners[k]
        label = labels[k] if len(labels[k]) <= _LONGEST else f"{labels[k][: _LONGEST - 1]}…"
        pixels = _label(f"{label} {scores[k]:.2f}", color_of(int(class_ids[k])), size, line)
        label_height, label_width = pixels.shape[:2]
        left = max(0, min(x1, width - label_width))
        above = y1 - label_height
        top = above if above >= 0 else max(0, min(y1 + line, height - label_height))
        seen = pixels[: height - top, : width - left]
        yield Mark(left, top, left + seen.shape[1], top + seen.shape[0], seen)


@lru_cache(maxsize=512)
def _label(words: str, color: Color, size: int, line: int) -> NDArray[np.uint8]:
    """The words on a ground of this colour, RGB UINT8 [H,W,3]."""
    font, text = fitting(words, size)
    left, top, right, bottom = ImageDraw.Draw(Image.new("RGB", (1, 1))).textbbox((0, 0), text, font=font)
    canvas = Image.new("RGB", (round(right - left) + 2 * line + 3, round(bottom - top) + 2 * line + 3), color)
    bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
    place = (line + 1 - left, line + 1 - top)
    ImageDraw.Draw(canvas).text(place, text, fill="black" if bright else "white", font=font)
    pixels = np.asarray(canvas)
    pixels.flags.writeable = False
    return pixels


def _corners(box: NDArray[np.float32], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First pixel of the box in x and y, and the one behind its last, inside the picture."""
    x1, y1 = (min(max(round(float(v)), 0), limit - 1) for v, limit in zip(box[:2], size, strict=True))
    x2, y2 = (min(max(round(float(v)), 1), limit) for v, limit in zip(box[2:], size, strict=True))
    return x1, y1, max(x1 + 1, x2), max(y1 + 1, y2)
