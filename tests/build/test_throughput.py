"""Which engine serves more pictures: real servers on two files, of which one is slow, broken or unable to answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from build import throughput
from build.contract import Target
from build.errors import ServeError
from build.graph.attach import attach
from build.publish import backend
from build.publish.engines import Choice
from build.spec import Spec, load
from tests.build import tiny_model

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return load(tiny_model.write(tmp_path / "models" / "tiny"))


@pytest.fixture
def both(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The file of each engine, of which ONNX Runtime's is the slower one; ONNX Runtime runs both here."""
    model = attach(spec)
    for engine in ("openvino", "onnxruntime"):
        (tmp_path / f"{engine}.onnx").write_bytes(model.SerializeToString())
        slow(model)
    served_by = backend.prepare()
    monkeypatch.setattr(backend, "prepare", lambda *arguments: served_by)
    monkeypatch.setattr(throughput, "ROUNDS", 3)
    monkeypatch.setattr(throughput, "SECONDS", 0.05)
    return {engine: tmp_path / f"{engine}.onnx" for engine in ("onnxruntime", "openvino")}


def slow(model: onnx.ModelProto) -> None:
    """Adds milliseconds of work to the scores, which stay the same."""
    (node,) = (node for node in model.graph.node if "detection_scores" in node.output)
    node.output[list(node.output).index("detection_scores")] = "scores"
    size = 600
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((size, size), np.float32), "zeros"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, 1], np.int64), "axes"))
    steps = [
        helper.make_node("ReduceSum", ["scores"], ["total"], keepdims=0),
        helper.make_node("Add", ["total", "zeros"], ["x0"]),
    ]
    steps += [helper.make_node("MatMul", [f"x{number}", "zeros"], [f"x{number + 1}"]) for number in range(4)]
    steps += [helper.make_node("ReduceSum", ["x4", "axes"], ["none"], keepdims=0)]
    model.graph.node.extend([*steps, helper.make_node("Add", ["scores", "none"], ["detection_scores"])])


def compare(spec: Spec, paths: dict[str, Path]) -> Choice:
    return throughput.compare(spec, Target("onnxruntime"), IMAGES, paths)


@pytest.mark.triton
def test_the_engine_that_serves_more_is_tried_first_and_both_figures_told(spec: Spec, both: dict[str, Path]) -> None:
    choice = compare(spec, both)
    assert choice.order == ("openvino", "onnxruntime")
    assert choice.served_ips["openvino"] > 1.5 * choice.served_ips["onnxruntime"] > 0
    assert all(f"{engine} {rate:.0f}" in choice.why for engine, rate in choice.served_ips.items())
    assert not choice.ms


@pytest.mark.triton
def test_an_engine_that_cannot_serve_its_file_is_not_chosen(spec: Spec, both: dict[str, Path]) -> None:
    both["openvino"].write_bytes(b"no model")
    choice = compare(spec, both)
    assert (choice.order, choice.served_ips) == (("onnxruntime",), {})
    assert "openvino does not serve this file: " in choice.why


def test_an_engine_that_fails_under_load_is_not_chosen(
    spec: Spec, both: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []

    def load(server: str, *arguments: object) -> float:
        loads.append(server)
        if loads.count("openvino") == 3:
            raise ServeError("it ended with code -11")
        return 100.0

    monkeypatch.setattr(throughput, "_start", lambda stack, spec, target, engine, *more: engine)
    monkeypatch.setattr(throughput, "_load", load)
    choice = compare(spec, both)
    assert choice.order == ("onnxruntime",)
    assert choice.why == "openvino does not serve this file: it ended with code -11"
    assert loads[:6] == ["onnxruntime", "openvino"] * 3, "the load goes to one after the other"
