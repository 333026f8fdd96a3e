"""Results for COCO tools and for the eye."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from ssd_client import Detections, ImageError, InvalidInputError, fonts
from ssd_client.fonts import fitting
from ssd_client.marks import color_of


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


def drawn_label(label: str) -> NDArray[np.uint8]:
    """The pixels of a picture with this label."""
    found = dataclasses.replace(detections([[10, 60, 390, 290]], (400, 300)), labels=(label,))
    return np.asarray(found.draw(Image.new("RGB", (400, 300))))


@pytest.mark.parametrize("label", ["Fußgänger", "ключ", "Łódź", "σκύλος"])
def test_labels_are_drawn_with_their_own_characters(label: str) -> None:
    font, text = fitting(label, 20)
    assert text == label
    missing = bytes(font.getmask("\uffff"))
    assert [character for character in label if bytes(font.getmask(character)) == missing] == []
    assert (drawn_label(label) != drawn_label("?" * len(label))).any()


def test_no_label_is_drawn_as_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no font has is written in letters that it has."""
    monkeypatch.setattr(fonts, "_SYSTEM_FONTS", ())
    monkeypatch.setattr(fonts, "find_spec", lambda _: None)
    fonts._fonts.cache_clear()
    try:
        assert [
            fitting(label, 20)[1] for label in ("Fußgänger", "Łódź", "Ørsted", "犬 2", "cafe\u0301", "a\u202eb")
        ] == [*("Fussganger", "Lodz", "Orsted", "U+72AC 2", "cafe", "a\\u202eb")]
    finally:
        fonts._fonts.cache_clear()
    for label in ("犬", "🙂", "\u0378"):
        font, text = fitting(label, 20)
        assert all(bytes(font.getmask(character)) != bytes(font.getmask("\uffff")) for character in text), text


def test_draw_has_the_clients_pixel_limit(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    Image.new("RGB", (60, 50)).save(path)
    found = detections([], (60, 50), path)
    assert found.draw().size == (60, 50)
    with pytest.raises(ImageError, match="the limit is 0"):
        dataclasses.replace(found, max_pixels=2999).draw()


def test_a_very_long_label_is_cut_before_it_is_drawn() -> None:
    """Its whole text took 23 s for every box; a server may send any label."""
    box, score, number = np.array([[10, 10, 90, 90]], np.float32), np.array([0.9], np.float32), np.zeros(1, np.int32)
    started = time.monotonic()
    picture = Image.new("RGB", (100, 100))
    drawn = Detections(box, score, number, ("long" * 25_000,), picture.size).draw(picture)
    assert drawn.size == picture.size
    assert time.monotonic() - started < 5
