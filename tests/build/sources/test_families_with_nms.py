"""Exports with post-processing inside: recognised, cut before it, the same boxes and scores as the truth in NumPy."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import helper

from build.errors import ImportModelError, OptionError
from build.sources.foreign import Wishes
from tests.build.sources.checks import check, imported
from tests.build.sources.layouts import Layout, in_graph_decoding
from tests.build.sources.layouts_tensorflow import tensorflow
from tests.build.sources.layouts_with_nms import WITH_NMS, caffe, nms_inside, plugin
from tests.build.sources.networks import BOXES, INDEX, Network


@pytest.mark.parametrize("name", WITH_NMS)
def test_every_layout(name: str, tmp_path: Path) -> None:
    check(WITH_NMS[name](), tmp_path)


def test_what_a_reading_says_is_read(tmp_path: Path) -> None:
    facts = {what: where for what, _, where in imported(caffe(), tmp_path).reading.facts}
    assert "DetectionOutput" in facts["iou_threshold"]
    assert "PriorBox" in facts["anchors"]
    assert facts["score_activation"].startswith("behind")
    facts = {what: where for what, _, where in imported(tensorflow(), tmp_path).reading.facts}
    assert facts["iou_threshold"] == "NonMaxSuppression 'body/nms'"
    assert "measured" in facts["box_scales"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share_location": 0}, "boxes of its own for every class"),
        ({"code_type": 3}, "code_type 3"),
    ],
)
def test_caffe_that_cannot_be(change: dict[str, int], message: str, tmp_path: Path) -> None:
    layout = caffe()
    node = layout.model.graph.node[-1]
    kept = [item for item in node.attribute if item.name not in change]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in change.items())])
    with pytest.raises(ImportModelError, match=message):
        imported(layout, tmp_path)


def test_caffe_with_other_variances_in_another_priorbox(tmp_path: Path) -> None:
    layout = caffe()
    node = next(node for node in layout.model.graph.node if node.op_type == "PriorBox")
    kept = [item for item in node.attribute if item.name != "variances"]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("variances", [0.2, 0.2, 0.2, 0.2])])
    with pytest.raises(ImportModelError, match="other variances"):
        imported(layout, tmp_path)


def test_tensorflow_with_labels_of_another_count(tmp_path: Path) -> None:
    layout = tensorflow(classes=5)
    layout.labels = 80
    with pytest.raises(ImportModelError, match="of 80 labels") as raised:
        imported(layout, tmp_path)
    assert "--boxes" in raised.value.fix


def test_nms_that_sees_the_best_class_only(tmp_path: Path) -> None:
    """torchvision's batched_nms and YOLOv7's end-to-end export: boxes moved apart by class, one score a box."""
    net = Network({"box": 4, "cls": 3}, batch=1)
    boxes = in_graph_decoding(net, net.rows("box", "1"), "xyxy", False, "1")
    scores = net.add("Sigmoid", net.rows("cls", "1"))
    best = net.axes("Unsqueeze", net.add("ReduceMax", scores, axes=[2], keepdims=0), 1)
    selected = net.add("NonMaxSuppression", boxes, best, net.const([9], INDEX), net.const([0.5]), net.const([0.1]))
    net.out(net.add("Cast", selected, to="cast"), "selected", ["n", 3])
    net.nodes[-1].attribute.append(helper.make_attribute("to", 1))
    with pytest.raises(ImportModelError, match="no heads to cut at") as raised:
        imported(Layout(net.build(), 3, lambda x: (x, x), ""), tmp_path)
    assert "one score a box" in raised.value.why
    assert "without NMS" in raised.value.fix


def test_finished_rows_without_a_visible_choice(tmp_path: Path) -> None:
    net = Network({"rows": 6})
    net.out(net.cut(net.rows("rows"), 0, 100, 1), "output0", ["batch", 100, 6])
    with pytest.raises(ImportModelError, match="finished detections") as raised:
        imported(Layout(net.build(), 7, lambda x: (x, x), ""), tmp_path)
    assert "end2end=False" in raised.value.fix


def test_plugin_anchors_that_the_picture_makes(tmp_path: Path) -> None:
    layout = plugin(anchored=True)
    node = layout.model.graph.node[-1]
    node.input[2] = node.input[0]
    with pytest.raises(ImportModelError, match="are no constant"):
        imported(layout, tmp_path)


def test_clipping_of_plugins_is_their_default(tmp_path: Path) -> None:
    layout = plugin(kind="BatchedNMS_TRT")
    node = layout.model.graph.node[-1]
    kept = [item for item in node.attribute if item.name != "clipBoxes"]
    del node.attribute[:]
    node.attribute.extend(kept)
    assert imported(layout, tmp_path).adapted.nms["clip_boxes"] is True


def test_nms_keeps_as_many_as_it_can(tmp_path: Path) -> None:
    """`most` of each class: where that cuts nothing off all are kept, else the best `most` of all."""
    assert imported(nms_inside(most=BOXES), tmp_path).adapted.nms["max_detections"] == 3 * BOXES
    assert imported(nms_inside(most=50), tmp_path).adapted.nms["max_detections"] == 50


def test_wrong_labels_behind_a_plugin(tmp_path: Path) -> None:
    layout = plugin()
    layout.labels = 7
    with pytest.raises(OptionError, match="has 3 classes, but there are 7 labels"):
        imported(layout, tmp_path)


def test_named_tensors_before_post_processing(tmp_path: Path) -> None:
    layout = tensorflow()
    loop = layout.model.graph.node[-1]
    body = next(item.g for item in loop.attribute if item.name == "body")
    reads = [node.input[0] for node in body.node if node.op_type == "Gather" and node.input[1] == "i"]
    layout.wishes = Wishes(boxes=reads[0], logits=reads[1], box_order="yxyx", boxes_are="decoded")
    layout.family, layout.nms = "named tensors", {}
    check(layout, tmp_path)
