"""Anchors of files, PriorBox nodes and arrays of any form.

Where the environment variable SSD_DETECTORS names a folder with published detectors (pedestrians/, faces/, blazeface/,
each with anchors_by_hand.npy and as_exported.onnx), all of their anchors are compared.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from build.errors import GraphError, OptionError
from build.sources.anchor_grids import PRESETS
from build.sources.anchors import (
    corners_to_centers,
    describe,
    from_text,
    guess_form,
    plausible_forms,
    priorbox_node,
)

FOLDER = os.environ.get("SSD_DETECTORS", "")
needs_detectors = pytest.mark.skipif(not FOLDER, reason="needs published detectors in the folder $SSD_DETECTORS")

RES10 = (
    "priorbox:feature=38,19,10,5,5,5;min=30,60,111,162,213,264;max=60,111,162,213,264,315;"
    "ratios=2|2,3|2,3|2,3|2|2;step=8,16,32,64,100,300"
)
CLIPPED = f"{PRESETS['caffe-ssd300'].text()};clip=1"


def rows(anchors: NDArray[np.float32], *numbers: int) -> list[list[float]]:
    return [[float(value) for value in anchors[number]] for number in numbers]


def columns(anchors: NDArray[Any], order: str, width: int = 1, height: int = 1) -> NDArray[np.float64]:
    """Anchors in another order, in pixels of width × height."""
    x, y, w, h = (anchors.astype(np.float64) * [width, height, width, height]).T
    return np.stack({
        "cxcywh": (x, y, w, h),
        "xyxy": (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
        "yxyx": (y - h / 2, x - w / 2, y + h / 2, x + w / 2),
        "xywh": (x - w / 2, y - h / 2, w, h),
        "cycxhw": (y, x, h, w),
    }[order], axis=1)  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------

SOME = np.float32([[0.25, 0.5, 0.5, 1], [0.75, 0.5, 0.5, 1]])


def test_files_of_every_kind(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", SOME.astype(np.float64)[None])
    np.savez(tmp_path / "a.npz", anything=SOME)
    (tmp_path / "a.txt").write_text("# cx cy w h\n0.25 0.5 0.5 1\n\n0.75\t0.5 5e-1  1 # the second\n")
    (tmp_path / "a.csv").write_text("0.25, 0.5, 0.5, 1\n0.75,0.5,0.5,1\n")
    for name in ("a.npy", "a.npz", "a.txt", "a.csv", str(tmp_path / "a.npy")):
        anchors = from_text(name, 300, 300, 2, folder=tmp_path)
        assert anchors.dtype == np.float32
        np.testing.assert_array_equal(anchors, SOME)


def test_files_that_are_no_anchors(tmp_path: Path) -> None:
    np.save(tmp_path / "three.npy", SOME[:, :3])
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "nan.npy", np.where(SOME == 0.75, np.nan, SOME))
    np.savez(tmp_path / "two.npz", a=SOME, b=SOME)
    (tmp_path / "short.csv").write_text("1,2,3,4\n1,2,3\n")
    (tmp_path / "header.csv").write_text("cx,cy,w,h\n1,2,3,4\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "broken.npy").write_bytes(b"")
    np.save(tmp_path / "good.npy", SOME)
    for name, complaint in {
        "three.npy": "must be numbers [N,4], but are float32 [2, 3]",
        "words.npy": "must be numbers [N,4], but are <U1 [1]",
        "nan.npy": "row 1 has a value that is not finite",
        "two.npz": "has the arrays a, b",
        "short.csv": "line 2 is '1,2,3', but must be 4 numbers",
        "header.csv": "line 1 is 'cx,cy,w,h', but must be 4 numbers",
        "empty.txt": "must be numbers [N,4]",
        "broken.npz": "cannot be read as anchors",
        "broken.npy": "cannot be read as anchors",
        "good.npy": "has 2 anchors: 1×2×1; sizes 0.71 .. 0.71, but the model's heads have 3 rows",
    }.items():
        with pytest.raises(OptionError) as error:
            from_text(name, 300, 300, 3, folder=tmp_path)
        assert f"{tmp_path / name}: {complaint}" in str(error.value)


# -- PriorBox nodes ----------------------------------------------------------------------------------------------------


def node(number: int, **others: Any) -> dict[str, Any]:
    """The attributes of the PriorBox of a level of SSD300, as caffe2onnx writes them."""
    sizes, steps = [30, 60, 111, 162, 213, 264, 315], [8, 16, 32, 64, 100, 300]
    more = [3.0, 0.3333333432674408] if 0 < number < 4 else []
    return {
        "min_sizes": [float(sizes[number])], "max_sizes": [float(sizes[number + 1])],
        "aspect_ratios": [1.0, 2.0, 0.5, *more], "flip": 1, "clip": 0, "variances": [0.1, 0.1, 0.2, 0.2],
        "steps": [float(steps[number])] * 2, "offset": 0.5,
        "img_sizes": [0, 0], **others,
    }  # fmt: skip


def test_priorbox_nodes_give_what_the_generator_gives() -> None:
    features = (38, 19, 10, 5, 5, 5)
    anchors = [priorbox_node(node(i), (side, side), (300, 300)) for i, side in enumerate(features)]
    np.testing.assert_array_equal(np.concatenate(anchors), from_text(RES10, 300, 300))


def test_priorbox_ratios_are_not_doubled() -> None:
    listed = priorbox_node(node(1), (19, 19), (300, 300))
    for ratios in ([2.0, 3.0], [1.0, 2.0, 3.0], (2.0, 0.5, 3.0)):
        np.testing.assert_array_equal(listed, priorbox_node(node(1, aspect_ratios=ratios), (19, 19), (300, 300)))
    unflipped = priorbox_node(node(1, flip=0), (19, 19), (300, 300))
    np.testing.assert_allclose(unflipped, listed, rtol=1e-6)
    assert len(priorbox_node(node(1, aspect_ratios=[2.0], flip=0), (19, 19), (300, 300))) == 19 * 19 * 3


def test_priorbox_defaults_sizes_and_clipping() -> None:
    least = priorbox_node({"min_sizes": [30.0, 60.0]}, (2, 4), (100, 200))
    np.testing.assert_allclose(rows(least, 0, 1), [[0.125, 0.25, 0.15, 0.3], [0.125, 0.25, 0.3, 0.6]], rtol=1e-6)
    other = priorbox_node({"min_sizes": [30.0], "img_sizes": [50, 100], "step": 10.0}, (2, 4), (1, 1))
    np.testing.assert_allclose(other[1], [0.15, 0.1, 0.3, 0.6], rtol=1e-6)
    clipped = [priorbox_node(node(i, clip=1), (side,) * 2, (300, 300)) for i, side in enumerate((38, 19, 10, 5, 3, 1))]
    np.testing.assert_array_equal(np.concatenate(clipped), from_text(CLIPPED, 300, 300))


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({}, "19×19 feature map: min sizes are [], but must be there"),
        ({"min_sizes": [1.0, 2.0], "max_sizes": [3.0]}, "min sizes are 2, but max sizes 1"),
    ],
)
def test_a_node_that_is_no_priorbox(attributes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(GraphError) as error:
        priorbox_node(attributes, (19, 19), (300, 300))
    assert complaint in str(error.value)
    assert "--anchors" in str(error.value)


# -- forms -------------------------------------------------------------------------------------------------------------

GRIDS = {
    "tensorflow": ("ssd-grid:", 300, 300),
    "res10": (RES10, 300, 300),
    "caffe-ssd300": ("caffe-ssd300", 300, 300),
    "nvidia-ssd300": ("nvidia-ssd300", 300, 300),
    "mlperf-ssd-resnet34": ("mlperf-ssd-resnet34", 1200, 1200),
    "pytorch-ssd-mobilenet": ("pytorch-ssd-mobilenet", 300, 300),
    "retinaface": ("retinaface", 640, 480),
    "ultraface": ("ultraface", 320, 240),
    "blazeface": ("blazeface-front", 128, 128),
    "cells": ("cells:strides=8,16,32;size=4", 416, 256),
}


@pytest.mark.parametrize("unit", ["fraction", "pixel"])
@pytest.mark.parametrize("order", ["cxcywh", "xyxy", "yxyx", "xywh", "cycxhw"])
@pytest.mark.parametrize("name", GRIDS)
def test_the_form_of_grids_is_told_from_their_values(name: str, order: str, unit: str) -> None:
    text, width, height = GRIDS[name]
    anchors = from_text(text, width, height)
    size = (width, height) if unit == "pixel" else (1, 1)
    array = columns(anchors, order, *size).astype(np.float32)
    assert guess_form(array, width, height) == (order, unit)
    np.testing.assert_allclose(corners_to_centers(array, order, *size), anchors, atol=1e-6)


@pytest.mark.parametrize("order", ["cxcywh", "xyxy", "yxyx"])
def test_the_form_of_clipped_anchors(order: str) -> None:
    clipped = columns(from_text(CLIPPED, 300, 300), order).astype(np.float32)
    assert guess_form(clipped, 300, 300) == (order, "fraction")
    assert guess_form(clipped * 300, 300, 300) == (order, "pixel")


def test_boxes_without_size_are_centres() -> None:
    anchors = from_text("blazeface-front", 128, 128)
    anchors[:, 2:] = 1e-12
    assert guess_form(anchors, 128, 128) == ("cxcywh", "fraction")
    assert guess_form(anchors * 128, 128, 128) == ("cxcywh", "pixel")
    with pytest.raises(OptionError):
        guess_form(columns(anchors, "xyxy").astype(np.float32), 128, 128)


def test_a_constant_of_tensorflow_has_a_leading_dimension() -> None:
    anchors = from_text("ssd-grid:", 300, 300)
    constant = columns(anchors, "yxyx")[None].astype(np.float32)
    np.testing.assert_allclose(constant[0, 1], [-0.04439489, -0.11510557, 0.09702647, 0.16773716], atol=1e-6)
    assert guess_form(constant, 300, 300) == ("yxyx", "fraction")
    np.testing.assert_allclose(corners_to_centers(constant, "yxyx"), anchors, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "parts"),
    [
        # A single box: x and y cannot be told apart.
        (np.float32([[0.3, 0.25, 0.7, 0.75]]), ["they can be read as", "xyxy in fractions and as yxyx in fractions"]),
        (np.tile(np.float32([0.5, 0.5, 0.3, 0.3]), (100, 1)), ["cxcywh in fractions and as xywh in fractions"]),
        # Cells from 0 on, with w and h of a cell: YOLOX's centres or the corners of cells.
        (from_text("cells:strides=8,16,32;offset=0", 64, 64), ["cxcywh in fractions and as xywh in fractions"]),
        # For an input of another size.
        (
            columns(from_text("retinaface", 640, 640), "xyxy", 640, 640),
            ["in no order", "64×64", "of another input size"],
        ),
        (
            np.random.default_rng(0).random((500, 4)),
            ["in no order are they boxes on grids over 64×64 (height × width)"],
        ),
        (np.zeros((7, 4)), ["in no order"]),
        (np.zeros((7, 5)), ["must be numbers [N,4], but are float64 [7, 5]"]),
    ],
)
def test_values_that_do_not_tell_are_asked_about(array: NDArray[Any], parts: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        guess_form(array, 64, 64)
    for part in parts:
        assert part in str(error.value)
    assert array.shape[1] != 4 or "--box-order cxcywh|xyxy|yxyx|xywh|cycxhw" in str(error.value)


def test_plausible_forms_lists_all_that_fit() -> None:
    same = np.tile(np.float32([0.5, 0.5, 0.3, 0.3]), (100, 1))
    assert plausible_forms(same, 64, 64) == [("cxcywh", "fraction"), ("xywh", "fraction")]


def test_an_order_that_is_unknown() -> None:
    with pytest.raises(OptionError, match="'xxyy', but must be one of cxcywh, xyxy, yxyx, xywh, cycxhw"):
        corners_to_centers(SOME, "xxyy")


# -- in words ----------------------------------------------------------------------------------------------------------


def test_describe() -> None:
    tensorflow = "1,917 anchors: 19×19×3, 10×10×6, 5×5×6, 3×3×6, 2×2×6, 1×1×6; sizes 0.10 .. 0.97"
    assert describe(from_text("ssd-grid:", 300, 300)) == tensorflow
    assert describe([[0.5, 0.5, 1, 1]]) == "1 anchor: 1×1×1; sizes 1.00 .. 1.00"
    assert describe(np.random.default_rng(0).random((500, 4)) + 1).startswith("500 anchors: no regular grid; sizes 1.")
    assert describe(from_text(CLIPPED, 300, 300)).startswith("8,732 anchors: no regular grid;")
    many = from_text("cells:strides=4,8,16,32,64,128,256,512,1024", 1024, 1024)
    assert describe(many).startswith("87,381 anchors: 256×256×1, 128×128×1, 64×64×1, …, 1×1×1; sizes 0.004 .. 1.00")


# -- the published detectors themselves --------------------------------------------------------------------------------


def by_hand(name: str) -> NDArray[np.float32]:
    anchors: NDArray[np.float32] = np.load(Path(FOLDER) / name / "anchors_by_hand.npy")
    return anchors


@needs_detectors
@pytest.mark.parametrize(
    ("name", "size", "order"),
    [(name, 300, order) for name in ("pedestrians", "faces") for order in ("cxcywh", "xyxy", "yxyx", "cycxhw")]
    + [("blazeface", 128, order) for order in ("cxcywh", "cycxhw")],  # its boxes have no size, so they have no corners
)
def test_forms_of_published_anchors(name: str, size: int, order: str) -> None:
    array = columns(by_hand(name), order).astype(np.float32)
    assert guess_form(array, size, size) == (order, "fraction")
    assert guess_form(array * size, size, size) == (order, "pixel")


@needs_detectors
def test_anchors_of_pedestrians() -> None:
    import onnx

    graph = onnx.load(Path(FOLDER) / "pedestrians" / "as_exported.onnx").graph
    (tensor,) = (item for item in graph.initializer if item.name == "Postprocessor/ExpandDims:0")
    constant = onnx.numpy_helper.to_array(tensor)
    assert guess_form(constant, 300, 300) == ("yxyx", "fraction")
    assert guess_form(constant * 300, 300, 300) == ("yxyx", "pixel")
    expected = by_hand("pedestrians")
    np.testing.assert_allclose(corners_to_centers(constant, "yxyx"), expected, atol=1e-6)
    np.testing.assert_allclose(from_text("ssd-grid:", 300, 300, 1917), expected, atol=1e-6)


@needs_detectors
def test_anchors_of_faces() -> None:
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(Path(FOLDER) / "faces" / "as_exported.onnx"))
    shapes = {item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim] for item in model.graph.value_info}
    anchors = [
        priorbox_node(
            {item.name: onnx.helper.get_attribute_value(item) for item in prior.attribute},
            shapes[prior.input[0]][2:],
            (300, 300),
        )
        for prior in model.graph.node
        if prior.op_type == "PriorBox"
    ]
    assert len(anchors) == 6
    np.testing.assert_allclose(np.concatenate(anchors), by_hand("faces"), atol=1e-6)


@needs_detectors
def test_anchors_of_blazeface() -> None:
    np.testing.assert_array_equal(from_text("blazeface-front", 128, 128)[:, :2], by_hand("blazeface")[:, :2])
