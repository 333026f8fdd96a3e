"""Run by test_tensorrt.py in a Python with TensorRT: registers, creates and serialises the plugin; prints JSON."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import sysconfig
from pathlib import Path

import numpy as np


def preload() -> None:
    """TensorRT's wheel looks for CUDA's libraries beside itself only: open those of the nvidia packages first."""
    nvidia = Path(sysconfig.get_path("purelib"), "nvidia")
    waiting = sorted(nvidia.glob("*/lib/lib*.so*"))
    for _ in range(4):  # they need each other
        waiting = [path for path in waiting if not _loaded(path)]


def _loaded(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def main() -> None:
    """See the module."""
    preload()
    import tensorrt as trt

    library = ctypes.CDLL(os.fspath(sys.argv[1]))
    library.ssdNmsPluginInfo.restype = ctypes.c_char_p
    told: dict[str, object] = {"info": json.loads(library.ssdNmsPluginInfo())}
    registry = trt.get_plugin_registry()
    v3 = not hasattr(registry, "get_plugin_creator") or int(trt.__version__.split(".")[0]) >= 10
    creator = registry.get_creator("SSDNMS", "1", "") if v3 else registry.get_plugin_creator("SSDNMS", "1", "")
    told["fields"] = [field.name for field in creator.field_names]

    alive = []  # a PluginField does not keep its data

    def field(name: str, value: object) -> object:
        kinds = trt.PluginFieldType
        if isinstance(value, str):
            data, kind = np.frombuffer(value.encode(), np.int8).copy(), kinds.CHAR
        elif isinstance(value, int):
            data, kind = np.array([value], np.int32), kinds.INT32
        else:
            data, kind = np.atleast_1d(np.array(value, np.float32)), kinds.FLOAT32
        alive.append(data)
        return trt.PluginField(name, data, kind)

    def create(**attributes: object) -> object:
        fields = trt.PluginFieldCollection([field(name, value) for name, value in attributes.items()])
        try:
            extra = (trt.TensorRTPhase.BUILD,) if v3 else ()
            return creator.create_plugin("nms", fields, *extra)
        except Exception as error:  # TensorRT's own, where it does not answer None
            print(error, file=sys.stderr)
            return None

    bad: dict[str, dict[str, object]] = {
        "score_threshold": {"score_threshold": 2.0},
        "iou_threshold": {"iou_threshold": -1.0},
        "score_activation": {"score_activation": "tanh"},
        "box_coding": {"box_coding": "yolo"},
        "unknown": {"foo": 1},
        "max_detections": {"max_detections": 0},
        "topk_per_class": {"topk_per_class": -1},
        "scales": {"box_scales": [1.0, 2.0]},
        "scale": {"box_scales": [1.0, 2.0, 0.0, 1.0]},
        "type": {"max_detections": 2.0},
        "flag": {"clip_boxes": 2},
    }
    told["refused"] = {name: create(**attributes) is None for name, attributes in bad.items()}
    plugin = create(
        score_threshold=0.3, score_activation="sigmoid", box_coding="corner", box_scales=[1.0, 2.0, 3.0, 4.0]
    )
    assert plugin is not None
    assert create() is not None  # every attribute has its default
    if not v3:
        told["outputs"] = plugin.num_outputs  # type: ignore[attr-defined]
        first = bytes(plugin.serialize())  # type: ignore[attr-defined]
        told["round_trip"] = bytes(creator.deserialize_plugin("nms", first).serialize()) == first
        changed = {
            "short": first[:-1],
            "magic": b"XXXX" + first[4:],
            "version": first[:4] + b"\x09" + first[5:],
            "inputs": first[:8] + b"\x09" + first[9:],
            "params": first[:12] + b"\xff\xff\xff\x7f" + first[16:],
        }
        for name, content in changed.items():
            told["refused"][f"plan: {name}"] = creator.deserialize_plugin("nms", content) is None  # type: ignore[index]
    print(json.dumps(told))


if __name__ == "__main__":
    main()
