"""A whole little source model, made in milliseconds: 8×8 pixels, 8 anchors, Conv-BatchNorm-Relu and heads of noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from build.spec import Spec

LABELS = ("cat", "dog")
ANCHORS = 8

SPEC = """
[model]
name = "tiny"

[input]
width = 8
height = 8
color_order = "{color_order}"
mean = [100.0, 110.0, 120.0]
std = [50.0, 60.0, 70.0]

[nms]
score_threshold = 0.1
max_detections = 5
runtime_thresholds = {runtime_thresholds}

[serving]
max_batch_size = 4
"""


def source(*, pixels: str = "images", opset: int = 17, classes: int = 3, batch: str | int = "b") -> onnx.ModelProto:
    """FP32 [B,3,8,8] → box_deltas [B,8,4], class_logits [B,8,classes]; the contract uses its input's name, too."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.normal(0, 0.3, (6, 3, 4, 4)),
        "scale": random.uniform(0.5, 1.5, 6),
        "shift": random.normal(0, 0.3, 6),
        "mean": random.normal(0, 0.3, 6),
        "variance": random.uniform(0.5, 1.5, 6),
        "w_box": random.normal(0, 1, (8, 6, 1, 1)),
        "w_class": random.normal(0, 1, (2 * classes, 6, 1, 1)),
    }
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    nodes = [
        helper.make_node("Conv", [pixels, "w"], ["conv"], name="conv", strides=[4, 4]),
        helper.make_node("BatchNormalization", ["conv", "scale", "shift", "mean", "variance"], ["bn"], name="bn"),
        helper.make_node("Relu", ["bn"], ["relu"], name="relu"),
    ]
    for head, weights, last in (("box_deltas", "w_box", 4), ("class_logits", "w_class", classes)):
        initializers.append(numpy_helper.from_array(np.array([0, -1, last], np.int64), f"{head}_shape"))
        nodes += [
            helper.make_node("Conv", ["relu", weights], [f"{head}_map"]),
            helper.make_node("Transpose", [f"{head}_map"], [f"{head}_last"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [f"{head}_last", f"{head}_shape"], [head]),
        ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(pixels, TensorProto.FLOAT, [batch, 3, 8, 8])],
        [
            helper.make_tensor_value_info("box_deltas", TensorProto.FLOAT, [batch, "n", 4]),
            helper.make_tensor_value_info("class_logits", TensorProto.FLOAT, [batch, "n", "c"]),
        ],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def with_operators() -> onnx.ModelProto:
    """`source` with operators between Relu and heads that not every precision takes; shapes stay as they are."""
    model = source(opset=18)
    values = {
        "slope": np.full((6, 1, 1), 0.2, np.float32),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "mix": np.random.default_rng(1).normal(0, 0.5, (6, 6)).astype(np.float32),
        "roi": np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "w_up": np.random.default_rng(2).normal(0, 0.3, (6, 6, 2, 2)).astype(np.float32),
        "end": np.float32(4.0),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())
    chain: list[tuple[str, list[str], dict[str, Any]]] = [
        ("HardSwish", [], {}),
        ("Mish", [], {}),
        ("Celu", [], {}),
        ("PRelu", ["slope"], {}),
        ("Pad", ["pads"], {}),  # 2x2 → 4x4
        ("Einsum", ["mix"], {"equation": "bchw,cd->bdhw"}),
        ("Resize", ["roi", "scales"], {"mode": "linear"}),  # → 8x8
        ("AveragePool", [], {"kernel_shape": [8, 8]}),  # → 1x1
        ("ConvTranspose", ["w_up"], {"strides": [2, 2]}),  # → 2x2
        ("Min", ["end"], {}),
        ("LpNormalization", [], {"axis": 1}),
        ("LpPool", [], {"kernel_shape": [1, 1]}),
    ]
    name, added = "relu", []
    for operator, more, attributes in chain:
        result = operator.lower()
        added.append(helper.make_node(operator, [name, *more], [result], name=result, **attributes))
        name = result
    place = next(i for i, node in enumerate(model.graph.node) if node.name == "relu") + 1
    for node in model.graph.node[place:]:
        node.input[:] = [name if read == "relu" else read for read in node.input]
    for i, node in enumerate(added):
        model.graph.node.insert(place + i, node)
    return model


def write(
    folder: Path, model: onnx.ModelProto | None = None, *, color_order: str = "RGB", thresholds: bool = True
) -> Path:
    """Writes a models/<name> folder; returns its spec.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    text = SPEC.format(color_order=color_order, runtime_thresholds=str(thresholds).lower())
    (folder / "spec.toml").write_text(text)
    (folder / "labels.txt").write_text("".join(f"{label}\n" for label in LABELS))
    random = np.random.default_rng(1)
    boxes = np.concatenate([random.uniform(0.2, 0.8, (ANCHORS, 2)), random.uniform(0.2, 0.6, (ANCHORS, 2))], 1)
    np.save(folder / "anchors.npy", boxes.astype(np.float32))
    onnx.save(model or source(), folder / "model.onnx")
    return folder / "spec.toml"


def engine_of(spec: Spec) -> dict[str, Any]:
    """What build/engine.py says of a plan that fits the spec."""
    size, most = (spec.input.height, spec.input.width), spec.nms.max_detections
    shapes = {
        "images": ("INPUT", "UINT8", [*size, 3]),
        "score_threshold": ("INPUT", "FLOAT", [1]),
        "iou_threshold": ("INPUT", "FLOAT", [1]),
        "num_detections": ("OUTPUT", "INT32", [1]),
        "detection_boxes": ("OUTPUT", "FLOAT", [most, 4]),
        "detection_scores": ("OUTPUT", "FLOAT", [most]),
        "detection_classes": ("OUTPUT", "INT32", [most]),
    }
    table = []
    for name, (mode, kind, rest) in shapes.items():
        sizes = [[[p.min, *rest], [p.opt, *rest], [p.max, *rest]] for p in spec.profiles] if mode == "INPUT" else []
        table.append({"name": name, "mode": mode, "dtype": kind, "shape": [-1, *rest], "profiles": sizes})
    return {"io": table, "tensorrt": "10.13.2"}
