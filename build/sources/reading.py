"""What a foreign graph was recognised as, and the small questions that every family asks a graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from build.sources.editor import SHAPING, Editor
from build.sources.front import Front

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

CAFFE = {"color_order": "BGR", "mean": [104.0, 117.0, 123.0], "std": [1.0, 1.0, 1.0]}
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
IMAGENET = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
HALF = {"mean": [127.5, 127.5, 127.5], "std": [127.5, 127.5, 127.5]}
SAMPLED = {"resample": "bilinear_plain"}
IN_PIXELS = 4  # no coordinate of a box or anchor in fractions of the picture reaches so far
USUAL = "usual:"  # how the place of a fact begins that the file cannot say


@dataclass
class Reading:
    """What a graph is.

    Attributes:
        family: its name.
        boxes, scores: tensors of the main graph.
        boxes_are: deltas (the anchors are still to be applied), decoded, linear (MediaPipe) or empty: to be found out.
        box_order: of decoded boxes xyxy, yxyx, xywh or cxcywh; of deltas `xy` or `yx`: which comes first.
        corners: the order of the graph's own decoded boxes, for a proof; set when it was found out.
        scores_are: logits or probabilities.
        stated: which of boxes_are, box_order and scores_are the user said: nothing in the graph overrules them.
        nms: keys of [nms] that the graph itself says.
        usual: keys of [nms] that users of this family usually choose; the file cannot say them.
        picture: keys of [input] that exports of this family usually want; the file cannot say them.
        anchors: FP32 [N,4] of cx,cy,w,h in 0..1 where the graph holds them.
        presets: names of anchor presets (build/sources/anchors.py) that this family usually has.
        facts: (what, value, where it was seen) for people.
        selection: what a proof compares with: names of the tensors (boxes, scores, selected) of a NonMaxSuppression in
            the main graph, of the outputs of TensorFlow's post-processing, or of finished rows.
        sees_background: whether that post-processing also chooses among the background's scores.
    """

    family: str
    boxes: ir.Value
    scores: ir.Value
    boxes_are: str = "deltas"
    box_order: str = ""
    corners: str = ""
    scores_are: str = "logits"
    stated: set[str] = field(default_factory=set)
    nms: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)
    picture: dict[str, Any] = field(default_factory=dict)
    anchors: NDArray[np.float32] | None = None
    presets: tuple[str, ...] = ()
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    selection: dict[str, str] = field(default_factory=dict)
    sees_background: bool = False

    def fact(self, what: str, value: object, where: str) -> None:
        self.facts.append((what, str(value), where))

    def suppose(self, what: str, value: object, setting: str) -> None:
        """A fact that the file cannot say: it is usual for the family, and the setting changes it."""
        self.fact(what, value, f"{USUAL} --set {setting}=...")

    def override(self, setting: str, value: object, where: str) -> None:
        """States what the user set; what was read or is usual for that key does not count any more."""
        names = {setting, setting.removeprefix("nms.")}
        self.facts = [fact for fact in self.facts if fact[0] not in names]
        self.fact(setting, value, where)

    def state_nms(self, where: str, **elsewhere: str) -> None:
        """Every key of [nms] so far as a fact: `where` says it, or another place says that key."""
        for key, value in self.nms.items():
            self.fact(key, value, elsewhere.get(key, where))


def attributes(node: ir.Node) -> dict[str, Any]:
    """A node's attributes; texts are str, lists are lists."""
    return {
        name: list(attribute.value) if isinstance(attribute.value, (tuple, list)) else attribute.value
        for name, attribute in node.attributes.items()
    }


def inside(node: ir.Node, op_type: str) -> list[ir.Node]:
    """Nodes of an operator in a node's subgraphs, however deep."""
    return [
        inner
        for attribute in node.attributes.values()
        if attribute.type.name == "GRAPH"
        for inner in attribute.as_graph().all_nodes()
        if inner.op_type == op_type
    ]


def captured(node: ir.Node) -> list[ir.Value]:
    """The tensors of the main graph that a node or its subgraphs read, constants left out."""
    own = node.graph
    values = {read.name: read for read in node.inputs if read is not None and read.const_value is None and read.name}
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            for inner in attribute.as_graph().all_nodes():
                for read in inner.inputs:
                    if read is not None and read.const_value is None and read.graph is own and read.name:
                        values[read.name] = read
    return list(values.values())


def outputs(editor: Editor, front: Front) -> list[tuple[ir.Value, NDArray[Any]]]:
    """The graph's outputs, and their values for one picture of noise."""
    values = list(editor.graph.outputs)
    return list(zip(values, editor.measure(front.example(), values), strict=True))


def columns(editor: Editor, front: Front, value: ir.Value, start: int, end: int) -> ir.Value:
    """value[..., start:end]: a part of the concatenation that made it where that is a whole part, else a slice."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value, node = node.inputs[0], node.inputs[0].producer()
    parts = [part for part in node.inputs if part is not None] if node is not None else []
    if node is not None and node.op_type == "Concat" and not any(editor.constant(part) is not None for part in parts):
        measured = editor.measure(front.example(), [value, *parts])
        axis = int(attributes(node)["axis"]) % measured[0].ndim
        places = [0]
        for array in measured[1:]:
            places.append(places[-1] + array.shape[axis])
        if axis == measured[0].ndim - 1:
            for part, low, high in zip(parts, places, places[1:], strict=False):
                if low <= start and end <= high:
                    whole = (low, high) == (start, end)
                    return part if whole else columns(editor, front, part, start - low, end - low)
    return editor.columns(value, start, end)


def three(
    editor: Editor, value: ir.Value, shape: tuple[int, ...], wide: int, count: int = 0
) -> tuple[ir.Value, int] | None:
    """A tensor of one picture as [B,N,wide], and N; None where it cannot be read so.

    Args:
        editor: its graph.
        value: the tensor.
        shape: as measured for one picture.
        wide: columns of a row.
        count: N where it is known.
    """
    total = math.prod(shape)
    rows = total // wide if wide else 0
    if not rows or total % wide or (count and rows != count):
        return None
    if len(shape) == 3 and shape[0] == 1 and shape[2] == wide:
        return value, rows
    if len(shape) == 3 and shape[0] == 1 and shape[1] == wide and shape[2] == rows:
        return editor.transpose(value, 0, 2, 1), rows
    # [N,wide], [B,N·wide], [B,N,1,wide]: the same numbers in the same order.
    if shape[-1] == wide or [size for size in shape if size != 1] == [total] or shape[-1] == total:
        return editor.reshape(value, -1, rows, wide), rows
    return None


def parts_of(value: ir.Value) -> list[ir.Value]:
    """The tensors that a concatenation joins, or the tensor itself."""
    node = value.producer()
    if node is None or node.op_type not in ("Concat", *SHAPING):
        return [value]
    reads = [read for read in node.inputs if read is not None]
    return [part for read in (reads if node.op_type == "Concat" else reads[:1]) for part in parts_of(read)]


def shown(value: ir.Value) -> str:
    """A tensor's shape as it is declared."""
    return "[" + ", ".join(str(size) for size in value.shape or ()) + "]"


def decimal(value: Any) -> float:
    """A float32 as the decimal that was meant: 0.45, not 0.44999998807907104."""
    import numpy as np

    return float(str(np.float32(np.asarray(value).ravel()[0])))
