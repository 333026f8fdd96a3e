"""A Caffe SSD with every kind of layer that is converted, against the same arithmetic in NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from build.errors import ImportModelError
from build.session import runner
from build.sources.caffe import _net, convert
from build.sources.foreign import understand

# 8x8 pixels become 4x4 cells with 3 boxes each (min_size, max_size, ratio 2 without its flip) and 2 classes.
HEAD = """
layer { name: "norm" type: "Normalize" bottom: "joined" top: "norm" norm_param { across_spatial: false } }
layer { name: "loc" type: "Convolution" bottom: "norm" top: "loc" convolution_param { num_output: 12 kernel_size: 1 } }
layer { name: "loc_perm" type: "Permute" bottom: "loc" top: "loc_perm"
        permute_param { order: 0 order: 2 order: 3 order: 1 } }
layer { name: "loc_flat" type: "Flatten" bottom: "loc_perm" top: "loc_flat" flatten_param { axis: 1 } }
layer { name: "conf" type: "Convolution" bottom: "norm" top: "conf" convolution_param { num_output: 6 kernel_size: 1 } }
layer { name: "conf_perm" type: "Permute" bottom: "conf" top: "conf_perm"
        permute_param { order: 0 order: 2 order: 3 order: 1 } }
layer { name: "conf_flat" type: "Flatten" bottom: "conf_perm" top: "conf_flat" }
layer { name: "priors" type: "PriorBox" bottom: "norm" bottom: "data" top: "priors"
        prior_box_param { min_size: 2 max_size: 4 aspect_ratio: 2 flip: false variance: 0.1 variance: 0.1
                          variance: 0.2 variance: 0.2 } }
layer { name: "mbox_loc" type: "Concat" bottom: "loc_flat" top: "mbox_loc" }
layer { name: "rows" type: "Reshape" bottom: "conf_flat" top: "rows" reshape_param { shape { dim: 0 dim: -1 dim: 2 } } }
layer { name: "softmax" type: "Softmax" bottom: "rows" top: "softmax" softmax_param { axis: 2 } }
layer { name: "scores" type: "Flatten" bottom: "softmax" top: "scores" }
layer { name: "out" type: "DetectionOutput" bottom: "mbox_loc" bottom: "scores" bottom: "priors" top: "out"
        include { phase: TEST }
        detection_output_param { num_classes: 2 code_type: CENTER_SIZE keep_top_k: 50 confidence_threshold: 0.25
                                 nms_param { nms_threshold: 0.5 top_k: 40 } } }
"""
PROTOTXT = (
    """
name: "tiny"  # a comment
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 1 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" param { lr_mult: 1 }
        convolution_param { num_output: 4 bias_term: false kernel_size: 1 weight_filler { type: "msra" } } }
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" batch_norm_param { eps: 0.001 } }
layer { name: "scale" type: "Scale" bottom: "conv" top: "conv" scale_param { bias_term: true } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { kernel_size: 3 stride: 2 } }
layer { name: "apart" type: "Scale" bottom: "pool" top: "apart" }
layer { name: "leaky" type: "ReLU" bottom: "apart" top: "leaky" relu_param { negative_slope: 0.5 } }
layer { name: "joined" type: "Eltwise" bottom: "leaky" bottom: "pool" top: "joined" }
layer { name: "drop" type: "Dropout" bottom: "joined" top: "joined" }
"""
    + HEAD
)


def weights() -> dict[str, list[np.ndarray]]:
    """Random weights of the layers that have some."""
    draw = np.random.default_rng(3)

    def of(*shape: int) -> np.ndarray:
        return draw.normal(size=shape).astype(np.float32)

    return {
        "conv": [of(4, 3, 1, 1)],
        "bn": [of(4), of(4) ** 2 + 1, np.array([2], np.float32)],
        "scale": [of(4), of(4)],
        "apart": [of(4)],
        "norm": [of(4)],
        "loc": [of(12, 4, 1, 1), of(12)],
        "conf": [of(6, 4, 1, 1), of(6)],
    }


def write(
    folder: Path, text: str = PROTOTXT, arrays: dict[str, list[np.ndarray]] | None = None, old: bool = False
) -> Any:
    """deploy.prototxt and weights.caffemodel; `old` writes shapes as four numbers, as Caffe did before 2015."""
    net = _net()()
    for name, blobs in (weights() if arrays is None else arrays).items():
        layer = net.layer.add(name=name)
        for array in blobs:
            blob = layer.blobs.add(data=array.ravel().tolist())
            if old:
                shape = [1] * (4 - array.ndim) + list(array.shape)
                blob.num, blob.channels, blob.height, blob.width = shape
            else:
                blob.shape.dim.extend(array.shape)
    (folder / "deploy.prototxt").write_text(text)
    (folder / "weights.caffemodel").write_bytes(net.SerializeToString())
    return folder / "deploy.prototxt", folder / "weights.caffemodel"


def expected(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box deltas [1,48,4] and class scores before softmax [1,48,2], written out."""
    w = weights()

    def channels(values: np.ndarray) -> np.ndarray:
        return values.reshape(1, -1, 1, 1)

    def conv(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return np.einsum("nchw,oc->nohw", values, kernel[:, :, 0, 0])

    x = conv(pixels, w["conv"][0])
    mean, variance, factor = w["bn"]
    x = (x - channels(mean / factor)) / np.sqrt(channels(variance / factor) + 0.001)
    x = np.maximum(x * channels(w["scale"][0]) + channels(w["scale"][1]), 0)
    rows = [slice(i, min(i + 3, 8)) for i in (0, 2, 4, 6)]  # Caffe rounds up: the last window is cut off
    pool = np.stack([np.stack([x[:, :, r, c].max((2, 3)) for c in rows], -1) for r in rows], -2)
    apart = pool * channels(w["apart"][0])
    x = np.where(apart < 0, apart / 2, apart) + pool
    x = x / np.sqrt((x**2).sum(1, keepdims=True) + 1e-10) * channels(w["norm"][0])
    heads = [conv(x, w[name][0]) + channels(w[name][1]) for name in ("loc", "conf")]
    return tuple(head.transpose(0, 2, 3, 1).reshape(1, 48, -1) for head in heads)  # type: ignore[return-value]


@pytest.mark.parametrize("old", [False, True], ids=["shape", "four numbers"])
def test_computes_what_caffe_does(tmp_path: Path, old: bool) -> None:
    model = convert(*write(tmp_path, old=old))
    for name in ("mbox_loc", "rows"):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    standard = onnx.utils.Extractor(model).extract_model(["data"], ["mbox_loc", "rows"])
    pixels = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    answers = runner(standard)({"data": pixels})
    boxes, scores = expected(pixels)
    np.testing.assert_allclose(answers["mbox_loc"].reshape(1, 48, 4), boxes, atol=1e-5)
    np.testing.assert_allclose(answers["rows"], scores, atol=1e-5)


def test_recogniser_reads_anchors_and_thresholds(tmp_path: Path) -> None:
    file = tmp_path / "tiny.onnx"
    onnx.save(convert(*write(tmp_path)), file)
    foreign = understand(file, ["thing"])
    assert foreign.reading.family == "caffe-ssd"
    assert foreign.adapted.anchors is not None
    # Cell centres are (i + 0.5) / 4; sizes are min, sqrt(min * max), and min with ratio 2, of 8 pixels.
    np.testing.assert_allclose(foreign.adapted.anchors[0], [0.125, 0.125, 0.25, 0.25], atol=1e-6)
    np.testing.assert_allclose(foreign.adapted.anchors[1, 2:], [8**0.5 / 8] * 2, atol=1e-6)
    np.testing.assert_allclose(foreign.adapted.anchors[2, 2:], [2 * 2**0.5 / 8, 2 / 2**0.5 / 8], atol=1e-6)
    assert foreign.adapted.anchors.shape == (48, 4)
    stated = {"box_coding": "center_size", "box_scales": [10, 10, 5, 5], "score_threshold": 0.25, "iou_threshold": 0.5}
    assert stated.items() <= foreign.adapted.nms.items()
    assert (foreign.adapted.nms["topk_per_class"], foreign.adapted.nms["max_detections"]) == (40, 50)


def test_one_normalisation_where_scale_writes_over_its_input(tmp_path: Path) -> None:
    operators = [node.op_type for node in convert(*write(tmp_path)).graph.node]
    assert operators[:4] == ["Conv", "BatchNormalization", "Relu", "MaxPool"]
    names = [node.name for node in convert(*write(tmp_path)).graph.node]
    assert len(set(names)) == len(names)


def test_scale_that_keeps_its_input_leaves_the_input_alone(tmp_path: Path) -> None:
    text = PROTOTXT.replace('bottom: "conv" top: "conv" scale_param', 'bottom: "conv" top: "scaled" scale_param')
    operators = [node.op_type for node in convert(*write(tmp_path, text)).graph.node]
    assert operators[:5] == ["Conv", "BatchNormalization", "Mul", "Add", "Relu"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'type: "Dropout"',
            'type: "LSTM"',
            "layer 'drop' of the type LSTM cannot be converted[\\s\\S]*BatchNorm, Concat",
        ),
        ('bottom: "leaky"', 'bottom: "lost"', "'joined' of the type Eltwise[\\s\\S]*no layer before it writes 'lost'"),
        ("across_spatial: false", "across_spatial: true", "'norm' of the type Normalize[\\s\\S]*across_spatial"),
        (
            'layer { name: "joined" type: "Eltwise"',
            'layer { name: "joined" eltwise_param { coeff: 2 } type: "Eltwise"',
            "weighs",
        ),
        ("kernel_size: 3 stride: 2", "pool: STOCHASTIC kernel_size: 3 stride: 2", "neither maximum nor average"),
        ("flatten_param { axis: 1 }", "flatten_param { axis: 2 }", "'loc_flat' of the type Flatten"),
        ("dim: 0 dim: -1 dim: 2 }", "dim: 0 dim: -1 dim: 2 } axis: 1", "'rows' of the type Reshape"),
        ('name: "tiny"', "name: {", "no prototxt"),
    ],
)
def test_refuses_what_it_cannot_convert(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in PROTOTXT
    with pytest.raises(ImportModelError, match=message):
        convert(*write(tmp_path, PROTOTXT.replace(old, new, 1)))


def test_refuses_a_network_of_the_old_format(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="has no `layer`"):
        convert(*write(tmp_path, 'layers { name: "conv" type: CONVOLUTION }'))


def test_refuses_missing_and_damaged_weights(tmp_path: Path) -> None:
    prototxt, caffemodel = write(tmp_path, arrays={**weights(), "bn": [np.ones(4, np.float32)]})
    with pytest.raises(ImportModelError, match=r"'bn' of the type BatchNorm[\s\S]*has 1 arrays for it, but it needs 3"):
        convert(prototxt, caffemodel)
    prototxt, caffemodel = write(tmp_path)
    caffemodel.write_bytes(caffemodel.read_bytes()[:-5])
    with pytest.raises(ImportModelError, match=r"weights\.caffemodel: no weights of Caffe"):
        convert(prototxt, caffemodel)
    caffemodel.unlink()
    with pytest.raises(ImportModelError, match=r"weights\.caffemodel: cannot be read: No such file"):
        convert(prototxt, caffemodel)
