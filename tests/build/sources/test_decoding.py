"""A decoding is found by asking the graph, whatever nodes it is made of; and not found where it is another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.sources.decoding import find_decoding, is_computed, to_corners
from build.sources.editor import Editor
from build.sources.front import find_front
from tests.build.sources.layouts import in_graph_decoding
from tests.build.sources.networks import BOXES, Network, anchors, corners, decoded


def decoding_of(net: Network, boxes: str, order: str = "") -> object:
    net.out(boxes, "boxes", ["batch", BOXES, 4])
    editor = Editor(Path("x.onnx"), net.build())
    front = find_front(editor)
    return find_decoding(editor, editor.value("boxes"), BOXES, order, front.example())


@pytest.mark.parametrize("order", ["xyxy", "cxcywh"])
@pytest.mark.parametrize("pixels", [False, True])
def test_the_ssd_decoding(order: str, pixels: bool) -> None:
    net = Network({"box": 4})
    decoding = decoding_of(net, in_graph_decoding(net, net.rows("box"), order, pixels, "0"))
    assert decoding is not None
    assert decoding.scales == (10, 10, 5, 5)  # type: ignore[attr-defined]
    assert decoding.order == (0, 1, 2, 3)  # type: ignore[attr-defined]
    assert decoding.box_order == order  # type: ignore[attr-defined]
    np.testing.assert_allclose(decoding.anchors, anchors() * (64 if pixels else 1), rtol=1e-4)  # type: ignore[attr-defined]


def test_other_decodings_are_not_taken_for_it() -> None:
    net = Network({"box": 4})
    rows = net.add("Sigmoid", net.rows("box"))
    assert decoding_of(net, net.add("Add", rows, net.const(anchors()[None]))) is None
    net = Network({"box": 4})
    assert decoding_of(net, net.add("Exp", net.rows("box"))) is None


def test_boxes_that_are_computed_for_each_anchor() -> None:
    net = Network({"box": 4})
    raw = net.rows("box")
    for value, name in ((net.add("Relu", raw), "raw"), (net.add("Add", raw, net.const(anchors()[None])), "moved")):
        net.out(value, name, ["batch", BOXES, 4])
    editor = Editor(Path("x.onnx"), net.build())
    assert not is_computed(editor, editor.value("raw"), BOXES)
    assert is_computed(editor, editor.value("moved"), BOXES)


def test_orders_of_four_numbers() -> None:
    table = anchors().astype(np.float64)
    right = corners(table)
    for order, boxes in {
        "xyxy": right,
        "yxyx": right[:, [1, 0, 3, 2]],
        "cxcywh": table,
        "cycxhw": table[:, [1, 0, 3, 2]],
        "xywh": np.concatenate([right[:, :2], table[:, 2:]], 1),
    }.items():
        np.testing.assert_allclose(to_corners(boxes, order), right)
    np.testing.assert_allclose(decoded(np.zeros((BOXES, 4)), table), right)
