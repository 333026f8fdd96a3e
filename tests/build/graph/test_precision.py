"""FP16 and BF16 graphs: typed as they say, the contract untouched, close to FP32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from build import contract
from build.errors import QuantizeError
from build.files import ROOT
from build.graph import precision, ssd_nms
from build.graph.attach import attach, before_nms, load_source
from build.quantization import qdq
from build.spec import Spec, load
from tests.build import tiny_model


@pytest.fixture(scope="module", params=["tiny", "shapes"])
def spec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Spec:
    if request.param == "shapes":
        return load(ROOT / "models" / "shapes")
    return load(tiny_model.write(tmp_path_factory.mktemp("tiny")))


def folded(spec: Spec) -> onnx.ModelProto:
    return qdq.fold(load_source(spec))


def run(model: onnx.ModelProto, pixels: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answers: list[np.ndarray] = session.run(None, {contract.IMAGES: pixels})
    return answers


def pixels(spec: Spec) -> np.ndarray:
    shape = (2, spec.input.height, spec.input.width, 3)
    return np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor that shape inference knows."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    return {
        info.name: info.type.tensor_type.elem_type for info in (*inferred.value_info, *inferred.input, *inferred.output)
    }


@pytest.mark.parametrize(("kind", "wanted"), [("fp16", TensorProto.FLOAT16), ("bf16", TensorProto.BFLOAT16)])
def test_every_conv_computes_in_the_type_and_the_contract_keeps_its_own(spec: Spec, kind: str, wanted: int) -> None:
    plain, model = attach(spec), attach(spec, precision.half(folded(spec), kind))
    onnx.checker.check_model(model, full_check=True)
    assert [(i.name, i.type) for i in model.graph.input] == [(i.name, i.type) for i in plain.graph.input]
    assert [(o.name, o.type) for o in model.graph.output] == [(o.name, o.type) for o in plain.graph.output]
    found = types(before_nms(model))
    constants = {constant.name: constant.data_type for constant in model.graph.initializer}
    convs = qdq.convs(model)
    assert len(convs) == len(qdq.convs(plain))
    for conv in convs:
        assert found[conv.output[0]] == found[conv.input[0]] == wanted
        assert {constants[name] for name in conv.input[1:]} == {wanted}
    # Pixels are normalised in FP32, and SSDNMS gets FP32.
    assert found["ssd/front/div"] == TensorProto.FLOAT
    assert {found[name] for name in ssd_nms.find(model).input[:2]} == {TensorProto.FLOAT}
    assert constants["ssd/anchors"] == TensorProto.FLOAT


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_operators_that_do_not_take_the_type_stay_fp32(kind: str) -> None:
    source = tiny_model.with_operators()
    model = precision.half(source, kind)
    onnx.checker.check_model(model, full_check=True)
    found, wanted = types(model), {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[kind]
    stay = {
        node.op_type
        for node in model.graph.node
        if node.op_type not in ("Cast", "Conv", "Transpose", "Reshape") and found[node.output[0]] != wanted
    }
    by_schema = {"fp16": {"Celu"}, "bf16": {"Celu", "Einsum", "Resize"}}[kind]
    by_builder = {"fp16": set(), "bf16": {"ConvTranspose", "HardSwish", "LpNormalization", "LpPool", "Mish"}}[kind]
    assert stay == {"Min", *by_schema, *by_builder}  # Min: by the converter
    pixels = np.random.default_rng(4).normal(0, 1, (2, 3, 8, 8)).astype(np.float32)
    answers = []
    for runs in (source, precision.runnable(model, kind)):
        session = onnxruntime.InferenceSession(runs.SerializeToString(), providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"images": pixels}))
    for exact, short in zip(*answers, strict=True):
        assert 0 < np.abs(exact - short).max() < 0.02 * np.abs(exact).max()


def test_fp16_is_close_and_not_equal(spec: Spec) -> None:
    images = pixels(spec)
    exact = run(before_nms(attach(spec)), images)
    halved = run(before_nms(attach(spec, precision.half(folded(spec), "fp16"))), images)
    for one, other in zip(exact, halved, strict=True):
        distance = np.abs(one - other).max() / np.abs(one).max()
        assert 0 < distance < 5e-3


def test_widened_computes_like_bfloat16(spec: Spec) -> None:
    """The heads have BF16's error, not FP16's."""
    images = pixels(spec)
    exact = run(before_nms(attach(spec)), images)
    model = precision.widened(attach(spec, precision.half(folded(spec), "bf16")))
    assert not {TensorProto.BFLOAT16} & {constant.data_type for constant in model.graph.initializer}
    rounded = run(before_nms(model), images)
    halved = run(before_nms(attach(spec, precision.half(folded(spec), "fp16"))), images)
    for one, coarse, fine in zip(exact, rounded, halved, strict=True):
        signal = np.abs(one).max()
        assert 3e-4 < np.abs(one - coarse).max() / signal < 8e-2
        assert np.abs(one - coarse).mean() > 2 * np.abs(one - fine).mean()


def test_widened_rounds_every_result_as_done_by_hand(tmp_path: Path) -> None:
    """The first Conv, in bits: BF16 pixels and weights, sums in FP32, the result rounded once."""
    import ml_dtypes

    spec = load(tiny_model.write(tmp_path / "tiny"))
    source, images = folded(spec), pixels(spec)
    conv = qdq.convs(source)[0]
    weights, bias = (
        numpy_helper.to_array(next(c for c in source.graph.initializer if c.name == name)) for name in conv.input[1:]
    )

    def short(values: np.ndarray) -> np.ndarray:
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    planes = (images.transpose(0, 3, 1, 2).astype(np.float32) - np.float32(spec.input.mean).reshape(3, 1, 1)) / (
        np.float32(spec.input.std).reshape(3, 1, 1)
    )
    patches = short(planes).reshape(len(images), 3, 2, 4, 2, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    by_hand = patches.astype(np.float64) @ short(weights).reshape(len(weights), -1).T.astype(np.float64) + short(bias)
    model = before_nms(precision.widened(attach(spec, precision.half(source, "bf16"))))
    del model.graph.output[:]
    model.graph.output.append(onnx.ValueInfoProto(name=conv.output[0]))
    (answered,) = run(model, images)
    rows = answered.transpose(0, 2, 3, 1).reshape(by_hand.shape)
    assert (rows == short(rows)).all()  # every value is a BF16 number
    step = np.abs(by_hand) * 2.0**-8 + 1e-6  # half a BF16 step, and the sums' own rounding
    assert (np.abs(rows - by_hand) <= step).all()


def test_bfloat16_constants_are_rounded_once_from_fp32(spec: Spec) -> None:
    import ml_dtypes

    source = folded(spec)
    exact = {one.name: numpy_helper.to_array(one) for one in source.graph.initializer}
    model = precision.half(source, "bf16")
    compared = 0
    for constant in model.graph.initializer:
        if constant.data_type == TensorProto.BFLOAT16:
            wanted = exact[constant.name].astype(ml_dtypes.bfloat16)
            assert numpy_helper.to_array(constant).tobytes() == wanted.tobytes()
            compared += 1
    assert compared >= 4


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    source = tiny_model.source()
    weights = next(one for one in source.graph.initializer if one.name == "w_box")
    values = numpy_helper.to_array(weights).copy()
    values.flat[0] = 1e5
    weights.CopyFrom(numpy_helper.from_array(values, "w_box"))
    with pytest.raises(QuantizeError, match="'w_box' holds values beyond 65504"):
        precision.half(source, "fp16")
    precision.half(source, "bf16")


def test_sort_orders_and_refuses_circles() -> None:
    model = tiny_model.source()
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    precision.sort(model)
    onnx.checker.check_model(model)
    model.graph.node.append(helper.make_node("Add", ["a", "b"], ["b"], name="loop"))
    with pytest.raises(QuantizeError, match="circle around 'loop'"):
        precision.sort(model)
