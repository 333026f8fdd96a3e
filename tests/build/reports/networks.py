"""Small networks, what ONNX Runtime makes of them, and reports on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from build.files import ROOT
from build.reports import fusion_analysis
from build.reports.fusion_model import Kernel, Report
from build.reports.roofline import Ceilings
from build.reports.source_graph import Source
from build.session import session

FIXTURES = ROOT / "tests" / "fixtures" / "inspector"
CBR = "Conv+BatchNormalization+Relu"

CEILINGS = Ceilings(1, 100e9, 400e9, [(1e6, 50e9), (1e9, 10e9)], "made up for a test")


def network(nodes: list[onnx.NodeProto], outputs: list[str], channels: int = 8) -> onnx.ModelProto:
    """`nodes` on `pixels` [n,3,16,16] with weights `w3` (3 → channels), `w` (channels → channels)."""
    random = np.random.default_rng(0)
    constants = {
        "w3": random.normal(0, 0.2, (channels, 3, 3, 3)),
        "w": random.normal(0, 0.2, (channels, channels, 3, 3)),
        "w_box": random.normal(0, 0.2, (16, channels, 1, 1)),
        "w_cls": random.normal(0, 0.2, (8, channels, 1, 1)),
        **{name: random.uniform(0.5, 1.5, channels) for name in ("scale", "shift", "mean", "var")},
    }
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()]
    initializers += [
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in (("to_box", [-1, 1024, 4]), ("to_cls", [-1, 1024, 2]))
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        initializers,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ssd", 1)], ir_version=8
    )


def node(op: str, inputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [f"{name}_out"], name=name, **attributes)


PAD = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}


def residual_nodes() -> list[onnx.NodeProto]:
    bn = ["scale", "shift", "mean", "var"]
    return [
        node("Conv", ["pixels", "w3"], "c1", **PAD),
        node("BatchNormalization", ["c1_out", *bn], "bn1"),
        node("Relu", ["bn1_out"], "r1"),
        node("Conv", ["r1_out", "w"], "c2", **PAD),
        node("Add", ["c2_out", "r1_out"], "add"),
        node("Relu", ["add_out"], "r2"),
    ]


def detector() -> onnx.ModelProto:
    """The network that the inspector fixtures are about."""
    nodes = [
        *residual_nodes(),
        node("Conv", ["r2_out", "w_box"], "box", kernel_shape=[1, 1]),
        node("Transpose", ["box_out"], "box_t", perm=[0, 2, 3, 1]),
        node("Reshape", ["box_t_out", "to_box"], "box_r"),
        node("Conv", ["r2_out", "w_cls"], "cls", kernel_shape=[1, 1]),
        node("Transpose", ["cls_out"], "cls_t", perm=[0, 2, 3, 1]),
        node("Reshape", ["cls_t_out", "to_cls"], "cls_r"),
        node("Sigmoid", ["r1_out"], "unused"),
        helper.make_node("Concat", ["box_r_out"], ["box_deltas"], name="box_cat", axis=1),
        helper.make_node("Concat", ["cls_r_out"], ["class_logits"], name="cls_cat", axis=1),
        helper.make_node("SSDNMS", ["box_deltas", "class_logits"], ["detections"], name="ssd/nms", domain="ssd"),
    ]
    return network(nodes, ["detections"])


def optimised(model: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of it."""
    session(model, written=tmp_path / "optimised.onnx")
    return onnx.load(tmp_path / "optimised.onnx")


def report_of(source: Source, kernels: list[Kernel]) -> Report:
    report = Report("test", "onnxruntime", "1", "fp32", "here", "so", kernels, CEILINGS)
    fusion_analysis.finish(report, source)
    return report


def mapped(report: Report) -> dict[str, set[str]]:
    """Names of the source nodes by kernel."""
    return {kernel.name: {report.nodes[i].name for i in kernel.nodes} for kernel in report.kernels}
