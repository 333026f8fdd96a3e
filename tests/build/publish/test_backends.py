"""The CPU's backends and engines on a real server: what they refuse to load, and errors that stay with a request."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton_grpc
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

from build.errors import ServeError
from build.publish import backend, openvino
from build.serve import TritonServer
from tests.conftest import NO_OPENVINO, unregister

OPENVINO = "openvino"  # our backend with that engine
KINDS = (backend.NATIVE, OPENVINO, backend.PYTHON)
SIDE, MOST = 4, 2
CONFIG = f"""
max_batch_size: 8
input {{ name: "images" data_type: TYPE_UINT8 dims: [{SIDE}, {SIDE}, 3] }}
input {{ name: "score_threshold" data_type: TYPE_FP32 dims: [1] }}
input {{ name: "iou_threshold" data_type: TYPE_FP32 dims: [1] }}
output {{ name: "num_detections" data_type: TYPE_INT32 dims: [1] }}
output {{ name: "detection_boxes" data_type: TYPE_FP32 dims: [{MOST}, 4] }}
output {{ name: "detection_scores" data_type: TYPE_FP32 dims: [{MOST}] }}
output {{ name: "detection_classes" data_type: TYPE_INT32 dims: [{MOST}] }}
instance_group {{ count: 1 kind: KIND_CPU }}
parameters {{ key: "contract" value {{ string_value: "1" }} }}
parameters {{ key: "threads" value {{ string_value: "1" }} }}
"""
BRIGHT = 200  # an image whose first byte is more makes either engine fail


def small_model() -> onnx.ModelProto:
    """Answers what it was sent: boxes = score_threshold, scores = iou_threshold, classes = the image's first byte."""
    constants = {
        "first": np.array([0, 0, 0], np.int64),
        "end": np.array([1, 1, 1], np.int64),
        "axes": np.array([1, 2, 3], np.int64),
        "flat": np.array([-1, 1], np.int64),
        "table": np.arange(BRIGHT + 1, dtype=np.int32),
        "most": np.array(BRIGHT, np.int32),
        "one": np.array([1], np.int64),
        "to_boxes": np.array([1, MOST, 4], np.int64),
        "to_scores": np.array([1, MOST], np.int64),
        "column": np.array([-1, 1, 1], np.int64),
    }
    nodes = [
        helper.make_node("Slice", ["images", "first", "end", "axes"], ["corner"]),
        helper.make_node("Reshape", ["corner", "flat"], ["byte"]),
        helper.make_node("Cast", ["byte"], ["number"], to=TensorProto.INT32),
        helper.make_node("Cast", ["byte"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["known"]),  # ONNX Runtime checks the index
        helper.make_node("Greater", ["number", "most"], ["brighter"]),
        helper.make_node("Cast", ["brighter"], ["more"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["more"], ["any"], keepdims=0),
        helper.make_node("Add", ["any", "one"], ["times"]),
        helper.make_node("Concat", ["times", "one"], ["repeats"], axis=0),
        helper.make_node("Tile", ["known", "repeats"], ["num_detections"]),  # OpenVINO answers twice the rows
        helper.make_node("Tile", ["num_detections", "to_scores"], ["detection_classes"]),
        helper.make_node("Tile", ["iou_threshold", "to_scores"], ["detection_scores"]),
        helper.make_node("Reshape", ["score_threshold", "column"], ["score_column"]),
        helper.make_node("Tile", ["score_column", "to_boxes"], ["detection_boxes"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", SIDE, SIDE, 3]),
            helper.make_tensor_value_info("score_threshold", TensorProto.FLOAT, ["batch", 1]),
            helper.make_tensor_value_info("iou_threshold", TensorProto.FLOAT, ["batch", 1]),
        ],
        [
            helper.make_tensor_value_info("num_detections", TensorProto.INT32, ["batch", 1]),
            helper.make_tensor_value_info("detection_boxes", TensorProto.FLOAT, ["batch", MOST, 4]),
            helper.make_tensor_value_info("detection_scores", TensorProto.FLOAT, ["batch", MOST]),
            helper.make_tensor_value_info("detection_classes", TensorProto.INT32, ["batch", MOST]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


@dataclass(frozen=True)
class Kind:
    """What runs a model: the backend by Triton's name for it, with an engine."""

    backend: str
    engine: str = "onnxruntime"

    @property
    def name(self) -> str:
        """The engine's, as its errors have it."""
        return "OpenVINO" if self.engine == OPENVINO else "ONNX Runtime"


def publish(repository: Path, name: str, kind: Kind, config: str = CONFIG) -> Path:
    """A model folder with the small model; returns its version folder."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    onnx.save(small_model(), version / "model.onnx")
    for file, source in backend.prepare(kind.backend, engine=kind.engine or "onnxruntime").files.items():
        shutil.copy(source, version / file)
    engine = f'parameters {{ key: "engine" value {{ string_value: "{kind.engine}" }} }}' if kind.engine else ""
    (repository / name / "config.pbtxt").write_text(f'name: "{name}" backend: "{kind.backend}" {config} {engine}')
    return version


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Each in turn; ours only where it can be compiled, OpenVINO only where it is installed."""
    if request.param == backend.PYTHON:
        return Kind(backend.PYTHON)
    request.getfixturevalue("native")
    if request.param == OPENVINO and not openvino.installed():
        pytest.skip(NO_OPENVINO)
    return Kind(backend.NATIVE, OPENVINO if request.param == OPENVINO else "onnxruntime")


REFUSED = {
    "contract": (
        '"contract" value { string_value: "1"',
        '"contract" value { string_value: "2"',
        r"speaks contract '2'",
    ),
    "input": (
        'input { name: "iou_threshold" data_type: TYPE_FP32 dims: [1] }',
        "",
        r"has the inputs .*model\.onnx has|has no iou_threshold, model\.onnx has",
    ),
    "output": (
        'output { name: "num_detections" data_type: TYPE_INT32 dims: [1] }',
        "",
        r"has the outputs \['detection_b|has no num_detections, model\.onnx has",
    ),
    "type": (
        'detection_classes" data_type: TYPE_INT32',
        'detection_classes" data_type: TYPE_FP32',
        r"detection_classes is (TYPE_)?FP32 .*in config\.pbtxt and (tensor\(int32\)|INT32 \[2\]) in model\.onnx",
    ),
    "size": (
        f"dims: [{SIDE}, {SIDE}, 3]",
        f"dims: [{SIDE}, 5, 3]",
        r"images is .*\[4, ?5, ?3\].* in config\.pbtxt and .*4, ?4, ?3\] in model\.onnx",
    ),
    "rank": (
        'detection_scores" data_type: TYPE_FP32 dims: [2]',
        'detection_scores" data_type: TYPE_FP32 dims: [2, 1]',
        r"detection_scores is .*\[2, ?1\]",
    ),
    "threads": (
        '"threads" value { string_value: "1"',
        '"threads" value { string_value: "many"',
        r"threads is 'many', expected a whole number",
    ),
}

OF_OURS = {
    "engine": ("engine", "other", "expected onnxruntime or openvino"),
    "runners": ("runners", "0", "whole number"),
}


@pytest.mark.triton
def test_what_does_not_fit_is_refused_with_its_reason(kind: Kind, tmp_path: Path, traces: Any) -> None:
    """All broken models on one server: each is named with what is wrong with it."""
    for name, (old, new, _) in REFUSED.items():
        assert old in CONFIG
        publish(tmp_path, name, kind, CONFIG.replace(old, new))
    (publish(tmp_path, "missing", kind) / "model.onnx").unlink()
    (publish(tmp_path, "corrupt", kind) / "model.onnx").write_bytes(b"no ONNX")
    more = f'{CONFIG} output {{ name: "more" data_type: TYPE_FP32 dims: [1] }}'
    publish(tmp_path, "more", kind, more)
    for name, content in (("changed", b"another file"), ("whole", small_model().SerializeToString())):
        digest = hashlib.sha256(content).hexdigest()
        parameter = f'parameters {{ key: "model_sha256" value {{ string_value: "{digest}" }} }}'
        publish(tmp_path, name, kind, f"{CONFIG} {parameter}")
    ours = OF_OURS if kind.backend == backend.NATIVE else {}
    for name, (key, value, _) in ours.items():
        parameter = f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'
        publish(tmp_path, name, replace(kind, engine="") if key == "engine" else kind, f"{CONFIG} {parameter}")
    with pytest.raises(ServeError) as caught:
        TritonServer(tmp_path).start()
    reasons = dict(re.findall(r"^model (\w+) did not load: (.*)$", caught.value.what, re.MULTILINE))
    assert set(reasons) == {*REFUSED, *ours, "missing", "corrupt", "more", "changed"}
    for name, (_, _, reason) in {**REFUSED, **ours}.items():
        assert re.search(reason, reasons[name]), (name, reasons[name])
    assert "model.onnx is missing: publish the model again" in reasons["missing"]
    assert re.search("protobuf parsing failed|OpenVINO failed: .*model format", reasons["corrupt"])
    assert "is not the file that was published (SHA-256 differs)" in reasons["changed"]
    assert re.search("has the outputs .*'more'|has 8 inputs and outputs, model.onnx has 7", reasons["more"])


@pytest.fixture(scope="module")
def server(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """The small model alone, as instances side by side, and behind a batcher that hands over several requests.

    After the last test all of them must still be whole.
    """
    repository = tmp_path_factory.mktemp("small")
    publish(repository, "small", kind)
    publish(repository, "batched", kind, f"{CONFIG} dynamic_batching {{ max_queue_delay_microseconds: 300000 }}")
    given = '"threads" value {{ string_value: "{}"'
    for threads in (1, 2):
        config = CONFIG.replace("count: 1", "count: 3").replace(given.format(1), given.format(threads))
        publish(repository, f"three_of_{threads}", kind, config)
    one = 'parameters { key: "runners" value { string_value: "1" } }'
    publish(repository, "three_for_one", kind, CONFIG.replace("count: 1", "count: 3") + one)
    with TritonServer(repository) as server:
        yield server
        server.check()


def request(byte: int, score: float = 0.25, iou: float = 0.5, batch: int = 1) -> list[Any]:
    arrays = {
        "images": np.full((batch, SIDE, SIDE, 3), byte, np.uint8),
        "score_threshold": np.full((batch, 1), score, np.float32),
        "iou_threshold": np.full((batch, 1), iou, np.float32),
    }
    return [
        triton_grpc.InferInput(name, list(array.shape), "UINT8" if name == "images" else "FP32").set_data_from_numpy(
            array
        )
        for name, array in arrays.items()
    ]


@pytest.mark.triton
def test_a_failing_request_leaves_the_others_of_its_call_alone(server: TritonServer, kind: Kind) -> None:
    sent = {
        "a": request(1),
        "bright": request(BRIGHT + 1),
        "b": request(2, 0.5, 0.75, batch=2),
        "nan": request(3, float("nan")),
        "c": request(4),
        "above": request(5, iou=1.25),
    }
    answers: SimpleQueue[tuple[str, Any, Any]] = SimpleQueue()
    with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
        before = client.get_inference_statistics("batched", as_json=True)
        for name, inputs in sent.items():
            client.async_infer("batched", inputs, lambda result, error, name=name: answers.put((name, result, error)))
        received = {name: (result, error) for name, result, error in (answers.get(timeout=30) for _ in sent)}
        after = client.get_inference_statistics("batched", as_json=True)

    def executions(statistics: Any) -> int:
        return int(statistics["model_stats"][0].get("execution_count", 0))

    done = executions(after) - executions(before)
    if kind.backend == backend.PYTHON:
        assert done < 3, "the requests were not handed over together"
    else:
        assert done == 3  # each request runs alone, and is counted so
    for name, byte, score, iou, batch in (("a", 1, 0.25, 0.5, 1), ("b", 2, 0.5, 0.75, 2), ("c", 4, 0.25, 0.5, 1)):
        result, error = received[name]
        assert error is None, (name, error)
        np.testing.assert_array_equal(result.as_numpy("num_detections"), np.full((batch, 1), byte, np.int32))
        np.testing.assert_array_equal(result.as_numpy("detection_classes"), np.full((batch, MOST), byte, np.int32))
        np.testing.assert_array_equal(result.as_numpy("detection_boxes"), np.full((batch, MOST, 4), score, np.float32))
        np.testing.assert_array_equal(result.as_numpy("detection_scores"), np.full((batch, MOST), iou, np.float32))
    assert "score_threshold must lie in 0..1, got [nan]" in str(received["nan"][1])
    assert "iou_threshold must lie in 0..1, got [1.25]" in str(received["above"][1])
    assert re.search(f"{kind.name} failed.*: .*(data bounds|has 16 bytes, expected 8)", str(received["bright"][1]))


@pytest.mark.triton
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_the_thresholds_are_allowed(server: TritonServer, value: float) -> None:
    with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
        answer = client.infer("small", request(7, value, value))
    assert answer.as_numpy("num_detections").tolist() == [[7]]


@pytest.mark.triton
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1e-7, 1.0000001])
@pytest.mark.parametrize("name", ["score", "iou"])
def test_thresholds_outside_are_refused(server: TritonServer, name: str, value: float) -> None:
    with (
        closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client,
        pytest.raises(InferenceServerException, match=rf"INVALID_ARGUMENT.*{name}_threshold must lie in 0\.\.1"),
    ):
        client.infer("small", request(7, **{name: value}))


@pytest.mark.triton
def test_only_what_was_asked_for_is_answered(server: TritonServer) -> None:
    wanted = ["detection_scores", "num_detections"]
    with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
        outputs = [triton_grpc.InferRequestedOutput(name) for name in wanted]
        answer = client.infer("small", request(7, 0.5, 0.75, batch=2), outputs=outputs)
    assert sorted(output.name for output in answer.get_response().outputs) == wanted
    assert answer.as_numpy("num_detections").tolist() == [[7], [7]]
    assert answer.as_numpy("detection_scores").tolist() == [[0.75, 0.75], [0.75, 0.75]]


@pytest.mark.triton
@pytest.mark.parametrize("offset", [0, 1, 4, 16])
def test_tensors_lie_anywhere_in_shared_memory(server: TritonServer, offset: int) -> None:
    """Kernels may want aligned memory; a client need not give it."""
    name, size = f"ssd-test-{os.getpid()}", 4096
    sent = {entry.name(): np.frombuffer(entry._get_content(), np.uint8) for entry in request(9, 0.5, 0.25, batch=3)}
    sizes = {"num_detections": 3 * 4, "detection_boxes": 3 * MOST * 16, "detection_scores": 3 * MOST * 4}
    kinds = {"num_detections": np.int32, "detection_boxes": np.float32, "detection_scores": np.float32}
    handle = shm.create_shared_memory_region(name, f"/{name}", size)
    at, places = offset, {}
    for tensor, length in {**{key: len(data) for key, data in sent.items()}, **sizes}.items():
        places[tensor] = (at, length)
        at += length + 16 - length % 16  # keeps the offset's remainder
    try:
        for tensor, data in sent.items():
            shm.set_shared_memory_region(handle, [data], offset=places[tensor][0])
        with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
            client.register_system_shared_memory(name, f"/{name}", size)
            inputs = request(9, 0.5, 0.25, batch=3)
            for entry in inputs:
                entry.set_shared_memory(name, places[entry.name()][1], places[entry.name()][0])
            outputs = [triton_grpc.InferRequestedOutput(tensor) for tensor in sizes]
            for output in outputs:
                output.set_shared_memory(name, places[output.name()][1], places[output.name()][0])
            client.infer("small", inputs, outputs=outputs)
            unregister(client, name)
        answered = {
            tensor: shm.get_contents_as_numpy(handle, kind, [3, places[tensor][1] // 12], places[tensor][0]).copy()
            for tensor, kind in kinds.items()
        }
    finally:
        shm.destroy_shared_memory_region(handle)
    assert (answered["num_detections"] == 9).all()
    assert (answered["detection_boxes"] == 0.5).all()
    assert (answered["detection_scores"] == 0.25).all()


@pytest.mark.triton
@pytest.mark.parametrize("model", ["three_of_1", "three_of_2", "three_for_one"])
def test_instances_answer_side_by_side(server: TritonServer, model: str) -> None:
    """Three of them, which share what they can, or wait for one runner; every answer is its own request's."""
    answers: SimpleQueue[tuple[int, Any, Any]] = SimpleQueue()
    with closing(triton_grpc.InferenceServerClient(server.grpc_url)) as client:
        for number in range(BRIGHT):
            client.async_infer(
                model,
                request(number, batch=1 + number % 8),
                lambda result, error, number=number: answers.put((number, result, error)),
            )
        for number, result, error in (answers.get(timeout=30) for _ in range(BRIGHT)):
            assert error is None, (number, error)
            assert result.as_numpy("num_detections").tolist() == [[number]] * (1 + number % 8)
    server.check()
