"""Results for COCO tools and for the eye."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ssd_client import Detections, InvalidInputError
from ssd_client.detections import color_of


def detections(boxes: list[list[float]], size: tuple[int, int], source: Any = None) -> Detections:
    count = len(boxes)
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.linspace(0.9, 0.5, count, dtype=np.float32),
        class_ids=np.arange(count, dtype=np.int32),
        labels=tuple(f"thing {k}" for k in range(count)),
        image_size=size,
        source=source,
    )


def test_to_coco() -> None:
    result = detections([[10, 20, 40, 80.5], [0, 0, 5, 5]], (100, 100))
    assert result.to_coco(7) == [
        {"image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 60.5], "score": pytest.approx(0.9)},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.5},
    ]
    assert json.loads(json.dumps(result.to_coco("a"))) == result.to_coco("a")
    assert [r["category_id"] for r in result.to_coco(7, {0: 44, 1: 90})] == [44, 90]
    with pytest.raises(InvalidInputError, match=r"no entry for class 1; it has \[0\]"):
        result.to_coco(7, {0: 44})
    assert detections([], (5, 5)).to_coco(1) == []


def test_iteration_and_length() -> None:
    result = detections([[1, 2, 3, 4], [5, 6, 7, 8]], (10, 10))
    assert len(result) == 2
    box, score, label = next(iter(result))
    assert (box.tolist(), score, label) == ([1, 2, 3, 4], pytest.approx(0.9), "thing 0")


def test_draw_paints_the_box_and_nothing_inside_it() -> None:
    picture = Image.new("RGB", (400, 300), (90, 90, 90))
    drawn = np.asarray(detections([[100, 80, 300, 250]], (400, 300)).draw(picture))
    color = color_of(0)
    for y, x in [(81, 200), (249, 200), (150, 100), (150, 299)]:
        assert tuple(drawn[y, x]) == color, (y, x)
    assert (drawn[90:240, 110:290] == 90).all()
    assert tuple(drawn[150, 99]) == tuple(drawn[150, 300]) == (90, 90, 90)
    assert np.asarray(picture).max() == 90, "the picture that was given is untouched"


@pytest.mark.parametrize("box", [[0, 0, 400, 300], [350, 0, 400, 20], [0, 290, 10, 300], [399.6, 299.6, 400, 300]])
def test_labels_stay_inside_the_picture(box: list[float]) -> None:
    blank = np.zeros((300, 400, 3), np.uint8)
    drawn = np.asarray(detections([box], (400, 300)).draw(blank))
    filled = (drawn == color_of(0)).all(axis=-1)
    text = (drawn != blank).any(axis=-1) & ~filled | filled
    ys, xs = np.nonzero(text)
    label_rows = [y for y in range(300) if text[y].sum() > 40]
    assert len(label_rows) >= 10, "the label is all there"
    assert ys.max() < 300
    assert xs.max() < 400


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (20, 20), (5000, 40)])
def test_draw_on_odd_sizes(size: tuple[int, int]) -> None:
    drawn = detections([[0, 0, *size]], size).draw(Image.new("RGB", size))
    assert drawn.size == size
    assert np.asarray(drawn).any()


def test_lines_and_labels_grow_with_the_picture() -> None:
    def painted(size: int) -> float:
        drawn = detections([[size * 0.2, size * 0.4, size * 0.8, size * 0.8]], (size, size)).draw(
            Image.new("RGB", (size, size))
        )
        return float(np.asarray(drawn).any(axis=-1).mean())

    assert painted(2000) == pytest.approx(painted(600), rel=0.35)


def test_draw_reads_the_source_again(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.new("RGB", (60, 50), "white").save(path)
    drawn = np.asarray(detections([[5, 5, 50, 40]], (60, 50), path).draw())
    assert tuple(drawn[39, 30]) == color_of(0)
    assert tuple(drawn[45, 30]) == (255, 255, 255)
    with pytest.raises(InvalidInputError, match="do not know their picture"):
        detections([], (60, 50)).draw()
    with pytest.raises(InvalidInputError, match="60 x 50 pixels, the detections are of one with 61 x 50"):
        detections([], (61, 50)).draw(path)


def test_classes_have_colours_of_their_own() -> None:
    assert len({color_of(k) for k in range(90)}) == 90
