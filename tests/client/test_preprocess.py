"""Every kind of picture to UINT8 [H,W,3], and boxes back to the picture's own pixels."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from ssd_client import ImageError, ModelConfig
from ssd_client.preprocess import FORMATS, SUFFIXES, input_array, load_image, place, preprocess

from tests.client.conftest import LETTERBOX, PARAMETERS

STRETCH = ModelConfig.from_triton("m", 8, PARAMETERS)
BOXED = ModelConfig.from_triton("m", 8, LETTERBOX)
BOXED_RGB = ModelConfig.from_triton("m", 8, {**LETTERBOX, "color_order": "RGB"})


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The four corner pixels: top left, top right, bottom left, bottom right."""
    pixels = np.asarray(image)
    return [tuple(pixels[y, x].tolist()) for y in (0, -1) for x in (0, -1)]


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


def test_damaged_exif_does_not_matter() -> None:
    image = load_image(encoded(four_colors(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffgarbage"))
    assert np.array_equal(np.asarray(image), np.asarray(four_colors()))


GREY = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "CMYK", "YCbCr", "1", "HSV"])
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


def test_16_bit_grey_is_scaled_over_its_full_range() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535 - 129, 65535 - 128, 65535]], np.uint16)
    expected = np.round(values / 257).astype(int)
    for kind in ("PNG", "TIFF"):
        image = load_image(encoded(Image.fromarray(values), kind))
        assert image.mode == "RGB"
        assert np.asarray(image)[..., 1].tolist() == expected.tolist()
    big_endian = b"P5 8 1 65535\n" + values.astype(">u2").tobytes()
    assert np.asarray(load_image(big_endian))[..., 2].tolist() == expected.tolist()


def test_greys_of_unknown_range_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(ImageError, match="from -1 to 70000"):
        load_image(Image.fromarray(np.array([[-1, 70000]], np.int32)))


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (5, 4), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


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
        import zlib

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


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_resample_is_the_configured_filter(name: str) -> None:
    config = ModelConfig.from_triton("m", 8, {**PARAMETERS, "resample": name})
    picture = Image.fromarray(np.random.default_rng(4).integers(0, 256, (99, 77, 3), dtype=np.uint8))
    expected = np.asarray(picture.resize((64, 48), Image.Resampling[name.upper()]))
    assert np.array_equal(input_array(picture, config)[0], expected)


@pytest.mark.parametrize(
    ("size", "inner"),
    [
        ((200, 100), (0, 8, 64, 32)),
        ((100, 200), (20, 0, 24, 48)),
        ((64, 48), (0, 0, 64, 48)),
        ((1000, 3), (0, 23, 64, 1)),
    ],
)
def test_letterbox_keeps_the_ratio_and_centres(size: tuple[int, int], inner: tuple[int, int, int, int]) -> None:
    left, top, width, height = inner
    array, placement = input_array(Image.new("RGB", size, (10, 20, 30)), BOXED_RGB)
    inside = np.zeros((48, 64), bool)
    inside[top : top + height, left : left + width] = True
    assert (array[inside] == (10, 20, 30)).all()
    assert (array[~inside] == 114).all()
    full = np.array([[left / 64, top / 48, (left + width) / 64, (top + height) / 48]], np.float32)
    assert np.allclose(placement.to_image(full), [[0, 0, *size]], atol=1e-3)
    everything = np.array([[0, 0, 1, 1]], np.float32)
    assert np.allclose(placement.to_image(everything), [[0, 0, *size]]), "the border is not part of the picture"


@pytest.mark.parametrize("config", [STRETCH, BOXED], ids=["stretch", "letterbox"])
def test_boxes_find_their_way_back(config: ModelConfig) -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        size = (int(rng.integers(1, 3000)), int(rng.integers(1, 3000)))
        placement = place(size, config)
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
