"""The graph under adaptation: looked at, run in parts, extended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from build.errors import ImportModelError
from build.sources.editor import Editor
from build.sources.front import find_front
from build.sources.reading import columns, parts_of, three
from tests.build.sources.layouts_without_nms import two_heads
from tests.build.sources.networks import BOXES, INDEX, Network


def editor_of(net: Network) -> Editor:
    return Editor(Path("given.onnx"), net.build())


def test_constants_are_what_constants_make(tmp_path: Path) -> None:
    net = Network({"box": 4})
    sum_ = net.add("Add", net.const([1.0, 2.0]), net.const([3.0, 4.0]))
    net.out(net.add("Mul", net.rows("box"), net.add("Concat", sum_, sum_, axis=0)), "out", ["batch", BOXES, 4])
    editor = editor_of(net)
    np.testing.assert_array_equal(editor.constant(editor.value(sum_)), [4, 6])
    assert editor.constant(editor.value("out")) is None
    assert editor.constant(None) is None


def test_a_name_that_is_not_there_suggests_others() -> None:
    editor = Editor(Path("given.onnx"), two_heads(names=("loc", "conf")).model)
    with pytest.raises(ImportModelError, match=r"given\.onnx: has no tensor 'lok'") as raised:
        editor.value("lok")
    assert "'loc'" in raised.value.fix


def test_a_part_that_depends_on_more_is_refused() -> None:
    net = Network({"box": 4, "cls": 4})
    boxes = net.rows("box")
    net.out(net.add("Add", boxes, net.rows("cls")), "out", ["batch", BOXES, 4])
    editor = editor_of(net)
    with pytest.raises(ImportModelError, match=r"given\.onnx: cannot be cut there"):
        editor.measure({boxes: np.zeros((1, BOXES, 4), np.float32)}, [editor.value("out")])
    assert editor.measure({}, []) == []


def test_a_part_that_cannot_run_is_refused_without_a_log_line(capfd: pytest.CaptureFixture[str]) -> None:
    net = Network({"box": 4})
    net.out(net.reshape(net.rows("box"), 7, 7), "out", [7, 7])
    editor = editor_of(net)
    with pytest.raises(ImportModelError, match=r"given\.onnx: this part of it cannot run"):
        editor.measure(find_front(editor).example(), [editor.value("out")])
    assert capfd.readouterr().err == ""


def test_half_precision_becomes_full() -> None:
    net = Network({"box": 4}, picture="float16")
    net.out(net.rows("box"), "out", ["batch", BOXES, 4])
    model = net.build()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    editor = Editor(Path("given.onnx"), model)
    assert {str(value.dtype) for value in (*editor.graph.inputs, *editor.graph.outputs)} == {"FLOAT"}


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
