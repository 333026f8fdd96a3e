"""What the user says about a file, and that nothing wrong is imported without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from build.errors import ImportModelError, OptionError
from build.sources.foreign import Wishes, understand
from tests.build.sources.checks import check, imported
from tests.build.sources.layouts import Layout
from tests.build.sources.layouts_tensorflow import tensorflow
from tests.build.sources.layouts_without_nms import two_heads
from tests.build.sources.networks import BOXES, Array, Network, anchors, corners, decoded

SAME = np.tile(np.float32([[0.5, 0.5, 0.3, 0.3]]), (BOXES, 1))


def plain(**options: Any) -> Layout:
    return two_heads(names=("loc", "conf"), **options)


def opaque(boxes: str = "", scores: str = "") -> Layout:
    """Heads that are finished in a way that no node tells."""
    net = Network({"box": 4, "cls": 4})
    rows, logits = net.rows("box"), net.rows("cls")
    if boxes:
        rows = net.add("Sigmoid", rows)
    if boxes == "corners":
        rows = net.add("Add", net.add("Mul", rows, net.const(0.4)), net.const([0, 0, 0.5, 0.5]))
    elif boxes == "pixels":
        rows = net.add("Add", net.add("Mul", rows, net.const(20.0)), net.const([0, 0, 30.0, 30.0]))
    if scores:
        logits = net.add("Mul", net.add("Softmax", logits, axis=2), net.const(0.999))
    net.out(rows, "loc", ["batch", BOXES, 4])
    net.out(logits, "conf", ["batch", BOXES, 4])
    return Layout(net.build(), 3, lambda x: (x, x), "raw-heads", table=anchors())


# -- anchors in other forms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "table",
    [
        corners(anchors()),
        corners(anchors())[:, [1, 0, 3, 2]],
        anchors()[:, [1, 0, 3, 2]],
        anchors() * 64,
        corners(anchors()) * 64,
    ],
    ids=["xyxy", "yxyx", "cycxhw", "pixels", "xyxy in pixels"],
)
def test_anchors_of_a_grid_tell_their_order_and_unit(table: Array, tmp_path: Path) -> None:
    layout = plain()
    layout.table = table.astype(np.float32)
    check(layout, tmp_path)


def test_anchors_that_do_not_tell_their_order(tmp_path: Path) -> None:
    layout = plain()
    layout.table = corners(SAME)
    with pytest.raises(OptionError, match="can be read as cxcywh in fractions and as xyxy in fractions") as raised:
        imported(layout, tmp_path)
    assert "--box-order" in raised.value.fix
    layout.wishes = Wishes(box_order="xyxy")
    np.testing.assert_allclose(imported(layout, tmp_path).adapted.anchors, SAME, atol=1e-6)
    layout.table = SAME * 64
    layout.wishes = Wishes(box_order="cxcywh")
    np.testing.assert_allclose(imported(layout, tmp_path).adapted.anchors, SAME, atol=1e-6)
    layout.wishes, layout.table = Wishes(), SAME
    np.testing.assert_array_equal(imported(layout, tmp_path).adapted.anchors, SAME)


def test_anchors_that_are_not_as_many_as_boxes(tmp_path: Path) -> None:
    layout = plain()
    layout.table = anchors()[:-1]
    with pytest.raises(OptionError, match=r"239 anchors.*, but the model's heads have 240 rows"):
        imported(layout, tmp_path)


@pytest.mark.parametrize("table", [corners(anchors())[:, [1, 0, 3, 2]], anchors()], ids=["yxyx", "cxcywh"])
def test_deltas_with_y_first_are_said_by_the_order(table: Array, tmp_path: Path) -> None:
    layout = plain()
    right = layout.truth

    def truth(pixels: Array) -> tuple[Array, Array]:
        return decoded(encoded(pixels)[..., [1, 0, 3, 2]], anchors()), right(pixels)[1]

    def encoded(pixels: Array) -> Array:
        net = Network({"box": 4, "cls": 4}, scale=2)
        return net.numbers(pixels, "box")

    layout.truth, layout.table, layout.wishes = truth, table.astype(np.float32), Wishes(box_order="yxyx")
    foreign = check(layout, tmp_path)
    assert ("deltas", "y before x, h before w", "as the order yxyx says") in foreign.reading.facts


# -- what would be served wrongly --------------------------------------------------------------------------------------


def test_scores_that_are_finished_already(tmp_path: Path) -> None:
    layout = opaque(scores="softmax")
    with pytest.raises(ImportModelError, match=r"'conf' lie in 0\.\.1: they are probabilities already") as raised:
        imported(layout, tmp_path)
    assert "--scores-are probabilities" in raised.value.fix
    layout.wishes = Wishes(scores_are="probabilities")
    assert imported(layout, tmp_path).adapted.nms["score_activation"] == "none"
    layout.wishes = Wishes(scores_are="logits")
    assert imported(layout, tmp_path).adapted.nms["score_activation"] == "softmax"


@pytest.mark.parametrize(("boxes", "unit"), [("corners", "0..1"), ("pixels", "pixels")])
def test_boxes_that_are_finished_already(boxes: str, unit: str, tmp_path: Path) -> None:
    layout = opaque(boxes=boxes)
    with pytest.raises(ImportModelError, match=f"look like corners x1,y1,x2,y2 in {unit} and not like") as raised:
        imported(layout, tmp_path)
    assert "--boxes-are decoded" in raised.value.fix
    layout.wishes, layout.table = Wishes(boxes_are="decoded"), None
    assert imported(layout, tmp_path).adapted.nms["box_coding"] == "decoded"


def test_centres_and_sizes_that_are_finished_already(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="none is below 0") as raised:
        imported(opaque(boxes="centres"), tmp_path)
    assert "--boxes-are decoded --box-order cxcywh" in raised.value.fix


def test_boxes_that_the_graph_decodes_are_not_moved_again(tmp_path: Path) -> None:
    layout = plain(decode="xyxy", activation="Softmax")
    layout.table = anchors() * np.float32([1, 1, 1.5, 1.5])
    for names in ({}, {"boxes": "loc", "logits": "conf"}):
        layout.wishes = Wishes(**names)
        with pytest.raises(ImportModelError, match="--anchors would move them a second time") as raised:
            imported(layout, tmp_path)
        assert "leave --anchors out" in raised.value.fix


def test_boxes_that_the_graph_computes_otherwise_are_not_moved_again(tmp_path: Path) -> None:
    net = Network({"box": 4, "cls": 4})
    moved = net.add("Add", net.add("Tanh", net.rows("box")), net.const(anchors()[None]))
    net.out(moved, "loc", ["batch", BOXES, 4])
    net.out(net.rows("cls"), "conf", ["batch", BOXES, 4])
    layout = Layout(net.build(), 3, lambda x: (x, x), "", table=anchors())
    with pytest.raises(ImportModelError, match="computed in the graph for each anchor"):
        imported(layout, tmp_path)
    layout.table = None
    with pytest.raises(OptionError, match="no corners, and nothing says what they are") as raised:
        imported(layout, tmp_path)
    assert "--box-order" in raised.value.fix


def test_boxes_and_scores_swapped(tmp_path: Path) -> None:
    layout = plain(classes=21)
    layout.wishes = Wishes(boxes="conf", logits="loc")
    with pytest.raises(ImportModelError, match="cannot be read as") as raised:
        imported(layout, tmp_path)
    assert "swapped" in raised.value.why
    assert raised.value.fix == "--boxes loc --logits conf"


@pytest.mark.parametrize("wishes", [Wishes(), Wishes(boxes="loc", logits="conf")])
def test_labels_of_another_count(wishes: Wishes, tmp_path: Path) -> None:
    layout = plain(classes=21)
    layout.labels, layout.wishes = 80, wishes
    with pytest.raises(OptionError, match="has 21 classes, but there are 80 labels") as raised:
        imported(layout, tmp_path)
    assert "there must be 20 labels, without one 21" in raised.value.why


def test_one_tensor_for_both_heads(tmp_path: Path) -> None:
    layout = plain()
    layout.wishes = Wishes(boxes="loc", logits="loc")
    with pytest.raises(OptionError, match="both name 'loc'"):
        imported(layout, tmp_path)


def test_a_tensor_inside_a_loop(tmp_path: Path) -> None:
    layout = tensorflow()
    layout.wishes = Wishes(boxes="i_boxes", logits="i_scores")
    with pytest.raises(ImportModelError, match="has no tensor 'i_boxes'") as raised:
        imported(layout, tmp_path)
    assert "inside a loop" in raised.value.why


def test_a_softmax_that_is_spelt_out_is_not_applied_twice(tmp_path: Path) -> None:
    foreign = check(plain(spelt_out=True), tmp_path)
    assert foreign.adapted.nms["score_activation"] == "softmax"
    assert not any(node.op_type == "Exp" for node in foreign.adapted.model.graph.node)


def test_an_input_with_channels_last_is_called_that(tmp_path: Path) -> None:
    foreign = check(plain(channels_last=True), tmp_path)
    assert ("input", "64 x 64, [B,H,W,3], channels last, float32", "input 'images'") in foreign.reading.facts


# -- facts are measured, read or usual ---------------------------------------------------------------------------------


def test_what_the_file_cannot_say_is_called_usual(tmp_path: Path) -> None:
    facts = imported(two_heads(names=("boxes", "scores"), decode="xyxy", activation="Softmax"), tmp_path).reading.facts
    assert {what: where.split(":")[0] for what, _, where in facts if "usual" in where} == {
        "input.mean": "usual",
        "input.std": "usual",
        "input.resample": "usual",
        "score_threshold": "usual",
        "iou_threshold": "usual",
        "clip_boxes": "usual",
    }


def test_what_the_user_says_is_a_fact(tmp_path: Path) -> None:
    layout = opaque(boxes="corners")
    layout.wishes, layout.table = Wishes(boxes_are="decoded", box_order="xyxy", scores_are="logits"), None
    said = {(what, where) for what, _, where in imported(layout, tmp_path).reading.facts if where.startswith("--")}
    assert {("boxes are", "--boxes-are"), ("box order", "--box-order"), ("scores are", "--scores-are")} <= said


@pytest.mark.parametrize("wrong", [{"box_order": "x"}, {"boxes_are": "x"}, {"scores_are": "x"}])
def test_options_have_known_values(wrong: dict[str, str]) -> None:
    with pytest.raises(OptionError, match="but must be one of"):
        Wishes(**wrong)


# -- files -------------------------------------------------------------------------------------------------------------


def test_unnamed_nodes(tmp_path: Path) -> None:
    layout = plain()
    for node in layout.model.graph.node:
        node.name = ""
    check(layout, tmp_path)


@pytest.mark.parametrize("opset", [9, 17])
def test_constants_that_are_inputs_too(opset: int, tmp_path: Path) -> None:
    layout = plain(opset=opset)
    layout.model.ir_version = 3 if opset == 9 else 8
    layout.model.graph.input.extend(
        helper.make_tensor_value_info(item.name, item.data_type, list(item.dims))
        for item in layout.model.graph.initializer
    )
    check(layout, tmp_path)


def test_constants_that_are_nodes(tmp_path: Path) -> None:
    layout = plain(activation="Softmax")
    graph = layout.model.graph
    nodes = [helper.make_node("Constant", [], [item.name], value=item) for item in graph.initializer]
    nodes += list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.node.extend(nodes)
    check(layout, tmp_path)


def test_a_branch_with_names_that_repeat(tmp_path: Path) -> None:
    layout = plain()
    graph = layout.model.graph
    last = next(node for node in graph.node if "loc" in node.output)
    last.output[0] = "joined"
    value = helper.make_tensor_value_info("dup", 1, None)
    branch = helper.make_graph([helper.make_node("Identity", ["joined"], ["dup"])], "branch", [], [value])
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "go"))
    graph.node.append(helper.make_node("If", ["go"], ["loc"], then_branch=branch, else_branch=branch))
    check(layout, tmp_path)


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    layout = plain()
    path = tmp_path / "parts.onnx"
    onnx.save(layout.model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    np.save(tmp_path / "anchors.npy", anchors())
    wishes = Wishes(anchors=str(tmp_path / "anchors.npy"))
    assert understand(path, ["a", "b", "c"], wishes).adapted.anchors is not None
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ImportModelError, match="cannot be read whole") as raised:
        understand(path, ["a", "b", "c"], wishes)
    assert "file of their own" in raised.value.why


def test_a_generator_has_its_own_order(tmp_path: Path) -> None:
    layout = plain()
    sizes = "min=12.8|28.8;ratios=2;flip=1;feature=8,4"
    layout.table, layout.wishes = None, Wishes(anchors=f"priorbox:{sizes}")
    right = imported(layout, tmp_path).adapted.anchors
    layout.wishes = Wishes(anchors=f"priorbox:{sizes}", box_order="yxyx")
    np.testing.assert_array_equal(imported(layout, tmp_path).adapted.anchors, right)
