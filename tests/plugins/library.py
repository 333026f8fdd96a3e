"""Calls a library that implements ssd_nms.h, over host memory: the reference, or the kernels in the emulator."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.contract import ATTRIBUTES, Nms
from tests.ssd_nms_oracle import Case, Outputs

RULES = {item.name: item.metadata for item in dataclasses.fields(Nms) if item.name in ATTRIBUTES}
STATUS = ("ok", "params", "shape", "too large", "pointer", "workspace", "launch")


class Params(ctypes.Structure):
    """SsdNmsParams."""

    _fields_ = (
        ("score_threshold", ctypes.c_float),
        ("iou_threshold", ctypes.c_float),
        ("max_detections", ctypes.c_int32),
        ("topk_per_class", ctypes.c_int32),
        ("background_class", ctypes.c_int32),
        ("score_activation", ctypes.c_int32),
        ("box_coding", ctypes.c_int32),
        ("box_scales", ctypes.c_float * 4),
        ("clip_boxes", ctypes.c_int32),
        ("class_agnostic", ctypes.c_int32),
        ("lowest_score_threshold", ctypes.c_float),
    )


class Shape(ctypes.Structure):
    """SsdNmsShape."""

    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "batch",
            "anchors",
            "classes",
            "deltas_type",
            "logits_type",
            "has_score_thresholds",
            "has_iou_thresholds",
        )
    )


class Tensors(ctypes.Structure):
    """SsdNmsTensors."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            "box_deltas",
            "class_logits",
            "anchors",
            "score_thresholds",
            "iou_thresholds",
            "num_detections",
            "boxes",
            "scores",
            "labels",
        )
    )


def c_value(name: str, value: Any) -> Any:
    """An attribute's value as SsdNmsParams holds it: a choice by its number, `box_scales` as an array."""
    if RULES[name]["choices"]:
        return RULES[name]["choices"].index(value)
    return (ctypes.c_float * 4)(*value) if isinstance(value, tuple) else value


def params_of(nms: Nms) -> Params:
    """The C struct of the same settings."""
    return Params(**{name: c_value(name, value) for name, value in nms.attributes().items()})


def shape_of(case: Case) -> Shape:
    """The C struct of the case's dimensions and types."""
    batch, anchors, classes = case.class_logits.shape
    return Shape(
        batch,
        anchors,
        classes,
        case.box_deltas.dtype == np.float16,
        case.class_logits.dtype == np.float16,
        case.score_threshold is not None,
        case.iou_threshold is not None,
    )


def aligned(nbytes: int, fill: int = 0xA5) -> NDArray[np.uint8]:
    """Bytes at an address that 16 divides, full of what nobody would expect."""
    whole = np.full(nbytes + 16, fill, np.uint8)
    start = -whole.ctypes.data % 16
    return whole[start : start + nbytes]


def aligned_copy(array: NDArray[Any]) -> NDArray[Any]:
    """The same numbers at an address that 16 divides."""
    copy = aligned(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Guarded:
    """An array with bytes behind it that nobody may write."""

    def __init__(self, dtype: type[np.generic], *shape: int) -> None:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        memory = aligned(nbytes + 256)
        self.array: NDArray[Any] = memory[:nbytes].view(dtype).reshape(shape)
        self._guard = memory[nbytes:]

    def is_whole(self) -> bool:
        """Whether the guard is untouched."""
        return bool((self._guard == 0xA5).all())


class Library:
    """One shared library with the interface of ssd_nms.h."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.ssdNmsStatusString.restype = self.c.ssdNmsLastError.restype = ctypes.c_char_p
        self.c.ssdNmsWorkspaceSize.restype = ctypes.c_size_t
        self.c.ssdNmsValidate.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]

    def validate(self, params: Params | None, shape: Shape | None) -> tuple[str, str]:
        """Status and message."""
        message = ctypes.create_string_buffer(256)
        references = [None if struct is None else ctypes.addressof(struct) for struct in (params, shape)]
        return STATUS[self.c.ssdNmsValidate(*references, message, len(message))], message.value.decode()

    def workspace_size(self, params: Params, shape: Shape) -> int:
        """Bytes."""
        return int(self.c.ssdNmsWorkspaceSize(ctypes.byref(params), ctypes.byref(shape)))

    def launch(self, params: Params, shape: Shape, tensors: Tensors, workspace: int, size: int) -> str:
        """Status."""
        arguments = [ctypes.byref(struct) for struct in (params, shape, tensors)]
        stream = None
        return STATUS[
            self.c.ssdNmsLaunch(*arguments, ctypes.c_void_p(workspace or None), ctypes.c_size_t(size), stream)
        ]

    def run(self, case: Case) -> Outputs:
        """The four outputs; what was not written is full of 0xA5."""
        params, shape = params_of(case.nms), shape_of(case)
        inputs = {name: aligned_copy(value) for name, value in case.inputs().items()}
        rows, most = shape.batch, case.nms.max_detections
        number, boxes, scores, labels = outputs = (
            Guarded(np.int32, rows, 1),
            Guarded(np.float32, rows, most, 4),
            Guarded(np.float32, rows, most),
            Guarded(np.int32, rows, most),
        )
        size = self.workspace_size(params, shape)
        workspace = Guarded(np.uint8, size)
        tensors = Tensors(
            *(
                inputs[name].ctypes.data if name in inputs else None
                for name in ("box_deltas", "class_logits", "anchors", "score_threshold", "iou_threshold")
            ),
            *(output.array.ctypes.data for output in outputs),
        )
        status = self.launch(params, shape, tensors, workspace.array.ctypes.data, size)
        assert status == "ok", f"{case.name}: {status}"
        for name, memory in zip(
            ("workspace", "number", "boxes", "scores", "labels"), (workspace, *outputs), strict=True
        ):
            assert memory.is_whole(), f"{case.name}: wrote behind its {name}"
        return number.array, boxes.array, scores.array, labels.array
