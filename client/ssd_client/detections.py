"""The detections of one picture: boxes in its own pixels, as arrays, as COCO results and as a drawing."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .exceptions import InvalidInputError
from .fonts import fitting
from .preprocess import MAX_PIXELS, ImageSource, load_image


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections in one picture, best first.

    Attributes:
        boxes: FP32 [n,4], x1,y1,x2,y2 in pixels of the picture, upright (after its EXIF orientation).
        scores: FP32 [n], 0..1.
        class_ids: INT32 [n], 0-based foreground classes.
        labels: the classes' names, n of them.
        image_size: (width, height) of the picture in pixels.
        source: what was given to `detect`, for `draw`.
        max_pixels: `draw` refuses picture files with more pixels than this.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    class_ids: NDArray[np.int32]
    labels: tuple[str, ...]
    image_size: tuple[int, int]
    source: ImageSource | None = field(default=None, repr=False)
    max_pixels: int = field(default=MAX_PIXELS, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[NDArray[np.float32], float, str]]:
        """(box, score, label) of every detection."""
        return zip(self.boxes, self.scores.tolist(), self.labels, strict=True)

    def to_coco(self, image_id: int | str, category_ids: Mapping[int, int] | None = None) -> list[dict[str, Any]]:
        """COCO's result format.

        Args:
            image_id: the picture's id in the annotations.
            category_ids: class id to category id; without it a category id is the class id + 1.

        Returns:
            One {image_id, category_id, bbox: [x, y, width, height] in pixels, score} per detection.

        Raises:
            InvalidInputError: `category_ids` lacks a class that was detected.
        """
        results = []
        for (x1, y1, x2, y2), score, class_id in zip(
            self.boxes.astype(float).tolist(), self.scores.tolist(), self.class_ids.tolist(), strict=True
        ):
            if category_ids is not None and class_id not in category_ids:
                raise InvalidInputError(
                    f"category_ids has no entry for class {class_id}; it has {sorted(category_ids)}",
                    fix="map every class of the model",
                )
            category = class_id + 1 if category_ids is None else category_ids[class_id]
            bbox = [x1, y1, x2 - x1, y2 - y1]
            results.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": score})
        return results

    def to_dicts(self) -> list[dict[str, Any]]:
        """One {box: [x1, y1, x2, y2] in pixels, score, class_id, label} per detection, ready for JSON."""
        rows = zip(self.boxes.tolist(), self.scores.tolist(), self.class_ids.tolist(), self.labels, strict=True)
        return [{"box": box, "score": score, "class_id": number, "label": label} for box, score, number, label in rows]

    def draw(self, image: ImageSource | None = None) -> Image.Image:
        """The picture with boxes, labels and scores on it.

        Args:
            image: the picture; without it what was given to `detect` is read again.

        Returns:
            A new RGB image of `image_size`.

        Raises:
            InvalidInputError: there is no picture, or its size differs from `image_size`.
            ImageError: the picture cannot be read.
        """
        source = self.source if image is None else image
        if source is None:
            raise InvalidInputError("these detections do not know their picture", fix="give it: draw(image)")
        canvas = load_image(source, max_pixels=self.max_pixels)
        if canvas.size != self.image_size:
            raise InvalidInputError(
                f"the picture has {canvas.width} x {canvas.height} pixels, the detections are of one with "
                f"{self.image_size[0]} x {self.image_size[1]}",
                fix="draw on the picture that was given to detect",
            )
        _draw(canvas, self)
        return canvas


def color_of(class_id: int) -> tuple[int, int, int]:
    """A colour of its own for every class: hues a golden angle apart, bright."""
    rgb = colorsys.hsv_to_rgb((class_id * 0.618034) % 1.0, 0.85, 1.0 if class_id % 2 == 0 else 0.8)
    return (round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2]))


def _draw(canvas: Image.Image, detections: Detections) -> None:
    pen = ImageDraw.Draw(canvas)
    width, height = canvas.size
    line = max(1, round(min(width, height) / 200))
    size = max(10, round(min(width, height) / 32))
    worst_first = range(len(detections) - 1, -1, -1)
    for k in worst_first:
        x1, y1, x2, y2 = _corners(detections.boxes[k], canvas.size)
        pen.rectangle((x1, y1, x2, y2), outline=color_of(int(detections.class_ids[k])), width=line)
    for k in worst_first:  # labels lie over every box
        x1, y1, _, _ = _corners(detections.boxes[k], canvas.size)
        color = color_of(int(detections.class_ids[k]))
        font, text = fitting(f"{detections.labels[k]} {detections.scores[k]:.2f}", size)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        label_width, label_height = right - left + 2 * line + 2, bottom - top + 2 * line + 2
        x = max(0, min(x1, width - label_width))
        above = y1 - label_height
        y = above if above >= 0 else max(0, min(y1 + line, height - label_height))
        pen.rectangle((x, y, x + label_width, y + label_height), fill=color)
        bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
        pen.text((x + line + 1 - left, y + line + 1 - top), text, fill="black" if bright else "white", font=font)


def _corners(box: NDArray[np.float32], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel of the box in x and y, inside the picture."""
    x1, y1 = (min(max(round(float(v)), 0), limit - 1) for v, limit in zip(box[:2], size, strict=True))
    x2, y2 = (min(max(round(float(v)) - 1, 0), limit - 1) for v, limit in zip(box[2:], size, strict=True))
    return x1, y1, max(x1, x2), max(y1, y2)
