"""What the exporter makes is legal for NVIDIA's real ONNX parser and strongly typed builder, which need no GPU here.

TensorRT for RTX stands for TensorRT: the same parser, the same typing rules. It takes no plugins, so that it sees the
graph before SSDNMS; the node itself is looked at in tests/build/tensorrt/test_engine.py and tests/plugins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from build.contract import PRECISIONS
from build.files import ROOT
from build.graph import precision
from build.graph.attach import attach, before_nms, load_source
from build.quantization import qdq
from build.quantization.candidates import candidates
from build.spec import load
from tests.build import tiny_model
from tests.build.quantization.operators import BODIES, network
from tests.optional import optional

pytestmark = pytest.mark.tensorrt


@pytest.fixture(scope="module")
def rtx() -> Path:
    """The folder of TensorRT for RTX, installed from its lock on first use."""
    return optional("tensorrt_rtx")


def attached(path: Path) -> onnx.ModelProto:
    return before_nms(attach(load(path)))


def typed(kind: str) -> Callable[[Path], onnx.ModelProto]:
    """Makes the tiny model's graph in a precision, INT8 and FP8 calibrated on pictures of noise."""

    def make(path: Path) -> onnx.ModelProto:
        folder = path.parent / "calibration"
        if not folder.exists():
            folder.mkdir()
            random = np.random.default_rng(3)
            for i in range(4):
                Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
            path.write_text(path.read_text() + '\n[data]\ncalibration = "calibration"\n')
        (candidate,) = candidates(load(path), kind, path.parent / "artifacts", calibrators=("minmax",))
        return before_nms(candidate.graph)

    return make


def of_precision(network: onnx.ModelProto, kind: str) -> Callable[[Path], onnx.ModelProto]:
    """Makes a network's graph in a precision, clipped anywhere: no type depends on where."""

    def make(path: Path) -> onnx.ModelProto:
        source = qdq.fold(network)
        if kind in ("fp16", "bf16"):
            source = precision.half(source, kind)
        elif PRECISIONS[kind].quantised:
            clips = {name: 4.0 for node in source.graph.node for name in node.output} | {"ssd/front/div": 1.0}
            source = qdq.quantize(source, clips, kind=kind).model
        return before_nms(attach(load(path), source))

    return make


def mixed_types(path: Path) -> onnx.ModelProto:
    """FP16 weights on FP32 activations."""
    model = attached(path)
    weights = next(item for item in model.graph.initializer if item.name == "w")
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights).astype(np.float16), "w"))
    return model


def integer_bias(path: Path) -> onnx.ModelProto:
    """A bias in INT32 behind DequantizeLinear, as quantisers write it by default."""
    model = attached(path)
    nodes = model.graph.node
    place = next(i for i, node in enumerate(nodes) if node.name == "conv")
    for name, value in (("bias_q", np.zeros(6, np.int32)), ("bias_scale", np.float32(0.1))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    nodes.insert(place, helper.make_node("DequantizeLinear", ["bias_q", "bias_scale"], ["bias"], name="bias_dq"))
    nodes[place + 1].input.append("bias")
    return model


def unknown_operator(path: Path) -> onnx.ModelProto:
    model = attached(path)
    next(node for node in model.graph.node if node.name == "relu").op_type = "NoSuchOperator"
    return model


def fixed_batch(path: Path) -> onnx.ModelProto:
    model = attached(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    return model


_CHANNELS = dict.fromkeys(PRECISIONS, 8) | {"fp8": 24}  # TensorRT has no FP8 kernels for fewer than 17
CASES: dict[str, Callable[[Path], onnx.ModelProto]] = {
    **{kind: typed(kind) for kind in PRECISIONS},
    **{f"operators, {kind}": of_precision(tiny_model.with_operators(), kind) for kind in PRECISIONS},
    **{f"patterns, {kind}": of_precision(network(*BODIES, channels=_CHANNELS[kind]), kind) for kind in PRECISIONS},
    "mixed types": mixed_types,
    "integer bias": integer_bias,
    "unknown operator": unknown_operator,
    "fixed batch": fixed_batch,
}


def compiled(rtx: Path, spec: Path, models: list[Path]) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(rtx)])}
    script = str(Path(__file__).with_name("compile_with_rtx.py"))
    done = subprocess.run(
        [sys.executable, script, str(spec), *map(str, models)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        cwd=ROOT,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ended = {"error": f"the process ended with {done.returncode}: {done.stderr[-1000:]}"}
    return lines + [ended] * (len(models) - len(lines))


@pytest.fixture(scope="module")
def results(rtx: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of every case, compiled in one process."""
    folder = tmp_path_factory.mktemp("legality")
    spec = tiny_model.write(folder / "tiny")
    paths = []
    for number, make in enumerate(CASES.values()):
        paths.append(folder / f"{number}.onnx")
        onnx.save(make(spec), paths[-1])
    return dict(zip(CASES, compiled(rtx, spec, paths), strict=True))


@pytest.mark.parametrize("case", [kind for kind in CASES if kind.split(", ")[-1] in PRECISIONS])
def test_every_precision_is_legal_and_typed_as_the_contract_says(case: str, results: dict[str, dict[str, Any]]) -> None:
    assert "error" not in results[case], results[case]["error"]
    assert results[case]["types"] == {"images": "UINT8", "box_deltas": "FLOAT", "class_logits": "FLOAT"}
    assert results[case]["bytes"] > 1000


@pytest.mark.parametrize(
    ("case", "telling"),
    [
        ("mixed types", ("conv",)),
        ("integer bias", ("bias_dq",)),
        ("unknown operator", ("node 'relu' (NoSuchOperator; bn: FLOAT[batch,6,2,2])",)),
        ("fixed batch", ("profile 0 (batch 1 to 4)", "'images' has the fixed batch 3")),
    ],
)
def test_exporter_mistakes_are_refused_and_named(
    case: str, telling: tuple[str, ...], results: dict[str, dict[str, Any]]
) -> None:
    for part in telling:
        assert part in results[case].get("error", "it was built")


@pytest.mark.parametrize("spec", sorted(ROOT.glob("models/*/spec.toml")), ids=lambda path: path.parent.name)
def test_the_models_here_are_legal(spec: Path, rtx: Path, tmp_path: Path) -> None:
    onnx.save(attached(spec), tmp_path / "model.onnx")
    (result,) = compiled(rtx, spec, [tmp_path / "model.onnx"])
    assert "error" not in result, result["error"]
    assert result["types"] == {"images": "UINT8", "box_deltas": "FLOAT", "class_logits": "FLOAT"}


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8", "int8 beside fp16", "fp8"])
def test_every_precision_of_shapes_is_legal(kind: str, rtx: Path, tmp_path: Path) -> None:
    """As it is built but for the clipping, which no type depends on: every Conv but the named ones is quantised."""
    spec = load(ROOT / "models" / "shapes")
    source = qdq.fold(load_source(spec))
    if kind in ("fp16", "bf16"):
        typed_source = precision.half(source, kind)
    else:
        clips = {name: 4.0 for node in source.graph.node for name in node.output} | {"ssd/front/div": 1.0}
        excluded = spec.quantization.exclude_nodes
        placed = qdq.quantize(source, clips, kind=kind.split()[0], exclude=excluded)
        assert set(placed.nodes) == {conv.name for conv in qdq.quantisable(source, kind.split()[0])} - set(excluded)
        typed_source = precision.half(placed.model, "fp16") if kind.endswith("fp16") else placed.model
        constants = {constant.name: constant for constant in typed_source.graph.initializer}
        for node in typed_source.graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                zero = constants[node.input[2]]
                assert zero.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT8E4M3FN)
                assert not any(zero.raw_data)
    onnx.save(before_nms(attach(spec, typed_source)), tmp_path / "model.onnx")
    (result,) = compiled(rtx, spec.path, [tmp_path / "model.onnx"])
    assert "error" not in result, result["error"]
    assert result["types"] == {"images": "UINT8", "box_deltas": "FLOAT", "class_logits": "FLOAT"}


@pytest.mark.long
@pytest.mark.parametrize("body", BODIES)
def test_every_pattern_of_real_detectors_is_legal(body: str, rtx: Path, tmp_path: Path) -> None:
    """Each alone, in every precision: names the one that a builder refuses in the chain of all."""
    spec = tiny_model.write(tmp_path / "tiny")
    paths = []
    for kind in PRECISIONS:
        paths.append(tmp_path / f"{kind}.onnx")
        onnx.save(of_precision(network(body, channels=_CHANNELS[kind]), kind)(spec), paths[-1])
    for kind, result in zip(PRECISIONS, compiled(rtx, spec, paths), strict=True):
        assert "error" not in result, (kind, result["error"])


def folders_of_real_networks() -> list[Path]:
    """Imported models: those of models/, and of the folder that SSD_REAL_MODELS names (folders with a spec.toml)."""
    more = os.environ.get("SSD_REAL_MODELS")
    places = [ROOT / "models", *([Path(more)] if more else [])]
    found = [path.parent for place in places for path in sorted(place.glob("*/spec.toml"))]
    return [folder for folder in found if folder.name != "shapes"]


@pytest.mark.long
@pytest.mark.parametrize("kind", PRECISIONS)
def test_real_networks_are_legal(kind: str, rtx: Path, tmp_path: Path) -> None:
    """Detectors that people have are not in the repository: `./invoke import-model --from faces` brings one."""
    folders = folders_of_real_networks()
    if not folders:
        pytest.skip("needs imported models in models/ or in the folder that SSD_REAL_MODELS names")
    refused = []
    for folder in folders:
        graph = of_precision(load_source(load(folder)), kind)(folder / "spec.toml")
        onnx.save(graph, tmp_path / "model.onnx")
        (result,) = compiled(rtx, folder / "spec.toml", [tmp_path / "model.onnx"])
        if "error" in result:
            refused.append(f"{folder.name}: {result['error']}")
    print(f"{kind}: {len(folders) - len(refused)} of {len(folders)} built")
    assert not refused, "\n".join(refused)
