"""Bilinear sampling without antialiasing: against ONNX's Resize, and by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from PIL import Image
from ssd_client import ModelConfig
from ssd_client.preprocess import input_array
from ssd_client.rule import BILINEAR_PLAIN

from tests.client.conftest import PARAMETERS

STRETCH = ModelConfig.from_triton("m", 8, PARAMETERS).preprocessing


@pytest.fixture(scope="module")
def onnx_resize() -> onnxruntime.InferenceSession:
    """ONNX's Resize (linear, half_pixel) of FP32 [1,3,H,W] to `sizes`."""
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="linear")
    graph = helper.make_graph(
        [node],
        "resize",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "h", "w"]),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, "H", "W"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("content", ["noise", "ramp"])
@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((64, 48), (32, 24)),  # every sample in the middle between two pixels
        ((200, 100), (64, 48)),
        ((1920, 1080), (300, 300)),
        ((641, 479), (299, 301)),
        ((13, 17), (64, 48)),
        ((7, 101), (33, 5)),  # one side up, the other down
        ((63, 47), (64, 48)),
        ((65, 49), (64, 48)),
        ((33, 300), (33, 48)),  # one side as it was
        ((1, 1), (5, 7)),
        ((1, 40), (5, 7)),
        ((40, 1), (5, 7)),
        ((40, 30), (1, 1)),
        ((2, 3), (1, 5)),
    ],
)
def test_bilinear_plain_is_onnx_resize(
    onnx_resize: onnxruntime.InferenceSession, size: tuple[int, int], to: tuple[int, int], content: str
) -> None:
    """To the nearest level: never more than half a level from the FP32 sample, apart from the rounding of FP32."""
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)
    if content == "ramp":
        pixels = np.linspace(0, 255, pixels.size).astype(np.uint8).reshape(shape)
    rule = dataclasses.replace(STRETCH, width=to[0], height=to[1], resample=BILINEAR_PLAIN)
    array, _ = input_array(pixels, rule)
    planes = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    (sampled,) = onnx_resize.run(None, {"x": planes, "sizes": np.array([1, 3, to[1], to[0]], np.int64)})
    assert np.abs(array - sampled[0].transpose(1, 2, 0)).max() <= 0.5 + 0.02


def test_bilinear_plain_by_hand() -> None:
    picture = np.array([[0, 100]], np.uint8)
    wide = dataclasses.replace(STRETCH, width=4, height=2, resample=BILINEAR_PLAIN)
    assert input_array(picture, wide)[0][..., 0].tolist() == [[0, 25, 75, 100]] * 2, "edge pixels reach to the edge"
    narrow = dataclasses.replace(wide, width=2)
    stripes = np.array([[9, 10, 11, 99, 99, 99, 20, 23]], np.uint8)
    assert input_array(stripes, narrow)[0][0, :, 0].tolist() == [11, 60], "no antialiasing"
    halves = np.array([[10, 11, 20, 21]], np.uint8)
    assert input_array(halves, narrow)[0][0, :, 0].tolist() == [11, 21], "half a level is rounded up"


def test_bilinear_plain_in_a_letterbox() -> None:
    picture = Image.fromarray(np.random.default_rng(8).integers(0, 256, (100, 200, 3), dtype=np.uint8))
    whole = dataclasses.replace(STRETCH, width=64, height=32, resample=BILINEAR_PLAIN)
    array, _ = input_array(picture, dataclasses.replace(STRETCH, resize="letterbox_top_left", resample=BILINEAR_PLAIN))
    assert np.array_equal(array[:32], input_array(picture, whole)[0])
    assert (array[32:] == 114).all()
