"""From a picture to the model's UINT8 [H,W,3] input, and from the model's boxes to the picture's own pixels.

This is the only place that opens, turns, flattens, resizes and pads pictures. It needs NumPy and Pillow, nothing else.
It treats unusual pictures as follows:

- The orientation in EXIF or XMP is applied.
- Transparent pixels are laid over white.
- Greys of 12 or 16 bits are scaled to 8 bits by the file's own depth. Colours of 16 bits keep their high byte.
- Of an animation or a file with several pages, the first picture counts.
- Colour profiles are ignored.

A picture that would need a guess is an `ImageError`: floating-point, signed and 32-bit values, whose black and white
no file states, and bands that Pillow does not know.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from .exceptions import ImageError
from .rule import BILINEAR_PLAIN, PAD, Preprocessing

ImageSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any]"
)

# Pillow's own limit, 89 megapixels: an RGB picture of a quarter of a gigabyte.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3

# Raster formats only: Pillow would start another program for some of the rest (EPS).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
# What such files are usually called, for looking through folders.
SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pcx"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)

# Tags of TIFF and EXIF.
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 256, 257, 258, 262, 274
_BANDS, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _SUBSAMPLING = 277, 338, 339, 530
_STRIPS, _TILES = 273, 324
_WHITE_IS_ZERO = 0
_PHOTOMETRICS = {0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELAB"}
_SAMPLE_FORMATS = {2: "signed values", 3: "floating-point values", 5: "complex values", 6: "complex values"}
# Pillow's modes of PNG greys with fewer than 8 bits, and its factor from the file's levels to 8 bits.
_PNG_LEVELS = {"L;2": 85, "L;4": 17}

_ROWS_AT_ONCE = 32  # of the result of plain bilinear sampling: few enough for the processor's cache

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
    offset: tuple[float, float]
    input_size: tuple[int, int]

    def to_image(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's boxes in pixels of the picture, clipped to its edges.

        Args:
            boxes: FP32 [n,4], x1,y1,x2,y2 in 0..1 of the model's input.

        Returns:
            FP32 [n,4], x1,y1,x2,y2 in pixels of the upright picture.
        """
        points = boxes.reshape(-1, 2, 2).astype(np.float64)
        points = (points * self.input_size - self.offset) / self.scale
        return np.clip(points, 0, self.image_size).astype(np.float32).reshape(-1, 4)


def load_image(
    source: ImageSource, *, max_pixels: int = MAX_PIXELS, before_decoding: Callable[[int], None] | None = None
) -> Image.Image:
    """Read a picture and bring it to 8-bit RGB, upright.

    Args:
        source: a path, the bytes of an image file, such a file opened for reading bytes, a Pillow image, or an array
            UINT8 [H,W,3] (RGB) or [H,W].
        max_pixels: refuse files that would decode to more pixels than this.
        before_decoding: called with a file's number of pixels before they take memory.

    Returns:
        An RGB image that carries no metadata.

    Raises:
        ImageError: it cannot be read, is too large, or cannot be turned into 8-bit RGB without a guess.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    source = whole(source)
    name = _name(source)
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        if isinstance(source, (bytes, bytearray, memoryview)):
            with io.BytesIO(source) as stream:
                return _decode(stream, name, max_pixels, before_decoding)
        if isinstance(source, (str, os.PathLike)):
            with Path(source).open("rb") as stream:
                return _decode(stream, name, max_pixels, before_decoding)
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
    except MemoryError:
        raise out_of_memory(source) from None
    except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
        if "out of memory" in str(error):  # a decoder that could not get any
            raise out_of_memory(source) from None
        raise ImageError(
            f"{name} cannot be decoded: {error or type(error).__name__}",
            why="the file is damaged or was cut off on its way",
            fix="get it again",
        ) from error
    raise ImageError(
        f"cannot read a picture from {type(source).__name__}",
        fix="give a path, the bytes of an image file, a file opened for reading bytes, a Pillow image, or an array "
        "UINT8 [H,W,3] or [H,W]",
    )


def out_of_memory(source: ImageSource) -> ImageError:
    """The error for a picture that is too large for this machine's memory; nothing is wrong with the picture."""
    return ImageError(
        f"{_name(source)} needs more memory than there is",
        fix="free some, look at fewer pictures at once, or make the picture smaller",
    )


def whole(source: Any) -> Any:
    """What is left to read of an open file, as bytes; anything else as it is.

    Raises:
        ImageError: the file cannot be read, or was opened for reading text.
    """
    if isinstance(source, (str, os.PathLike, Image.Image)) or not hasattr(source, "read"):
        return source
    name = f"the open file {getattr(source, 'name', type(source).__name__)!s}"
    try:
        content = source.read()
    except (OSError, ValueError) as error:  # ValueError: closed, or text that is not UTF-8
        raise ImageError(f"{name} cannot be read: {error}", fix="open it for reading bytes: open(path, 'rb')") from None
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ImageError(
            f"{name} gives {type(content).__name__}, not bytes", fix="open it for reading bytes: open(path, 'rb')"
        )
    return bytes(content)


def place(image_size: tuple[int, int], rule: Preprocessing) -> Placement:
    """Where a picture lies in the model's input.

    Args:
        image_size: (width, height) of the upright picture in pixels.
        rule: how a picture becomes the input.
    """
    (width, height), (across, down) = image_size, (rule.width, rule.height)
    if rule.resize == "stretch":
        return Placement(image_size, (across / width, down / height), (0, 0), (across, down))
    if rule.resize == PAD:
        whole = _padded(image_size, rule)
        across_scale, down_scale = across / whole[0], down / whole[1]
        left, top = ((whole[0] - width) // 2, (whole[1] - height) // 2)
        return Placement(
            image_size, (across_scale, down_scale), (left * across_scale, top * down_scale), (across, down)
        )
    scale = min(across / width, down / height)
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    offset = (0, 0) if rule.resize == "letterbox_top_left" else ((across - inner[0]) // 2, (down - inner[1]) // 2)
    return Placement(image_size, (inner[0] / width, inner[1] / height), offset, (across, down))


def _padded(image_size: tuple[int, int], rule: Preprocessing) -> tuple[int, int]:
    """(width, height) of a picture that is padded to the input's aspect ratio."""
    width, height = image_size
    return max(width, round(height * rule.width / rule.height)), max(height, round(width * rule.height / rule.width))


def preprocess(image: Image.Image, rule: Preprocessing, out: NDArray[np.uint8]) -> Placement:
    """Resize an RGB image to the model's input, straight into `out`.

    Args:
        image: from `load_image`.
        rule: how a picture becomes the input.
        out: UINT8 [H,W,3] of the rule's size, written in place.

    Returns:
        Where the picture lies in the input, to map boxes back.
    """
    placement = place(image.size, rule)
    (across, down) = placement.input_size
    if rule.resize == PAD:
        size = _padded(image.size, rule)
        canvas = Image.new("RGB", size, (rule.pad_value,) * 3)
        canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
        pixels = _resized(canvas, (across, down), rule.resample)
        out[...] = pixels if rule.color_order == "RGB" else pixels[..., ::-1]
        return placement
    left, top = (round(edge) for edge in placement.offset)
    inner = (
        round(placement.scale[0] * placement.image_size[0]),
        round(placement.scale[1] * placement.image_size[1]),
    )
    if inner != (across, down):
        out[...] = rule.pad_value
    pixels = _resized(image, inner, rule.resample)
    out[top : top + inner[1], left : left + inner[0]] = pixels if rule.color_order == "RGB" else pixels[..., ::-1]
    return placement


def input_array(source: ImageSource, rule: Preprocessing) -> tuple[NDArray[np.uint8], Placement]:
    """`load_image` and `preprocess` in one call.

    Args:
        source: what `load_image` takes.
        rule: how a picture becomes the input; a served model's is `ModelConfig.preprocessing`.

    Returns:
        The input UINT8 [H,W,3], and where the picture lies in it.

    Raises:
        ImageError: the picture cannot be read.
    """
    out = np.empty((rule.height, rule.width, 3), np.uint8)
    return out, preprocess(load_image(source), rule, out)


def _resized(image: Image.Image, size: tuple[int, int], resample: str) -> NDArray[np.uint8]:
    if image.size == size:
        return np.asarray(image)
    if resample == BILINEAR_PLAIN:
        return _bilinear_plain(image, size)
    return np.asarray(image.resize(size, Image.Resampling[resample.upper()]))


def _bilinear_plain(image: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Bilinear sampling at half-pixel centres without antialiasing, in FP32, rounded to the nearest level (half: up).

    This is what OpenCV's INTER_LINEAR, torch.nn.functional.interpolate (bilinear, align_corners=False) and ONNX's
    Resize (linear, half_pixel) do. Pillow's `Image.transform` samples at the same places, but cuts the fractions off,
    so its pictures are half a level too dark.
    """
    width, height = size
    left, right, across = _neighbours(image.width, width)
    above, below, down = _neighbours(image.height, height)
    bands = np.arange(3)
    left, right = ((3 * columns[:, None] + bands).ravel() for columns in (left, right))
    across, down = np.repeat(across, 3), down[:, None]

    def row_samples(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        samples, further = rows.take(left, 1).astype(np.float32), rows.take(right, 1).astype(np.float32)
        further -= samples
        further *= across
        samples += further
        return samples

    out = np.empty((height, 3 * width), np.uint8)
    for start in range(0, height, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        needed, places = np.unique((above[part], below[part]), return_inverse=True)
        top, bottom = int(needed[0]), int(needed[-1]) + 1
        rows = np.asarray(image.crop((0, top, image.width, bottom))).reshape(bottom - top, -1)
        samples, further = row_samples(rows[needed - top])[places.reshape(2, -1)]
        further -= samples
        further *= down[part]
        samples += further
        samples += 0.5
        out[part] = samples
    return out.reshape(height, width, 3)


def _neighbours(count: int, samples: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The two of `count` pixels that each sample lies between, and how far it lies from the first to the second.

    Sample i lies at (i + 0.5) * count / samples - 0.5. A sample outside of the outermost centres takes the edge pixel.
    """
    places = np.clip((np.arange(samples) + 0.5) * (count / samples) - 0.5, 0, count - 1)
    first = places.astype(np.intp)
    return first, np.minimum(first + 1, count - 1), (places - first).astype(np.float32)


def _name(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, Image.Image):
        return f"Pillow image (mode {source.mode}, {source.width} x {source.height})"
    return f"picture of {len(source)} bytes" if isinstance(source, (bytes, bytearray)) else "picture"


def _is_empty(source: object) -> bool:
    if isinstance(source, (str, os.PathLike)):
        return Path(source).stat().st_size == 0
    return isinstance(source, (bytes, bytearray, memoryview)) and len(source) == 0


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(
    stream: IO[bytes], name: str, max_pixels: int, before_decoding: Callable[[int], None] | None
) -> Image.Image:
    try:
        image = Image.open(stream, formats=_formats())
    except UnidentifiedImageError:
        _refuse_unknown_tiff(stream, name)
        raise
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{name} has {width} x {height} = {width * height / 1e6:.1f} megapixels, "
                f"the limit is {max_pixels / 1e6:.1f}",
                why="it is a very large picture, or a small file made to fill the memory",
                fix="make it smaller, or raise max_pixels (the command line: --max-pixels)",
            )
        if before_decoding is not None:
            before_decoding(width * height)
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels: {image.width} x {image.height}")
    tags = getattr(image, "tag_v2", {})  # those of a TIFF, before anything else changes them
    _check_tiff(image, tags, name)
    _correct_png_transparency(image, name)
    image.load()
    upright = _TRANSPOSE.get(_orientation(image))
    if image.mode == "F":
        _refuse_unknown_range(name, "floating-point values")
    if image.mode.startswith("I"):
        if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two come scaled to 16 bits
            low, high = image.getextrema()
            _refuse_unknown_range(name, f"32-bit integers from {low} to {high}")
        result = _from_deep_grey(image, tags)
    elif image.has_transparency_data:
        straight = {"RGBa": "RGBA", "La": "LA"}.get(image.mode)
        result = _over_white((image.convert(straight) if straight else image).convert("RGBA"))
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


def _over_white(rgba: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _from_deep_grey(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """RGB from greys of up to 16 bits, which Pillow leaves as they are in the file."""
    values = np.asarray(image).astype(np.uint32)
    white = 2 ** int(tags[_BITS][0]) - 1 if _BITS in tags else 65535
    greys = ((values * 255 + white // 2) // white).astype(np.uint8)
    if tags and tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO:  # Pillow's default, too
        greys = 255 - greys
    key = image.info.get("transparency")  # of a PNG: the one level that is transparent
    if key is not None:
        greys[values == key] = 255
    return Image.fromarray(greys).convert("RGB")


def _correct_png_transparency(image: Image.Image, name: str) -> None:
    """A PNG's transparent colour is in the file's levels; Pillow compares it with 8-bit ones.

    This has to be called before the pixels are loaded: after that, nothing tells the file's depth.
    """
    tiles = getattr(image, "tile", None)
    if image.format != "PNG" or "transparency" not in image.info or not tiles:
        return
    raw_mode = tiles[0][3]
    if raw_mode == "RGB;16B":
        raise ImageError(
            f"{name} is a PNG with 16-bit colours and a transparent one among them",
            why="Pillow keeps 8 bits, so colours close to the transparent one look transparent, too",
            fix="save it with an alpha channel, or with 8 bits",
        )
    if raw_mode in _PNG_LEVELS:
        image.info["transparency"] *= _PNG_LEVELS[raw_mode]


def _check_tiff(image: Image.Image, tags: Mapping[int, Any], name: str) -> None:
    """Refuse what Pillow opens, but does not read as the file means it."""
    kind = _SAMPLE_FORMATS.get(max(tags.get(_SAMPLE_FORMAT, (1,))))
    if kind is not None:
        _refuse_unknown_range(name, kind)
    if tags and image.mode == "I":
        _refuse_unknown_range(name, "32-bit integers")
    subsampling = tags.get(_SUBSAMPLING, (1, 1))
    if image.mode == "YCbCr" and subsampling != (1, 1):
        raise ImageError(
            f"{name} is an uncompressed TIFF in YCbCr, subsampled by {subsampling}, which Pillow cannot read",
            fix="save it as RGB",
        )


def _refuse_unknown_tiff(stream: IO[bytes], name: str) -> None:
    """Raise an error that describes the pixels, if this is a TIFF with pixels that Pillow does not know."""
    try:
        stream.seek(0)
        header = stream.read(8)
        if header[2:3] == b"+" or header[3:4] == b"+":  # BigTIFF
            header += stream.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        stream.seek(tags.next)
        tags.load(stream)
        bits = tuple(int(count) for count in tags.get(_BITS, (1,)))
        bands, photometric = int(tags.get(_BANDS, len(bits))), int(tags[_PHOTOMETRIC])
        kind = _SAMPLE_FORMATS.get(max(tags.get(_SAMPLE_FORMAT, (1,))))
        is_whole = _WIDTH in tags and _HEIGHT in tags and (_STRIPS in tags or _TILES in tags)
    except Exception:  # not a TIFF, or damaged
        return
    if not is_whole:
        return
    if kind is not None:
        _refuse_unknown_range(name, kind)
    depth = "/".join(str(count) for count in sorted(set(bits)))
    colors = _PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}")
    raise ImageError(
        f"{name} is a TIFF with {bands} band{'s' * (bands != 1)} of {depth} bits ({colors}; extra bands: "
        f"{tags.get(_EXTRA_SAMPLES, 'none described')}), which Pillow cannot read",
        fix="save it as 8-bit grey, RGB or RGBA",
    )


def _refuse_unknown_range(name: str, kind: str) -> NoReturn:
    raise ImageError(
        f"{name} holds {kind}, whose black and white are unknown",
        fix="scale it to UINT8 first, 0 = black and 255 = white, for example with NumPy",
    )


def _from_array(array: NDArray[Any]) -> Image.Image:
    name = f"array {array.dtype}{list(array.shape)}"
    if array.dtype.kind == "f":
        _refuse_unknown_range(name, "floating-point values")
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] != 3)
        or not array.size
    ):
        raise ImageError(f"cannot read a picture from an {name}", fix="give UINT8 [H,W,3] in RGB order, or UINT8 [H,W]")
    image = Image.fromarray(np.ascontiguousarray(array))
    return image if image.mode == "RGB" else image.convert("RGB")  # of RGB, convert makes a copy
