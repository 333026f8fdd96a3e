"""Every kind of picture to UINT8 [H,W,3], and boxes back to the picture's own pixels."""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, features
from ssd_client import ImageError, InvalidInputError, ModelConfig
from ssd_client.preprocess import (
    FORMATS,
    SUFFIXES,
    ImageSource,
    Preprocessing,
    input_array,
    load_image,
    place,
    preprocess,
)
from ssd_client.rule import BILINEAR_PLAIN, RESAMPLES, RESIZES

from tests.client.conftest import LETTERBOX, PARAMETERS

STRETCH = ModelConfig.from_triton("m", 8, PARAMETERS).preprocessing
BOXED = ModelConfig.from_triton("m", 8, LETTERBOX).preprocessing
BOXED_RGB = dataclasses.replace(BOXED, color_order="RGB")
TOP_LEFT = dataclasses.replace(BOXED_RGB, resize="letterbox_top_left")


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(
    data: bytes,
    bits: Sequence[int],
    photometric: int,
    *,
    size: tuple[int, int] = (4, 1),
    order: str = "<",
    deflate: bool = False,
    tags: dict[int, Sequence[int]] | None = None,
) -> bytes:
    """A TIFF of one strip, written by hand: Pillow writes few of the kinds that it reads.

    Args:
        data: the samples, chunky, rows padded to bytes.
        bits: bits of every band.
        photometric: 0 WhiteIsZero, 1 BlackIsZero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr, 8 CIELAB.
        size: (width, height) in pixels.
        order: `<` or `>`, of the bytes.
        deflate: compress, which leads through libtiff.
        tags: more tags of 16-bit values.
    """
    data = zlib.compress(data) if deflate else data
    fields: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [size[0]]),
        257: ("I", [size[1]]),
        258: ("H", bits),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]),
        273: ("I", [0]),
        277: ("H", [len(bits)]),
        278: ("I", [size[1]]),
        279: ("I", [len(data)]),
        **{tag: ("H", values) for tag, values in (tags or {}).items()},
    }
    start = 8 + 2 + 12 * len(fields) + 4
    lengths = [len(values) * (4 if kind == "I" else 2) for kind, values in fields.values()]
    fields[273] = ("I", [start + sum(length for length in lengths if length > 4)])
    directory, behind = b"", b""
    for tag, (kind, values) in sorted(fields.items()):
        packed = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(packed) > 4:
            packed, behind = struct.pack(f"{order}I", start + len(behind)), behind + packed
        directory += struct.pack(f"{order}HHI", tag, 4 if kind == "I" else 3, len(values)) + packed.ljust(4, b"\0")
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(fields))
    return header + directory + b"\0\0\0\0" + behind + data


def png(size: tuple[int, int], depth: int, color_type: int, row: bytes, **chunks: bytes) -> bytes:
    """A PNG with the same `row` of samples in every line, and `chunks` before it."""

    def chunk(kind: str, data: bytes) -> bytes:
        body = kind.encode() + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk("IHDR", struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0))
    pixels = chunk("IDAT", zlib.compress((b"\0" + row) * size[1]))
    others = b"".join(chunk(kind, data) for kind, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + header + others + pixels + chunk("IEND", b"")


def packed_bits(values: Sequence[int], bits: int) -> bytes:
    text = "".join(f"{value:0{bits}b}" for value in values)
    return bytes(int(text[k : k + 8].ljust(8, "0"), 2) for k in range(0, len(text), 8))


def greys(source: ImageSource) -> list[int]:
    """The first row of a picture that has to come out grey."""
    pixels = np.asarray(load_image(source))[0]
    assert (pixels == pixels[:, :1]).all()
    return [int(value) for value in pixels[:, 0]]


def colors(source: ImageSource) -> list[list[int]]:
    """The first row of a picture."""
    row: list[list[int]] = np.asarray(load_image(source))[0].tolist()
    return row


def four_colors() -> Image.Image:
    """30 x 20, a colour of its own in each quarter."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:10, :15], pixels[:10, 15:], pixels[10:, :15] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(orientation: int, kind: str) -> None:
    upright = four_colors()
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    once = load_image(encoded(stored, kind, exif=exif, **options))
    assert once.size == (30, 20)
    assert np.array_equal(np.asarray(once), np.asarray(upright))
    assert np.array_equal(np.asarray(load_image(once)), np.asarray(upright)), "a loaded image is not turned again"


def test_orientation_in_a_jpeg() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = four_colors().resize((48, 32), Image.Resampling.NEAREST).transpose(Image.Transpose.ROTATE_90)
    upright = np.asarray(load_image(encoded(stored, "JPEG", exif=exif, quality=95))).astype(int)
    assert upright.shape == (32, 48, 3)
    assert (
        np.abs(
            upright[[4, 4, -4, -4], [4, -4, 4, -4]] - np.asarray(four_colors())[[0, 0, -1, -1], [0, -1, 0, -1]]
        ).max()
        < 10
    )


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation_in_xmp(kind: str) -> None:
    stored = four_colors().resize((32, 48), Image.Resampling.NEAREST).transpose(Image.Transpose.ROTATE_90)
    if kind == "PNG":
        text = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
        data = png(stored.size, 8, 2, np.asarray(stored)[0].tobytes(), iTXt=text)
        stored = Image.fromarray(np.broadcast_to(np.asarray(stored)[:1], (32, 48, 3)))
    elif kind == "TIFF":
        data = encoded(stored, kind, tiffinfo={700: XMP})
    else:
        data = encoded(
            stored, kind, xmp=XMP, **({"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0})
        )
    expected = np.asarray(stored.transpose(Image.Transpose.ROTATE_270)).astype(int)
    loaded = np.asarray(load_image(data))
    assert loaded.shape == (48, 32, 3)
    assert np.abs(loaded - expected).mean() < (3 if kind == "JPEG" else 1e-9)


def test_damaged_exif_does_not_matter() -> None:
    image = load_image(encoded(four_colors(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"))
    assert np.array_equal(np.asarray(image), np.asarray(four_colors()))


GREY = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "1", "HSV", "LAB"])
def test_modes_without_alpha(mode: str) -> None:
    source = Image.fromarray(GREY).convert("RGB").convert(mode)
    expected = np.asarray(source.convert("RGB"))
    assert np.array_equal(np.asarray(load_image(source)), expected)
    if mode in ("L", "P", "1"):
        assert np.array_equal(np.asarray(load_image(encoded(source))), expected)
    if mode == "CMYK":
        assert np.abs(np.asarray(load_image(encoded(source, "TIFF"))).astype(int) - expected).max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La"])
def test_transparency_lies_over_white(mode: str) -> None:
    alpha = Image.fromarray(np.array([[0, 128, 255]], np.uint8))
    base = Image.new("L", (3, 1), 100)
    source = Image.merge("LA", (base, alpha)) if "L" in mode else Image.merge("RGBA", (base, base, base, alpha))
    if mode in ("RGBa", "La"):
        source = source.convert(mode)
    got = np.asarray(load_image(source))[0, :, 0].astype(int)
    assert abs(got - [255, 177, 100]).max() <= 1


def test_palette_and_grey_transparency_lie_over_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    image = load_image(encoded(palette, "PNG", transparency=0))
    assert np.asarray(image).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert np.asarray(load_image(encoded(grey, "PNG", transparency=7))).tolist() == [[[255] * 3, [8] * 3]]


def test_a_palette_with_alpha_lies_over_white() -> None:
    """The red pixel is transparent, the green one is not."""
    image = Image.fromarray(np.array([[[255, 0, 0, 0], [0, 255, 0, 255]]], np.uint8))
    quantized = image.quantize(4)
    assert quantized.mode == "P"
    assert "transparency" not in quantized.info
    for source in (quantized, encoded(quantized), image.convert("PA"), encoded(quantized, "WEBP", lossless=True)):
        assert colors(source) == [[255, 255, 255], [0, 255, 0]]
    palette = [0x1000] * 256 + [0x2000] * 256 + [0x3000] * 256
    data = tiff(bytes([1, 0, 1, 255]), [8, 8], 3, size=(2, 1), tags={320: palette, 338: [2]})
    assert colors(data) == [[255, 255, 255], [16, 32, 48]]


def test_levels_of_palette_transparency_are_kept() -> None:
    data = png((3, 1), 8, 3, bytes([0, 1, 2]), PLTE=bytes([9, 9, 9, 100, 100, 100, 7, 7, 7]), tRNS=bytes([0, 128]))
    assert colors(data) == [[255] * 3, [177] * 3, [7] * 3]


@pytest.mark.parametrize(
    ("depth", "row", "key", "expected"),
    [
        (1, packed_bits([0, 1, 0, 1], 1), 0, [255, 255, 255, 255]),
        (1, packed_bits([0, 1, 0, 1], 1), 1, [0, 255, 0, 255]),
        (2, packed_bits([0, 1, 2, 3], 2), 1, [0, 255, 170, 255]),
        (4, packed_bits([0, 1, 2, 8], 4), 2, [0, 17, 255, 136]),
        (8, bytes([0, 50, 51, 200]), 50, [0, 255, 51, 200]),
        (16, struct.pack(">4H", 0, 1000, 1001, 65535), 1000, [0, 255, 4, 255]),
    ],
)
def test_the_transparent_grey_of_a_png_is_in_the_files_levels(
    depth: int, row: bytes, key: int, expected: list[int]
) -> None:
    data = png((4, 1), depth, 0, row, tRNS=struct.pack(">H", key))
    assert greys(data) == expected
    with Image.open(io.BytesIO(data)) as image:
        assert greys(image) == expected
        assert greys(image) == expected, "a second time"


def test_the_transparent_color_of_a_png() -> None:
    key = struct.pack(">HHH", 1, 2, 3)
    assert colors(png((2, 1), 8, 2, bytes([1, 2, 3, 1, 2, 4]), tRNS=key)) == [[255, 255, 255], [1, 2, 4]]
    image = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    image.info["transparency"] = (1, 2, 3)
    assert colors(image) == [[255, 255, 255], [1, 2, 4]]
    with pytest.raises(ImageError, match=r"16-bit colours(.|\n)*save it with an alpha channel"):
        load_image(png((1, 1), 16, 2, bytes(6), tRNS=key))


def test_alpha_of_16_bits() -> None:
    assert greys(png((2, 1), 16, 4, struct.pack(">4H", 100 * 257, 0, 100 * 257, 65535))) == [255, 100]
    assert colors(png((1, 1), 16, 6, struct.pack(">4H", 100 * 257, 100 * 257, 0, 128 * 257))) == [[177, 177, 127]]


def test_premultiplied_alpha_in_a_tiff() -> None:
    data = tiff(bytes([50, 50, 50, 128, 0, 0, 0, 0, 9, 9, 9, 255]), [8] * 4, 2, size=(3, 1), tags={338: [1]})
    assert greys(data) == [177, 255, 9]
    assert greys(tiff(bytes([50, 128]), [8, 8], 1, size=(1, 1), tags={338: [1]})) == [177]


def test_16_bit_grey_is_scaled_over_its_full_range() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    expected = np.round(values / 257).astype(int)
    for kind in ("PNG", "TIFF"):
        image = load_image(encoded(Image.fromarray(values), kind))
        assert image.mode == "RGB"
        assert np.asarray(image)[..., 1].tolist() == expected.tolist()
    big_endian = values.astype(">u2").tobytes()
    assert greys(b"P5 8 1 65535\n" + big_endian) == expected[0].tolist()
    assert greys(tiff(big_endian, [16], 1, size=(8, 1), order=">")) == expected[0].tolist()
    assert greys(Image.frombytes("I;16B", (8, 1), big_endian)) == expected[0].tolist()
    if features.check("jpg_2000"):
        assert greys(encoded(Image.fromarray(values), "JPEG2000", irreversible=False)) == expected[0].tolist()


@pytest.mark.parametrize("deflate", [False, True])
def test_greys_of_12_bits_are_scaled_over_their_full_range(deflate: bool) -> None:
    values = [0, 1000, 2048, 4095]
    assert greys(tiff(packed_bits(values, 12), [12], 1, deflate=deflate)) == [round(v * 255 / 4095) for v in values]


@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize(
    ("bits", "values"),
    [(1, [0, 1, 1, 0]), (2, [0, 1, 2, 3]), (4, [0, 1, 8, 15]), (8, [0, 50, 200, 255]), (16, [0, 1000, 32768, 65535])],
)
def test_white_is_zero(bits: int, values: list[int], deflate: bool) -> None:
    data = struct.pack("<4H", *values) if bits == 16 else packed_bits(values, bits)
    expected = [round(value * 255 / (2**bits - 1)) for value in values]
    assert greys(tiff(data, [bits], 1, deflate=deflate)) == expected
    assert greys(tiff(data, [bits], 0, deflate=deflate)) == [255 - value for value in expected]


@pytest.mark.parametrize("largest", [1, 100, 255, 1023, 4095, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_greys_and_colors_of_any_range_in_a_pnm(largest: int, plain: bool) -> None:
    values = [0, largest // 2, largest]
    data = (
        " ".join(map(str, values)).encode() if plain else np.array(values, ">u2" if largest > 255 else "u1").tobytes()
    )
    expected = np.array(values) * 255 / largest
    grey = greys(b"P%d 3 1 %d\n" % (2 if plain else 5, largest) + data)
    color = colors(b"P%d 1 1 %d\n" % (3 if plain else 6, largest) + data)
    assert np.abs(grey - expected).max() <= 0.51
    assert np.abs(color[0] - expected).max() <= 0.51


@pytest.mark.parametrize("order", ["<", ">"])
def test_colors_of_16_bits_keep_their_high_byte(order: str) -> None:
    values = [0, 255, 256, 65535, 65280, 32768]
    expected = [[value >> 8 for value in part] for part in (values[:3], values[3:])]
    assert np.abs(np.array(expected).ravel() - np.array(values) / 257).max() < 1, "less than one grey level"
    assert colors(tiff(struct.pack(f"{order}6H", *values), [16] * 3, 2, size=(2, 1), order=order)) == expected
    assert colors(png((2, 1), 16, 2, struct.pack(">6H", *values))) == expected


def test_other_colors_in_a_tiff() -> None:
    cmyk = bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 255, 0, 255, 255, 0])
    assert colors(tiff(cmyk, [8] * 4, 5)) == [[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 0, 0]]
    ycbcr = bytes([255, 128, 128, 0, 128, 128, 128, 128, 128, 76, 85, 255])
    assert np.abs(np.array(colors(tiff(ycbcr, [8] * 3, 6))) - [[255] * 3, [0] * 3, [128] * 3, [255, 0, 0]]).max() <= 1
    lab = bytes([255, 0, 0, 0, 0, 0, 138, 81, 70, 138, 81, 70])  # at D50, L* 54.3, a* 80.8, b* 69.9 is red
    assert np.abs(np.array(colors(tiff(lab, [8] * 3, 8))) - [[255] * 3, [0] * 3, [255, 0, 0], [255, 0, 0]]).max() <= 6
    extra = bytes([1, 2, 3, 99, 98, 4, 5, 6, 97, 96])
    assert colors(tiff(extra, [8] * 5, 2, size=(2, 1), tags={338: [0, 0]})) == [[1, 2, 3], [4, 5, 6]]


def test_cmyk_jpegs_of_adobe_are_inverted() -> None:
    source = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(source, "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(np.array(colors(data)) - [255, 0, 0]).max() <= 6
    # YCCK holds Y, Cb, Cr of (C, M, Y) taken as (R, G, B), here cyan, and the inverted K. Pillow inverts as it writes.
    ycck = bytearray(encoded(Image.new("CMYK", (16, 16), (255 - 179, 255 - 171, 255 - 1, 0)), "JPEG", quality=95))
    ycck[ycck.index(b"Adobe") + 11] = 2
    assert np.abs(np.array(colors(bytes(ycck))) - [255, 0, 0]).max() <= 6


FLOATS = np.ones((1, 4), np.float32)
SCALE = r"black and white are unknown\n(.|\n)*scale it to UINT8 first, 0 = black and 255 = white"


@pytest.mark.parametrize(
    "source",
    [
        Image.fromarray(FLOATS),
        FLOATS,
        FLOATS.astype(np.float64),
        np.ones((4, 4, 3), np.float16),
        tiff(FLOATS.tobytes(), [32], 1, tags={339: [3]}),
        tiff(FLOATS.tobytes(), [32], 0, tags={339: [3]}),
        tiff(FLOATS.astype("f8").tobytes(), [64], 1, tags={339: [3]}),
        tiff(FLOATS.astype("f2").tobytes(), [16], 1, tags={339: [3]}),
        tiff(FLOATS.astype(">f4").tobytes(), [32], 1, order=">", tags={339: [3]}),
        tiff(FLOATS.tobytes() * 3, [32] * 3, 2, tags={339: [3] * 3}),
        b"Pf 4 1 -1.0\n" + FLOATS.tobytes(),
    ],
    ids=["Pillow", "float32", "float64", "float16 RGB", "TIFF", "WhiteIsZero", "64", "16", "big-endian", "RGB", "PFM"],
)
def test_floating_point_is_refused_the_same_way_everywhere(source: Any) -> None:
    with pytest.raises(ImageError, match="holds floating-point values, whose " + SCALE):
        load_image(source)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        (Image.fromarray(np.array([[-1, 70000]], np.int32)), "32-bit integers from -1 to 70000"),
        (Image.fromarray(np.array([[0, 200]], np.int32)), "32-bit integers from 0 to 200"),
        (tiff(struct.pack("<4I", 0, 1, 70000, 2**32 - 1), [32], 1), "32-bit integers"),
        (tiff(struct.pack("<4I", 0, 1, 200, 65535), [32], 1), "32-bit integers"),
        (tiff(struct.pack("<4i", 0, 1, 200, 65535), [32], 1, tags={339: [2]}), "signed values"),
        (tiff(struct.pack("<4h", 0, 1, 200, 32767), [16], 1, tags={339: [2]}), "signed values"),
        (tiff(struct.pack(">4h", -1, 1, 200, 32767), [16], 1, order=">", tags={339: [2]}), "signed values"),
        (tiff(struct.pack("4b", -1, 0, 1, 127), [8], 1, tags={339: [2]}), "signed values"),
        (tiff(bytes(32), [64], 1, tags={339: [6]}), "complex values"),
    ],
)
def test_integers_of_unknown_range_are_refused(source: Any, kind: str) -> None:
    with pytest.raises(ImageError, match=f"holds {kind}, whose {SCALE}"):
        load_image(source)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (tiff(bytes(20), [8] * 5, 1), r"5 bands of 8 bits \(BlackIsZero; extra bands: none described\)"),
        (tiff(bytes(20), [8] * 5, 5, tags={338: [2]}), r"5 bands of 8 bits \(CMYK; extra bands: \(2,\)\)"),
        (tiff(bytes(8), [8] * 2, 1), "2 bands of 8 bits"),
        (tiff(bytes(16), [16] * 2, 1, tags={338: [2]}), "2 bands of 16 bits"),
        (tiff(bytes(96), [8] * 24, 2), "24 bands of 8 bits"),
        (tiff(bytes(12), [5, 6, 5], 2), "3 bands of 5/6 bits"),
        (tiff(bytes(8), [16], 32803), "1 band of 16 bits .photometric interpretation 32803"),
        (tiff(bytes(8), [10], 1), "1 band of 10 bits"),
        (tiff(bytes(8), [14], 1), "1 band of 14 bits"),
        (tiff(bytes(8), [12], 1, order=">"), "1 band of 12 bits"),
        (tiff(bytes(8), [16], 0, order=">"), "1 band of 16 bits .WhiteIsZero"),
        (tiff(bytes(12), [8] * 3, 6, size=(4, 2), tags={530: [2, 2]}), r"subsampled by \(2, 2\)"),
    ],
)
def test_tiffs_that_pillow_cannot_read_are_described(data: bytes, text: str) -> None:
    with pytest.raises(ImageError, match=f"{text}(.|\n)*, which Pillow cannot read\nwhat to do: save it as"):
        load_image(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_counts(kind: str) -> None:
    """Of animations, and of files with several pages or pictures."""
    frames = [Image.new("RGB", (16, 8), color) for color in ("red", "lime", "blue")]
    options = {"WEBP": {"lossless": True}, "MPO": {"quality": 95}}.get(kind, {})
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
        assert image.format == kind
    assert np.abs(np.array(colors(data)[0]) - [255, 0, 0]).max() <= (2 if kind == "MPO" else 0)


@pytest.mark.parametrize("wrap", [str, Path, "bytes", bytearray, memoryview, "pillow"])
def test_sources_agree(wrap: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    four_colors().save(path)
    source: Any
    if wrap in (str, Path):
        source = wrap(path)
    elif wrap == "pillow":
        source = Image.open(path)
    else:
        source = path.read_bytes() if wrap == "bytes" else wrap(path.read_bytes())
    assert np.array_equal(np.asarray(load_image(source)), np.asarray(four_colors()))


def test_arrays() -> None:
    pixels = np.asarray(four_colors())
    assert np.array_equal(np.asarray(load_image(pixels)), pixels)
    assert np.array_equal(np.asarray(load_image(pixels[:, ::-1])), pixels[:, ::-1]), "a view with negative strides"
    assert np.array_equal(np.asarray(load_image(GREY)), np.repeat(GREY[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint16),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_wrong_arrays_are_named(array: NDArray[Any]) -> None:
    with pytest.raises(ImageError) as caught:
        load_image(array)
    assert f"{array.dtype}{list(array.shape)}" in str(caught.value)


@pytest.mark.parametrize("source", [None, 3, {"a": 1}])
def test_other_objects_are_refused(source: Any) -> None:
    with pytest.raises(ImageError, match=type(source).__name__):
        load_image(source)


class TestBadFiles:
    def test_missing_and_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ImageError, match=r"none\.jpg: No such file"):
            load_image(tmp_path / "none.jpg")
        with pytest.raises(ImageError, match="Is a directory"):
            load_image(tmp_path)

    def test_empty_file(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.jpg"
        path.touch()
        with pytest.raises(ImageError, match=r"empty\.jpg is not a picture(.|\n)*the file is empty"):
            load_image(path)
        with pytest.raises(ImageError, match="the file is empty"):
            load_image(b"")

    def test_text_named_png(self, tmp_path: Path) -> None:
        path = tmp_path / "text.png"
        path.write_text("this is no picture\n" * 50)
        with pytest.raises(ImageError, match=r"text\.png is not a picture in any known format"):
            load_image(path)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
    def test_cut_off_and_damaged(self, kind: str, tmp_path: Path) -> None:
        noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8))
        data = encoded(noise, kind)
        path = tmp_path / f"cut.{kind.lower()}"
        for keep in (len(data) // 2, len(data) // 10, 12):
            path.write_bytes(data[:keep])
            with pytest.raises(ImageError, match=r"cut\.\w+ (cannot be decoded|is not a picture)"):
                load_image(path)

    def test_random_damage_is_an_image_error_or_a_picture(self) -> None:
        rng = np.random.default_rng(2)
        refused = 0
        for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM", "TGA", "ICO", "PCX"):
            data = bytearray(encoded(four_colors(), kind))
            for _ in range(60):
                broken = bytearray(data)
                for at in rng.integers(0, len(data), 4):
                    broken[at] = rng.integers(0, 256)
                try:
                    assert load_image(bytes(broken), max_pixels=1_000_000).mode == "RGB"
                except ImageError:
                    refused += 1
        assert refused > 50

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_100_megapixels(self, tmp_path: Path) -> None:
        path = tmp_path / "huge.png"
        Image.new("1", (10_000, 10_000)).save(path)
        with pytest.raises(ImageError, match=r"10000 x 10000 = 100\.0 megapixels, the limit is 89\.5") as caught:
            load_image(path)
        assert "max_pixels" in str(caught.value)
        assert load_image(path, max_pixels=100_000_000).size == (10_000, 10_000)

    def test_far_too_many_pixels(self) -> None:
        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        data = bytearray(encoded(Image.new("RGB", (1, 1))))
        data[16 : 16 + len(header)] = header
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        with pytest.raises(ImageError, match="exceeds limit"):
            load_image(bytes(data))

    def test_formats_that_start_programs_are_not_opened(self) -> None:
        eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        with Image.open(io.BytesIO(eps)) as image:
            assert image.format == "EPS"
        assert "EPS" not in FORMATS
        with pytest.raises(ImageError, match="not a picture in any known format"):
            load_image(eps)

    def test_suffixes_belong_to_the_formats(self) -> None:
        Image.init()
        assert {Image.EXTENSION[suffix] for suffix in SUFFIXES if suffix in Image.EXTENSION} <= set(FORMATS)


def test_stretch_is_pillows_resize() -> None:
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (100, 200, 3), dtype=np.uint8))
    array, placement = input_array(picture, STRETCH)
    assert array.shape == (48, 64, 3)
    assert array.dtype == np.uint8
    assert np.array_equal(array, np.asarray(picture.resize((64, 48), Image.Resampling.BILINEAR)))
    boxes = np.array([[0, 0, 1, 1], [0.25, 0.5, 0.75, 1]], np.float32)
    assert placement.to_image(boxes).tolist() == [[0, 0, 200, 100], [50, 50, 150, 100]]


@pytest.mark.parametrize("name", [name for name in RESAMPLES if name != BILINEAR_PLAIN])
def test_resample_is_the_configured_filter(name: str) -> None:
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (99, 77, 3), dtype=np.uint8))
    expected = np.asarray(picture.resize((64, 48), Image.Resampling[name.upper()]))
    assert np.array_equal(input_array(picture, dataclasses.replace(STRETCH, resample=name))[0], expected)


def test_the_rule_of_a_served_model() -> None:
    assert (
        Preprocessing(width=64, height=48, resize="letterbox", resample="bilinear", pad_value=114, color_order="BGR")
        == BOXED
    )
    assert not any(field.default is not dataclasses.MISSING for field in dataclasses.fields(Preprocessing))
    for resize, resample in itertools.product(RESIZES, RESAMPLES):
        config = ModelConfig.from_triton("m", 8, {**PARAMETERS, "resize": resize, "resample": resample})
        assert (config.preprocessing.resize, config.preprocessing.resample) == (resize, resample)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("width", 0),
        ("height", -1),
        ("resize", "crop"),
        ("resample", "BILINEAR"),
        ("pad_value", 256),
        ("pad_value", -1),
        ("color_order", "rgb"),
    ],
)
def test_wrong_rules_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"{name} is {value!r}\nwhat to do: give"):
        dataclasses.replace(STRETCH, **{name: value})


@pytest.mark.parametrize("rule", [BOXED_RGB, TOP_LEFT], ids=["centred", "top left"])
@pytest.mark.parametrize(
    ("size", "inner"),
    [
        ((200, 100), (0, 8, 64, 32)),
        ((100, 200), (20, 0, 24, 48)),
        ((64, 48), (0, 0, 64, 48)),
        ((1000, 3), (0, 23, 64, 1)),
    ],
)
def test_letterbox_keeps_the_ratio(
    rule: Preprocessing, size: tuple[int, int], inner: tuple[int, int, int, int]
) -> None:
    left, top, width, height = inner if rule == BOXED_RGB else (0, 0, *inner[2:])
    array, placement = input_array(Image.new("RGB", size, (10, 20, 30)), rule)
    inside = np.zeros((48, 64), bool)
    inside[top : top + height, left : left + width] = True
    assert (array[inside] == (10, 20, 30)).all()
    assert (array[~inside] == 114).all()
    full = np.array([[left / 64, top / 48, (left + width) / 64, (top + height) / 48]], np.float32)
    assert np.allclose(placement.to_image(full), [[0, 0, *size]], atol=1e-3)
    everything = np.array([[0, 0, 1, 1]], np.float32)
    assert np.allclose(placement.to_image(everything), [[0, 0, *size]]), "the border is not part of the picture"


@pytest.mark.parametrize("rule", [STRETCH, BOXED, TOP_LEFT], ids=["stretch", "letterbox", "top left"])
def test_boxes_are_mapped_back(rule: Preprocessing) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        size = (int(rng.integers(1, 3000)), int(rng.integers(1, 3000)))
        placement = place(size, rule)
        boxes = np.sort(rng.random((20, 2, 2)), axis=1).reshape(-1, 4) * [*size, *size]
        points = boxes.reshape(-1, 2, 2) * placement.scale + placement.offset
        normalised = (points / placement.input_size).reshape(-1, 4).astype(np.float32)
        assert np.allclose(placement.to_image(normalised), boxes, rtol=1e-5, atol=2e-3 + max(size) * 1e-5)


def test_bgr_is_rgb_backwards() -> None:
    picture = four_colors()
    assert np.array_equal(input_array(picture, BOXED)[0], input_array(picture, BOXED_RGB)[0][..., ::-1])


def test_preprocess_overwrites_what_was_there() -> None:
    out = np.full((48, 64, 3), 7, np.uint8)
    preprocess(four_colors(), BOXED_RGB, out)
    assert np.array_equal(out, input_array(four_colors(), BOXED_RGB)[0])


@pytest.mark.parametrize("size", [(451, 300), (300, 451), (512, 512), (31, 7)])
def test_pad_pads_first_and_keeps_fractions(size: tuple[int, int]) -> None:
    rule = Preprocessing(128, 96, "pad", "bilinear", 7, "RGB")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    pixels, placement = input_array(picture, rule)
    whole = max(size[0], round(size[1] * 4 / 3)), max(size[1], round(size[0] * 3 / 4))
    left, top = (whole[0] - size[0]) // 2, (whole[1] - size[1]) // 2
    canvas = Image.new("RGB", whole, (7, 7, 7))
    canvas.paste(picture, (left, top))
    assert np.array_equal(pixels, np.asarray(canvas.resize((128, 96), Image.Resampling.BILINEAR)))
    corners = np.array([[left, top, left + size[0], top + size[1]]], np.float32) / [*whole, *whole]
    np.testing.assert_allclose(placement.to_image(corners.astype(np.float32)), [[0, 0, *size]], atol=1e-3)
