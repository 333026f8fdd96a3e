"""From what a foreign graph has to what the build takes: `box_deltas` [B,N,4] and `class_logits` [B,N,C].

Only standard operators are added. Boxes that cannot stay encoded are decoded here, to corners x1,y1,x2,y2 in 0..1; then
the spec says `box_coding = "decoded"` and there are no anchors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import ImportModelError, OptionError
from build.sources.decoding import find_decoding
from build.sources.editor import Editor
from build.sources.front import Front, new_input
from build.sources.recognise import Reading, activation_of

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

# Of each order of four numbers: the places of x1, y1, x2, y2, or of cx, cy, w, h.
CORNERS = {"xyxy": (0, 1, 2, 3), "yxyx": (1, 0, 3, 2)}
DELTAS = {"xy": (0, 1, 2, 3), "yx": (1, 0, 3, 2)}
BOX_ORDERS = ("xyxy", "yxyx", "xywh", "cxcywh", "cycxhw")


@dataclass(frozen=True)
class Adapted:
    """What the build takes.

    Attributes:
        model: FP32 `pixels` [batch,3,H,W] → box_deltas [B,N,4], class_logits [B,N,C].
        anchors: FP32 [N,4]; None where boxes are decoded.
        nms: keys of [nms].
        picture: keys of [input].
    """

    model: onnx.ModelProto
    anchors: NDArray[np.float32] | None
    nms: dict[str, Any]
    picture: dict[str, Any]


def adapt(editor: Editor, front: Front, reading: Reading, labels: int, anchors: NDArray[np.float32] | None) -> Adapted:
    """Adapts the graph.

    Args:
        editor: the graph; it is changed.
        front: where its pixels come in.
        reading: what it is.
        labels: how many foreground labels there are.
        anchors: FP32 [N,4] of cx,cy,w,h in 0..1 as the user gives them; None = as the graph has them.

    Raises:
        OptionError: something that the graph does not say must be said; names the option.
        ImportModelError: the graph contradicts its reading.
    """
    import numpy as np

    boxes, scores = reading.boxes, reading.scores
    sizes = [array.shape for array in editor.measure(front.example(), [boxes, scores])]
    nms = {"runtime_thresholds": True, **reading.nms}
    given = anchors if anchors is not None else reading.anchors
    if reading.pick:
        box_columns, score_columns, objectness = reading.pick
        rows, count = _three(editor, boxes, sizes[0], sizes[0][-1] if not reading.turned else sizes[0][1], "boxes")
        other = rows if scores is boxes else _three(editor, scores, sizes[1], score_columns[1], "scores")[0]
        heads, classes = editor.columns(other, *score_columns), score_columns[1] - score_columns[0]
        if objectness >= 0:
            heads = editor.op("Mul", heads, editor.columns(rows, objectness, objectness + 1))
            reading.fact("scores", "objectness x class", "adapted")
        boxes = editor.columns(rows, *box_columns)
        if reading.family == "keras-ssd":
            boxes, constant, scales = _keras_rows(editor, front, reading, rows, classes)
            reading.boxes_are, reading.box_order = ("deltas", "xy") if constant is not None else ("decoded", "cxcywh")
            given = constant if given is None else given
            nms |= {"box_scales": scales} if scales else {}
        if reading.scores_are == "probabilities":
            nms["score_activation"] = "none"
    else:
        encoded, size = boxes, sizes[0]
        boxes, count = _three(editor, boxes, size, 4, "boxes")
        heads, classes = _scores(editor, front, reading, scores, sizes[1], count, nms)
        if reading.boxes_are == "decoded" and reading.box_order in CORNERS:
            decoding = find_decoding(editor, encoded, count, reading.box_order, front.example())
            if decoding is not None:
                where = f"tensor {decoding.encodings.name!r}, measured: {decoding.error:.0e} from the graph's own"
                reading.fact("box_scales", list(decoding.scales), where)
                reading.fact("anchors", f"{count}", where)
                (array,) = editor.measure(front.example(), [decoding.encodings])
                boxes = editor.pick(_three(editor, decoding.encodings, array.shape, 4, "encodings")[0], decoding.order)
                in_pixels = decoding.anchors.max() > 4
                unit = np.array([front.width, front.height] * 2 if in_pixels else [1] * 4, np.float32)
                given, reading.boxes_are, reading.box_order = decoding.anchors / unit, "deltas", "xy"
                nms |= {"box_coding": "center_size", "box_scales": list(decoding.scales)}
    nms.setdefault("background_class", _background(editor, classes, labels))
    if not reading.boxes_are:
        raise OptionError(
            f"{editor.path}: nothing in the graph says whether its boxes {reading.boxes.name!r} are decoded",
            why="no arithmetic stands between the network and the output",
            fix="say it: --boxes-are decoded, or --boxes-are deltas with --anchors FILE",
        )
    if reading.boxes_are == "deltas":
        if given is None:
            raise OptionError(
                f"{editor.path}: its {count} boxes are deltas, and the anchors that they move are not in the graph",
                fix="name them: --anchors FILE.npy, or generate them, such as --anchors priorbox:... (docs/import.md)",
            )
        if len(given) != count:
            raise OptionError(
                f"{editor.path}: has {count} boxes, but there are {len(given)} anchors",
                fix="name the anchors of this model",
            )
        boxes = editor.pick(boxes, DELTAS[reading.box_order or "xy"])
    else:
        boxes, given = _decoded(editor, front, reading, boxes, given), None
        nms |= {"box_coding": "decoded"}
        nms.pop("box_scales", None)
    pixels = new_input(editor, front)
    tensors = ((boxes, count, 4), (heads, count, classes))
    model = editor.finish(pixels, dict(zip(contract.HEADS, tensors, strict=True)), (front.height, front.width))
    picture = {"width": front.width, "height": front.height, **reading.picture}
    if front.normalised:
        picture |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    return Adapted(model, given, nms, picture)


def _three(editor: Editor, value: ir.Value, shape: tuple[int, ...], columns: int, what: str) -> tuple[ir.Value, int]:
    """A tensor as [B,N,columns], and N.

    Raises:
        ImportModelError: it cannot be read so.
    """
    size = shape[1:] if len(shape) > 2 or (len(shape) == 2 and shape[0] == 1) else shape
    total = 1
    for dim in size:
        total *= dim
    if len(shape) == 3 and shape[2] == columns:
        return value, shape[1]
    if len(shape) == 3 and shape[1] == columns:
        return editor.transpose(value, 0, 2, 1), shape[2]
    if total % columns == 0 and (shape[-1] == columns or len(size) == 1):
        # [N,columns], [B,N·columns], [B,N,1,columns]: the same numbers in the same order.
        first = 0 if len(shape) > 1 and shape[0] == 1 else -1
        return editor.reshape(value, first, total // columns, columns) if first else editor.reshape(
            value, 0, -1, columns
        ), total // columns
    raise ImportModelError(
        f"{editor.path}: {what} {value.name!r} are {list(shape)}, which cannot be read as [B,N,{columns}]",
        fix="name another tensor: --boxes NAME --logits NAME",
    )


def _scores(
    editor: Editor,
    front: Front,
    reading: Reading,
    scores: ir.Value,
    shape: tuple[int, ...],
    count: int,
    nms: dict[str, Any],
) -> tuple[ir.Value, int]:
    """The scores as [B,N,C], from before their activation where SSDNMS can do it, and C."""
    import numpy as np

    columns = _columns(editor, scores, shape, count)
    rows, _ = _three(editor, scores, shape, columns, "scores")
    node = activation_of(scores)
    if node is not None and not reading.scores_stated:
        kind, source = node.op_type.lower(), node.inputs[0]
        assert source is not None
        (before,) = editor.measure(front.example(), [source])
        wide = _columns(editor, source, before.shape, count)
        logits, _ = _three(editor, source, before.shape, wide, "scores")
        raw, activated = editor.measure(front.example(), [logits, rows])
        ours = _activate(raw, kind)[..., wide - columns :]  # exports cut the background off behind the activation
        if ours.shape == activated.shape and np.abs(ours - activated).max() < 1e-5:
            nms["score_activation"] = kind
            reading.fact("score_activation", kind, f"{node.op_type} {node.name!r}, left to SSDNMS")
            return logits, wide
        reading.scores_are = "probabilities"  # activated along another axis than the classes: taken as they are
    if reading.scores_are == "probabilities":
        nms["score_activation"] = "none"
        reading.fact("score_activation", "none", f"{scores.name!r} are probabilities already")
    return rows, columns


def _activate(logits: NDArray[np.float32], kind: str) -> NDArray[np.float64]:
    import numpy as np

    values = logits.astype(np.float64)
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-values))
    powers = np.exp(values - values.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _columns(editor: Editor, scores: ir.Value, shape: tuple[int, ...], count: int) -> int:
    """C of scores that hold `count` rows.

    Raises:
        ImportModelError: they do not.
    """
    import math

    total = math.prod(shape[1:] if len(shape) > 1 else shape)
    if total % count:
        raise ImportModelError(
            f"{editor.path}: scores {scores.name!r} are {list(shape)}, but there are {count} boxes",
            fix="name the tensors that belong together: --boxes NAME --logits NAME",
        )
    return total // count


def _background(editor: Editor, columns: int, labels: int) -> int:
    """The background's column, as the number of labels tells.

    Raises:
        OptionError: the labels do not fit.
    """
    if columns == labels + 1:
        return 0
    if columns == labels:
        return -1
    raise OptionError(
        f"{editor.path}: has {columns} classes, but there are {labels} labels",
        why=f"with a background there must be {columns - 1} labels, without one {columns}",
        fix="give the labels of this model: --labels FILE, one foreground label per line",
    )


def _decoded(
    editor: Editor, front: Front, reading: Reading, boxes: ir.Value, anchors: NDArray[np.float32] | None
) -> ir.Value:
    """Boxes [B,N,4] of any decoding as corners x1,y1,x2,y2 in 0..1.

    Raises:
        OptionError: their order, or the anchors that they need, must be said.
    """
    import numpy as np

    size = np.array([front.width, front.height] * 2, np.float32)
    if reading.boxes_are == "linear":  # MediaPipe: offsets and sizes in pixels, added to the anchors' centres
        centres = _needed(editor, anchors)[:, :2]
        boxes = editor.op("Div", boxes, editor.number(size))
        boxes = editor.op("Add", boxes, editor.number(np.pad(centres, ((0, 0), (0, 2)))[None]))
        return _corners(editor, boxes, "cxcywh")
    if reading.boxes_are == "cells":  # YOLOX: offsets in cells, logarithms of the size in cells
        cells = _needed(editor, anchors)
        stride = editor.number(cells[None, :, 2:])
        centre = editor.op("Mul", editor.columns(boxes, 0, 2), stride)
        centre = editor.op("Add", centre, editor.number(cells[None, :, :2]))
        extent = editor.op("Mul", editor.op("Exp", editor.columns(boxes, 2, 4)), stride)
        return _corners(editor, editor.concat([centre, extent], 2), "cxcywh")
    (values,) = editor.measure(front.example(), [boxes])
    order = reading.box_order or _told(editor, values)
    corners = _corners(editor, boxes, order)
    (values,) = editor.measure(front.example(), [corners])
    if np.abs(values).max() > 4 or reading.unit == "pixels":
        corners = editor.op("Div", corners, editor.number(size))
        reading.fact("unit", "pixels", "measured: values beyond 4")
    reading.fact("box_order", order, "adapted to x1,y1,x2,y2 in 0..1")
    return corners


def _told(editor: Editor, values: NDArray[np.float32]) -> str:
    """The order of decoded boxes, where their values tell: corners are xyxy, unless said otherwise.

    Raises:
        OptionError: they do not.
    """
    rows = values.reshape(-1, 4)
    if ((rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])).mean() > 0.99:
        return "xyxy"
    raise OptionError(
        f"{editor.path}: its decoded boxes are no corners, and nothing says what they are",
        why=f"the first one is {rows[0].round(3).tolist()}",
        fix=f"say it: --box-order {'|'.join(BOX_ORDERS)}",
    )


def _corners(editor: Editor, boxes: ir.Value, order: str) -> ir.Value:
    """Boxes of an order as x1,y1,x2,y2."""
    if order in CORNERS:
        return editor.pick(boxes, CORNERS[order])
    if order == "cycxhw":
        boxes = editor.pick(boxes, CORNERS["yxyx"])
    first, extent = editor.columns(boxes, 0, 2), editor.columns(boxes, 2, 4)
    if order == "xywh":
        return editor.concat([first, editor.op("Add", first, extent)], 2)
    half = editor.op("Mul", extent, editor.number(0.5))
    return editor.concat([editor.op("Sub", first, half), editor.op("Add", first, half)], 2)


def _needed(editor: Editor, anchors: NDArray[np.float32] | None) -> NDArray[np.float32]:
    if anchors is None:
        raise OptionError(
            f"{editor.path}: its boxes are decoded with anchors that are not in the graph",
            fix="name them, or have them generated: --anchors FILE.npy|cells:...|ssd-grid:... (--family list)",
        )
    return anchors


def _keras_rows(
    editor: Editor, front: Front, reading: Reading, rows: ir.Value, classes: int
) -> tuple[ir.Value, NDArray[np.float32] | None, list[float]]:
    """Keras SSD's columns behind the scores: deltas and constant anchors, or boxes decoded from all of them.

    Returns:
        The boxes [B,N,4], the anchors (None: the boxes are decoded, as cx,cy,w,h), the scales.
    """
    import numpy as np

    deltas, anchor, variance = (editor.columns(rows, classes + 4 * i, classes + 4 * i + 4) for i in range(3))
    first = editor.measure(front.example(), [anchor, variance])
    other = editor.measure(front.feeds(np.full((1, front.height, front.width, 3), 7.0)), [anchor, variance])
    if all(np.array_equal(a, b) for a, b in zip(first, other, strict=True)) and (np.ptp(first[1], axis=1) == 0).all():
        anchors = first[0][0].astype(np.float32)
        reading.fact("anchors", f"{len(anchors)}, the same for every picture", "columns of the output")
        return deltas, anchors, [float(f"{1 / value:.6g}") for value in first[1][0, 0]]
    reading.fact("anchors", "computed for every picture: decoded in the graph", "columns of the output")
    moves = editor.op("Mul", deltas, variance)
    size = editor.columns(anchor, 2, 4)
    centre = editor.op("Add", editor.op("Mul", editor.columns(moves, 0, 2), size), editor.columns(anchor, 0, 2))
    extent = editor.op("Mul", editor.op("Exp", editor.columns(moves, 2, 4)), size)
    return editor.concat([centre, extent], 2), None, []


def to_corners(boxes: NDArray[np.float64], order: str) -> NDArray[np.float64]:
    """[n,4] of an order as x1,y1,x2,y2: what `_corners` writes into the graph."""
    import numpy as np

    if order in CORNERS:
        return boxes[:, CORNERS[order]]
    if order == "cycxhw":
        boxes = boxes[:, CORNERS["yxyx"]]
    first, extent = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([first, first + extent] if order == "xywh" else [first - extent / 2, first + extent / 2], 1)
