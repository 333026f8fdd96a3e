"""What a layout of an export is, and what the layouts of layouts_with_nms.py and layouts_without_nms.py share.

Each layout is a function that builds a `Network` and its output layout. `truth` is written from the definition of the
family, not from what the import makes of it: boxes x1,y1,x2,y2 in 0..1 and scores of the foreground.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from build.sources.foreign import Wishes
from tests.build.sources.networks import CELL, SIZE, Array, Network, anchors

Truth = Callable[[Array], tuple[Array, Array]]  # pixels [B,3,64,64] as the heads take them → boxes, scores
GRID = np.array(
    [(x, y, s) for side, s in ((8, 8), (4, 16)) for y in range(side) for x in range(side) for _ in range(CELL)],
    np.float32,
)


@dataclass
class Layout:
    """A file, how it is imported, and what it must give.

    Attributes:
        model: the file.
        labels: how many.
        truth: boxes [B,N,4] and scores [B,N,labels].
        family: as it is recognised.
        wishes: what the user says; `anchors` as a text; `table` is saved as anchors.npy and named.
        nms: keys of [nms] that must be read from the graph.
        table: anchors that the user gives; None = none.
    """

    model: onnx.ModelProto
    labels: int
    truth: Truth
    family: str
    wishes: Wishes = field(default_factory=Wishes)
    nms: dict[str, Any] = field(default_factory=dict)
    table: Array | None = None


Layouts = dict[str, Callable[[], Layout]]


def variations(into: Layouts, name: str, build: Callable[..., Layout], **cases: dict[str, Any]) -> None:
    """The same builder with other arguments."""
    for case, arguments in cases.items():
        into[f"{name}: {case.replace('_', ' ')}"] = lambda arguments=arguments: build(**arguments)  # type: ignore[misc]


def cast(net: Network, value: str, to: int = TensorProto.FLOAT) -> str:
    output = f"cast_{len(net.nodes)}"
    net.nodes.append(helper.make_node("Cast", [value], [output], name=f"n/{output}", to=to))
    return output


def in_graph_decoding(net: Network, rows: str, order: str, pixels: bool, batch: str, squeezed: bool = False) -> str:
    """pytorch-ssd's `convert_locations_to_boxes` and `center_form_to_corner_form`."""
    table = anchors()
    axis = 1 if squeezed else 2
    if squeezed:
        rows = net.axes("Squeeze", rows, 0)
    prior = net.const(table if squeezed else table[None])
    centre = net.add("Mul", net.add("Mul", net.cut(rows, 0, 2, axis), net.const(0.1)), net.cut(prior, 2, 4, axis))
    centre = net.add("Add", centre, net.cut(prior, 0, 2, axis))
    extent = net.add(
        "Mul", net.add("Exp", net.add("Mul", net.cut(rows, 2, 4, axis), net.const(0.2))), net.cut(prior, 2, 4, axis)
    )
    if order == "cxcywh":
        boxes = net.add("Concat", centre, extent, axis=axis)
    else:
        half = net.add("Div", extent, net.const(2.0))
        boxes = net.add("Concat", net.add("Sub", centre, half), net.add("Add", centre, half), axis=axis)
    return net.add("Mul", boxes, net.const([SIZE] * 4)) if pixels else boxes
