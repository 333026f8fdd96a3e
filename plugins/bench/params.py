"""The settings of SSDNMS for bench.py, and as the library takes them. It needs no torch, so a test can read it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """SsdNmsParams, in its order."""

    score_threshold: float = 0.05
    iou_threshold: float = 0.45
    max_detections: int = 100
    topk_per_class: int = 0
    background_class: int = 0
    score_activation: int = 0
    box_coding: int = 0
    box_scales: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    clip_boxes: int = 1
    class_agnostic: int = 0
    lowest_score_threshold: float = 0.01


class Params(ctypes.Structure):
    """SsdNmsParams."""

    _fields_ = (
        ("score_threshold", ctypes.c_float),
        ("iou_threshold", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("max_detections", "topk_per_class", "background_class")),
        *((name, ctypes.c_int32) for name in ("score_activation", "box_coding")),
        ("box_scales", ctypes.c_float * 4),
        *((name, ctypes.c_int32) for name in ("clip_boxes", "class_agnostic")),
        ("lowest_score_threshold", ctypes.c_float),
    )
