"""The `parameters` of a served model's Triton configuration, checked, as one dataclass.

No default stands in for a missing parameter. Text from the server is parsed, never evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from .exceptions import ModelConfigError
from .rule import COLOR_ORDERS, RESAMPLES, RESIZES, Preprocessing
from .text import HIDDEN, has_hidden

CONTRACT = "1"
# Bytes of the largest answer that a transport reads, and what of it may be no tensor.
MAX_ANSWER, _OVERHEAD = 64 << 20, 1 << 16
_MOST_PIXELS = 1 << 24  # of the model's input: 4096 x 4096

T = TypeVar("T")


@dataclass(frozen=True)
class ModelConfig:
    """A model that obeys contract 1.

    Attributes:
        name: the model's name on the server.
        max_batch_size: most images in one request, by the model and by the size of its answers.
        input_width: width of the model's input in pixels.
        input_height: height of the model's input in pixels.
        color_order: `RGB` or `BGR`, order of the channels of the input.
        resize: one of `rule.RESIZES`; `rule.Preprocessing` explains them.
        resample: one of `rule.RESAMPLES`; `rule.Preprocessing` explains them.
        pad_value: grey level of the padding, 0..255.
        labels: names of the foreground classes, in order.
        score_threshold: the model's own score threshold, 0..1.
        iou_threshold: the model's own IoU threshold of the suppression, 0..1.
        runtime_thresholds: whether a request can bring its own thresholds.
        max_detections: most detections per image.
        precision: such as `fp32` or `int8`.
        runtime: `tensorrt` or `onnxruntime`.
        manifest_sha256: SHA-256 of the manifest of the published version.
        version: number of the version that this describes; empty if the server has not said.
        lowest_score_threshold: a request's score threshold may not be below it; 0 if the model was published by a
            build that did not say it.
    """

    name: str
    max_batch_size: int
    input_width: int
    input_height: int
    color_order: str
    resize: str
    resample: str
    pad_value: int
    labels: tuple[str, ...]
    score_threshold: float
    iou_threshold: float
    runtime_thresholds: bool
    max_detections: int
    precision: str
    runtime: str
    manifest_sha256: str
    version: str = ""
    lowest_score_threshold: float = 0.0

    def asks_like(self, other: ModelConfig) -> bool:
        """Whether a request made by this configuration is the one that `other` would make."""
        return self is other or self._rules == other._rules

    @property
    def _rules(self) -> tuple[Any, ...]:
        thresholds = self.runtime_thresholds, self.lowest_score_threshold, self.score_threshold, self.iou_threshold
        return self.preprocessing, *thresholds

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """The rule by which a picture becomes this model's input."""
        return Preprocessing(
            width=self.input_width,
            height=self.input_height,
            resize=self.resize,
            resample=self.resample,
            pad_value=self.pad_value,
            color_order=self.color_order,
        )

    @classmethod
    def from_triton(
        cls, name: str, max_batch_size: int, parameters: Mapping[str, str], version: str = ""
    ) -> ModelConfig:
        """Check what the server sent.

        Args:
            name: the model's name on the server.
            max_batch_size: of the model's Triton configuration.
            parameters: of the model's Triton configuration, name to string value.
            version: number of the version; empty if it is not known.

        Raises:
            ModelConfigError: a parameter is missing or wrong, or the contract has another version.
        """
        read = _Reader(name, parameters)
        contract = read("contract", _text)
        if contract != CONTRACT:
            raise ModelConfigError(
                f"model {name!r} speaks contract {contract!r}, this client knows {CONTRACT!r}",
                fix="install the ssd-client that belongs to the version of the model's build",
            )
        if max_batch_size < 1:
            raise ModelConfigError(
                f"model {name!r} has max_batch_size {max_batch_size}; the contract's tensors start with the batch",
                fix="publish the model again with max_batch_size of at least 1",
            )
        width, height = read("input_width", _integer(1, 65535)), read("input_height", _integer(1, 65535))
        if width * height > _MOST_PIXELS:
            raise ModelConfigError(
                f"model {name!r} takes {width} x {height} pixels, this client at most {_MOST_PIXELS}"
            )
        most = read("max_detections", _integer(1, 2**31 - 1))
        room = (MAX_ANSWER - _OVERHEAD) // (4 + most * 6 * 4)  # a count; a box, a score and a class per detection
        if room < 1:
            raise ModelConfigError(
                f"model {name!r} has max_detections {most}: an answer would have {most * 24 / 1e6:.0f} MB, this client "
                f"reads {MAX_ANSWER / 1e6:.0f} MB",
                fix="publish the model again with a smaller max_detections",
            )
        return cls(
            name=name,
            max_batch_size=min(max_batch_size, room),
            input_width=width,
            input_height=height,
            color_order=read("color_order", _choice(*COLOR_ORDERS)),
            resize=read("resize", _choice(*RESIZES)),
            resample=read("resample", _choice(*RESAMPLES)),
            pad_value=read("pad_value", _integer(0, 255)),
            labels=read("labels", _labels),
            score_threshold=read("score_threshold", _fraction),
            iou_threshold=read("iou_threshold", _fraction),
            runtime_thresholds=read("runtime_thresholds", _choice("true", "false")) == "true",
            max_detections=most,
            precision=read("precision", _text),
            runtime=read("runtime", _text),
            manifest_sha256=read("manifest_sha256", _text),
            version=version,
            lowest_score_threshold=(
                read("lowest_score_threshold", _fraction) if "lowest_score_threshold" in parameters else 0.0
            ),
        )


class _Reader:
    def __init__(self, name: str, parameters: Mapping[str, str]) -> None:
        self._name, self._parameters = name, parameters

    def __call__(self, key: str, parse: Callable[[str], T]) -> T:
        if key not in self._parameters:
            raise ModelConfigError(
                f"the configuration of model {self._name!r} has no parameter {key!r}; "
                f"it has {str(sorted(self._parameters) or 'none')[:1000]}",
                why="it was not published by this project's build, or by an older one",
                fix="check the model's name, or publish the model again",
            )
        text = self._parameters[key]
        try:
            return parse(text)
        except ValueError as error:
            raise ModelConfigError(
                f"parameter {key!r} of model {self._name!r} is {text[:200]!r}: {error}", fix="publish the model again"
            ) from None


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else low - 1
        if not low <= value <= high:
            raise ValueError(f"expected a whole number in {low}..{high}")
        return value

    return parse


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


def _text(text: str) -> str:
    if has_hidden(text) or len(text) > 1000:
        raise ValueError("expected a short text without control characters")
    return text


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:  # false for NaN, too
        raise ValueError("expected a number in 0..1")
    return value


def _labels(text: str) -> tuple[str, ...]:
    try:
        value: Any = json.loads(text)
    except RecursionError:
        raise ValueError("expected a JSON list of strings") from None
    if not isinstance(value, list) or not value or not all(isinstance(label, str) for label in value):
        raise ValueError("expected a JSON list of strings")
    for label in value:
        if has_hidden(label):
            raise ValueError(f"label {label[:100]!r} has {HIDDEN}")
    return tuple(value)
