"""A film's frame as the picture that a model sees, and as the one to encode, with boxes painted on its planes.

A frame is not converted to RGB and back: what no box covers keeps the film's own values, and nothing is spent on it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .detections import Detections
from .marks import Color, Mark

FORMAT = "yuv420p"  # what every usual encoder takes
_JPEG_RANGE, _MPEG_RANGE = 2, 1  # FFmpeg's AVCOL_RANGE
_UNKNOWN = 2  # AVCOL_SPC of a film that does not tell; a film in RGB is 0
# Weights of red and blue in the luma, by FFmpeg's AVCOL_SPC: ITU-R BT.709 and BT.2020; all others as BT.601, which is
# what FFmpeg takes for a film that does not tell.
_BT601, _WEIGHTS = (0.299, 0.114), {1: (0.2126, 0.0722), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def quarter_turns(frame: Any) -> int:
    """How often a player turns the frame by 90 degrees, counterclockwise."""
    return int(round(frame.rotation / 90) % 4)


def picture(frame: Any) -> Image.Image:
    """A frame as the client takes it, RGB, turned as the film says."""
    rgb = frame.reformat(format="rgb24")
    plane = rgb.planes[0]
    image = Image.frombuffer("RGB", (rgb.width, rgb.height), plane, "raw", "RGB", plane.line_size, 1)
    turn = _TURNS[quarter_turns(frame)]
    return image if turn is None else image.transpose(turn)


def painted(frame: Any, detections: Detections | None) -> Any:
    """A copy of a frame to encode: YUV 4:2:0 of 8 bits in the range of television, upright, with the boxes.

    Args:
        frame: of PyAV, in any format.
        detections: in the pixels of `picture(frame)`.

    Returns:
        A frame of PyAV. Encoders store colours for two by two pixels: an odd width or height grows by a pixel.
    """
    source = frame
    if frame.format.name != FORMAT or frame.color_range == _JPEG_RANGE:
        source = frame.reformat(format=FORMAT, dst_color_range=_MPEG_RANGE)
    planes = [np.rot90(plane, quarter_turns(frame)) for plane in _planes(source)]
    (height, width), (rows, columns) = planes[0].shape, planes[1].shape
    copy = type(frame)(2 * columns, 2 * rows, FORMAT)
    for target, plane in zip(_planes(copy), planes, strict=True):
        target[: plane.shape[0], : plane.shape[1]] = plane
    luma = _planes(copy)[0]
    luma[height:] = luma[height - 1]
    luma[:, width:] = luma[:, width - 1 : width]
    copy.colorspace, copy.color_range = _colorspace(frame), _MPEG_RANGE
    if detections is not None:
        weights = _WEIGHTS.get(_colorspace(frame), _BT601)
        for mark in detections.marks():
            _paint(_planes(copy), mark, weights)
    return copy


def _planes(frame: Any) -> list[NDArray[np.uint8]]:
    """Views of a frame's planes: UINT8 [H,W] of luma, and twice [(H+1)//2,(W+1)//2] of colour."""
    return [np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[: p.height, : p.width] for p in frame.planes]


def _colorspace(frame: Any) -> int:
    """How the colours of its YUV are meant."""
    return int(frame.colorspace) or _UNKNOWN


def _paint(planes: list[NDArray[np.uint8]], mark: Mark, weights: tuple[float, float]) -> None:
    # Colours are for two by two pixels: those that the mark touches.
    top, bottom, left, right = mark.top // 2, (mark.bottom + 1) // 2, mark.left // 2, (mark.right + 1) // 2
    areas = (slice(mark.top, mark.bottom), slice(mark.left, mark.right)), (slice(top, bottom), slice(left, right))
    if isinstance(mark.paint, tuple):
        for plane, area, value in zip(
            planes, (areas[0], areas[1], areas[1]), _of_color(mark.paint, weights), strict=True
        ):
            plane[area] = value
        return
    values = _yuv(mark.paint, weights)
    planes[0][areas[0]] = values[..., 0]
    rows = np.clip(np.arange(2 * top, 2 * bottom) - mark.top, 0, len(values) - 1)
    columns = np.clip(np.arange(2 * left, 2 * right) - mark.left, 0, values.shape[1] - 1)
    pairs = values[..., 1:][rows][:, columns]
    pairs = pairs[0::2] + pairs[1::2]
    colors = (pairs[:, 0::2] + pairs[:, 1::2]) / 4
    planes[1][areas[1]], planes[2][areas[1]] = colors[..., 0], colors[..., 1]


def _yuv(rgb: NDArray[Any], weights: tuple[float, float]) -> NDArray[np.float32]:
    """ITU-R BT.601, BT.709 or BT.2020 in 8 bits: luma 16 to 235, colours 16 to 240.

    Args:
        rgb: [...,3], 0..255.
        weights: of red and blue in the luma.

    Returns:
        FP32 [...,3]: luma, blue and red difference, half a level higher: what becomes UINT8 is rounded.
    """
    red, green, blue = (rgb[..., k].astype(np.float32) / 255 for k in range(3))
    luma = weights[0] * red + (1 - sum(weights)) * green + weights[1] * blue
    differences = ((blue - luma) / (1 - weights[1]), (red - luma) / (1 - weights[0]))
    return np.stack((16.5 + 219 * luma, *(128.5 + 112 * each for each in differences)), axis=-1)


@lru_cache(maxsize=1024)
def _of_color(color: Color, weights: tuple[float, float]) -> tuple[int, ...]:
    return tuple(int(value) for value in _yuv(np.array(color), weights))
