"""Quantisation: folding, histograms, calibrators, the cache, where pairs are placed, and what is refused."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from build import contract
from build.errors import DataError, QuantizeError, WriteError
from build.gate import datasets
from build.graph.attach import attach, before_nms, load_source
from build.quantization import calibration, qdq
from build.session import runner
from build.spec import Spec, load
from tests.build import pictures, tiny_model
from tests.build.quantization.operators import clips_of, network


def tiny(folder: Path, data: str = 'calibration = "pictures"', count: int = 120) -> Spec:
    path = tiny_model.write(folder)
    pictures.write(folder / "pictures", count, tiny_model.LABELS)
    path.write_text(f"{path.read_text()}\n[data]\n{data}\n")
    return load(path)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return tiny(tmp_path / "tiny")


def silent() -> Console:
    return Console(quiet=True)


def source_of(spec: Spec) -> onnx.ModelProto:
    return qdq.fold(load_source(spec))


def run(model: onnx.ModelProto, feeds: dict[str, Any], *, literal: bool = True) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if literal:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answers: list[np.ndarray] = session.run(None, feeds)
    return answers


def noise(seed: int = 5, rows: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (rows, 3, 8, 8)).astype(np.float32)


def optimised(model: onnx.ModelProto, feed: dict[str, np.ndarray], folder: Path) -> tuple[list[str], np.ndarray]:
    """The operators that ONNX Runtime makes of a graph, and its first output."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]
    return kinds, np.asarray(session.run(None, feed)[0])


# -- folding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_folding_leaves_no_normalisation_and_the_same_answers(spec: Spec, bias: bool) -> None:
    source = load_source(spec)
    if bias:
        values = np.linspace(-2, 2, 6, dtype=np.float32)
        source.graph.initializer.append(numpy_helper.from_array(values, "bias"))
        qdq.convs(source)[0].input.append("bias")
    folded = qdq.fold(source)
    onnx.checker.check_model(folded, full_check=True)
    assert not any(node.op_type == "BatchNormalization" for node in folded.graph.node)
    assert all(conv.name for conv in qdq.convs(folded))
    for exact, found in zip(run(source, {"images": noise()}), run(folded, {"images": noise()}), strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)


def test_folding_keeps_what_something_else_reads(spec: Spec) -> None:
    source = load_source(spec)
    source.graph.output.append(helper.make_tensor_value_info("conv", TensorProto.FLOAT, None))
    assert any(node.op_type == "BatchNormalization" for node in qdq.fold(source).graph.node)


# -- calibration -------------------------------------------------------------------------------------------------------


def test_calibration_measures_what_the_model_computes(spec: Spec, tmp_path: Path) -> None:
    folded = source_of(spec)
    found = calibration.calibrate(spec, folded, tmp_path / "cache", silent())
    assert found.pictures == 120
    whole = before_nms(attach(spec, folded))
    whole.graph.output.append(onnx.ValueInfoProto(name="relu"))
    images = np.concatenate(list(datasets.arrays(datasets.calibration(spec, tmp_path), spec.input, 8)))
    relu = run(whole, {contract.IMAGES: images})[-1]
    held = found.histograms["relu"]
    assert held.counts.sum() == relu.size
    assert held.largest == pytest.approx(relu.max(), rel=1e-5)
    assert not held.negative
    assert found.histograms["ssd/front/div"].negative


def test_the_cache_is_used_and_refused_when_stale(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folded, cache = source_of(spec), tmp_path / "cache"
    first = calibration.calibrate(spec, folded, cache, silent())
    file = cache / "tiny" / "calibration.npz"
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("it was measured again"))
        again = calibration.calibrate(spec, folded, cache, silent())
    assert again.clips("entropy", 99.0) == first.clips("entropy", 99.0)

    for changed in ("pictures", "model", "activations", "method", "onnxruntime"):
        with pytest.raises(QuantizeError, match=f"stale: other {changed}"):
            calibration.read_calibration(file, {**first.key, changed: "something else"})
    picture = spec.path.parent / "pictures" / "0000.png"
    picture.write_bytes((spec.path.parent / "pictures" / "0001.png").read_bytes())
    anew = calibration.calibrate(spec, folded, cache, Console(stderr=True, soft_wrap=True))
    assert "the calibration is stale: other pictures: calibrating anew" in capsys.readouterr().err
    assert anew.key != first.key
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    with pytest.raises(QuantizeError, match="no readable calibration"):
        calibration.read_calibration(file, anew.key)
    refused = 0
    for place in range(30, 700, 10):  # some bits, such as a time, change nothing
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        try:
            read = calibration.read_calibration(file, anew.key)
            assert read.clips("entropy", 99.0) == anew.clips("entropy", 99.0)
        except QuantizeError:
            refused += 1
    assert refused > 40
    file.write_bytes(whole[:200])
    assert calibration.calibrate(spec, folded, cache, silent()).key == anew.key


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("", "names no calibration pictures"),
        ('calibration = "nowhere"', "nowhere: there is no such folder"),
        ('calibration = "empty"', "empty: holds no pictures"),
        ('generator = "gone.py"\ncalibration = "a"', r"gone\.py: no Python file"),
        ('generator = "broken.py"\ncalibration = "a"', r"write_split\('a', 500\) failed: ZeroDivisionError"),
    ],
)
def test_no_pictures_no_calibration(
    tmp_path: Path, data: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tiny(tmp_path / "tiny", data)
    (tmp_path / "tiny" / "empty").mkdir()
    (tmp_path / "tiny" / "broken.py").write_text("def write_split(folder, split, count):\n    1 / 0\n")
    with pytest.raises(DataError, match=complaint):
        calibration.calibrate(spec, source_of(spec), tmp_path / "cache", silent())
    assert not (tmp_path / "cache").exists()
    program = f"the model's own program, which runs now: {tmp_path / 'tiny' / 'broken.py'}"
    assert (program in capsys.readouterr().err) is ("ZeroDivision" in complaint)


def test_few_pictures_are_said_and_broken_ones_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tiny(tmp_path / "tiny", count=40)
    folder = tmp_path / "tiny" / "pictures"
    (folder / "0003.png").write_bytes(b"no picture")
    found = calibration.calibrate(spec, source_of(spec), tmp_path / "cache", Console(soft_wrap=True))
    said = capsys.readouterr()
    assert found.pictures == 39
    assert "40 pictures; with fewer than 100" in said.out
    assert "1 of 40 pictures cannot be read" in said.err.replace("\n", " ")
    for name in ("0004.png", "0005.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:60])
    with pytest.raises(DataError, match="3 of 40 pictures cannot be read"):
        calibration.calibrate(spec, source_of(spec), tmp_path / "cache", silent())


def test_a_full_disk_leaves_nothing_half_written(spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(WriteError, match="the disk is full"):
        calibration.calibrate(spec, source_of(spec), tmp_path / "cache", silent())
    assert not (tmp_path / "cache" / "tiny" / "calibration.npz").exists()


# -- placement ---------------------------------------------------------------------------------------------------------


def pairs(model: onnx.ModelProto) -> set[str]:
    """What is quantised: tensors that a QuantizeLinear reads."""
    return {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def test_pairs_lie_where_they_are_fused(spec: Spec) -> None:
    folded = source_of(spec)
    placed = qdq.quantize(folded, clips_of(folded, noise()))
    onnx.checker.check_model(placed.model, full_check=True)
    weights = {conv.input[1] for conv in qdq.convs(folded)}
    # The input, what follows the Relu (not the Conv before it), every weight; not the heads' answers.
    assert pairs(placed.model) == {"images", "relu", *weights}
    assert len(placed.nodes) == 3
    assert not placed.left
    constants = {one.name: one for one in placed.model.graph.initializer}
    for node in placed.model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = numpy_helper.to_array(constants[node.input[2]])
            assert zero.dtype == np.int8
            assert not zero.any()
            scale = numpy_helper.to_array(constants[node.input[1]])
            assert scale.dtype == np.float32
            assert (scale > 0).all()
            # A weight has a scale per output channel, an activation one.
            assert scale.ndim == (node.name.rsplit("/", 1)[0] in weights)
    for conv in qdq.convs(placed.model):
        assert all(name.endswith("/dq") for name in conv.input[:2])
        assert all(name in constants and constants[name].data_type == TensorProto.FLOAT for name in conv.input[2:])


def test_the_same_arithmetic_as_onnxruntime_s_own_quantiser(spec: Spec) -> None:
    """With the same ranges and the settings for TensorRT, its graph answers the same, up to float rounding."""
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    folded = source_of(spec)
    clips = clips_of(folded, noise())
    ranges = {
        name: (np.array(-clips[measured], np.float32), np.array(clips[measured], np.float32))
        for name, measured in (("images", "ssd/front/div"), ("relu", "relu"))
    }
    copied = onnx.ModelProto()
    copied.CopyFrom(folded)
    theirs = QDQQuantizer(
        copied,
        True,
        False,
        QuantType.QInt8,
        QuantType.QInt8,
        TensorsData(CalibrationMethod.MinMax, ranges),
        None,
        [],
        ["Conv"],
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "AddQDQPairToWeight": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv"],
            "DedicatedQDQPair": False,
        },
    ).quantize_model()
    ours = qdq.quantize(folded, clips).model
    images = noise(6)
    for expected, found in zip(run(theirs, {"images": images}), run(ours, {"images": images}), strict=True):
        step = np.abs(expected).max() * 2e-2  # a value on the border of two codes may fall to either side
        assert np.abs(expected - found).max() < step
        assert np.mean(np.abs(expected - found) > 1e-4) < 0.02


def residual() -> onnx.ModelProto:
    """conv_a → Relu → conv_b + conv_e (the shortcut) → Relu → Concat with conv_c of it → conv_d."""
    rng = np.random.default_rng(0)
    make = helper.make_node
    shapes = {"wa": (4, 3, 3, 3), "wb": (4, 4, 3, 3), "wc": (4, 4, 1, 1), "wd": (2, 8, 3, 3), "we": (4, 4, 1, 1)}
    constants = [numpy_helper.from_array(rng.normal(0, 0.3, s).astype(np.float32), n) for n, s in shapes.items()]
    same: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    nodes = [
        make("Conv", ["x", "wa"], ["a"], name="conv_a", **same),
        make("Relu", ["a"], ["ar"]),
        make("Conv", ["ar", "wb"], ["b"], name="conv_b", **same),
        make("Conv", ["ar", "we"], ["e"], name="conv_e"),
        make("Add", ["b", "e"], ["sum"]),
        make("Relu", ["sum"], ["sr"]),
        make("Conv", ["sr", "wc"], ["c"], name="conv_c"),
        make("Relu", ["c"], ["cr"]),
        make("Concat", ["sr", "cr"], ["both"], axis=1),
        make("Conv", ["both", "wd"], ["y"], name="conv_d", **same),
    ]
    tensor = helper.make_tensor_value_info
    graph_of = helper.make_graph(
        nodes,
        "residual",
        [tensor("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [tensor("y", TensorProto.FLOAT, [1, 2, 8, 8])],
        constants,
    )
    return helper.make_model(graph_of, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_residuals_and_concatenations() -> None:
    model = residual()
    placed = qdq.quantize(model, clips_of(model, noise(rows=1)))
    onnx.checker.check_model(placed.model, full_check=True)
    activations = pairs(placed.model) - {one.name for one in model.graph.initializer}
    # conv_b runs into the Add unquantised, the other side of the Add is the shortcut; the concatenation has one pair
    # behind it.
    assert activations == {"x", "ar", "e", "sr", "both"}
    assert [output.name for output in placed.model.graph.output] == ["y"]
    exact, found = run(model, {"x": noise(rows=1)})[0], run(placed.model, {"x": noise(rows=1)})[0]
    assert 0 < np.abs(exact - found).max() < 0.1 * np.abs(exact).max()


def test_a_conv_that_others_read_too_is_not_summed_in_its_registers() -> None:
    """As in MobileNetV2's blocks: the linear Conv before a block is the shortcut, the one that ends it has no pair."""
    rng = np.random.default_rng(0)
    make = helper.make_node
    weights = {f"w{i}": rng.normal(0, 0.3, (3, 3, 1, 1)).astype(np.float32) for i in range(4)}
    nodes = [
        make("Conv", ["x", "w0"], ["shortcut"], name="conv0"),
        make("Conv", ["shortcut", "w1"], ["a"], name="conv1"),
        make("Relu", ["a"], ["ar"]),
        make("Conv", ["ar", "w2"], ["end"], name="conv2"),
        make("Add", ["end", "shortcut"], ["sum"]),
        make("Conv", ["sum", "w3"], ["y"], name="conv3"),
    ]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 8, 8]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "block", tensors[:1], tensors[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    placed = qdq.quantize(model, clips_of(model, noise(rows=1)))
    assert pairs(placed.model) - weights.keys() == {"x", "shortcut", "ar", "sum"}


def test_sums_and_concatenations_run_in_integers_in_onnxruntime_s_form(tmp_path: Path) -> None:
    model = residual()
    clips = clips_of(model, noise(rows=1))
    with_kernels = qdq.quantize(model, clips, kernels=True).model
    # The graph's own output keeps its name behind its pair.
    assert pairs(with_kernels) - pairs(qdq.quantize(model, clips).model) == {"b", "cr", "y/raw"}
    kinds, found = optimised(qdq.for_onnxruntime(with_kernels), {"x": noise(rows=1)}, tmp_path)
    assert kinds.count("QLinearConv") == 5
    assert {"QLinearAdd", "QLinearConcat"} <= set(kinds)
    exact = run(model, {"x": noise(rows=1)})[0]
    assert 0 < np.abs(exact - found).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("kernels", [False, True])
def test_what_is_left_out_reads_unrounded_inputs(kernels: bool) -> None:
    """Also where a quantised Conv reads the same tensor, and where an integer kernel would round what was read."""
    model = residual()
    clips = clips_of(model, noise(rows=1))
    beside = qdq.quantize(model, clips, exclude=["conv_e"], kernels=kernels).model
    reads = {conv.name: conv.input[0] for conv in qdq.convs(beside)}
    assert (reads["conv_b"], reads["conv_e"]) == ("ar/dq", "ar")
    alone = qdq.quantize(model, clips, exclude=["conv_c"], kernels=kernels).model
    assert next(conv.input[0] for conv in qdq.convs(alone) if conv.name == "conv_c") == "sr"
    both = qdq.quantize(model, clips, exclude=["conv_b", "conv_e"], kernels=kernels).model
    assert "ar" not in pairs(both)
    onnx.checker.check_model(both, full_check=True)


def test_every_conv_has_a_bias_of_its_own(spec: Spec) -> None:
    """Exporters let equal biases share a constant; equalisation and correction change them one by one."""
    source = network("relu")
    biases = {conv.name: conv.input[2] for conv in qdq.convs(source)[1:3]}
    (shared, other) = biases.values()
    qdq.convs(source)[2].input[2] = shared
    folded = qdq.fold(source)
    names = [conv.input[2] for conv in qdq.convs(folded) if len(conv.input) > 2]
    assert len(set(names)) == len(names)
    assert shared != other
    images = noise()
    for right, found in zip(run(source, {"images": images}), run(folded, {"images": images}), strict=True):
        np.testing.assert_array_equal(found, right)


def test_exclusions(spec: Spec) -> None:
    folded = source_of(spec)
    names = [conv.name for conv in qdq.convs(folded)]
    placed = qdq.quantize(folded, clips_of(folded, noise()), exclude=names[:1])
    assert placed.nodes == tuple(names[1:])
    assert placed.left == {names[0]: "excluded"}
    assert "images" not in pairs(placed.model)
    with pytest.raises(QuantizeError, match="exclude_nodes names 'nothing', but no Conv has this name"):
        qdq.quantize(folded, {}, exclude=["nothing"])
    with pytest.raises(QuantizeError, match="'ssd/front/div' was not calibrated"):
        qdq.quantize(folded, {})


def test_quantised_models_are_not_quantised_again(spec: Spec) -> None:
    folded = source_of(spec)
    with pytest.raises(QuantizeError, match=r"quantised already: it has .* nodes like QuantizeLinear"):
        qdq.fold(qdq.quantize(folded, clips_of(folded, noise())).model)


def test_fp8_is_where_tensorrt_has_kernels_for_it() -> None:
    """Neither few channels (the first Conv, the heads) nor grouped ones: these stay in floating point."""
    folded = qdq.fold(network("relu", "depthwise", channels=24))
    clips = clips_of(folded, noise())
    placed = qdq.quantize(folded, clips, kind="fp8")
    depthwise = [conv.name for conv in qdq.convs(folded) if any(each.name == "group" for each in conv.attribute)]
    few = [conv.name for conv in qdq.convs(folded) if conv.input[0] == "images"]
    heads = [conv.name for conv in qdq.convs(folded)[-2:]]
    assert placed.left == dict.fromkeys([*few, *depthwise, *heads], qdq.NO_KERNEL)
    assert len(placed.nodes) == 3
    assert set(placed.nodes) == {conv.name for conv in qdq.quantisable(folded, "fp8")}
    model = placed.model
    onnx.checker.check_model(model, full_check=True)
    zeros = {one.data_type for one in model.graph.initializer if one.name.endswith("/zero")}
    assert zeros == {TensorProto.FLOAT8E4M3FN}
    exact, fp8 = run(folded, {"images": noise()}), run(model, {"images": noise()})
    for one, other in zip(exact, fp8, strict=True):
        assert 1e-4 < np.abs(one - other).max() / np.abs(one).max() < 0.15


def test_fp8_behind_a_relu6_runs_without_being_asked_to_run_literally() -> None:
    """ONNX Runtime's optimisations take the pair behind a Clip for one of INT8, and end with an error."""
    folded = qdq.fold(network("relu6", "relu6", channels=24))
    graph = qdq.quantize(folded, clips_of(folded, noise()), kind="fp8").model
    found = runner(graph)({"images": noise()})
    for name, right in runner(graph, literal=True)({"images": noise()}).items():
        np.testing.assert_array_equal(found[name], right)


# -- ONNX Runtime's form -----------------------------------------------------------------------------------------------


def test_onnxruntime_runs_its_form_in_integers_with_the_same_answers(tmp_path: Path) -> None:
    source = qdq.fold(network("relu"))
    images = noise()
    clips = clips_of(source, images)
    written = qdq.quantize(source, clips, exclude=[qdq.convs(source)[0].name], kernels=True).model
    form = qdq.for_onnxruntime(written)
    # Only the zero points of activations differ.
    differ = {
        one.name: numpy_helper.to_array(other)
        for one, other in zip(written.graph.initializer, form.graph.initializer, strict=True)
        if one != other
    }
    assert differ == {name: 0 if name.startswith("relu") else 128 for name in differ}
    assert all(zero.dtype == np.uint8 and name.endswith("/zero") for name, zero in differ.items())
    assert list(written.graph.node) == list(form.graph.node)
    kinds, _ = optimised(form, {"images": images}, tmp_path)
    assert kinds.count("QLinearConv") == len(qdq.convs(source)) - 1
    # Nothing here is clipped, so that the codes 0..127 are all there is: the same numbers, integer or not.
    for expected, found in zip(
        run(written, {"images": images}), run(form, {"images": images}, literal=False), strict=True
    ):
        step = np.abs(expected).max() / 127
        assert np.abs(expected - found).max() <= 2.02 * step
        assert np.mean(np.abs(expected - found) > 1e-5) < 0.02


def test_a_small_head_is_not_rounded(spec: Spec, tmp_path: Path) -> None:
    """Its Conv costs little in floating point; 1x1 Convs inside the network, or with many channels, keep their pair."""
    folded = source_of(spec)
    assert pairs(qdq.quantize(folded, clips_of(folded, noise()), kernels=True).model) == {
        "images",
        "relu",
        *(conv.input[1] for conv in qdq.convs(folded)),
    }
    wide = source_of(load(tiny_model.write(tmp_path / "wide", tiny_model.source(classes=40))))
    assert "class_logits_map" in pairs(qdq.quantize(wide, clips_of(wide, noise()), kernels=True).model)


def bottleneck(minimum: str) -> onnx.ModelProto:
    """As in MobileNetV2: Conv, ReLU6, depthwise Conv, ReLU6, Conv without an activation, the sum with a shortcut, Conv.

    Args:
        minimum: where the lower end of ReLU6 is: an initializer, a Constant node, or -1 in place of 0.
    """
    rng = np.random.default_rng(5)
    make = helper.make_node
    same: dict[str, Any] = {"group": 8, "pads": [1, 1, 1, 1]}
    shapes = {"wa": (4, 3, 1, 1), "wb": (8, 4, 1, 1), "wc": (8, 1, 3, 3), "wd": (4, 8, 1, 1), "we": (4, 4, 1, 1)}
    constants = [numpy_helper.from_array(rng.normal(0, 0.7, s).astype(np.float32), n) for n, s in shapes.items()]
    low = numpy_helper.from_array(np.float32(-1.0 if minimum == "below zero" else 0.0), "low")
    constants.append(numpy_helper.from_array(np.float32(6), "high"))
    if minimum != "constant node":
        constants.append(low)
    nodes = [
        *([make("Constant", [], ["low"], value=low)] if minimum == "constant node" else []),
        make("Conv", ["x", "wa"], ["a"], name="stem"),
        make("Conv", ["a", "wb"], ["b"], name="expand"),
        make("Clip", ["b", "low", "high"], ["b6"]),
        make("Conv", ["b6", "wc"], ["c"], name="depthwise", **same),
        make("Clip", ["c", "low", "high"], ["c6"]),
        make("Conv", ["c6", "wd"], ["d"], name="project"),
        make("Add", ["d", "a"], ["sum"]),
        make("Conv", ["sum", "we"], ["y"], name="next"),
    ]
    tensor = helper.make_tensor_value_info
    x, y = tensor("x", TensorProto.FLOAT, [1, 3, 8, 8]), tensor("y", TensorProto.FLOAT, [1, 4, 8, 8])
    graph = helper.make_graph(nodes, "bottleneck", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# All but the head.
@pytest.mark.parametrize(("minimum", "in_integers"), [("initializer", 4), ("constant node", 4), ("below zero", 4)])
def test_onnxruntime_s_form_of_relu6_runs_in_integers(minimum: str, in_integers: int, tmp_path: Path) -> None:
    model = bottleneck(minimum)
    images = 4 * noise(rows=1)
    form = qdq.for_onnxruntime(qdq.quantize(model, clips_of(model, images), kernels=True).model)
    kinds, found = optimised(form, {"x": images}, tmp_path)
    assert kinds.count("QLinearConv") == in_integers
    assert ("Clip" in kinds) is (minimum == "below zero")
    exact = run(model, {"x": images})[0]
    assert 0 < np.abs(exact - found).max() < 0.05 * np.abs(exact).max()


# -- what people look at -----------------------------------------------------------------------------------------------


def test_scales_and_histograms(spec: Spec, tmp_path: Path) -> None:
    import csv

    found = calibration.calibrate(spec, source_of(spec), tmp_path / "cache", silent())
    calibration.write_scales(tmp_path / "scales.csv", found, 99.0)
    with (tmp_path / "scales.csv").open() as file:
        rows = {row["activation"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(found.histograms)
    for name, clip in found.clips("percentile", 99.0).items():
        assert float(rows[name]["percentile_clip"]) == clip
        assert float(rows[name]["percentile_scale"]) == pytest.approx(clip / 127)
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    calibration.draw_histograms(tmp_path / "histograms.png", found, 99.0)
    assert (tmp_path / "histograms.png").stat().st_size > 5000
