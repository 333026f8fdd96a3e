"""The rule by which a picture becomes the model's input: names and values alone, without NumPy or Pillow."""

from __future__ import annotations

from dataclasses import dataclass

from .exceptions import InvalidInputError

PAD = "pad"
RESIZES = ("stretch", "letterbox", "letterbox_top_left", PAD)
BILINEAR_PLAIN = "bilinear_plain"
RESAMPLES = ("nearest", "box", "bilinear", BILINEAR_PLAIN, "hamming", "bicubic", "lanczos")
COLOR_ORDERS = ("RGB", "BGR")


@dataclass(frozen=True)
class Preprocessing:
    """The rule by which a picture becomes the model's input.

    Attributes:
        width: of the input, in pixels.
        height: of the input, in pixels.
        resize: `stretch`, or `letterbox` (aspect ratio kept, centred, padded with `pad_value`), or `letterbox_top_left`
            (the same, but in the top left corner), or `pad` (centred and padded to the input's aspect ratio first, then
            resized: MediaPipe's way, which keeps fractions of a pixel that `letterbox` rounds).
        resample: `bilinear_plain` (no antialiasing: OpenCV's INTER_LINEAR, torch's interpolate, ONNX's Resize), or the
            Pillow filter of that name (antialiased when it shrinks); one of `RESAMPLES`.
        pad_value: grey level of the padding, 0..255.
        color_order: `RGB` or `BGR`, the order of the input's channels.

    Raises:
        InvalidInputError: a value is not one of these.
    """

    width: int
    height: int
    resize: str
    resample: str
    pad_value: int
    color_order: str

    def __post_init__(self) -> None:
        for name, value, is_valid, fix in (
            ("width", self.width, self.width >= 1, "give pixels, at least 1"),
            ("height", self.height, self.height >= 1, "give pixels, at least 1"),
            ("resize", self.resize, self.resize in RESIZES, f"give one of {', '.join(RESIZES)}"),
            ("resample", self.resample, self.resample in RESAMPLES, f"give one of {', '.join(RESAMPLES)}"),
            ("pad_value", self.pad_value, 0 <= self.pad_value <= 255, "give a grey level in 0..255"),
            ("color_order", self.color_order, self.color_order in COLOR_ORDERS, "give RGB or BGR"),
        ):
            if not is_valid:
                raise InvalidInputError(f"{name} is {value!r}", fix=fix)
