"""Activations are found by their values: nodes, the same spelt out, columns cut off; nothing else is taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.sources.activations import activate, find_activation, is_activated
from build.sources.editor import Editor
from build.sources.front import find_front
from tests.build.sources.networks import BOXES, INDEX, Network, sigmoid, softmax


def spelt_out(net: Network, rows: str) -> str:
    powers = net.add("Exp", rows)
    return net.add("Div", powers, net.add("ReduceSum", powers, net.const([2], INDEX), keepdims=1))


def one_over(net: Network, rows: str) -> str:
    return net.add("Div", net.const(1.0), net.add("Add", net.const(1.0), net.add("Exp", net.add("Neg", rows))))


BUILT = {
    "softmax": lambda net, rows: net.add("Softmax", rows, axis=2),
    "softmax spelt out": spelt_out,
    "softmax without its background": lambda net, rows: net.cut(net.add("Softmax", rows, axis=2), 1, 4, 2),
    "softmax of rows": lambda net, rows: net.reshape(
        net.add("Softmax", net.reshape(rows, -1, 4), axis=1), -1, BOXES, 4
    ),
    "sigmoid": lambda net, rows: net.add("Sigmoid", rows),
    "sigmoid spelt out": one_over,
}
NONE = {
    "nothing": lambda net, rows: net.add("Identity", rows),
    "softmax over the boxes": lambda net, rows: net.add("Softmax", rows, axis=1),
    "clipped": lambda net, rows: net.add("Clip", rows, net.const(0.0), net.const(1.0)),
    "scaled": lambda net, rows: net.add("Mul", net.add("Sigmoid", rows), net.const(0.9)),
}


def looked_at(build: object, cut: int = 0) -> object:
    net = Network({"cls": 4})
    net.out(build(net, net.rows("cls")), "scores", ["batch", BOXES, 4 - cut])  # type: ignore[operator]
    editor = Editor(Path("x.onnx"), net.build())
    return find_activation(editor, find_front(editor), editor.value("scores"), BOXES, 4 - cut)


@pytest.mark.parametrize("name", BUILT)
def test_it_is_found(name: str) -> None:
    activation = looked_at(BUILT[name], "without" in name)
    assert activation is not None
    assert activation.kind == name.split()[0]  # type: ignore[attr-defined]
    assert activation.columns == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NONE)
def test_nothing_else_is_taken_for_one(name: str) -> None:
    assert looked_at(NONE[name]) is None


def test_activations_of_every_part() -> None:
    net = Network({"cls": 4})
    levels = [net.reshape(net.add("Sigmoid", net.level("cls", i)), 0, -1, 4) for i in range(2)]
    net.out(net.add("Concat", *levels, axis=1), "scores", ["batch", BOXES, 4])
    net.out(net.add("Concat", levels[0], net.rows("cls"), axis=1), "mixed", ["batch", 192 + BOXES, 4])
    editor = Editor(Path("x.onnx"), net.build())
    assert is_activated(editor.value("scores"))
    assert not is_activated(editor.value("mixed"))


def test_the_same_arithmetic_as_numpy() -> None:
    values = np.random.default_rng(0).normal(0, 30, (2, 5, 4)).astype(np.float32)
    np.testing.assert_allclose(activate(values, "softmax"), softmax(values.astype(float)), atol=1e-12)
    np.testing.assert_allclose(activate(values, "sigmoid"), sigmoid(values.astype(float)), atol=1e-12)
