"""The small questions that families ask a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from build.sources.editor import Editor
from build.sources.front import find_front
from build.sources.reading import Reading, columns, decimal, parts_of, three
from tests.build.sources.networks import BOXES, INDEX, Network


def editor_of(net: Network) -> Editor:
    return Editor(Path("given.onnx"), net.build())


def test_what_the_user_sets_replaces_a_fact() -> None:
    net = Network({"box": 4})
    net.out(net.rows("box"), "out", ["batch", BOXES, 4])
    value = editor_of(net).value("out")
    reading = Reading("some", value, value, nms={"iou_threshold": 0.5, "topk_per_class": 7})
    reading.state_nms("a node", topk_per_class="elsewhere")
    assert reading.facts == [("iou_threshold", "0.5", "a node"), ("topk_per_class", "7", "elsewhere")]
    reading.override("nms.iou_threshold", 0.6, "--set")
    assert reading.facts == [("topk_per_class", "7", "elsewhere"), ("nms.iou_threshold", "0.6", "--set")]


def test_decimals_as_they_were_meant() -> None:
    assert decimal(np.float32(0.45)) == 0.45
    assert decimal([np.float32(1e-8)]) == 1e-8


def test_columns_are_a_part_of_the_concatenation_where_they_can_be() -> None:
    net = Network({"box": 4, "cls": 3})
    box, cls = net.rows("box"), net.rows("cls")
    net.out(net.add("Identity", net.add("Concat", box, cls, axis=2)), "out", ["batch", BOXES, 7])
    editor = editor_of(net)
    front = find_front(editor)
    assert columns(editor, front, editor.value("out"), 0, 4) is editor.value(box)
    assert columns(editor, front, editor.value("out"), 4, 7) is editor.value(cls)
    sliced = columns(editor, front, editor.value("out"), 3, 5)
    whole, part = editor.measure(front.example(), [editor.value("out"), sliced])
    np.testing.assert_array_equal(part, whole[..., 3:5])


def test_rows_of_any_shape() -> None:
    net = Network({"box": 4})
    rows = net.rows("box")
    shapes = {
        "rows": rows,
        "turned": net.add("Transpose", rows, perm=[0, 2, 1]),
        "flat": net.add("Flatten", rows),
        "without batch": net.reshape(rows, -1, 4),
        "four dimensions": net.axes("Unsqueeze", rows, 2),
    }
    for name, value in shapes.items():
        net.out(net.add("Identity", value), name, None)  # type: ignore[arg-type]
    editor = editor_of(net)
    example = find_front(editor).example()
    (right,) = editor.measure(example, [editor.value("rows")])
    for name in shapes:
        (array,) = editor.measure(example, [editor.value(name)])
        read = three(editor, editor.value(name), array.shape, 4)
        assert read is not None
        assert read[1] == BOXES
        np.testing.assert_array_equal(editor.measure(example, [read[0]])[0], right)
    assert three(editor, editor.value("rows"), (1, BOXES, 4), 3) is None
    assert three(editor, editor.value("rows"), (1, BOXES, 4), 4, BOXES + 1) is None


def test_the_parts_of_a_concatenation() -> None:
    net = Network({"box": 4})
    a, b = net.level("box", 0), net.level("box", 1)
    flat = [net.reshape(value, 0, -1, 4) for value in (a, b)]
    net.out(net.add("Concat", *flat, axis=1), "out", ["batch", BOXES, 4])
    editor = editor_of(net)
    assert [part.name for part in parts_of(editor.value("out"))] == [a, b]
    assert editor.constant(editor.whole(3)) == np.array([3], INDEX)
