"""The benchmark's peer, EfficientNMS_TRT: its network, its process, and what a failure looks like.

The network's ordinary part runs in ONNX Runtime; the calls of TensorRT and CUDA run on stand-ins of their names; a real
TensorRT, where it is, creates the plugin, which needs no GPU. Nothing here runs the plugin itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from build.errors import EngineError
from build.tensorrt.cuda import Cuda
from plugins.bench import efficient_nms as peer
from tests.build.tensorrt.fake_tensorrt import VERSIONS, FakeTensorRT
from tests.build.tensorrt.test_plan import FakeCudart
from tests.plugins.test_tensorrt import python_with_tensorrt

SETTINGS = SimpleNamespace(
    score_threshold=0.05,
    iou_threshold=0.45,
    max_detections=100,
    topk_per_class=0,
    background_class=0,
    score_activation=0,
    box_coding=0,
    box_scales=(10.0, 10.0, 5.0, 5.0),
    class_agnostic=0,
)
BATCH, COUNT, CLASSES = 2, 7, 5


def inputs(kind: str, seed: int) -> SimpleNamespace:
    random = np.random.default_rng(seed)
    anchors = random.uniform(0.1, 0.9, (COUNT, 4)).astype(np.float32)
    deltas, logits = random.normal(size=(BATCH, COUNT, 4)), random.normal(size=(BATCH, COUNT, CLASSES)) * 3
    return SimpleNamespace(deltas=deltas.astype(kind), logits=logits.astype(kind), anchors=anchors)


@pytest.fixture(params=["float16", "float32"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """A case as the process gets it: two sets of inputs on disk."""
    kind = str(request.param)
    writer = peer.Peer(tmp_path, command=["false"])
    sets = [inputs(kind, seed) for seed in range(2)]
    writer._write(sets)
    names = ("score_threshold", "iou_threshold", "max_detections", "background_class", "box_scales")
    return {name: getattr(SETTINGS, name) for name in names} | {
        "batch": BATCH,
        "anchors": COUNT,
        "classes": CLASSES,
        "type": kind,
        "replays": 5,
        "sets": [writer._files(index) for index in range(2)],
        "anchors_file": str(tmp_path / "anchors"),
    }


def test_the_network_before_the_plugin_is_softmax_and_what_its_decoder_expects(case: dict[str, Any]) -> None:
    """Its box_coding 1 decodes centre = a + d * size and size * e^d: SSD's own after division by the scales."""
    model = peer.model(case)
    onnx.checker.check_model(model, full_check=True)
    node = model.graph.node[-1]
    assert (node.op_type, node.domain, len(node.input)) == ("EfficientNMS_TRT", "TRT", 3)
    assert {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} == pytest.approx(peer.attributes(case))
    before = onnx.ModelProto()
    before.CopyFrom(model)
    element = before.graph.input[0].type.tensor_type.elem_type
    del before.graph.node[-1], before.graph.output[:]
    for name in ("offsets", "scores", "anchors"):
        before.graph.output.append(onnx.helper.make_tensor_value_info(name, element, None))
    given_set = inputs(case["type"], 1)
    session = onnxruntime.InferenceSession(before.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"box_deltas": given_set.deltas, "class_logits": given_set.logits}
    offsets, scores, anchors = (np.asarray(value, np.float64) for value in session.run(None, given))

    tolerance = 4e-3 if case["type"] == "float16" else 1e-6
    powers = np.exp(given_set.logits.astype(np.float64))
    np.testing.assert_allclose(scores, powers / powers.sum(-1, keepdims=True), atol=tolerance)
    first = inputs(case["type"], 0).anchors.astype(np.float64)  # all sets share the first one's
    d = given_set.deltas.astype(np.float64)
    centre = first[:, :2] + d[..., :2] / 10 * first[:, 2:]
    size = first[:, 2:] * np.exp(d[..., 2:] / 5)
    np.testing.assert_allclose(anchors[..., :2] + offsets[..., :2] * anchors[..., 2:], centre, atol=tolerance)
    np.testing.assert_allclose(anchors[..., 2:] * np.exp(offsets[..., 2:]), size, atol=tolerance)


def fake(version: str, case: dict[str, Any], fields: set[str] | None = None, **options: Any) -> FakeTensorRT:
    """A stand-in whose engine finds 3 and 4 objects."""
    kind = "HALF" if case["type"] == "float16" else "FLOAT"
    table = {
        "box_deltas": ("INPUT", kind, (BATCH, COUNT, 4)),
        "class_logits": ("INPUT", kind, (BATCH, COUNT, CLASSES)),
        "num_detections": ("OUTPUT", "INT32", (BATCH, 1)),
        "detection_boxes": ("OUTPUT", kind, (BATCH, 100, 4)),
        "detection_scores": ("OUTPUT", kind, (BATCH, 100)),
        "detection_classes": ("OUTPUT", "INT32", (BATCH, 100)),
    }

    def execute(context: Any) -> bool:
        import ctypes

        numbers = np.array([3, 4], np.int32)
        ctypes.memmove(context.assigned["addresses"]["num_detections"], numbers.tobytes(), numbers.nbytes)
        return True

    standard: dict[str, Any] = {
        "creators": {(peer.NAME, "1")},
        "engine": lambda trt: trt.engine(table, []),
        "execute": execute,
    }
    trt = FakeTensorRT(version, **(standard | options))
    names = set(peer.attributes(case)) if fields is None else fields
    creator = SimpleNamespace(field_names=[SimpleNamespace(name=name) for name in names])

    def registry() -> Any:
        def find(name: str, number: str, namespace: str) -> Any:
            known: set[tuple[str, str]] = trt.options["creators"]  # type: ignore[assignment]
            return creator if (name, number) in known else None

        return trt._of("IPluginRegistry", get_creator=find, get_plugin_creator=find)

    trt.get_plugin_registry = registry  # type: ignore[method-assign]
    return trt


@pytest.mark.parametrize("version", VERSIONS)
def test_it_builds_and_times_every_set_in_one_graph(version: str, case: dict[str, Any]) -> None:
    trt, cudart = fake(version, case), FakeCudart()
    engine, seconds = peer.build(trt, case)
    assert seconds >= 0
    assert trt.seen.parsed.graph.node[-1].op_type == peer.NAME
    told = peer.run(Cuda(cudart), engine, case)
    assert told["us"] == told["us, fastest"] == 0.25 * 1000 / 2  # two calls in a graph
    assert told["detections per image"] == 3.5
    assert cudart.calls.count("cudaGraphLaunch") == 3 + 5
    assert cudart.memory == {}  # all given back
    order = [name for name in cudart.calls if "Capture" in name or "Graph" in name]
    assert order[:3] == ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
    assert order[-2:] == ["cudaGraphExecDestroy", "cudaGraphDestroy"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"creators": set()}, "has no plugin EfficientNMS_TRT of version 1"),
        ({"fields": {"score_threshold"}}, "has no attribute background_class, box_coding, iou_threshold"),
        ({"gpu": False, "says": ["CUDA 35"]}, "builder does not start: CUDA 35"),
        ({"faults": ((2, "no such importer"),)}, "parser refuses the network: no such importer"),
        ({"plan": None, "says": ["out of memory"]}, "could not build the engine: out of memory"),
        ({"engine": None}, "cannot read the plan"),
    ],
)
def test_what_tensorrt_refuses_has_a_reason(options: dict[str, Any], reason: str, case: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=reason):
        peer.build(fake(VERSIONS[-1], case, **options), case)


def test_what_fails_in_a_run_has_a_reason_and_leaves_nothing_behind(case: dict[str, Any]) -> None:
    cudart = FakeCudart()
    engine, _ = peer.build(fake(VERSIONS[-1], case, execute=lambda context: False), case)
    with pytest.raises(EngineError, match="cannot run the engine"):
        peer.run(Cuda(cudart), engine, case)
    assert cudart.memory == {}


def script(tmp_path: Path, *lines: str) -> list[str]:
    """A process in the place of the one with TensorRT."""
    path = tmp_path / "stand_in.py"
    path.write_text("\n".join(["import json, os, sys, time", *lines]))
    return [sys.executable, str(path)]


HELLO = "print(json.dumps({'tensorrt': '10.0'}), flush=True)"


def ask(running: peer.Peer, settings: Any = SETTINGS) -> dict[str, Any] | str:
    return running.measure("key", [inputs("float16", 0)], settings, 25)


def test_the_running_python_tells_why_it_cannot(tmp_path: Path) -> None:
    """The real process: no TensorRT, no cuda-python or no GPU here, or a figure where there is everything."""
    with peer.Peer(tmp_path / "inputs", python=sys.executable) as running:
        told = ask(running)
        if isinstance(told, dict):
            pytest.skip("there is a GPU with TensorRT here: nothing fails")
        assert told.startswith("not measured: ")
        assert any(words in told for words in ("tensorrt is not installed", "cuda-python", "GPU", "cannot be imported"))
        assert running.summary() == told
        assert ask(running) == told


def test_a_case_goes_there_and_its_figures_come_back(tmp_path: Path) -> None:
    echo = ("for line in sys.stdin:", "    print(json.dumps({'us': 5.0, 'case': json.loads(line)}), flush=True)")
    with peer.Peer(tmp_path / "inputs", command=script(tmp_path, HELLO, *echo)) as running:
        told = ask(running)
        assert isinstance(told, dict)
        case = told["case"]
        assert (case["batch"], case["anchors"], case["classes"], case["type"]) == (BATCH, COUNT, CLASSES, "float16")
        written = np.fromfile(case["sets"][0]["class_logits"], np.float16)
        assert (written == inputs("float16", 0).logits.ravel()).all()
        assert ask(running, SimpleNamespace(**(vars(SETTINGS) | {"topk_per_class": 400}))) == peer.not_measured(
            "the peer is set up for softmax, centre coding and one type of inputs, without a cap"
        )
        summary = running.summary()
        assert isinstance(summary, dict)
        assert summary["tensorrt"] == "10.0"
        assert "4096" in summary["caveats"][0]


def test_a_crash_costs_one_case(tmp_path: Path) -> None:
    mark = tmp_path / "crashed"
    lines = (
        HELLO,
        "for line in sys.stdin:",
        f"    if not os.path.exists({str(mark)!r}):",
        f"        open({str(mark)!r}, 'w').close(); os.abort()",
        "    print(json.dumps({'us': 5.0}), flush=True)",
    )
    with peer.Peer(tmp_path / "inputs", command=script(tmp_path, *lines)) as running:
        assert ask(running) == "not measured: the process with TensorRT ended with -6"
        assert ask(running) == {"us": 5.0}


def test_a_process_that_says_nothing_or_nonsense_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "TIME_LIMIT", 0.5)
    with peer.Peer(tmp_path / "inputs", command=script(tmp_path, "time.sleep(60)")) as running:
        assert str(ask(running)).startswith("not measured: no answer in")
    with peer.Peer(tmp_path / "inputs", command=script(tmp_path, "print('hm')")) as running:
        assert str(ask(running)).startswith("not measured: JSONDecodeError")
    with peer.Peer(tmp_path / "inputs", command=[str(tmp_path / "none")]) as running:
        assert str(ask(running)).startswith("not measured: FileNotFoundError")


@pytest.mark.tensorrt
def test_a_real_tensorrt_creates_the_plugin_from_these_attributes() -> None:
    probe = """
import json, sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import numpy as np, tensorrt as trt
from build.tensorrt import compat
from plugins.bench import efficient_nms as peer
case = json.loads(sys.argv[2])
said = []
logger = compat.logger(trt, lambda severity, text: said.append([severity, text]))
creator = peer.creator(trt, logger, case)
data = {k: np.array([v], np.int32 if isinstance(v, int) else np.float32) for k, v in peer.attributes(case).items()}
kinds = trt.PluginFieldType
fields = [trt.PluginField(k, v, kinds.INT32 if v.dtype == np.int32 else kinds.FLOAT32) for k, v in data.items()]
phase = (trt.TensorRTPhase.BUILD,) if hasattr(creator, "create_plugin") and hasattr(trt, "IPluginCreatorV3One") and (
    isinstance(creator, trt.IPluginCreatorV3One)) else ()
plugin = creator.create_plugin("nms", trt.PluginFieldCollection(fields), *phase)
state = bytes(plugin.serialize()) if hasattr(plugin, "serialize") else b""
print(json.dumps({"type": plugin.plugin_type if hasattr(plugin, "plugin_type") else peer.NAME,
    "outputs": plugin.num_outputs if hasattr(plugin, "num_outputs") else 4, "state": state.hex(),
    "errors": [text for severity, text in said if severity == "ERROR"]}))
"""
    names = ("score_threshold", "iou_threshold", "max_detections", "background_class")
    case = {name: getattr(SETTINGS, name) for name in names} | {"iou_threshold": 0.375, "score_threshold": 0.0625}
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [python_with_tensorrt(), "-c", probe, root, json.dumps(case)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["type"], told["outputs"], told["errors"]) == (peer.NAME, 4, [])
    if told["state"]:  # the parameters as it keeps them: thresholds first, then 100 boxes
        state = bytes.fromhex(told["state"])
        assert np.frombuffer(state[:8], np.float32).tolist() == [0.375, 0.0625]
        assert int.from_bytes(state[8:12], "little") == 100
        assert peer.CUT in np.frombuffer(state[: len(state) // 4 * 4], np.int32)
