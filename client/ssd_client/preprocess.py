"""From whatever holds a picture to the model's UINT8 [H,W,3] input, and back to the picture's own pixels.

What happens to unusual pictures, in one place: EXIF orientation is applied; transparent pixels are laid over white;
16-bit greys are scaled to 8 bits over their full range; of an animation the first frame counts; colour profiles are
ignored. Anything else that would need a guess is an `ImageError`.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .config import ModelConfig
from .exceptions import ImageError

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]"

# Pillow's own limit, 89 megapixels: an RGB picture of a quarter of a gigabyte.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3

# Raster formats only: Pillow would start another program for some of the rest (EPS).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# What such files are usually called, for looking through folders.
SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pcx"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)

_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in the model's input.

    Attributes:
        image_size: (width, height) of the picture in pixels.
        scale: input pixels per picture pixel, (x, y).
        offset: the picture's left and top edge in the input, in pixels.
        input_size: (width, height) of the input in pixels.
    """

    image_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]
    input_size: tuple[int, int]

    def to_image(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes of the model in pixels of the picture, cut off at its edges.

        Args:
            boxes: FP32 [n,4], x1,y1,x2,y2 in 0..1 of the model's input.

        Returns:
            FP32 [n,4], x1,y1,x2,y2 in pixels.
        """
        points = boxes.reshape(-1, 2, 2).astype(np.float64)
        points = (points * self.input_size - self.offset) / self.scale
        return np.clip(points, 0, self.image_size).astype(np.float32).reshape(-1, 4)


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture and bring it to 8-bit RGB, upright.

    Args:
        source: a path, the bytes of an image file, a Pillow image, or an array UINT8 [H,W,3] (RGB) or [H,W].
        max_pixels: refuse files that would decode to more pixels than this.

    Returns:
        An RGB image that carries no metadata.

    Raises:
        ImageError: it cannot be read, is too large, or cannot be turned into 8-bit RGB without a guess.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        if isinstance(source, (bytes, bytearray, memoryview)):
            with io.BytesIO(source) as stream:
                return _decode(stream, name, max_pixels)
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb") as stream:
                return _decode(stream, name, max_pixels)
    except ImageError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise ImageError(f"{name}: {error.strerror}", fix="check the path") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name} is not a picture in any known format",
            why="the file is empty" if _is_empty(source) else "it is something else, whatever it is called",
            fix=f"give one of {', '.join(_formats())}",
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(
            f"{name}: {error}",
            fix="if you trust it, raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS (the command line: --max-pixels)",
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        raise ImageError(
            f"{name} cannot be decoded: {error or type(error).__name__}",
            why="the file is damaged or was cut off on its way",
            fix="get it again",
        ) from error
    raise ImageError(
        f"cannot read a picture from {type(source).__name__}",
        fix="give a path, the bytes of an image file, a Pillow image, or a UINT8 array [H,W,3] or [H,W]",
    )


def place(image_size: tuple[int, int], config: ModelConfig) -> Placement:
    """Where a picture of this (width, height) comes to lie in the model's input."""
    (width, height), (across, down) = image_size, (config.input_width, config.input_height)
    if config.resize == "stretch":
        return Placement(image_size, (across / width, down / height), (0, 0), (across, down))
    scale = min(across / width, down / height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    offset = ((across - inner[0]) // 2, (down - inner[1]) // 2)
    return Placement(image_size, (inner[0] / width, inner[1] / height), offset, (across, down))


def preprocess(image: Image.Image, config: ModelConfig, out: NDArray[np.uint8]) -> Placement:
    """Resize an RGB image to the model's input, straight into `out`.

    Args:
        image: from `load_image`.
        config: says size, resize rule, filter, border and colour order.
        out: UINT8 [H,W,3], written in place; see `input_array` for one call that makes it.

    Returns:
        How to get from the model's boxes back to the image.
    """
    placement = place(image.size, config)
    (left, top), (across, down) = placement.offset, placement.input_size
    inner = (
        round(placement.scale[0] * placement.image_size[0]),
        round(placement.scale[1] * placement.image_size[1]),
    )
    if image.size != inner:
        image = image.resize(inner, Image.Resampling[config.resample.upper()])
    if inner != (across, down):
        out[...] = config.pad_value
    pixels = np.asarray(image)
    out[top : top + inner[1], left : left + inner[0]] = pixels if config.color_order == "RGB" else pixels[..., ::-1]
    return placement


def input_array(source: ImageSource, config: ModelConfig) -> tuple[NDArray[np.uint8], Placement]:
    """`load_image` and `preprocess` in one: UINT8 [H,W,3] for the model, and the way back."""
    out = np.empty((config.input_height, config.input_width, 3), np.uint8)
    return out, preprocess(load_image(source), config, out)


def _name(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        return f"Pillow image (mode {source.mode}, {source.width} x {source.height})"
    return f"{type(source).__name__} of {len(source)} bytes" if isinstance(source, (bytes, bytearray)) else "picture"


def _is_empty(source: object) -> bool:
    if isinstance(source, (str, os.PathLike)):
        return Path(source).stat().st_size == 0
    return isinstance(source, (bytes, bytearray, memoryview)) and len(source) == 0


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(stream: Any, name: str, max_pixels: int) -> Image.Image:
    with Image.open(stream, formats=_formats()) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{name} has {width} x {height} = {width * height / 1e6:.1f} megapixels, "
                f"the limit is {max_pixels / 1e6:.1f}",
                why="it is a very large picture, or a small file made to fill the memory",
                fix="make it smaller, or raise max_pixels (the command line: --max-pixels)",
            )
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels: {image.width} x {image.height}")
    image.load()
    upright = _TRANSPOSE.get(_orientation(image))
    if image.mode.startswith("I"):
        result = _from_16_bit(image, name)
    elif image.mode == "F":
        raise ImageError(
            f"{name} holds floating-point greys, whose black and white are unknown",
            fix="scale it to 8 bits first, for example with numpy",
        )
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        straight = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
        rgba = (image.convert(straight) if straight else image).convert("RGBA")
        result = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        result = image.convert("RGB")
    if upright is not None:
        result = result.transpose(upright)
    result.info.clear()  # an orientation left behind would be applied a second time
    return result


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata does not make the picture unreadable
        return 1


def _from_16_bit(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(
            f"{name} holds greys from {low} to {high}, which is not 16 bits", fix="scale it to 8 or 16 bits first"
        )
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] != 3)
        or not array.size
    ):
        raise ImageError(
            f"cannot read a picture from an array {array.dtype}{list(array.shape)}",
            fix="give UINT8 [H,W,3] in RGB order, or UINT8 [H,W]",
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
