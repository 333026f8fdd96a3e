"""Exports that end at their heads: recognised, and the same boxes and scores as the truth in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.errors import ImportModelError, OptionError
from tests.build.sources.checks import check, imported
from tests.build.sources.layouts import Layout
from tests.build.sources.layouts_faces import blazeface, retinaface
from tests.build.sources.layouts_without_nms import WITHOUT_NMS, two_heads, yolo
from tests.build.sources.networks import BOXES, Network, anchors


@pytest.mark.parametrize("name", WITHOUT_NMS)
def test_every_layout(name: str, tmp_path: Path) -> None:
    check(WITHOUT_NMS[name](), tmp_path)


def pooled(
    size: tuple[int, int], count: int, heads: dict[str, int], names: dict[str, str], joined: bool = False
) -> Layout:
    """A network of any input size with `count` boxes: a convolution, the mean of it, and a head of all boxes.

    Args:
        size: height, width.
        count: N.
        heads: name → columns.
        names: name → output.
        joined: one output `output`, with all heads but the first behind a Sigmoid.
    """
    net = Network({"box": 4}, size=size)
    random = np.random.default_rng(0)
    value = net.add("Conv", net.input, net.const(random.normal(0, 0.1, (2, 3, 8, 8))), strides=[8, 8])
    value = net.add("GlobalAveragePool", value)
    tables = []
    for head, columns in heads.items():
        weights = net.const(random.normal(0, 1, (count * columns, 2, 1, 1)))
        bias = net.const(random.normal(0, 1, count * columns))
        tables.append(net.reshape(net.add("Conv", value, weights, bias), 0, -1, columns))
        if not joined:
            net.out(tables[-1], names[head], ["batch", count, columns])
    if joined:
        rest = [net.add("Sigmoid", table) for table in tables[1:]]
        net.out(net.add("Concat", tables[0], *rest, axis=2), "output", ["batch", count, sum(heads.values())])
    return Layout(net.build(), 1, lambda pixels: (pixels, pixels), "")


RETINAFACE = {"box": 4, "cls": 2, "land": 10}
BLAZEFACE = {"box": 16, "cls": 1}
BLAZEFACE_NAMES = {"box": "regressors", "cls": "classificators"}


@pytest.mark.parametrize(
    ("size", "count", "heads", "names", "preset"),
    [
        ((128, 128), 896, BLAZEFACE, BLAZEFACE_NAMES, "blazeface-front"),
        ((256, 256), 896, BLAZEFACE, BLAZEFACE_NAMES, "blazeface-back"),
        ((192, 192), 2304, BLAZEFACE, BLAZEFACE_NAMES, "blazeface-full-range"),
        ((300, 300), 8732, {"box": 4, "cls": 2}, {"box": "ploc", "cls": "plabel"}, "nvidia-ssd300"),
        ((1200, 1200), 15130, {"box": 4, "cls": 2}, {"box": "ploc", "cls": "plabel"}, "mlperf-ssd-resnet34"),
        ((64, 96), 252, RETINAFACE, {"box": "loc", "cls": "conf", "land": "landms"}, "retinaface"),
    ],
)  # fmt: skip
def test_anchors_that_are_usual_for_a_count_and_a_size(
    size: tuple[int, int], count: int, heads: dict[str, int], names: dict[str, str], preset: str, tmp_path: Path
) -> None:
    foreign = imported(pooled(size, count, heads, names), tmp_path)
    (said,) = [where for what, value, where in foreign.reading.facts if what == "anchors" and value == preset]
    assert said.startswith(f"usual for {count} boxes of a {size[1]} x {size[0]} input")


def test_the_cells_of_yolox_are_usual(tmp_path: Path) -> None:
    layout = pooled((64, 64), 84, {"box": 4, "object": 1, "cls": 1}, {}, joined=True)
    foreign = imported(layout, tmp_path)
    assert foreign.reading.family == "yolox"
    assert foreign.adapted.anchors is not None
    np.testing.assert_allclose(foreign.adapted.anchors[:2], [[0, 0, 0.125, 0.125], [0.125, 0, 0.125, 0.125]])


def test_ssd300_of_no_known_names_has_more_than_one_usual_grid(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not in the graph") as raised:
        imported(pooled((300, 300), 8732, {"box": 4, "cls": 2}, {"box": "a_box", "cls": "b"}), tmp_path)
    assert "caffe-ssd300 and nvidia-ssd300 both have 8732" in raised.value.fix


def test_deltas_without_anchors_are_asked_for(tmp_path: Path) -> None:
    layout = two_heads(names=("loc", "conf"))
    layout.table = None
    with pytest.raises(OptionError, match="240 boxes are deltas") as raised:
        imported(layout, tmp_path)
    assert "--anchors" in raised.value.fix


def test_pytorch_ssd_without_arithmetic_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="nothing in the graph says") as raised:
        imported(two_heads(names=("boxes", "scores"), activation="Softmax"), tmp_path)
    assert "--boxes-are" in raised.value.fix


def test_two_tables_of_four_columns_that_no_name_tells(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="boxes and scores can be") as raised:
        imported(two_heads(names=("a", "b")), tmp_path)
    assert "--boxes NAME" in raised.value.fix


def test_segmentation_masks_are_left_out(tmp_path: Path) -> None:
    net = Network({"box": 4, "cls": 3, "mask": 32})
    boxes = net.add("Exp", net.rows("box"))
    rows = net.add("Concat", boxes, net.add("Sigmoid", net.rows("cls")), net.rows("mask"), axis=2)
    net.out(net.add("Transpose", rows, perm=[0, 2, 1]), "output0", ["batch", 39, BOXES])
    weights = net.const(np.random.default_rng(0).normal(0, 1, (32, 16, 1, 1)))
    net.out(net.add("Conv", net.maps()[0], weights), "output1", ["batch", 32, 8, 8])
    foreign = imported(Layout(net.build(), 3, lambda x: (x, x), ""), tmp_path)
    assert foreign.reading.family == "yolov8"
    assert "32 of masks" in str(foreign.reading.facts)


def test_other_labels_of_a_one_output_export(tmp_path: Path) -> None:
    layout = yolo()
    layout.labels = 9
    with pytest.raises(ImportModelError, match="of no known family") as raised:
        imported(layout, tmp_path)
    assert "9 labels" in raised.value.why


def test_faces_have_one_label(tmp_path: Path) -> None:
    layout = blazeface()
    layout.labels = 2
    with pytest.raises(ImportModelError, match="of no known family"):
        imported(layout, tmp_path)


def test_retinaface_leaves_landmarks_out_and_says_so(tmp_path: Path) -> None:
    foreign = imported(retinaface(per_scale=True), tmp_path)
    assert ("landmarks", "left out", "2 outputs [B,N,10]") in foreign.reading.facts
    np.testing.assert_array_equal(foreign.adapted.anchors, anchors())
