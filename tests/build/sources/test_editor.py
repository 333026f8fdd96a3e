"""The graph under adaptation: looked at, run in parts, extended."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from build.errors import ImportModelError
from build.sources.editor import Editor
from build.sources.front import find_front
from tests.build.sources.layouts_without_nms import two_heads
from tests.build.sources.networks import BOXES, Network


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
