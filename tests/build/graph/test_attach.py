"""The served graph around a source: same bits as the source, the contract's inputs and outputs, clear refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from build import contract
from build.errors import GraphError, SpecError
from build.gate.self_check import self_check
from build.graph import ssd_nms
from build.graph.attach import attach, before_nms
from build.session import session
from build.spec import Spec, load
from tests import ssd_nms_oracle as oracle
from tests.build import tiny_model


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)


def pictures(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)


def normalised(images: np.ndarray, spec: Spec) -> np.ndarray:
    """What the front must compute, in FP32 and in this order."""
    planes = images.astype(np.float32).transpose(0, 3, 1, 2)
    if spec.input.color_order == "BGR":
        planes = planes[:, ::-1]
    mean, std = (np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (spec.input.mean, spec.input.std))
    return np.ascontiguousarray((planes - mean) / std)


@pytest.mark.parametrize("pixels", ["images", "score_threshold", "data"])
@pytest.mark.parametrize("color_order", ["RGB", "BGR"])
@pytest.mark.parametrize("opset", [13, 17, 21])
def test_front_and_heads_have_the_bits_of_the_source(tmp_path: Path, pixels: str, color_order: str, opset: int) -> None:
    source = tiny_model.source(pixels=pixels, opset=opset)
    spec = load(tiny_model.write(tmp_path, source, color_order=color_order))
    cut = before_nms(attach(spec))
    onnx.checker.check_model(cut, full_check=True)
    wanted = run(source, **{pixels: normalised(pictures(), spec)})
    for got, want in zip(run(cut, images=pictures()), wanted, strict=True):
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("thresholds", [False, True])
def test_detections_are_the_oracles(tmp_path: Path, thresholds: bool) -> None:
    spec = load(tiny_model.write(tmp_path, thresholds=thresholds))
    model = attach(spec)
    deltas, logits = run(before_nms(model), images=pictures())
    extra = {
        name: np.full((3, 1), value, np.float32) for name, value in zip(contract.THRESHOLDS, (0.2, 0.3), strict=True)
    }
    extra = extra if thresholds else {}
    case = oracle.Case("tiny", spec.nms, deltas, logits, spec.load_anchors(), **extra)
    got = run(model, images=pictures(), **extra)
    assert oracle.agree(case, tuple(got)) != "ambiguous"
    assert got[0].min() >= 1


def decoded(folder: Path, source: onnx.ModelProto, nms: str = "") -> Spec:
    """The tiny model whose boxes are decoded already, without anchors; `nms` are more keys of its [nms]."""
    path = tiny_model.write(folder, source, thresholds=False)
    (folder / "anchors.npy").unlink()
    path.write_text(path.read_text().replace("[nms]\n", f'[nms]\nbox_coding = "decoded"\n{nms}\n'))
    return load(path)


def hide_number(source: onnx.ModelProto) -> None:
    """Lets the heads go through a Compress that keeps every box: shape inference then cannot tell how many."""
    source.graph.initializer.append(numpy_helper.from_array(np.ones(tiny_model.ANCHORS, bool), "all"))
    for name in contract.HEADS:
        next(node for node in source.graph.node if node.output[0] == name).output[0] = f"{name}_before"
        source.graph.node.append(helper.make_node("Compress", [f"{name}_before", "all"], [name], axis=1))


@pytest.mark.parametrize("clip", ["true", "false"])
@pytest.mark.parametrize("hidden", [False, True], ids=["inferred", "run"])
def test_decoded_boxes_are_selected_as_they_are(tmp_path: Path, hidden: bool, clip: str) -> None:
    source = tiny_model.source()
    if hidden:
        hide_number(source)
    spec = decoded(tmp_path, source, f'score_activation = "none"\nclip_boxes = {clip}\niou_threshold = 0.2')
    model = attach(spec)
    anchors = next(item for item in model.graph.initializer if item.name == "ssd/anchors")
    assert not numpy_helper.to_array(anchors).any()
    assert list(anchors.dims) == [tiny_model.ANCHORS, 4]
    boxes, scores = run(before_nms(model), images=pictures())
    case = oracle.Case("decoded", spec.nms, boxes, scores, np.full((tiny_model.ANCHORS, 4), np.nan, np.float32))
    got = run(model, images=pictures())
    assert oracle.agree(case, tuple(got)) == "exact"
    assert got[0].min() >= 2
    self_check(model, spec)


def constant_source(boxes: np.ndarray, scores: np.ndarray) -> onnx.ModelProto:
    """A source that gives every picture the same boxes [N,4] and scores [N,C]."""
    model = tiny_model.source()
    del model.graph.node[:], model.graph.initializer[:]
    nodes = [helper.make_node("Shape", ["images"], ["batch"], end=1)]
    for name, values in zip(contract.HEADS, (boxes, scores), strict=True):
        size = numpy_helper.from_array(np.array(values.shape, np.int64), f"{name}_size")
        model.graph.initializer.extend([numpy_helper.from_array(values[None], f"{name}_values"), size])
        nodes.append(helper.make_node("Concat", ["batch", size.name], [f"{name}_shape"], axis=0))
        nodes.append(helper.make_node("Expand", [f"{name}_values", f"{name}_shape"], [name]))
    model.graph.node.extend(nodes)
    return model


def test_zero_anchors_change_no_bit_of_a_box(tmp_path: Path) -> None:
    """Infinite and subnormal values come through, too; -0.0 becomes 0.0, and NaN stays NaN."""
    values = [0.1, -0.3, 1.5, 1e-45, -3e-39, 1e38, -1e38, np.finfo(np.float32).tiny, np.inf, -np.inf, np.nan, -0.0]
    boxes = np.array([values, values[::-1], np.roll(values, 1)], np.float32).reshape(-1, 4)
    scores = np.zeros((len(boxes), 3), np.float32)
    scores[:, 1] = np.linspace(0.9, 0.5, len(boxes))
    more = 'score_activation = "none"\nclip_boxes = false\niou_threshold = 1.0'
    spec = decoded(tmp_path, constant_source(boxes, scores), more)
    spec = dataclasses.replace(spec, nms=dataclasses.replace(spec.nms, max_detections=len(boxes)))
    number, got, _, _ = run(attach(spec), images=pictures())
    assert (number == len(boxes)).all()
    wanted = np.where(boxes == 0, np.float32(0), boxes)
    same = got.view(np.int32) == wanted.view(np.int32)
    assert (same | (np.isnan(got) & np.isnan(wanted))).all()
    assert np.signbit(boxes[boxes == 0]).all()


def test_decoded_boxes_of_two_numbers_are_refused(tmp_path: Path) -> None:
    source = constant_source(np.zeros((8, 4), np.float32), np.zeros((9, 3), np.float32))
    with pytest.raises(GraphError, match=r"'class_logits' has the shape \[1, 9, 3\], but must have \['B', 8, 3\]"):
        attach(decoded(tmp_path, source))


def test_the_specs_own_source_tells_how_many_boxes(tmp_path: Path) -> None:
    """What stands in for it may have types that ONNX Runtime cannot run."""
    source = tiny_model.source()
    hide_number(source)
    spec = decoded(tmp_path, source)
    source.graph.node[2].output[0] = "relu_full"
    source.graph.node.insert(3, helper.make_node("Cast", ["relu_full"], ["half"], to=TensorProto.BFLOAT16))
    source.graph.node.insert(4, helper.make_node("Relu", ["half"], ["half_relu"]))
    source.graph.node.insert(5, helper.make_node("Cast", ["half_relu"], ["relu"], to=TensorProto.FLOAT))
    with pytest.raises(GraphError, match="cannot run"):
        session(source)
    anchors = next(item for item in attach(spec, source).graph.initializer if item.name == "ssd/anchors")
    assert list(anchors.dims) == [tiny_model.ANCHORS, 4]


def test_a_decoded_source_that_does_not_run_is_refused(tmp_path: Path) -> None:
    source = tiny_model.source()
    hide_number(source)
    weights = next(item for item in source.graph.initializer if item.name == "w_box")
    weights.CopyFrom(numpy_helper.from_array(np.zeros((8, 5, 1, 1), np.float32), "w_box"))
    with pytest.raises(GraphError, match="ONNX Runtime cannot run it"):
        attach(decoded(tmp_path, source))


@pytest.mark.parametrize("thresholds", [False, True])
def test_inputs_and_outputs_are_the_contracts(tmp_path: Path, thresholds: bool) -> None:
    model = attach(load(tiny_model.write(tmp_path, thresholds=thresholds)))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    limits = [("score_threshold", "tensor(float)", ["batch", 1]), ("iou_threshold", "tensor(float)", ["batch", 1])]
    found = [(item.name, item.type, item.shape) for item in session.get_inputs()]
    assert found == [("images", "tensor(uint8)", ["batch", 8, 8, 3]), *(limits if thresholds else [])]
    assert [(item.name, item.type, item.shape) for item in session.get_outputs()] == [
        ("num_detections", "tensor(int32)", ["batch", 1]),
        ("detection_boxes", "tensor(float)", ["batch", 5, 4]),
        ("detection_scores", "tensor(float)", ["batch", 5]),
        ("detection_classes", "tensor(int32)", ["batch", 5]),
    ]


def test_the_sources_nodes_stay_as_they_are(tmp_path: Path) -> None:
    source = tiny_model.source()
    model = attach(load(tiny_model.write(tmp_path, source)))
    kinds = [node.op_type for node in model.graph.node]
    inside = [node.op_type for node in source.graph.node]
    assert kinds == ["Cast", "Transpose", "Sub", "Div", *inside, "SSDNMS"]
    added = [node.name for node in model.graph.node if node.name.startswith("ssd/")]
    assert added == ["ssd/front/cast", "ssd/front/transpose", "ssd/front/sub", "ssd/front/div", "ssd/nms"]


def test_before_nms_and_strip_function_leave_the_model_alone(tmp_path: Path) -> None:
    model = attach(load(tiny_model.write(tmp_path)))
    before = model.SerializeToString(deterministic=True)
    cut, stripped = before_nms(model), ssd_nms.strip_function(model)
    assert model.SerializeToString(deterministic=True) == before
    assert [item.name for item in (*cut.graph.input, *cut.graph.output)] == ["images", "box_deltas", "class_logits"]
    assert {item.domain for item in cut.opset_import} == {""}
    assert not cut.functions
    assert not stripped.functions
    assert ssd_nms.find(stripped).name == "ssd/nms"
    assert "ssd/anchors" not in {item.name for item in cut.graph.initializer}


def test_half_precision_heads_are_taken(tmp_path: Path) -> None:
    source = tiny_model.source()
    for name in contract.HEADS:
        next(node for node in source.graph.node if node.output[0] == name).output[0] = f"{name}_full"
        source.graph.node.append(helper.make_node("Cast", [f"{name}_full"], [name], to=TensorProto.FLOAT16))
    for output in source.graph.output:
        output.type.tensor_type.elem_type = TensorProto.FLOAT16
    spec = load(tiny_model.write(tmp_path, source))
    limits = {name: np.full((3, 1), 0.2, np.float32) for name in contract.THRESHOLDS}
    assert run(attach(spec), images=pictures(), **limits)[0].min() >= 1


def rename_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = model.graph.node[-4].output[0] = "boxes"


def make_double(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def make_wide(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 16


def add_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def add_class(model: onnx.ModelProto) -> None:
    model.CopyFrom(tiny_model.source(classes=4))


def fix_batch(model: onnx.ModelProto) -> None:
    model.CopyFrom(tiny_model.source(batch=1))


def make_old(model: onnx.ModelProto) -> None:
    model.CopyFrom(tiny_model.source(opset=12))


def lose_node(model: onnx.ModelProto) -> None:
    del model.graph.node[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename_output, r"has the outputs \['boxes', 'class_logits'\], but must have box_deltas and class_logits"),
        (make_double, "'images' is of type DOUBLE, but must be FLOAT"),
        (make_wide, r"'images' has the shape \['b', 3, 8, 16\], but must have \['B', 3, 8, 8\]"),
        (add_input, r"has the inputs \['images', 'more'\]"),
        (add_class, r"'class_logits' has the shape \[1, 8, 4\], but must have \['B', 8, 3\]"),
        (fix_batch, "has the fixed batch 1"),
        (make_old, "uses operators of version 12, but must use 13 or later"),
        (lose_node, "no valid ONNX model"),
    ],
)
def test_a_wrong_source_is_refused(tmp_path: Path, spoil: Callable[[onnx.ModelProto], None], message: str) -> None:
    source = tiny_model.source()
    spoil(source)
    spec = load(tiny_model.write(tmp_path, source))
    with pytest.raises(GraphError, match=message):
        attach(spec)


@pytest.mark.parametrize("content", [b"", b"no onnx at all", None])
def test_a_corrupt_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    spec = load(tiny_model.write(tmp_path))
    spec.onnx_path.write_bytes(spec.onnx_path.read_bytes()[:700] if content is None else content)
    with pytest.raises(GraphError, match=r"model\.onnx: no valid ONNX model"):
        attach(spec)


def test_missing_external_data_is_refused(tmp_path: Path) -> None:
    spec = load(tiny_model.write(tmp_path))
    onnx.save(tiny_model.source(), spec.onnx_path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    attach(spec)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(GraphError):
        attach(spec)


@pytest.mark.parametrize(
    "anchors", [np.zeros((8, 3), np.float32), np.ones((9, 4), np.float32), np.zeros((8, 4), np.float32), "text"]
)
def test_wrong_anchors_are_refused(tmp_path: Path, anchors: np.ndarray | str) -> None:
    spec = load(tiny_model.write(tmp_path))
    if isinstance(anchors, str):
        spec.anchors_path.write_text(anchors)
    else:
        np.save(spec.anchors_path, anchors)
    with pytest.raises((SpecError, GraphError)):
        attach(spec)
