"""Every kernel mapped back to its source nodes, or said to be unmapped; the report's figures and files."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from build import spec
from build.errors import SSDError
from build.graph.attach import attach
from build.reports import fusion, fusion_html, roofline

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "inspector"
CEILINGS = roofline.Ceilings(1, 100e9, 400e9, [(1e6, 50e9), (1e9, 10e9)], "made up for a test")
CBR = "Conv+BatchNormalization+Relu"


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
    made = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        initializers,
    )
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ssd", 1)], ir_version=8
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


def optimised(model: onnx.ModelProto, tmp_path: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimised.onnx")


def report_of(source: fusion.Source, kernels: list[fusion.Kernel]) -> fusion.Report:
    made = fusion.Report("test", "onnxruntime", "1", "fp32", "here", "so", [], kernels, [], CEILINGS)
    fusion._finish(made, source)
    return made


def mapped(report: fusion.Report) -> dict[str, set[str]]:
    """Names of the source nodes by kernel."""
    return {kernel.name: {report.nodes[i].name for i in kernel.nodes} for kernel in report.kernels}


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes() -> fusion.Report:
    checked = spec.load(ROOT / "models" / "shapes")
    return fusion.onnxruntime_report(checked, attach(checked), "fp32", 1, 3, CEILINGS)


def test_every_conv_bn_relu_of_shapes_is_named(shapes: fusion.Report) -> None:
    model = attach(spec.load(ROOT / "models" / "shapes"))
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
    written = fusion_html.markdown(shapes)
    for names in wanted:
        assert " + ".join(f"`{name}`" for name in names) in written


def test_nothing_of_shapes_is_unmapped(shapes: fusion.Report) -> None:
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
    source = fusion.Source(network(nodes, ["last_out"], channels=16))
    report = report_of(source, fusion.map_optimised(source, optimised(source.model, tmp_path)))
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
    source = fusion.Source(model)
    report = report_of(source, fusion.map_optimised(source, optimised(source.model, tmp_path)))
    groups = list(mapped(report).values())
    assert all(kernel.evidence != "unmapped" for kernel in report.kernels)
    assert any("depth" in group for group in groups)
    assert {"c1", "r1"} in groups


class FakePlan:
    """A plan that says what the fixtures say."""

    def __init__(self, path: Path, engine: Any, *, plugin: Path) -> None:
        assert path.name == "model.plan"

    def __enter__(self) -> FakePlan:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def layers(self) -> Any:
        return json.loads((FIXTURES / "written_after_schema_tensorrt_10.json").read_text())

    def layer_times(self, feeds: Any, runs: int) -> Any:
        assert feeds["images"].shape == (1, 300, 300, 3)
        return json.loads((FIXTURES / "written_after_schema_profile.json").read_text())


def test_a_published_plan_is_asked_and_its_answer_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("build.tensorrt.plan.Plan", FakePlan)
    monkeypatch.setattr("build.publish.repository.served_version", lambda *_: 1)
    folder = tmp_path / "repository" / "shapes" / "1"
    folder.mkdir(parents=True)
    (folder / "model.plan").write_bytes(b"plan")
    (folder / "manifest.json").write_text('{"precision": "fp32", "engine": {}}')
    options: dict[str, Any] = {"artifacts": tmp_path / "artifacts", "published": tmp_path / "repository"}
    made = fusion.fusion_report("tensorrt", **options)
    assert json.loads((made / "report.json").read_text())["runtime"] == "tensorrt"
    assert (tmp_path / "artifacts" / "shapes" / "fp32" / "layers.json").is_file()
    (folder / "manifest.json").write_text('{"precision": "fp16", "engine": {}}')
    fusion.fusion_report("tensorrt", **options)  # from what was kept
    (tmp_path / "artifacts" / "shapes" / "fp32" / "layers.json").unlink()
    with pytest.raises(fusion.FusionError, match="is fp16, not fp32"):
        fusion.fusion_report("tensorrt", **options)


def test_a_kernel_without_evidence_is_unmapped_and_the_others_are_not(tmp_path: Path) -> None:
    nodes = [*residual_nodes(), node("Conv", ["r2_out", "w_box"], "box", kernel_shape=[1, 1])]
    source = fusion.Source(network(nodes, ["box_out"], channels=16))
    made = optimised(source.model, tmp_path)
    before = mapped(report_of(source, fusion.map_optimised(source, made)))
    first = next(item for item in made.graph.node if item.op_type == "Conv")
    first.name = "no name that the source knows"
    assert first.output[0] not in source.tensors
    report = report_of(source, fusion.map_optimised(source, made))
    unmapped = [kernel for kernel in report.kernels if kernel.evidence == "unmapped"]
    assert first.name in {kernel.name for kernel in unmapped}
    assert not any(kernel.nodes for kernel in unmapped)
    assert {item.name for item in report.fates()["unmapped"]} >= {"c1", "bn1", "r1"}
    after = mapped(report)
    assert all(after[name] in (nodes, set()) for name, nodes in before.items() if name in after)


def test_a_false_name_is_not_believed(tmp_path: Path) -> None:
    nodes = [*residual_nodes(), node("Conv", ["r2_out", "w_box"], "box", kernel_shape=[1, 1])]
    source = fusion.Source(network(nodes, ["box_out"], channels=16))
    made = optimised(source.model, tmp_path)
    first = next(item for item in made.graph.node if item.op_type == "Conv")
    first.name = "box_out_nchwc"  # the name of the last one, with another kernel size and other inputs
    report = report_of(source, fusion.map_optimised(source, made))
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
    source = fusion.Source(network(nodes, ["d1_out"]))
    made = optimised(source.model, tmp_path)
    assert "QLinearConv" in {item.op_type for item in made.graph.node}
    report = report_of(source, fusion.map_optimised(source, made))
    assert all(kernel.evidence != "unmapped" for kernel in report.kernels)
    quantised = next(kernel for kernel in report.kernels if kernel.op == "QLinearConv")
    assert {report.nodes[i].name for i in quantised.nodes} == {"d0", "c1", "q1"}


# -- work and bounds ---------------------------------------------------------------------------------------------------


def test_operations_bytes_bound_and_int8() -> None:
    source = fusion.Source(network(residual_nodes(), ["r2_out"]))
    kernels = [
        fusion.Kernel(
            "k", "Conv", [], ["r1_out"], nodes=[0, 1, 2], evidence="tensor", milliseconds=0.1, precision="FP32"
        )
    ]
    report = report_of(source, kernels)
    kernel = report.kernels[0]
    pixels = 16 * 16
    # The batch normalisation is folded into the convolution; ReLU is one operation for each element.
    assert kernel.operations == 2 * 27 * 8 * pixels + 8 * pixels
    assert kernel.traffic == 4 * (3 * pixels + 8 * pixels + 8 * 27 + 4 * 8)
    assert kernel.intensity == pytest.approx(kernel.operations / kernel.traffic)
    memory, compute = kernel.traffic / 50e9, kernel.operations / 100e9
    assert kernel.bound == ("compute" if compute > memory else "memory") == "compute"
    assert kernel.efficiency == pytest.approx(compute / 1e-4)
    then = max(kernel.operations / 400e9, kernel.traffic / 4 / 50e9)
    assert kernel.int8_milliseconds == pytest.approx(0.1 * then / compute)
    assert report.kernels[0].pattern == CBR
    assert report.kernels[0].kind == "vertical"


def test_ceilings_of_this_machine() -> None:
    found = roofline.measure_ceilings(1, seconds=0.05)
    assert found.operations > 1e8
    assert found.int8 is not None
    assert found.int8 > 1e8
    assert [size for size, _ in found.bandwidth] == list(roofline.WORKING_SETS)
    assert all(speed > 1e8 and math.isfinite(speed) for _, speed in found.bandwidth)


# -- TensorRT ----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("version", ["10", "11"])
def test_both_schemas_of_the_engine_inspector(version: str) -> None:
    report = fusion.tensorrt_report(
        "tiny",
        detector(),
        "fp16",
        FIXTURES / f"written_after_schema_tensorrt_{version}.json",
        FIXTURES / "written_after_schema_profile.json",
        CEILINGS,
    )
    kernels = {kernel.name: kernel for kernel in report.kernels}
    groups = mapped(report)
    assert groups["c1 + bn1 + r1"] == {"c1", "bn1", "r1"}
    assert groups["c2 + add + r2"] == {"c2", "add", "r2"}
    assert groups["box || cls"] == {"box", "cls"}
    assert kernels["box || cls"].kind == "horizontal"
    assert kernels["c1 + bn1 + r1"].kind == "vertical"
    assert kernels["c1 + bn1 + r1"].precision == "FP16"
    assert kernels["__myl_TraResTraRes_myl0_0"].precision == "FP32"
    assert kernels["c1 + bn1 + r1"].milliseconds == 0.012
    assert [kernel.kind for kernel in report.kernels].count("added") == 1
    assert {item.name: item.fate for item in report.nodes if item.op == "Concat"} == {
        "box_cat": "eliminated",
        "cls_cat": "eliminated",
    }
    assert [item.name for item in report.fates()["dead"]] == ["unused"]
    assert not report.not_merged
    assert not [kernel for kernel in report.kernels if kernel.evidence == "unmapped"]
    assert report.milliseconds == pytest.approx(0.087)
    assert "Concat elimination: 2 of 2" in fusion_html.markdown(report)
    assert "<svg" in fusion_html.html(report)


def test_a_layer_of_which_nothing_is_known_is_unmapped(tmp_path: Path) -> None:
    data = json.loads((FIXTURES / "written_after_schema_tensorrt_10.json").read_text())
    data["Layers"][2] |= {"Name": "{ForeignNode[c2...r2]}", "Metadata": ""}
    (tmp_path / "layers.json").write_text(json.dumps(data))
    report = fusion.tensorrt_report("tiny", detector(), "fp16", tmp_path / "layers.json", None, None)
    assert report.kernels[2].evidence == "unmapped"
    assert {item.name for item in report.fates()["unmapped"]} >= {"c2", "add", "r2"}
    assert all(item.fate != "eliminated" for item in report.nodes)  # they may be in that layer
    assert all(kernel.milliseconds is None and not kernel.bound for kernel in report.kernels)


def test_layers_without_metadata_are_known_by_their_names(tmp_path: Path) -> None:
    data = json.loads((FIXTURES / "written_after_schema_tensorrt_10.json").read_text())
    for layer in data["Layers"]:
        layer["Metadata"] = ""
    data["Layers"][4]["Name"] = "PWN(box_t, box_r)"
    (tmp_path / "layers.json").write_text(json.dumps(data))
    report = fusion.tensorrt_report("tiny", detector(), "fp16", tmp_path / "layers.json", None, None)
    groups = mapped(report)
    assert groups["c1 + bn1 + r1"] == {"c1", "bn1", "r1"}
    assert groups["PWN(box_t, box_r)"] == {"box_t", "box_r"}
    assert groups["box || cls"] == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"Layers": ["a", "b"], "Bindings": []}', "names alone"),
        ('{"nodes": []}', "has no Layers"),
        ('{"Layers": [', "no valid JSON"),
        ("[1, 2]", "no JSON object"),
    ],
)
def test_wrong_layer_information_is_explained(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(text)
    with pytest.raises(fusion.FusionError, match=message):
        fusion.tensorrt_report("tiny", detector(), "fp16", tmp_path / "layers.json", None, None)


# -- the files ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags that stay open, and everything that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.loads += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_html_is_whole_and_loads_nothing(shapes: fusion.Report) -> None:
    text = fusion_html.html(shapes)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert "url(" not in text.replace("url(#plot)", "")
    assert "prefers-color-scheme:dark" in text
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) == 2
    for picture in pictures:
        ElementTree.fromstring(picture)
    assert pictures[1].count('class="box vertical"') == 18 * 3 + 18


def test_strange_names_are_escaped(tmp_path: Path) -> None:
    nodes = [node("Relu", ["pixels"], "<script>alert('x')</script>|&")]
    source = fusion.Source(network(nodes, [nodes[0].output[0]]))
    report = report_of(source, fusion.map_optimised(source, optimised(source.model, tmp_path)))
    assert "<script>" not in fusion_html.html(report)
    Page().feed(fusion_html.html(report))


def test_the_task_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ceilings.json").write_text(
        json.dumps({"operations": 1e11, "int8": None, "bandwidth": [[1e9, 1e10]], "method": "given"})
    )
    folder = fusion.fusion_report(ceilings=tmp_path / "ceilings.json", threads=1, runs=2, artifacts=tmp_path)
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.json", "report.html"}
    data = json.loads((folder / "report.json").read_text())
    assert data["after"] == len(data["kernels"]) < data["before"]
    assert sum(kernel["pattern"] == CBR for kernel in data["kernels"]) == 18
    assert "18 Conv+BatchNormalization+Relu became one kernel each" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "cuda"}, "runtime is 'cuda'"),
        ({"runtime": "tensorrt"}, "no plan of shapes is published"),
        ({"runtime": "tensorrt", "layers": Path("nowhere.json")}, "cannot be read"),
        ({"precision": "fp7"}, "model.onnx is not there"),
        ({"runs": 0}, "runs is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"model": "nothing"}, "cannot be read"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SSDError, match=message):
        fusion.fusion_report(**options, artifacts=tmp_path, published=tmp_path)


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"operations": 0, "bandwidth": [[1, 1]], "method": "x"}', '{"operations": "a"}']
)
def test_wrong_ceilings_are_explained(text: str, tmp_path: Path) -> None:
    (tmp_path / "ceilings.json").write_text(text)
    with pytest.raises(fusion.FusionError, match="not a description of ceilings"):
        roofline.read_ceilings(tmp_path / "ceilings.json")
