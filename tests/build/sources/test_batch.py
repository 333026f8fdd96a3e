"""A batch of one is opened wherever an export wrote it; where that cannot be, the error names the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from build.errors import ImportModelError
from tests.build.sources.checks import check, imported
from tests.build.sources.layouts import Layout
from tests.build.sources.layouts_without_nms import two_heads
from tests.build.sources.networks import BOXES, INDEX, Array, Network, anchors, decoded, softmax


def dropped(how: str) -> Layout:
    """Heads of an export for one picture that goes on without the batch, or writes it into a shape."""
    net = Network({"box": 4, "cls": 4}, batch=1, scale=2)
    rows = [net.rows(head, "1") for head in ("box", "cls")]
    shape: list[int | str] = [BOXES, 4]
    if how == "squeeze":
        rows = [net.axes("Squeeze", value, 0) for value in rows]
    elif how == "squeeze and unsqueeze":
        rows = [net.axes("Unsqueeze", net.axes("Squeeze", value, 0), 0) for value in rows]
        shape = [1, BOXES, 4]
    elif how == "gather":
        rows = [net.add("Gather", value, net.const(0, INDEX), axis=0) for value in rows]
    elif how == "reshape":
        rows = [net.reshape(value, BOXES, 4) for value in rows]
    elif how == "rows":
        rows = [net.reshape(value, -1, 4) for value in rows]
    elif how == "transposed":
        rows = [net.add("Transpose", net.axes("Squeeze", value, 0), perm=[1, 0]) for value in rows]
        rows = [net.cut(value, 0, 4, 0) for value in rows]
        rows = [net.reshape(net.add("Transpose", value), 1, BOXES, 4) for value in rows]
        shape = [1, BOXES, 4]
    elif how == "expand":
        rows = [net.add("Expand", value, net.const([1, BOXES, 4], INDEX)) for value in rows]
        shape = [1, BOXES, 4]
    elif how == "shape of constants":
        number = [net.const([size], INDEX) for size in (1, -1, 4)]
        rows = [net.add("Reshape", value, net.add("Concat", *number, axis=0)) for value in rows]
        shape = [1, BOXES, 4]
    if how != "expand":
        rows[1] = net.add("Softmax", rows[1], axis=len(shape) - 1)
    net.out(rows[0], "loc", shape)
    net.out(rows[1], "conf", shape)

    def truth(values: Array) -> tuple[Array, Array]:
        return decoded(net.numbers(values, "box"), anchors()), softmax(net.numbers(values, "cls"))[..., 1:]

    return Layout(net.build(), 3, truth, "raw-heads", table=anchors())


@pytest.mark.parametrize(
    "how",
    ["squeeze", "squeeze and unsqueeze", "gather", "reshape", "rows", "transposed", "expand", "shape of constants"],
)
def test_a_batch_of_one_is_opened(how: str, tmp_path: Path) -> None:
    check(dropped(how), tmp_path)


def test_what_was_opened_is_said(tmp_path: Path) -> None:
    facts = {what: value for what, value, _ in imported(dropped("squeeze"), tmp_path).reading.facts}
    assert facts["batch"].startswith("opened in")


def test_a_batch_of_several_is_refused_and_the_node_named(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match="exported for batches of 8: its node 'n/Reshape") as raised:
        imported(two_heads(names=("loc", "conf"), batch="8", first=8), tmp_path)
    assert "dynamic_axes" in raised.value.fix


def test_a_batch_of_several_that_no_node_holds_is_opened(tmp_path: Path) -> None:
    check(two_heads(names=("loc", "conf"), first=8), tmp_path)


def mixing(op_type: str, **attributes: Any) -> Layout:
    net = Network({"box": 4, "cls": 4})
    scores = net.rows("cls")
    other = net.add(op_type, scores, **attributes)
    net.out(net.add("Sub", scores, other), "conf", ["batch", BOXES, 4])
    net.out(net.rows("box"), "loc", ["batch", BOXES, 4])
    return Layout(net.build(), 3, lambda x: (x, x), "", table=anchors())


def test_pictures_that_mix_are_refused_and_the_node_named(tmp_path: Path) -> None:
    with pytest.raises(ImportModelError, match=r"mixes the pictures of a batch: its node 'n/ReduceMean_\d+'"):
        imported(mixing("ReduceMean", axes=[0], keepdims=1), tmp_path)


def test_a_constant_for_one_picture_is_refused_and_the_node_named(tmp_path: Path) -> None:
    net = Network({"box": 4, "cls": 4}, batch=1)
    marked = net.add("Concat", net.rows("box", "1"), net.const(np.ones((1, BOXES, 1))), axis=2)
    net.out(net.add("Relu", marked), "five", [1, BOXES, 5])
    net.out(net.cut("five", 0, 4, 2), "loc", [1, BOXES, 4])
    net.out(net.rows("cls", "1"), "conf", [1, BOXES, 4])
    layout = Layout(net.build(), 3, lambda x: (x, x), "", table=anchors())
    del layout.model.graph.output[0]
    with pytest.raises(ImportModelError, match=r"works on one picture only: its node 'n/Concat_\d+' \(Concat\)"):
        imported(layout, tmp_path)


def test_a_node_that_needs_the_batch_gone_is_named(tmp_path: Path) -> None:
    net = Network({"box": 4, "cls": 4}, batch=1)
    rows = net.axes("Squeeze", net.rows("box", "1"), 0)
    net.out(net.add("CumSum", rows, net.const(0, INDEX)), "loc", [BOXES, 4])
    net.out(net.rows("cls", "1"), "conf", [1, BOXES, 4])
    with pytest.raises(ImportModelError, match=r"its node 'n/CumSum_\d+' \(CumSum\) cannot work on more"):
        imported(Layout(net.build(), 3, lambda x: (x, x), "", table=anchors()), tmp_path)
