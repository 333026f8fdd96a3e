"""Every kernel of ONNX Runtime mapped back to its source nodes, or said to be unmapped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from build import spec
from build.errors import GraphError
from build.files import MODELS
from build.graph.attach import attach
from build.reports import fusion_onnxruntime, fusion_text
from build.reports.fusion_model import Report
from build.reports.fusion_onnxruntime import map_optimised, onnxruntime_report
from build.reports.source_graph import Source
from tests.build.reports.networks import CBR, PAD, mapped, network, node, optimised, report_of, residual_nodes


def test_every_conv_bn_relu_of_shapes_is_named(shapes: Report) -> None:
    model = attach(spec.load(MODELS / "shapes"))
    users: dict[str, list[onnx.NodeProto]] = {}
    for item in model.graph.node:
        for name in item.input:
            users.setdefault(name, []).append(item)
    wanted = set()
    for conv in model.graph.node:
        if conv.op_type == "Conv" and users[conv.output[0]][0].op_type == "BatchNormalization":
            norm = users[conv.output[0]][0]
            wanted.add((conv.name, norm.name, users[norm.output[0]][0].name))
    assert len(wanted) == 18
    assert {tuple(item.name for item in group) for group in shapes.groups(CBR)} == wanted
    written = fusion_text.markdown(shapes)
    for names in wanted:
        assert " + ".join(f"`{name}`" for name in names) in written


def test_nothing_of_shapes_is_unmapped(shapes: Report) -> None:
    assert all(kernel.evidence != "unmapped" for kernel in shapes.kernels)
    assert set(shapes.fates()) == {"kernel", "folded"}
    convolutions = [item for item in shapes.nodes if item.op == "Conv"]
    assert len(convolutions) == 30
    assert all(len(item.kernels) == 1 for item in convolutions)
    ssd_nms = next(item for item in shapes.nodes if item.op == "SSDNMS")
    assert {shapes.kernels[k].kind for k in ssd_nms.kernels} == {"expansion"}
    assert "Scan" in {shapes.kernels[k].op for k in ssd_nms.kernels}
    assert len(shapes.kernels) < shapes.computing_nodes() < (shapes.unfused_kernels or 0)
    assert sum(kernel.share or 0 for kernel in shapes.kernels) == pytest.approx(1)
    assert all(kernel.milliseconds is not None and kernel.precision for kernel in shapes.kernels)


def test_residuals_and_what_needs_no_kernel(tmp_path: Path) -> None:
    nodes = [
        *residual_nodes(),
        node("Identity", ["r2_out"], "same"),
        node("Conv", ["same_out", "w_box"], "box", kernel_shape=[1, 1]),
        node("Conv", ["same_out", "w_box"], "twin", kernel_shape=[1, 1]),
        node("Add", ["box_out", "twin_out"], "both"),
        node("Sigmoid", ["c1_out"], "unused"),
        node("Mul", ["scale", "shift"], "weights_only"),
        node("Mul", ["mean", "weights_only_out"], "more"),
        node("Add", ["both_out", "more_sum"], "last"),
    ]
    nodes.insert(-1, helper.make_node("ReduceSum", ["more_out"], ["more_sum"], name="sum", keepdims=0))
    source = Source(network(nodes, ["last_out"], channels=16))
    report = report_of(source, map_optimised(source, optimised(source.model, tmp_path)))
    fates = {item.name: item.fate for item in report.nodes}
    assert all(kernel.evidence != "unmapped" for kernel in report.kernels)
    assert fates["unused"] == "kernel"  # ONNX Runtime does not drop it
    assert any("unused" in note for note in report.notes)
    assert fates["weights_only"] == fates["more"] == fates["sum"] == "folded"
    assert {fates["box"], fates["twin"]} == {"kernel", "merged"}
    groups = list(mapped(report).values())
    assert {"c1"} in groups  # another node reads its output, so that it keeps its own kernel
    assert {"bn1", "r1"} in groups
    assert {"c2", "add", "r2"} in groups
    for name in ("c1", "bn1", "c2"):
        assert sum(name in group for group in groups) == 1


def test_depthwise_channels_that_are_rounded_up_are_still_known(tmp_path: Path) -> None:
    """ONNX Runtime rounds the groups of a depthwise convolution up to its block of channels."""
    nodes = [
        node("Conv", ["pixels", "w3"], "c1", **PAD),
        node("Relu", ["c1_out"], "r1"),
        node("Conv", ["r1_out", "w_depth"], "depth", group=24, **PAD),
        node("Clip", ["depth_out"], "r2"),
    ]
    model = network(nodes, ["r2_out"], channels=24)
    weight = np.random.default_rng(1).normal(0, 1, (24, 1, 3, 3)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w_depth"))
    source = Source(model)
    report = report_of(source, map_optimised(source, optimised(source.model, tmp_path)))
    groups = list(mapped(report).values())
    assert all(kernel.evidence != "unmapped" for kernel in report.kernels)
    assert any("depth" in group for group in groups)
    assert {"c1", "r1"} in groups


def test_a_kernel_without_evidence_is_unmapped_and_the_others_are_not(tmp_path: Path) -> None:
    nodes = [*residual_nodes(), node("Conv", ["r2_out", "w_box"], "box", kernel_shape=[1, 1])]
    source = Source(network(nodes, ["box_out"], channels=16))
    result = optimised(source.model, tmp_path)
    before = mapped(report_of(source, map_optimised(source, result)))
    first = next(item for item in result.graph.node if item.op_type == "Conv")
    first.name = "no name that the source knows"
    assert first.output[0] not in source.tensors
    report = report_of(source, map_optimised(source, result))
    unmapped = [kernel for kernel in report.kernels if kernel.evidence == "unmapped"]
    assert first.name in {kernel.name for kernel in unmapped}
    assert not any(kernel.nodes for kernel in unmapped)
    assert {item.name for item in report.fates()["unmapped"]} >= {"c1", "bn1", "r1"}
    after = mapped(report)
    assert all(after[name] in (nodes, set()) for name, nodes in before.items() if name in after)


def test_a_false_name_is_not_believed(tmp_path: Path) -> None:
    nodes = [*residual_nodes(), node("Conv", ["r2_out", "w_box"], "box", kernel_shape=[1, 1])]
    source = Source(network(nodes, ["box_out"], channels=16))
    result = optimised(source.model, tmp_path)
    first = next(item for item in result.graph.node if item.op_type == "Conv")
    first.name = "box_out_nchwc"  # the name of the last one, with another kernel size and other inputs
    report = report_of(source, map_optimised(source, result))
    assert report.kernels[[kernel.name for kernel in report.kernels].index(first.name)].evidence == "unmapped"


def test_quantised_convolutions_are_mapped(tmp_path: Path) -> None:
    scale = helper.make_node("Constant", [], ["q_scale"], name="k1", value_float=0.05)
    zero = helper.make_node("Constant", [], ["q_zero"], name="k2", value=numpy_helper.from_array(np.int8(0)))
    nodes = [scale, zero, node("QuantizeLinear", ["pixels", "q_scale", "q_zero"], "q0")]
    nodes += [node("DequantizeLinear", ["q0_out", "q_scale", "q_zero"], "d0")]
    nodes += [node("QuantizeLinear", ["w3", "q_scale", "q_zero"], "qw")]
    nodes += [node("DequantizeLinear", ["qw_out", "q_scale", "q_zero"], "dw")]
    nodes += [node("Conv", ["d0_out", "dw_out"], "c1", **PAD)]
    nodes += [node("QuantizeLinear", ["c1_out", "q_scale", "q_zero"], "q1")]
    nodes += [node("DequantizeLinear", ["q1_out", "q_scale", "q_zero"], "d1")]
    source = Source(network(nodes, ["d1_out"]))
    result = optimised(source.model, tmp_path)
    assert "QLinearConv" in {item.op_type for item in result.graph.node}
    report = report_of(source, map_optimised(source, result))
    assert all(kernel.evidence != "unmapped" for kernel in report.kernels)
    quantised = next(kernel for kernel in report.kernels if kernel.op == "QLinearConv")
    assert {report.nodes[i].name for i in quantised.nodes} == {"d0", "c1", "q1"}


def test_a_model_that_cannot_run_is_an_error() -> None:
    source = network([node("Relu", ["pixels"], "relu")], ["relu_out"])
    with pytest.raises(GraphError, match="ONNX Runtime cannot run the model"):
        onnxruntime_report("test", source, "fp32", {"other": np.zeros(1)}, threads=1, runs=1, ceilings=None)


def test_a_busy_machine_is_noted(shapes: Report) -> None:
    kernel = dataclasses.replace(shapes.kernels[0], bound="compute", efficiency=1.2)
    busy = dataclasses.replace(shapes, kernels=[kernel], milliseconds=10.0)
    interrupted, low_ceiling = fusion_onnxruntime._doubts(busy, 14.0)
    assert interrupted.startswith("A whole call took 14.0 ms at the median, its kernels 10.0 ms")
    assert low_ceiling.startswith("A kernel reaches 120% of the compute ceiling")
    idle = dataclasses.replace(busy, kernels=[dataclasses.replace(kernel, efficiency=1.1)])
    assert fusion_onnxruntime._doubts(idle, 12.0) == []
