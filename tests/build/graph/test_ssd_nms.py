"""The ONNX function against the brute-force oracle, and what the function promises beyond its numbers."""

from __future__ import annotations

import collections
import functools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from build import contract
from build.contract import Nms
from build.errors import GraphError
from build.graph import ssd_nms
from build.session import session
from tests import ssd_nms_oracle as oracle
from tests.ssd_nms_oracle import realistic


def model_of(nms: Nms, *, opset: int = 17) -> onnx.ModelProto:
    """A model of nothing but the SSDNMS node."""
    names = contract.NMS_INPUTS + (contract.THRESHOLDS if nms.runtime_thresholds else ())
    shapes = {"box_deltas": ["B", "N", 4], "class_logits": ["B", "N", "C"], "anchors": ["N", 4]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes.get(name, ["B", 1])) for name in names]
    kinds = (TensorProto.INT32, TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT32)
    outputs = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in zip(
            contract.OUTPUTS, kinds, (["B", 1], ["B", "K", 4], ["B", "K"], ["B", "K"]), strict=True
        )
    ]
    graph = helper.make_graph([], "nms", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    ssd_nms.attach(model, ssd_nms.node(nms, names))
    return model


def session_of(model: onnx.ModelProto) -> Any:
    return session(model, threads=1)


@functools.cache
def authored(structure: Nms) -> onnx.ModelProto:
    return model_of(structure)


@functools.cache
def run(case: oracle.Case) -> oracle.Outputs:
    """The function's answer, kept for other tests.

    Authoring takes longer than running, so cases of one structure share a function; their numbers are the node's.
    """
    numbers = {"score_threshold": 0.5, "iou_threshold": 0.5, "max_detections": 7, "box_scales": (1.0, 2.0, 3.0, 4.0)}
    capped = min(case.nms.topk_per_class, 1)
    model = onnx.ModelProto()
    model.CopyFrom(authored(replace(case.nms, **numbers, topk_per_class=capped)))
    if case.box_deltas.dtype == np.float16:
        for value in model.graph.input[:2]:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    written = model.graph.node[0]
    written.CopyFrom(ssd_nms.node(case.nms, written.input))
    assert ssd_nms.find(model) == written
    return tuple(session_of(model).run(None, case.inputs()))


def same_bits(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(x.tobytes() == y.tobytes() and x.shape == y.shape for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_agrees_with_the_oracle_on_1000_cases() -> None:
    tally = collections.Counter(oracle.agree(case, run(case)) for case in oracle.cases(1000))
    assert tally.total() == 1000
    assert tally["exact"] >= 1000 / 6, tally  # activation none with corner boxes must be exact, and more can be
    assert tally["ambiguous"] <= 1000 // 50, tally


def test_the_cases_hold_what_they_are_for() -> None:
    kinds = collections.Counter()
    near = 0
    for case in oracle.cases(260):
        (number, *_), ambiguous = oracle.expected(case)
        kinds[next(kind for kind in oracle.KINDS if f" {kind} " in case.name)] += int(number.sum())
        near += ambiguous
    assert set(kinds) == set(oracle.KINDS)
    assert min(kinds.values()) >= 20, kinds
    assert near <= 26


@pytest.mark.parametrize("fault", ["class", "score", "order", "box", "number"])
def test_the_comparison_can_fail(fault: str) -> None:
    case = next(c for c in oracle.cases(50) if oracle.expected(c)[0][0].min() >= 2 and not oracle.expected(c)[1])
    number, boxes, scores, classes = (array.copy() for array in oracle.expected(case)[0])
    if fault == "class":
        classes[0, 0] += 1
    elif fault == "score":
        scores[0, 0] += 1e-4
    elif fault == "order":
        boxes[0, [0, 1]], scores[0, [0, 1]] = boxes[0, [1, 0]], scores[0, [1, 0]]
    elif fault == "box":
        boxes[0, 1, 2] += 1e-3
    else:
        number[0] -= 1
    with pytest.raises(AssertionError):
        oracle.agree(case, (number, boxes, scores, classes))


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_row_of_a_batch_equals_the_image_alone(activation: str, agnostic: bool) -> None:
    nms = Nms(score_threshold=0.3, topk_per_class=100, score_activation=activation, class_agnostic=agnostic)
    session, inputs = session_of(model_of(nms)), realistic(rows=8)
    inputs["class_logits"][3] = -50  # a row without a detection between the others
    batch = session.run(None, inputs)
    assert batch[0].max() > 10
    for row in range(8):
        alone = {name: value if name == "anchors" else value[row : row + 1] for name, value in inputs.items()}
        assert same_bits([output[row : row + 1] for output in batch], session.run(None, alone)), row
    assert same_bits(batch, session.run(None, inputs))


def test_thresholds_of_one_row_do_not_touch_another() -> None:
    session, inputs = session_of(model_of(Nms(runtime_thresholds=True))), realistic(rows=1)
    inputs = {name: value if name == "anchors" else np.repeat(value, 4, 0) for name, value in inputs.items()}
    scores = np.array([[0.3], [0.6], [np.nan], [0.3]], np.float32)
    ious = np.array([[0.45], [0.2], [0.45], [7.0]], np.float32)  # out of 0..1: acts as 1, and breaks no batch
    batch = session.run(None, {**inputs, "score_threshold": scores, "iou_threshold": ious})
    for row, (score, iou) in enumerate([(0.3, 0.45), (0.6, 0.2), (1.0, 0.45), (0.3, 1.0)]):
        fixed = session_of(model_of(Nms(score_threshold=score, iou_threshold=iou)))
        alone = {name: value if name == "anchors" else value[:1] for name, value in inputs.items()}
        assert same_bits([output[row : row + 1] for output in batch], fixed.run(None, alone)), row
    assert batch[0][:, 0].tolist()[2] == 0


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("nms", [Nms(topk_per_class=9), Nms(background_class=-1, class_agnostic=True)])
def test_passes_the_checker_at_every_opset(nms: Nms, opset: int) -> None:
    model = model_of(nms, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert session_of(model).run(None, realistic())[0][0, 0] > 10


def test_numbers_are_read_from_the_node() -> None:
    model = model_of(Nms())
    changed = replace(Nms(), score_threshold=0.5, iou_threshold=0.1, max_detections=7, box_scales=(1.0, 2.0, 3.0, 4.0))
    model.graph.node[0].CopyFrom(ssd_nms.node(changed, contract.NMS_INPUTS))
    ssd_nms.find(model)
    inputs = realistic()
    assert same_bits(session_of(model).run(None, inputs), session_of(model_of(changed)).run(None, inputs))


@pytest.mark.parametrize(
    "change", [{"score_activation": "none"}, {"class_agnostic": True}, {"background_class": 3}, {"topk_per_class": 5}]
)
def test_a_node_that_disagrees_with_its_function_is_found(change: dict[str, object]) -> None:
    model = model_of(Nms())
    model.graph.node[0].CopyFrom(ssd_nms.node(replace(Nms(), **change), contract.NMS_INPUTS))
    with pytest.raises(GraphError, match="was authored for"):
        ssd_nms.find(model)


@pytest.mark.parametrize(("name", "value"), [("score_threshold", 1.5), ("box_coding", "cornr"), ("max_detections", 0)])
def test_a_node_out_of_range_is_found(name: str, value: object) -> None:
    model = model_of(Nms())
    attribute = next(a for a in model.graph.node[0].attribute if a.name == name)
    attribute.CopyFrom(helper.make_attribute(name, value))
    with pytest.raises(GraphError, match=f"{name} is .*{value}"):
        ssd_nms.find(model)


def test_wrong_number_of_inputs() -> None:
    with pytest.raises(GraphError, match="has 3 inputs, but must have 5"):
        ssd_nms.node(Nms(runtime_thresholds=True), contract.NMS_INPUTS)


def test_nms_of_reads_what_node_wrote() -> None:
    for case in oracle.cases(60):
        names = contract.NMS_INPUTS + (contract.THRESHOLDS if case.nms.runtime_thresholds else ())
        written = ssd_nms.node(case.nms, names)
        read = ssd_nms.nms_of(written)
        assert ssd_nms.node(read, names) == written
        assert read.runtime_thresholds == case.nms.runtime_thresholds


def test_strip_function_leaves_the_node() -> None:
    model = model_of(Nms())
    stripped = ssd_nms.strip_function(model)
    assert (len(stripped.functions), len(model.functions)) == (0, 1)
    assert ssd_nms.find(stripped) == ssd_nms.find(model)
    with pytest.raises(GraphError, match="0 SSDNMS nodes"):
        ssd_nms.find(onnx.ModelProto())


def test_only_what_the_cap_leaves_is_decoded(tmp_path: Path) -> None:
    """Of 500 anchors, which all are candidates of both classes."""
    random = np.random.default_rng(0)
    anchors = random.uniform(0.1, 0.5, (500, 4)).astype(np.float32)
    logits = random.normal(0, 1, (1, 500, 3)).astype(np.float32)
    inputs = {"box_deltas": np.zeros((1, 500, 4), np.float32), "class_logits": logits, "anchors": anchors}
    model = model_of(Nms(score_threshold=0.01, lowest_score_threshold=0.001, topk_per_class=10))
    runs = session(model, threads=1, profile=tmp_path / "profile")
    assert runs.run(None, inputs)[0][0, 0] > 0
    events = json.loads(Path(runs.end_profiling()).read_bytes())
    sizes = [int(each["args"]["output_size"]) for each in events if each.get("args", {}).get("op_name") == "Exp"]
    assert 0 < max(sizes) <= 2 * 10 * 2 * 4, "bytes of the widths and heights of ten anchors a class"


def test_takes_no_more_than_2_ms_for_8732_anchors_and_21_classes() -> None:
    session, inputs = session_of(model_of(Nms(score_threshold=0.25, topk_per_class=200))), realistic()
    times = []
    for _ in range(50):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - start)
    assert min(times) <= 2e-3
