"""Seeded synthetic scenes with exact boxes: the data set of the shapes model.

Scene number i of a seed is the same picture on every machine: `numpy.random.default_rng([seed, i])` decides everything.
Splits are seeds (`SPLIT_SEEDS`), so a held-out scene can never have been trained on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 300
LABELS = ("circle", "square", "triangle", "star", "cross", "ring")
SPLIT_SEEDS = {"train": 1, "calibration": 2, "held_out": 3, "validation": 4}

MIN_SIDE, MAX_SIDE = 12, 250  # pixels, longer side of a box
SMALL_SHARE = 0.08  # share of objects in MIN_SIDE..20
MIN_CONTRAST = 15.0  # grey levels between an object and the background under it
MAX_OVERLAP = 0.5  # of the smaller box
MAX_OBJECTS = 7
_SUPERSAMPLE = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it.

    Attributes:
        image: RGB, SIZE × SIZE.
        boxes: FP32 [n,4], x1,y1,x2,y2 in pixels, tight around the drawn shape.
        classes: INT64 [n], index into LABELS.
    """

    image: Image.Image
    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]


def scene(split: str, index: int) -> Scene:
    """Draws scene `index` of a split.

    Args:
        split: a key of SPLIT_SEEDS.
        index: 0 upwards, no upper end.

    Raises:
        KeyError: no such split.
    """
    rng = np.random.default_rng([SPLIT_SEEDS[split], index])
    canvas = _background(rng)
    for _ in range(int(rng.integers(0, 6))):
        _draw_distractor(canvas, rng)
    boxes: list[tuple[float, float, float, float]] = []
    classes: list[int] = []
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        placed = _draw_object(canvas, rng, boxes)
        if placed is not None:
            classes.append(placed[0])
            boxes.append(placed[1])
    if rng.random() < 0.3:
        blurred = Image.fromarray(canvas.astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.8)))
        )
        canvas = np.asarray(blurred, np.float32).copy()
    canvas += rng.normal(0.0, rng.uniform(0.0, 5.0), canvas.shape).astype(np.float32)
    return Scene(
        Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)),
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(classes, np.int64),
    )


def scenes(split: str, count: int) -> Iterator[Scene]:
    """The first `count` scenes of a split, drawn one by one."""
    return (scene(split, index) for index in range(count))


def coco_ground_truth(split: str, count: int) -> dict[str, Any]:
    """The first `count` scenes as a COCO `instances` dictionary: image id = index + 1, category = class + 1."""
    return _instances(split, [(drawn.boxes, drawn.classes) for drawn in scenes(split, count)])


def _instances(split: str, objects: Sequence[tuple[NDArray[np.float32], NDArray[np.int64]]]) -> dict[str, Any]:
    """COCO's `instances` of scenes by their boxes and classes."""
    annotations: list[dict[str, Any]] = []
    for image_id, (boxes, classes) in enumerate(objects, start=1):
        for box, class_index in zip(boxes.tolist(), classes.tolist(), strict=True):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": class_index + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    count = len(objects)
    return {
        "info": {"description": f"shapes, split {split}, first {count} scenes"},
        "images": [{"id": i + 1, "width": SIZE, "height": SIZE, "file_name": f"{i:05d}.png"} for i in range(count)],
        "categories": [{"id": i + 1, "name": label} for i, label in enumerate(LABELS)],
        "annotations": annotations,
    }


def write_split(folder: Path, split: str, count: int) -> tuple[list[Path], dict[str, Any]]:
    """Writes the first `count` scenes of a split as PNG files with COCO ground truth, unless they are there.

    Returns:
        The pictures in order (image id = position + 1) and the COCO `instances` dictionary.
    """
    home = folder / f"{split}-{count}-{_source_digest()}"
    pictures = [home / f"{index:05d}.png" for index in range(count)]
    truth = home / "instances.json"
    if not truth.exists():  # written last: its presence says that the folder is whole
        home.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(
            os.cpu_count()
        ) as pool:  # numpy and Pillow release the interpreter lock where it counts
            objects = list(pool.map(_write_scene, pictures, [split] * count, range(count)))
        partial = truth.with_suffix(".tmp")
        partial.write_text(json.dumps(_instances(split, objects)))
        partial.replace(truth)
    return pictures, json.loads(truth.read_text())


def _write_scene(path: Path, split: str, index: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    drawn = scene(split, index)
    drawn.image.save(path, compress_level=1)
    return drawn.boxes, drawn.classes


def _source_digest() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def _color(rng: np.random.Generator) -> NDArray[np.float32]:
    return rng.uniform(10, 245, 3).astype(np.float32)


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """A gradient, flat, waves, blotches or a checker board; FP32 [SIZE,SIZE,3] in 0..255."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    first, second = _color(rng), _color(rng)
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) + 0.5
    mix = float(rng.uniform(0.0, 0.7))
    canvas = first + (np.clip(ramp, 0, 1)[..., None] * mix) * (second - first)
    kind = int(rng.integers(0, 5))
    amplitude = float(rng.uniform(3, 22))
    if kind == 1:
        frequency, phase, tilt = rng.uniform(4, 40), rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
        wave = np.sin((x * math.cos(tilt) + y * math.sin(tilt)) * 2 * math.pi * frequency + phase)
        canvas = canvas + amplitude * wave[..., None]
    elif kind == 2:
        cells = int(rng.integers(4, 40))
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        blotches = np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
        canvas = canvas + amplitude * blotches
    elif kind == 3:
        cells = int(rng.integers(3, 20))
        board = ((np.floor(x * cells) + np.floor(y * cells)) % 2) * 2 - 1
        canvas = canvas + 0.6 * amplitude * board[..., None]
    elif kind == 4:
        grain = rng.normal(0, amplitude * 0.5, (SIZE // 2, SIZE // 2)).astype(np.float32)
        canvas = canvas + np.repeat(np.repeat(grain, 2, 0), 2, 1)[..., None]
    return np.asarray(np.clip(canvas, 0, 255), np.float32)


def _polygon(points: list[Point], side: float, angle: float) -> list[Point]:
    """Points of the unit disc, turned and scaled so that the longer side of their box is `side`; box starts at 0,0."""
    turned = [
        (px * math.cos(angle) - py * math.sin(angle), px * math.sin(angle) + py * math.cos(angle)) for px, py in points
    ]
    xs, ys = [p[0] for p in turned], [p[1] for p in turned]
    scale = side / max(max(xs) - min(xs), max(ys) - min(ys))
    return [((px - min(xs)) * scale, (py - min(ys)) * scale) for px, py in turned]


def _regular(corners: int, inner: float = 1.0) -> list[Point]:
    """A regular polygon, or a star where every second corner lies at radius `inner`."""
    count = corners if inner == 1.0 else 2 * corners
    return [
        (r * math.sin(2 * math.pi * i / count), -r * math.cos(2 * math.pi * i / count))
        for i in range(count)
        for r in [1.0 if inner == 1.0 or i % 2 == 0 else inner]
    ]


def _cross(arm: float) -> list[Point]:
    a = arm
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


def _shape_mask(label: str, side: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Coverage 0..1 of a shape, antialiased by supersampling, cropped to its tight box."""
    big = side * _SUPERSAMPLE
    angle = float(rng.uniform(0, 2 * math.pi))
    if label in ("circle", "ring"):
        stretch = float(rng.uniform(0.8, 1.0))
        width, height = (big, big * stretch) if rng.random() < 0.5 else (big * stretch, big)
        mask = Image.new("L", (math.ceil(width), math.ceil(height)))
        draw = ImageDraw.Draw(mask)
        draw.ellipse((0, 0, width - 1, height - 1), fill=255)
        if label == "ring":
            hole = float(rng.uniform(0.5, 0.68))
            left, top = width * (1 - hole) / 2, height * (1 - hole) / 2
            draw.ellipse((left, top, width - 1 - left, height - 1 - top), fill=0)
    else:
        if label == "square":
            outline = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
        elif label == "triangle":
            outline = _regular(3)
        elif label == "star":
            outline = _regular(5, float(rng.uniform(0.38, 0.48)))
        else:
            outline = _cross(float(rng.uniform(0.22, 0.36)))
        stretch = 1.0 if label == "square" else float(rng.uniform(0.75, 1.0))
        points = _polygon([(px, py * stretch) for px, py in outline], big, angle)
        width, height = max(p[0] for p in points), max(p[1] for p in points)
        mask = Image.new("L", (math.ceil(width), math.ceil(height)))
        ImageDraw.Draw(mask).polygon(points, fill=255)
    small = mask.resize(
        (max(1, round(mask.width / _SUPERSAMPLE)), max(1, round(mask.height / _SUPERSAMPLE))), Image.Resampling.BOX
    )
    return np.asarray(small, np.float32) / 255.0


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Intersection over the area of the smaller box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return max(width, 0.0) * max(height, 0.0) / smaller


def _side(rng: np.random.Generator) -> float:
    low, high = (MIN_SIDE, 20) if rng.random() < SMALL_SHARE else (20, MAX_SIDE)
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


def _draw_object(
    canvas: NDArray[np.float32], rng: np.random.Generator, boxes: list[tuple[float, float, float, float]]
) -> tuple[int, tuple[float, float, float, float]] | None:
    """Draws one object where there is room for it; None where twelve tries found none."""
    class_index = int(rng.integers(0, len(LABELS)))
    for _ in range(12):
        mask = _shape_mask(LABELS[class_index], _side(rng), rng)
        height, width = mask.shape
        left, top = int(rng.integers(0, SIZE - width + 1)), int(rng.integers(0, SIZE - height + 1))
        box = (float(left), float(top), float(left + width), float(top + height))
        if all(_overlap(box, other) <= MAX_OVERLAP for other in boxes):
            _paint(canvas, mask, left, top, _contrasting(canvas, mask, left, top, rng), rng)
            return class_index, box
    return None


def _contrasting(
    canvas: NDArray[np.float32], mask: NDArray[np.float32], left: int, top: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """A colour at least MIN_CONTRAST grey levels (Rec. 601 luma) from what lies under the mask."""
    height, width = mask.shape
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    under = canvas[top : top + height, left : left + width][mask > 0.5].reshape(-1, 3).mean(0)
    if rng.random() < 0.2:  # low contrast on purpose: the background's own colour, shifted
        shift = float(rng.uniform(MIN_CONTRAST, 40.0)) * (1 if under @ luma < 127 else -1)
        return np.asarray(np.clip(under + shift, 0, 255), np.float32)
    color = _color(rng)
    while abs(float((color - under) @ luma)) < MIN_CONTRAST:
        color = _color(rng)
    return color


def _paint(
    canvas: NDArray[np.float32],
    mask: NDArray[np.float32],
    left: int,
    top: int,
    color: NDArray[np.float32],
    rng: np.random.Generator,
) -> None:
    """Blends a shape onto the canvas: flat, with a slight gradient, or finely striped."""
    height, width = mask.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    fill = np.broadcast_to(color, (height, width, 3))
    kind = int(rng.integers(0, 4))
    if kind == 1:
        fill = fill + (rng.uniform(-14, 14) * (x / width) + rng.uniform(-14, 14) * (y / height))[..., None]
    elif kind == 2:
        fill = fill + 6.0 * np.sin(x * rng.uniform(0.3, 1.2) + y * rng.uniform(0.3, 1.2))[..., None]
    region = canvas[top : top + height, left : left + width]
    region += mask[..., None] * (np.clip(fill, 0, 255) - region)


def _draw_distractor(canvas: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Something that is no object: a line, an arc, an open angle, a thin bar or a cloud of dots."""
    big = SIZE * 2
    mask = Image.new("L", (big, big))
    draw = ImageDraw.Draw(mask)
    kind = int(rng.integers(0, 5))
    x, y = rng.uniform(0, big, 2)
    reach = float(rng.uniform(30, 260))
    thickness = int(rng.integers(2, 8))
    angle = float(rng.uniform(0, 2 * math.pi))
    end = (x + reach * math.cos(angle), y + reach * math.sin(angle))
    if kind == 0:
        draw.line([(x, y), end], fill=255, width=thickness)
    elif kind == 1:
        start = float(rng.uniform(0, 360))
        draw.arc(
            (x - reach, y - reach, x + reach, y + reach), start, start + rng.uniform(30, 150), fill=255, width=thickness
        )
    elif kind == 2:
        turn = angle + rng.uniform(0.5, 1.4)
        other = (x + reach * math.cos(turn), y + reach * math.sin(turn))
        draw.line([end, (x, y), other], fill=255, width=thickness)
    elif kind == 3:
        draw.line([(x, y), end], fill=255, width=thickness + int(rng.integers(6, 16)))
    else:
        for px, py in rng.normal((x, y), reach / 4, (int(rng.integers(8, 30)), 2)):
            draw.ellipse((px - 2, py - 2, px + 2, py + 2), fill=255)
    coverage = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)[..., None] / 255.0
    canvas += coverage * float(rng.uniform(0.5, 1.0)) * (_color(rng) - canvas)
