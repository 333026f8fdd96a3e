"""Rounding by second moments: against all roundings of a small filter, and against the inputs of real graphs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from build.gate import datasets
from build.quantization import qdq, rounding
from build.session import runner
from tests.build import pictures, tiny_model
from tests.build.quantization.operators import network


def moments_of(inputs: np.ndarray) -> np.ndarray:
    """[G, P, K] → [G, K, K]."""
    return np.asarray(inputs.transpose(0, 2, 1) @ inputs, np.float64)


def test_close_to_the_best_of_all_roundings() -> None:
    """Nine weights have 2⁹ roundings up or down. The best of them is hardly better, the nearest one much worse."""
    rng = np.random.default_rng(0)
    channels = 40
    weights = rng.normal(0, 1, (channels, 1, 3, 3)).astype(np.float32)
    inputs = np.maximum(rng.normal(1, 0.5, (channels, 400, 1)) + rng.normal(0, 0.2, (channels, 400, 9)), 0)
    moments = moments_of(inputs)
    found = rounding.round_by(weights, moments)
    steps = qdq.weight_scales(weights, "int8").reshape(-1, 1, 1, 1)
    codes = found / steps
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-4)
    assert np.abs(codes).max() <= 127.001

    def loss(rounded: np.ndarray) -> np.ndarray:
        error = (rounded - weights).reshape(channels, 9).astype(np.float64)
        return np.asarray(np.einsum("ci,cij,cj->c", error, moments, error))

    low = np.floor(weights / steps)
    every = [
        loss(np.clip(low + np.array(up).reshape(1, 1, 3, 3), -127, 127) * steps)
        for up in itertools.product((0, 1), repeat=9)
    ]
    best, nearest = np.min(every, axis=0), loss(np.clip(np.round(weights / steps), -127, 127) * steps)
    assert best.sum() < 0.2 * nearest.sum()
    assert loss(found).sum() < 0.4 * nearest.sum()


def test_weights_of_fp8_lie_on_its_values_and_cost_less_than_the_nearest_ones() -> None:
    import ml_dtypes

    rng = np.random.default_rng(3)
    weights = rng.normal(0, 1, (32, 24, 3, 3)).astype(np.float32)
    moments = moments_of(np.maximum(rng.normal(0.5, 1, (1, 600, 24 * 9)), 0))
    found = rounding.round_by(weights, moments, "fp8")
    scales = qdq.weight_scales(weights, "fp8").reshape(-1, 1, 1, 1)
    nearest = qdq.representable(weights / scales, "fp8") * scales
    assert np.abs(nearest / scales).max() == pytest.approx(448)
    codes = found / scales
    np.testing.assert_allclose(codes, codes.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), rtol=1e-5, atol=1e-6)
    loss = []
    for rounded in (found, nearest):
        error = (rounded - weights).reshape(32, -1).astype(np.float64)
        loss.append(np.einsum("ci,ij,cj->", error, moments[0], error))
    assert loss[0] < 0.5 * loss[1]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    weights = rng.normal(0, 1, (6, 5, 3, 3)).astype(np.float32)
    moments = moments_of(np.maximum(rng.normal(1, 1, (1, 300, 45)), 0))
    whole = rounding.round_by(weights, moments)
    monkeypatch.setattr(rounding, "_BLOCK", 7)
    np.testing.assert_allclose(rounding.round_by(weights, 3 * moments), whole, rtol=1e-6)


CONVS: dict[str, dict[str, Any]] = {
    "plain": {"pads": [1, 1, 1, 1]},
    "strided": {"strides": [2, 2], "pads": [1, 0, 1, 2]},
    "dilated": {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
    "grouped": {"group": 2},
    "depthwise": {"group": 4, "pads": [1, 1, 1, 1]},
    "same_upper": {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    "same_lower": {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
}


@pytest.mark.parametrize("kind", CONVS)
def test_patches_are_what_the_conv_multiplies(kind: str) -> None:
    """Patches times weights, at every place, is what ONNX Runtime answers."""
    rng = np.random.default_rng(1)
    group = CONVS[kind].get("group", 1)
    weights = rng.normal(0, 1, (8, 4 // group, 3, 3)).astype(np.float32)
    conv = helper.make_node("Conv", ["x", "w"], ["y"], **CONVS[kind])
    x = rng.normal(0, 1, (4, 9, 10)).astype(np.float32)
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        [conv],
        "one",
        [tensor("x", TensorProto.FLOAT, [1, 4, 9, 10])],
        [tensor("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    right = runner(model)({"x": x[None]})["y"][0]
    patches = rounding._patches(conv, x, weights.shape, np.random.default_rng(0))
    assert patches.shape == (group, right[0].size, 36 // group)
    found = np.einsum("gpk,gmk->gmp", patches, weights.reshape(group, 8 // group, -1)).reshape(right.shape)
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)


def test_int8_of_a_graph_is_closer_than_with_the_nearest_steps(tmp_path: Path) -> None:
    from build.spec import load

    source = qdq.fold(network("relu", "bottleneck", "shared_weights"))
    path = tiny_model.write(tmp_path / "tiny", source)
    pictures.write(tmp_path / "tiny" / "pictures", 40, tiny_model.LABELS)
    path.write_text(f'{path.read_text()}\n[data]\ncalibration = "pictures"\n')
    spec = load(path)
    seen = datasets.calibration(spec, tmp_path)
    weights = rounding.rounded(spec, source, seen, "int8")
    assert set(weights) == {conv.input[1] for conv in qdq.convs(source)}
    pixels = np.concatenate(list(datasets.arrays(seen, spec.input, 8))).astype(np.float32)
    images = ((pixels - np.float32(spec.input.mean)) / np.float32(spec.input.std)).transpose(0, 3, 1, 2)
    errors = {}
    exact = runner(source)({"images": images})
    for name, given in (("nearest", None), ("moments", weights)):
        placed = qdq.quantize(source, dict.fromkeys(_names(source), 4.0), weights=given)
        alone = _weights_alone(placed.model)
        found = runner(alone, literal=True)({"images": images})
        errors[name] = sum(np.square(found[head] - exact[head]).mean() / exact[head].var() for head in exact)
    assert errors["moments"] < 0.6 * errors["nearest"]
    assert not rounding.rounded(spec, source, seen, "fp8"), "no Conv of so few channels has an FP8 kernel"


def _names(model: onnx.ModelProto) -> list[str]:
    return ["ssd/front/div", *(name for node in model.graph.node for name in node.output)]


def _weights_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the pairs of the activations."""
    held = {one.name for one in model.graph.initializer}
    pairs = {
        node.output[0].removesuffix("/q") + "/dq": node.input[0]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in held
    }
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            node.input[:] = [pairs.get(name, name) for name in node.input]
    return model


def test_a_version_is_stale_when_any_file_that_makes_a_quantised_graph_changes() -> None:
    """What candidates.py brings together, and what those bring, is what a published version depends on."""
    import ast

    from build.files import ROOT
    from build.publish import repository

    waiting, needed = ["candidates"], set[str]()
    while waiting:
        name = waiting.pop()
        needed.add(f"build/quantization/{name}.py")
        for node in ast.walk(ast.parse((ROOT / "build" / "quantization" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("build.quantization"):
                parts = (node.module or "").split(".")[2:] or [alias.name for alias in node.names]
                waiting += [part for part in parts if f"build/quantization/{part}.py" not in needed]
    assert needed <= set(repository._OF_TYPED)
