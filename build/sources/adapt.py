"""From what a foreign graph has to what the build takes: `box_deltas` [B,N,4] and `class_logits` [B,N,C].

Only standard operators are added. Boxes that cannot stay encoded are decoded here, to corners x1,y1,x2,y2 in 0..1; then
the spec says `box_coding = "decoded"` and there are no anchors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build import contract
from build.errors import ImportModelError, OptionError
from build.sources.activations import find_activation, is_activated
from build.sources.anchors import usual_anchors
from build.sources.batch import check_batch, open_batch
from build.sources.decoding import BOX_ORDERS, CORNERS, Decoding, find_decoding, is_computed
from build.sources.editor import Editor
from build.sources.front import Front, new_input
from build.sources.reading import IN_PIXELS, Reading, three

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

Y_FIRST = ("yx", "yxyx", "cycxhw")  # orders of deltas, anchors and boxes in which y comes before x


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
    size, other = (array.shape for array in editor.measure(front.example(), [reading.boxes, reading.scores]))
    boxes, count = _box_rows(editor, reading, size, other)
    nms = {"runtime_thresholds": True, **reading.usual, **reading.nms}
    heads, classes, activation = _scores(editor, front, reading, other, count, labels)
    nms.setdefault("background_class", 0 if classes == labels + 1 else -1)
    _check_labels(editor, classes, labels, nms["background_class"])
    nms["score_activation"] = activation or _usual_activation(reading, classes, nms["background_class"])
    decoding = None
    if reading.boxes_are in ("decoded", ""):
        decoding = find_decoding(editor, boxes, count, reading.box_order, front.example())
    if decoding is not None:
        boxes, own = _encodings(editor, front, reading, decoding, anchors)
        nms |= {"box_coding": "center_size", "box_scales": list(decoding.scales)}
        given: NDArray[np.float32] | None = own
    else:
        given = anchors if anchors is not None else reading.anchors
        reading.boxes_are = reading.boxes_are or _deltas_or_decoded(
            editor, front, reading, boxes, count, anchors is not None
        )
        if reading.boxes_are != "decoded":
            given = _anchors(editor, front, reading, given, count)
    if reading.boxes_are == "deltas":
        if reading.box_order in Y_FIRST:
            boxes = editor.pick(boxes, CORNERS["yxyx"])
            reading.fact("deltas", "y before x, h before w", f"as the order {reading.box_order} says")
        kept = given
    else:
        boxes, kept = _decoded(editor, front, reading, boxes, given), None
        nms |= {"box_coding": "decoded"}
        nms.pop("box_scales", None)
    lowest = contract.lowest_for(nms.get("score_threshold", contract.Nms.score_threshold))
    if lowest < contract.Nms.lowest_score_threshold:
        nms["lowest_score_threshold"] = lowest
    for key, value in reading.usual.items():
        if nms.get(key) == value and key not in reading.nms:
            reading.suppose(key, value, f"nms.{key}")
    pixels = new_input(editor, front)
    tensors = ((boxes, count, 4), (heads, count, classes))
    model = editor.finish(pixels, dict(zip(contract.HEADS, tensors, strict=True)), (front.height, front.width))
    noise = front.noise(2).transpose(0, 3, 1, 2)
    opened = open_batch(editor.path, model, noise[:1])
    if opened:
        reading.fact("batch", f"opened in {len(opened)} nodes", ", ".join(map(repr, opened[:3])))
    check_batch(editor.path, model, noise)
    picture = {"width": front.width, "height": front.height, **reading.picture}
    if front.normalised:
        picture |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    return Adapted(model, kept, nms, picture)


# -- scores ------------------------------------------------------------------------------------------------------------


def _scores(
    editor: Editor, front: Front, reading: Reading, shape: tuple[int, ...], count: int, labels: int
) -> tuple[ir.Value, int, str]:
    """The scores as [B,N,C], from before their activation where SSDNMS can do it; C; the activation, if it is known.

    Raises:
        ImportModelError: they are not of as many boxes.
    """
    scores, total = reading.scores, math.prod(shape)
    read = three(editor, scores, shape, total // count, count) if total % count == 0 else None
    if read is None:
        raise ImportModelError(
            f"{editor.path}: scores {scores.name!r} are {list(shape)}, but {reading.boxes.name!r} has {count} boxes",
            fix="name the tensors that belong together: --boxes NAME --logits NAME",
        )
    rows, classes = read[0], total // count
    if "scores_are" not in reading.stated:
        activation = find_activation(editor, front, rows, count, classes)
        # A background that is cut off behind the activation must be among the classes again.
        if activation is not None and activation.columns <= labels + 1:
            kind, node = activation.kind, activation.source
            if activation.columns > classes:
                reading.nms["background_class"] = 0
            reading.fact("score_activation", kind, f"behind {node.name!r}, measured: left to SSDNMS")
            return activation.logits, activation.columns, kind
        if is_activated(rows):  # part by part, such as for each feature map
            reading.scores_are = "probabilities"
    if reading.scores_are == "probabilities":
        reading.fact("score_activation", "none", f"{scores.name!r} are probabilities already")
        return rows, classes, "none"
    return rows, classes, str(reading.nms.get("score_activation", ""))


def _usual_activation(reading: Reading, classes: int, background: int) -> str:
    """The activation of logits where nothing tells it: softmax with a background's column, else sigmoid."""
    kind = "softmax" if background >= 0 and classes > 1 else "sigmoid"
    column = "with" if background >= 0 else "without"
    reading.fact("score_activation", kind, f"usual {column} a background column (--set nms.score_activation=...)")
    return kind


def _check_labels(editor: Editor, columns: int, labels: int, background: int) -> None:
    """The labels are as many as the columns say.

    Raises:
        OptionError: they are not.
    """
    if columns != labels + (background >= 0):
        raise OptionError(
            f"{editor.path}: has {columns} classes, but there are {labels} labels",
            why=f"with a background there must be {columns - 1} labels, without one {columns}",
            fix="give the labels of this model: --labels FILE, one foreground label per line",
        )


# -- boxes -------------------------------------------------------------------------------------------------------------


def _box_rows(editor: Editor, reading: Reading, size: tuple[int, ...], other: tuple[int, ...]) -> tuple[ir.Value, int]:
    """The boxes as [B,N,4], and N.

    Raises:
        ImportModelError: they cannot be read so.
    """
    read = three(editor, reading.boxes, size, 4)
    if read is not None:
        return read
    swapped = 4 in other[-2:]
    raise ImportModelError(
        f"{editor.path}: boxes {reading.boxes.name!r} are {list(size)}, which cannot be read as [B,N,4]",
        why=f"boxes and scores are swapped: {reading.scores.name!r} is {list(other)}" if swapped else "",
        fix=f"--boxes {reading.scores.name} --logits {reading.boxes.name}"
        if swapped
        else "name another tensor: --boxes NAME --logits NAME",
    )


def _encodings(
    editor: Editor, front: Front, reading: Reading, decoding: Decoding, anchors: NDArray[np.float32] | None
) -> tuple[ir.Value, NDArray[np.float32]]:
    """What the graph decodes, in the order x,y,w,h, and its anchors in 0..1.

    Raises:
        ImportModelError: the user gave other anchors.
    """
    import numpy as np

    in_pixels = decoding.anchors.max() > IN_PIXELS
    unit = np.array([front.width, front.height] * 2 if in_pixels else [1] * 4, np.float32)
    own, order = decoding.anchors / unit, decoding.order
    reading.corners = decoding.box_order
    changes = [np.count_nonzero(np.abs(np.diff(own[:, i])) > 1e-4) for i in range(2)]
    if changes[0] < changes[1] and "box_order" not in reading.stated:  # from row to row, x changes first
        own, order = own[:, [1, 0, 3, 2]], (order[1], order[0], order[3], order[2])
        turned = {"xyxy": "yxyx", "yxyx": "xyxy", "cxcywh": "cycxhw"}
        reading.corners = turned.get(reading.corners, reading.corners)
    if anchors is not None and (anchors.shape != own.shape or np.abs(anchors - own).max() > 1e-3):
        raise ImportModelError(
            f"{editor.path}: the graph itself decodes the boxes {reading.boxes.name!r} with {len(own)} anchors, and "
            "--anchors would move them a second time",
            why=f"they are computed from the raw numbers in {decoding.encodings.name!r}",
            fix="leave --anchors out: the anchors are read from the graph",
        )
    where = f"tensor {decoding.encodings.name!r}, measured: {decoding.error:.0e} from the graph's own"
    reading.fact("box_scales", list(decoding.scales), where)
    reading.fact("anchors", f"{len(own)}{' in pixels' if in_pixels else ''}", where)
    (array,) = editor.measure(front.example(), [decoding.encodings])
    read = three(editor, decoding.encodings, array.shape, 4, len(own))
    assert read is not None
    reading.boxes_are, reading.box_order = "deltas", "xy"
    return editor.pick(read[0], order), np.ascontiguousarray(own, np.float32)


def _deltas_or_decoded(
    editor: Editor, front: Front, reading: Reading, boxes: ir.Value, count: int, anchors_given: bool
) -> str:
    """What boxes are that no SSD decoding stands behind.

    Raises:
        OptionError: it must be said.
        ImportModelError: the graph computes boxes, and the user gave anchors to move them again.
    """
    if is_computed(editor, boxes, count):
        if anchors_given:
            raise ImportModelError(
                f"{editor.path}: the boxes {reading.boxes.name!r} are computed in the graph for each anchor, and "
                "--anchors would move them a second time",
                fix="leave --anchors out, or --boxes-are deltas if they really are raw",
            )
        return "decoded"
    if reading.family == "pytorch-ssd":
        corners = _share_of_corners(editor.measure(front.example(), [boxes])[0])
        raise OptionError(
            f"{editor.path}: nothing in the graph says whether its boxes {reading.boxes.name!r} are decoded",
            why="no arithmetic stands between the network and the output, "
            f"and on noise {100 * corners:.0f} % of them have x1 < x2 and y1 < y2 (of decoded boxes, nearly all do)",
            fix="say it: --boxes-are deltas, with --anchors FILE if their number is not a known one; or "
            "--boxes-are decoded",
        )
    return "deltas"


def _anchors(
    editor: Editor, front: Front, reading: Reading, given: NDArray[np.float32] | None, count: int
) -> NDArray[np.float32]:
    """The anchors: given, in the graph, or those that this family usually has for so many boxes and this input.

    Raises:
        OptionError: there are none, or not as many as boxes.
    """
    if given is None:
        usual = usual_anchors(reading.presets, count, front.width, front.height)
        if len(usual) == 1:
            text, rows = next(iter(usual.items()))
            size = f"{count} boxes of a {front.width} x {front.height} input"
            reading.fact("anchors", text, f"usual for {size} (--anchors FILE for others)")
            return rows
        several = f"{' and '.join(usual)} both have {count}; " if usual else ""
        raise OptionError(
            f"{editor.path}: its {count} boxes are deltas, and the anchors that they move are not in the graph",
            fix=f"{several}name them: --anchors FILE.npy, or generate them: --anchors priorbox:...|ssd-grid:...|"
            "mediapipe:...|cells:... (docs/import.md); or, if the boxes are decoded, --boxes-are decoded",
        )
    if len(given) != count:
        raise OptionError(
            f"{editor.path}: has {count} boxes, but there are {len(given)} anchors",
            fix="name the anchors of this model",
        )
    return given


def _decoded(
    editor: Editor, front: Front, reading: Reading, boxes: ir.Value, anchors: NDArray[np.float32] | None
) -> ir.Value:
    """Boxes [B,N,4] of any decoding as corners x1,y1,x2,y2 in 0..1.

    Raises:
        OptionError: their order must be said.
    """
    import numpy as np

    size = np.array([front.width, front.height] * 2, np.float32)
    if reading.boxes_are == "linear":  # MediaPipe: offsets and sizes in pixels, added to the anchors' centres
        assert anchors is not None
        boxes = editor.op("Div", boxes, editor.number(size))
        boxes = editor.op("Add", boxes, editor.number(np.pad(anchors[:, :2], ((0, 0), (0, 2)))[None]))
        return _corners(editor, boxes, "cxcywh")
    (values,) = editor.measure(front.example(), [boxes])
    order = reading.box_order or _told(editor, reading, values)
    reading.corners = order
    corners = _corners(editor, boxes, order)
    if reading.family == "nms-inside" and order in CORNERS and (values[..., 2:] < values[..., :2]).any():
        first, second = editor.columns(corners, 0, 2), editor.columns(corners, 2, 4)
        corners = editor.concat([editor.op("Min", first, second), editor.op("Max", first, second)], 2)
        reading.fact("corners", "sorted", "NonMaxSuppression takes any two opposite corners (ONNX)")
    (values,) = editor.measure(front.example(), [corners])
    largest = np.abs(values).max()
    if largest > IN_PIXELS:
        corners = editor.op("Div", corners, editor.number(size))
    unit = "pixels" if largest > IN_PIXELS else "fractions of the picture"
    reading.fact("unit", unit, f"measured on noise: values up to {largest:.3g}")
    reading.fact("box_order", order, "adapted to x1,y1,x2,y2 in 0..1")
    return corners


def _share_of_corners(values: NDArray[np.float32]) -> float:
    """How many of the boxes have their second corner to the right of and below the first, in 0..1."""
    rows = values.reshape(-1, 4)
    return float(((rows[:, 2] > rows[:, 0]) & (rows[:, 3] > rows[:, 1])).mean())


def _told(editor: Editor, reading: Reading, values: NDArray[np.float32]) -> str:
    """The order of decoded boxes, where their values tell that they are corners: xyxy, unless said otherwise.

    Raises:
        OptionError: they do not.
    """
    rows = values.reshape(-1, 4)
    if _share_of_corners(values) > 0.99:
        reading.fact("box_order", "corners", "measured; that x comes first is usual (--box-order yxyx otherwise)")
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
