"""Equalised channels: the same answers, ranges that one scale fits, and what must not be scaled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from build.gate import datasets
from build.quantization import equalisation, qdq
from build.session import runner
from build.spec import Spec, load
from tests.build import pictures, tiny_model
from tests.build.quantization.operators import BODIES, network


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    pictures.write(folder, 24, tiny_model.LABELS)
    return folder


def spec_of(folder: Path, shown: Path, model: onnx.ModelProto) -> Spec:
    path = tiny_model.write(folder / "tiny", model)
    path.write_text(f'{path.read_text()}\n[data]\ncalibration = "{shown}"\n')
    return load(path)


def planes(spec: Spec, pixels: np.ndarray) -> np.ndarray:
    mean, deviation = np.array(spec.input.mean, np.float32), np.array(spec.input.std, np.float32)
    return np.ascontiguousarray(((pixels - mean) / deviation).astype(np.float32).transpose(0, 3, 1, 2))


def activations(model: onnx.ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in model.graph.node[:-1])
    return dict(runner(probe)({model.graph.input[0].name: images}))


def scalable(model: onnx.ModelProto) -> list[str]:
    """The activations that a Conv reads and that can be scaled."""
    found = equalisation.channels(model)
    return sorted({conv.input[0] for conv in qdq.convs(model) if found.any(conv.input[0])})


# How many activations can be scaled: by whether what lies between two Convs is homogeneous.
SCALABLE = {"relu": 3, "relu6": 3, "leakyrelu": 3, "prelu": 3, "residual": 4, "bottleneck": 6, "depthwise": 3, "pad": 3}
SCALABLE |= {"hardswish": 2, "silu": 2, "concat": 3, "shared_weights": 0, "squeeze_excite": 3, "resize": 3, "einsum": 1}
SCALABLE |= {"conv_transpose": 2, "matmul": 0, "gemm": 0, "appended_channels": 4, "split": 4}


@pytest.mark.parametrize("body", BODIES)
def test_the_answers_stay_and_the_ranges_fit(body: str, shown: Path, tmp_path: Path) -> None:
    source = qdq.fold(network(body))
    spec = spec_of(tmp_path, shown, source)
    assert len(scalable(source)) == SCALABLE[body]
    seen = datasets.calibration(spec, tmp_path)
    after = equalisation.equalised(spec, source, seen)
    images = planes(spec, np.concatenate(list(datasets.arrays(seen, spec.input, 8))))
    exact, found = activations(source, images), activations(after, images)
    for head in ("box_deltas", "class_logits"):
        np.testing.assert_allclose(found[head], exact[head], rtol=1e-3, atol=1e-4)
    together = equalisation.channels(source)
    classes = [set(together.classes[name].tolist()) for name in scalable(source)]
    for name in scalable(source):
        largest = [np.abs(values[name]).max((0, 2, 3)) for values in (exact, found)]
        spread = [np.log(each[each > 0]).std() for each in largest]
        own = together.classes[name]
        alone = sum(bool(set(own.tolist()) & other) for other in classes) == 1
        assert spread[1] <= spread[0] + 1e-3 or not alone
        end = np.where(np.isfinite(together.tops[own]), together.tops[own], largest[0].max())
        assert largest[1].max() <= end.max() * 1.001, "the scale got coarser"


def test_a_value_beyond_calibration_is_clipped_as_int8_would(shown: Path, tmp_path: Path) -> None:
    source = qdq.fold(network("relu6"))
    spec = spec_of(tmp_path, shown, source)
    after = equalisation.equalised(spec, source, datasets.calibration(spec, tmp_path))
    (relu6,) = (node.output[0] for node in source.graph.node if node.op_type == "Clip")
    assert relu6 in scalable(source)
    seen = planes(spec, np.concatenate(list(datasets.arrays(datasets.calibration(spec, tmp_path), spec.input, 8))))
    largest = np.abs(activations(source, seen)[relu6]).max((0, 2, 3))
    factor = np.abs(activations(after, seen)[relu6]).max((0, 2, 3)) / np.maximum(largest, 1e-9)
    beyond = activations(after, 10 * seen)[relu6].max((0, 2, 3)) / np.maximum(factor, 1e-9)
    grown = (largest > 0.2) & (largest < 5)
    assert grown.any()
    np.testing.assert_allclose(beyond[grown], largest[grown], rtol=1e-3)


def read_elsewhere(model: onnx.ModelProto) -> None:
    """An activation that something else reads, too."""
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Relu")
    model.graph.node.append(helper.make_node("Sigmoid", [name], ["elsewhere"]))


def computed_weights(model: onnx.ModelProto) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and node.input[0] != "images")
    model.graph.node.insert(0, helper.make_node("Neg", [conv.input[1]], ["computed"]))
    conv.input[1] = "computed"


def offset_added(model: onnx.ModelProto) -> None:
    """A constant added behind a Relu: not homogeneous."""
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "offset"))
    for node in model.graph.node:
        node.input[:] = ["shifted" if name == relu.output[0] else name for name in node.input]
    place = list(model.graph.node).index(relu) + 1
    model.graph.node.insert(place, helper.make_node("Add", [relu.output[0], "offset"], ["shifted"]))


@pytest.mark.parametrize("change", [read_elsewhere, computed_weights, offset_added])
def test_what_is_not_homogeneous_is_left_alone(
    change: Callable[[onnx.ModelProto], None], shown: Path, tmp_path: Path
) -> None:
    source = network("relu")
    before = len(scalable(source))
    change(source)
    spec = spec_of(tmp_path, shown, network("relu"))
    assert len(scalable(source)) < before
    after = equalisation.equalised(spec, qdq.fold(source), datasets.calibration(spec, tmp_path))
    images = np.random.default_rng(0).normal(0, 1, (4, 3, 8, 8)).astype(np.float32)
    exact, found = (runner(model)({"images": images}) for model in (source, after))
    for name, right in exact.items():
        np.testing.assert_allclose(found[name], right, rtol=1e-3, atol=1e-4)


def test_who_asks_for_a_shape_only_does_not_stand_in_the_way() -> None:
    source = network("resize")
    before = scalable(source)
    (resize,) = (node for node in source.graph.node if node.op_type == "Resize")
    place = list(source.graph.node).index(resize)
    two = numpy_helper.from_array(np.array([1, 1, 2, 2], np.int64), "two")
    source.graph.initializer.append(two)
    source.graph.node.insert(place, helper.make_node("Shape", [resize.input[0]], ["shape"]))
    source.graph.node.insert(place + 1, helper.make_node("Mul", ["shape", "two"], ["sizes"]))
    source.graph.node[place + 2].input[:] = [resize.input[0], "", "", "sizes"]
    assert scalable(source) == before
