"""The detections of one picture: boxes in its own pixels, as arrays, as COCO results and as a drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .exceptions import InvalidInputError
from .marks import Mark, marks
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
        for mark in self.marks():
            box = (mark.left, mark.top, mark.right, mark.bottom)
            canvas.paste(mark.paint if isinstance(mark.paint, tuple) else Image.fromarray(mark.paint), box)
        return canvas

    def marks(self) -> Iterator[Mark]:
        """The rectangles that `draw` paints, in this order."""
        return marks(self.boxes, self.scores, self.class_ids, self.labels, self.image_size)
