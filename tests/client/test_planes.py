"""A film's frame as the model's picture and as the frame to encode, against PyAV's own conversions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ssd_client import Detections
from ssd_client.planes import painted, picture

from tests.client.conftest import scene

pytestmark = pytest.mark.usefixtures("pyav")
BT709, BT2020, UNKNOWN = 1, 9, 2  # FFmpeg's AVCOL_SPC
MPEG, JPEG = 1, 2  # AVCOL_RANGE


def frame_of(pixels: NDArray[np.uint8], kind: str = "yuv420p", space: int = UNKNOWN, value_range: int = MPEG) -> Any:
    import av

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
        format=kind, dst_colorspace=space if space != UNKNOWN else None, dst_color_range=value_range
    )
    frame.colorspace, frame.color_range = space, value_range
    return frame


def rgb(frame: Any) -> NDArray[np.int64]:
    return frame.to_ndarray(format="rgb24").astype(int)  # type: ignore[no-any-return]


FOUND = Detections(
    boxes=np.array([[31, 17, 101, 90], [110.4, 30.2, 190, 99.7]], np.float32),
    scores=np.array([0.9, 0.5], np.float32),
    class_ids=np.array([0, 1], np.int32),
    labels=("red", "blue"),
    image_size=(200, 100),
)


def test_what_no_box_covers_stays_and_the_source_too() -> None:
    frame = frame_of(np.random.default_rng(0).integers(0, 256, (100, 200, 3), np.uint8))
    before = frame.to_ndarray()
    after = painted(frame, FOUND).to_ndarray()
    assert (frame.to_ndarray() == before).all()
    assert (painted(frame, None).to_ndarray() == before).all()
    changed = before[:100] != after[:100]
    assert changed[17, 50]
    assert changed[60, 31]
    covered = np.zeros((100, 200), bool)
    for mark in FOUND.marks():
        covered[mark.top : mark.bottom, mark.left : mark.right] = True
    assert not changed[~covered].any()
    assert changed[covered].mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "space", "value_range"),
    [
        ("yuv420p", UNKNOWN, MPEG),
        ("yuv420p", BT709, MPEG),
        ("yuv420p", BT2020, MPEG),
        ("yuv420p", BT709, JPEG),
        ("yuvj420p", UNKNOWN, JPEG),
        ("yuv420p10le", BT709, MPEG),
        ("yuv444p", UNKNOWN, MPEG),
        ("nv12", BT709, MPEG),
        ("gray", UNKNOWN, MPEG),
        ("gbrp", 0, JPEG),
        ("rgba", 0, JPEG),
    ],
)
def test_colours_are_those_that_draw_paints(kind: str, space: int, value_range: int) -> None:
    frame = frame_of(np.full((100, 200, 3), 128, np.uint8), kind, space, value_range)
    drawn = painted(frame, FOUND)
    assert (drawn.format.name, drawn.color_range) == ("yuv420p", MPEG)
    assert drawn.colorspace == (space or UNKNOWN)
    seen = picture(frame)
    wanted = np.asarray(FOUND.draw(seen)).astype(int)
    differences = np.abs(rgb(drawn) - wanted).max(axis=2)
    # Colours are stored for two by two pixels, so those beside a line may have some of its colour.
    assert np.median(differences) <= 3
    assert differences.mean() < 8
    for mark in FOUND.marks():
        if isinstance(mark.paint, tuple) and mark.bottom - mark.top > 10:  # the inside of an upright line
            at = rgb(drawn)[mark.top + 8, mark.left]
            assert np.abs(at - mark.paint).max() <= 6, (at, mark.paint)


def test_the_model_sees_what_pyav_makes_of_the_frame() -> None:
    frame = frame_of(np.random.default_rng(0).integers(0, 256, (51, 101, 3), np.uint8))
    assert (np.asarray(picture(frame)) == frame.to_ndarray(format="rgb24")).all()


@pytest.mark.parametrize("size", [(101, 51), (1, 1), (2, 3), (640, 359)])
def test_odd_sizes_grow_by_a_pixel_of_the_edge(size: tuple[int, int]) -> None:
    width, height = size
    pixels = scene(width, height)
    drawn = painted(frame_of(pixels, "yuv444p"), None)
    assert (drawn.width, drawn.height) == (width + width % 2, height + height % 2)
    grown = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert np.abs(rgb(drawn) - grown).mean() < 6
