"""How a graph decodes its boxes, found out by asking it.

A decoding moves each anchor by four numbers. Whatever nodes compute it, zeros give the anchors themselves, and a small
step in one of the four shows which side of the box it moves, by how much, and whether linearly or exponentially. The
conclusion is then compared with the graph on random numbers: it must give the same boxes, or it is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from build.errors import ImportModelError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

    from build.sources.editor import Editor

# What a network is made of: behind the last of these, encodings are decoded.
NETWORK = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Loop", "Scan", "If", "Shape")
_STEP = 0.25
_CLOSE = 1e-5
# Of each order of corners: the places of x1, y1, x2, y2.
CORNERS = {"xyxy": (0, 1, 2, 3), "yxyx": (1, 0, 3, 2)}
BOX_ORDERS = ("xyxy", "yxyx", "xywh", "cxcywh", "cycxhw")


@dataclass(frozen=True)
class Decoding:
    """What turns encodings into boxes.

    Attributes:
        encodings: the tensor with the raw numbers.
        order: places of the numbers for x, y, width and height among the encodings' four.
        scales: what those four are divided by.
        anchors: FP32 [N,4], cx,cy,w,h in the unit of the decoded boxes.
        box_order: of the decoded boxes.
        error: the largest difference between these boxes and the graph's, on random encodings.
    """

    encodings: ir.Value
    order: tuple[int, int, int, int]
    scales: tuple[float, float, float, float]
    anchors: NDArray[np.float32]
    box_order: str
    error: float


def find_decoding(
    editor: Editor, boxes: ir.Value, count: int, box_order: str, image: dict[str, NDArray[np.generic]]
) -> Decoding | None:
    """The SSD decoding (Liu et al. 2016, eq. 2) between raw encodings and decoded boxes, if there is one.

    Args:
        editor: the graph.
        boxes: the decoded boxes.
        count: N.
        box_order: of the decoded boxes, where it is known; the others are tried, too.
        image: the feeds for one picture, for the sizes of tensors.

    Returns:
        The one that starts nearest to the network; None where the boxes are decoded otherwise, or not at all.
    """
    import numpy as np

    farthest = None
    orders = [box_order, "xyxy", "cxcywh", "xywh"] if box_order else ["xyxy", "cxcywh", "xywh"]
    candidates = editor.ancestors(boxes, until=NETWORK)[1:]
    for candidate, numbers in zip(candidates, editor.measure(image, candidates), strict=True):
        size = numbers.shape
        if int(np.prod(size)) == 4 * count and size[-1] in (4, 4 * count):
            tried = [farthest.box_order] if farthest else list(dict.fromkeys(orders))
            farthest = _probe(editor, candidate, boxes, size, count, tried) or farthest
    return farthest


def is_computed(editor: Editor, boxes: ir.Value, count: int) -> bool:
    """Whether numbers of each of the N anchors, or an exponential, stand between the network and these boxes."""
    for value in editor.ancestors(boxes, until=NETWORK):
        node = value.producer()
        if node is None or node.op_type in NETWORK:
            continue
        if node.op_type == "Exp":
            return True
        if node.op_type in ("Add", "Sub", "Mul", "Div"):
            constants = [editor.constant(read) for read in node.inputs]
            if any(array is not None and array.size >= count > 1 for array in constants):
                return True
    return False


def to_corners(boxes: NDArray[np.float64], order: str) -> NDArray[np.float64]:
    """[n,4] of an order as x1,y1,x2,y2."""
    import numpy as np

    if order in CORNERS:
        return boxes[:, CORNERS[order]]
    if order == "cycxhw":
        boxes = boxes[:, CORNERS["yxyx"]]
    first, extent = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([first, first + extent] if order == "xywh" else [first - extent / 2, first + extent / 2], 1)


def _probe(
    editor: Editor, encodings: ir.Value, boxes: ir.Value, size: tuple[int, ...], count: int, orders: list[str]
) -> Decoding | None:
    import numpy as np

    def decode(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N,4] encodings → [N,4] boxes as they are."""
        feeds = {str(encodings.name): numbers.astype(np.float32).reshape(size)}
        (answer,) = editor.measure(feeds, [boxes])
        rows = answer.astype(np.float64)
        return rows.reshape(4, count).T if rows.shape[-2:] == (4, count) and count != 4 else rows.reshape(count, 4)

    random = np.random.default_rng(0).normal(0, 1, (count, 4))
    inputs = [np.zeros((count, 4)), *(np.eye(4)[place] * np.full((count, 1), _STEP) for place in range(4)), random]
    try:
        answers = [decode(numbers) for numbers in inputs]
    except (ImportModelError, ValueError):
        return None  # more than these numbers goes into the boxes
    for order in orders:
        decoding = _conclude(encodings, [to_corners(answer, order) for answer in answers], random, order)
        if decoding is not None:
            return decoding
    return None


def _conclude(
    encodings: ir.Value, answers: list[NDArray[np.float64]], random: NDArray[np.float64], box_order: str
) -> Decoding | None:
    """The decoding that gives these corners for zeros, for a step in each number, and for random numbers."""
    import numpy as np

    at_zero, *moved, theirs = answers
    extent = at_zero[:, 2:] - at_zero[:, :2]
    centre = (at_zero[:, :2] + at_zero[:, 2:]) / 2
    if not (extent > 0).all():
        return None
    order, scales = [-1] * 4, [0.0] * 4
    for place, corners in enumerate(moved):
        shift = (corners[:, :2] + corners[:, 2:]) / 2 - centre
        growth = (corners[:, 2:] - corners[:, :2]) / extent
        for axis in range(2):
            moves = np.median(shift[:, axis] / extent[:, axis])
            grows = np.median(growth[:, axis])
            if abs(moves) > 1e-4 and abs(grows - 1) < 1e-3:
                order[axis], scales[axis] = place, _STEP / moves
            elif grows > 1 + 1e-4 and abs(moves) < 1e-3:
                order[2 + axis], scales[2 + axis] = place, _STEP / float(np.log(grows))
    if sorted(order) != [0, 1, 2, 3] or min(scales) <= 0:
        return None
    scales = [float(f"{scale:.5g}") for scale in scales]
    anchors = np.concatenate([centre, extent], 1)
    ours = corners_of(random[:, order], anchors, scales)
    error = float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))
    if not error < _CLOSE:
        return None
    ordered = (order[0], order[1], order[2], order[3])
    divisors = (scales[0], scales[1], scales[2], scales[3])
    return Decoding(encodings, ordered, divisors, anchors.astype(np.float32), box_order, error)


def corners_of(deltas: NDArray[np.float64], anchors: NDArray[np.float64], scales: list[float]) -> NDArray[np.float64]:
    """SSDNMS's `center_size` (docs/design.md) in FP64: [N,4] deltas → x1,y1,x2,y2."""
    import numpy as np

    moves = deltas / scales
    centre = moves[:, :2] * anchors[:, 2:] + anchors[:, :2]
    half = 0.5 * np.exp(moves[:, 2:]) * anchors[:, 2:]
    return np.concatenate([centre - half, centre + half], 1)
