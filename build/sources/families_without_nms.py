"""Exports that end at the network's heads, raw or decoded: one output, two, several for each level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError
from build.sources.editor import Editor
from build.sources.front import Front
from build.sources.reading import (
    CAFFE,
    HALF,
    IMAGENET,
    IN_PIXELS,
    PLAIN,
    SAMPLED,
    Reading,
    columns,
    outputs,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    Output = tuple[ir.Value, NDArray[Any]]

_LETTERBOX = {**PLAIN, "std": [255.0] * 3, "resize": "letterbox", "pad_value": 114} | SAMPLED
_FACES = {"background_class": -1, "score_activation": "sigmoid"}


def keras(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Keras SSD (ssd_keras): one output [B,N,C+12]: scores, four deltas, the anchor, the variances."""
    import numpy as np

    table = _one_table(editor, front)
    if table is None or table[1].shape[2] != labels + 13:
        return None
    output, array = table
    classes = labels + 1
    scores, deltas, anchor, variance = (
        columns(editor, front, output, start, end)
        for start, end in ((0, classes), *((classes + 4 * i, classes + 4 * i + 4) for i in range(3)))
    )
    reading = Reading("keras-ssd", deltas, scores, picture=CAFFE | SAMPLED)
    where = f"output {output.name!r} {list(array.shape)}"
    reading.fact("columns", f"{classes} scores, 4 deltas, 4 of the anchor, 4 variances", where)
    reading.nms = {"background_class": 0}
    first = editor.measure(front.example(), [anchor, variance])
    flat = np.full((1, front.height, front.width, 3), 7.0)
    other = editor.measure(front.feeds(flat), [anchor, variance]) if not front.cut else first
    if all(np.array_equal(a, b) for a, b in zip(first, other, strict=True)) and (np.ptp(first[1], axis=1) == 0).all():
        pixels = first[0].max() > IN_PIXELS
        unit = [front.width, front.height] * 2 if pixels else [1] * 4
        reading.anchors = (first[0][0] / np.array(unit)).astype(np.float32)
        reading.nms["box_scales"] = [float(f"{1 / value:.6g}") for value in first[1][0, 0]]
        form = "in pixels" if pixels else "in fractions"
        reading.fact("anchors", f"{len(reading.anchors)}, the same for every picture, {form}", where)
        reading.fact("box_scales", reading.nms["box_scales"], f"1 / variances of {where}")
        return reading
    reading.fact("anchors", "computed for every picture: decoded in the graph", where)
    moves = editor.op("Mul", deltas, variance)
    size = editor.columns(anchor, 2, 4)
    centre = editor.op("Add", editor.op("Mul", editor.columns(moves, 0, 2), size), editor.columns(anchor, 0, 2))
    extent = editor.op("Mul", editor.op("Exp", editor.columns(moves, 2, 4)), size)
    reading.boxes = editor.concat([centre, extent], 2)
    reading.boxes_are, reading.box_order = "decoded", "cxcywh"
    return reading


def one_table(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Raw boxes and scores side by side in one output: [B,N,4+C] or [B,N,C+4], joined by a Concat that tells which."""
    table = _one_table(editor, front)
    if table is None or table[1].shape[2] not in (labels + 4, labels + 5):
        return None
    output, array = table
    classes = array.shape[2] - 4
    where = f"output {output.name!r} {list(array.shape)}"
    for start, first in ((0, 4), (classes, 0)):
        boxes, scores = array[..., start : start + 4], array[..., first : first + classes]
        background = classes == labels + 1 and _sums_to_one(scores)
        if classes == labels + 1 and not background and ((scores >= 0) & (scores <= 1)).all():
            continue  # objectness and classes of YOLOX
        parts = [columns(editor, front, output, *ends) for ends in ((start, start + 4), (first, first + classes))]
        joined = all(part.producer() is None or part.producer().op_type != "Slice" for part in parts)  # type: ignore[union-attr]
        if (boxes < 0).any() and (joined or background) and (classes != 4 or background):
            reading = Reading("raw-heads", parts[0], parts[1], boxes_are="")
            order = "4 of the box, then" if start == 0 else "then 4 of the box:"
            reading.fact("columns", f"{order} {classes} scores", where)
            return reading
    return None


def yolo(editor: Editor, front: Front, labels: int) -> Reading | None:
    """YOLOv5 to v12 and YOLOX: an output with the box, in YOLOv5, v7 and X objectness, and a score for each class."""
    table = _one_table(editor, front)
    if table is None:
        return None
    output, array = table
    masks = 32 if any(other.ndim == 4 and other.shape[1] == 32 for _, other in outputs(editor, front)) else 0
    known = {labels + 4 + masks: False, labels + 5 + masks: True}
    turned = array.shape[1] in known and array.shape[2] not in known
    wide = array.shape[1] if turned else array.shape[2]
    if wide not in known:
        return None
    objectness = known[wide]
    rows = array.transpose(0, 2, 1) if turned else array
    value = _turned_rows(editor, output) if turned else output
    raw = bool((rows[..., 2:4] < 0).any())
    first = 5 if objectness else 4
    scores = columns(editor, front, value, first, first + labels)
    where = f"output {output.name!r} {list(array.shape)}"
    finished = bool((rows[..., 4:] >= 0).all() and (rows[..., 4:] <= 1).all())
    if raw and not turned and not (objectness and finished):  # YOLO has no sizes below 0, YOLOX no raw scores
        raise ImportModelError(
            f"{editor.path}: its {where} can be 4 of the box and {wide - 4} scores, but the boxes are not decoded and "
            "nothing tells the columns apart",
            why="YOLO exports have sizes above 0, and YOLOX exports have scores in 0..1",
            fix="name the tensors before they are joined: --boxes NAME --logits NAME --anchors FILE",
        )
    raw = raw and objectness
    name = "yolox" if raw else "yolov5" if objectness else "yolov8"
    logits = not (rows[..., 4:].min() >= 0 and rows[..., 4:].max() <= 1)
    reading = Reading(name, columns(editor, front, value, 0, 4), scores, boxes_are="decoded", box_order="cxcywh")
    if objectness:
        object_ = columns(editor, front, value, 4, 5)
        parts = [editor.op("Sigmoid", part) if logits else part for part in (scores, object_)]
        reading.scores, logits = editor.op("Mul", *parts), False
    reading.scores_are = "logits" if logits else "probabilities"
    reading.nms = {"background_class": -1} | ({"score_activation": "sigmoid"} if logits else {})
    reading.picture = dict(_LETTERBOX)
    if raw:  # offsets in cells and logarithms of the size in cells: deltas of anchors that are the cells
        reading.boxes_are, reading.box_order, reading.presets = "deltas", "xy", ("cells:strides=8,16,32;offset=0",)
        reading.nms |= {"box_scales": [1.0] * 4}
    if raw:
        reading.picture |= {**PLAIN, "color_order": "BGR", "resize": "letterbox_top_left"}
    reading.usual = {"iou_threshold": 0.45, "score_threshold": 0.25, "max_detections": 300, "clip_boxes": False}
    parts_said = f"4 of the box{', objectness' if objectness else ''}, {labels} scores"
    rest = f", {masks} of masks, which are left out" if masks else ""
    reading.fact("columns", f"{parts_said}{rest}{'; rows are columns' if turned else ''}", where)
    if objectness:
        reading.fact("scores", "objectness x class", where)
    return reading


def mediapipe(editor: Editor, front: Front, labels: int) -> Reading | None:
    """MediaPipe's BlazeFace: regressors [B,N,16] (box, then key points) and classificators [B,N,1]."""
    tables = [(value, array.shape) for value, array in outputs(editor, front) if array.ndim == 3]
    boxes = [entry for entry in tables if entry[1][2] == 16]
    scores = [entry for entry in tables if entry[1][2] == 1]
    if labels != 1 or not boxes or sorted(size[1] for _, size in boxes) != sorted(size[1] for _, size in scores):
        return None
    boxes, scores = _by_size(boxes), _by_size(scores)
    joined = editor.concat([value for value, _ in boxes], 1)
    reading = Reading("blazeface", editor.columns(joined, 0, 4), editor.concat([v for v, _ in scores], 1))
    reading.boxes_are = "linear"
    reading.picture = HALF | {"resize": "pad", "resample": "bilinear", "pad_value": 0}
    reading.presets = ("blazeface-front", "blazeface-back", "blazeface-full-range")
    reading.nms = dict(_FACES)
    reading.usual = {"score_threshold": 0.5, "iou_threshold": 0.3, "clip_boxes": False}
    where = f"output {boxes[0][0].name!r} {list(boxes[0][1])}"
    reading.fact("columns", "4 of the box, 12 of key points, which are left out", where)
    return reading


def retinaface(editor: Editor, front: Front, labels: int) -> Reading | None:
    """RetinaFace: loc [B,N,4], conf [B,N,2] and landms [B,N,10]; or these three for every scale, also as maps."""
    if labels != 1:
        return None
    groups: dict[int, list[tuple[ir.Value, tuple[int, ...]]]] = {4: [], 2: [], 10: []}
    for value, array in outputs(editor, front):
        size, table = array.shape, value
        if array.ndim == 4 and array.shape[1] % 2 == 0:
            per_cell = {array.shape[1] // wide: wide for wide in (10, 4, 2) if array.shape[1] % wide == 0}
            wide = next((w for w in (10, 4, 2) if f"{w}" == _kind(value)), 0) or per_cell.get(
                _cells(editor, front, array), 0
            )
            if not wide:
                return None
            table = maps_to_rows(editor, value, wide)
            size = (1, array.size // wide, wide)
        if len(size) != 3 or size[2] not in groups:
            return None
        groups[size[2]].append((table, size))
    counts = {tuple(sorted(size[1] for _, size in entries)) for entries in groups.values()}
    if len(counts) != 1 or not groups[4]:
        return None
    boxes, scores = (editor.concat([v for v, _ in _by_size(groups[wide])], 1) for wide in (4, 2))
    reading = Reading("retinaface", boxes, scores, boxes_are="", picture=CAFFE | SAMPLED)
    reading.presets = ("retinaface",)
    reading.nms = {"background_class": 0}
    reading.usual = {"box_scales": [10.0, 10.0, 5.0, 5.0], "iou_threshold": 0.4, "score_threshold": 0.02,
                     "topk_per_class": 5000, "max_detections": 750, "clip_boxes": False}  # fmt: skip
    scales = len(groups[4])
    reading.fact(
        "landmarks", "left out", f"{scales} outputs [B,N,10]" if scales > 1 else f"output {groups[10][0][0].name!r}"
    )
    if scales > 1:
        reading.fact("scales", ", ".join(str(size[1]) for _, size in _by_size(groups[4])), f"{3 * scales} outputs")
    return reading


def _kind(value: ir.Value) -> str:
    """The columns that a RetinaFace output's name tells: 4, 2, 10, or nothing."""
    name = str(value.name).lower()
    kinds = (
        ("land", "10"),
        ("kps", "10"),
        ("bbox", "4"),
        ("loc", "4"),
        ("box", "4"),
        ("conf", "2"),
        ("cls", "2"),
        ("score", "2"),
    )
    return next((wide for word, wide in kinds if word in name), "")


def _cells(editor: Editor, front: Front, array: NDArray[Any]) -> int:
    """Boxes of a cell, from the three outputs of the same height and width: their channels are 2, 4 and 10 of each."""
    same = sorted(a.shape[1] for _, a in outputs(editor, front) if a.ndim == 4 and a.shape[2:] == array.shape[2:])
    return same[0] // 2 if len(same) == 3 and same[1] == 2 * same[0] and same[2] == 5 * same[0] else 0


def centerface(editor: Editor, front: Front, labels: int) -> Reading | None:
    """CenterFace: heatmap, sizes, offsets and landmarks for each cell of one map (Xu et al. 2019, section 3)."""
    import numpy as np

    maps = [(value, array) for value, array in outputs(editor, front) if array.ndim == 4]
    by_channels = {array.shape[1]: value for value, array in maps}
    twos = [value for value, array in maps if array.shape[1] == 2]
    if labels != 1 or len(maps) != 4 or len(twos) != 2 or not {1, 10} <= by_channels.keys():
        return None
    if len({array.shape[2:] for _, array in maps}) != 1:
        return None
    named = {
        word: next((value for value in twos if word in str(value.name).lower()), None) for word in ("scale", "off")
    }
    sizes = named["scale"] or next(value for value in twos if value is not named["off"])
    offsets = next(value for value in twos if value is not sizes)
    height, width = maps[0][1].shape[2:]
    rows = [maps_to_rows(editor, value, 2) for value in (offsets, sizes)]
    reading = Reading("centerface", editor.concat(rows, 2), maps_to_rows(editor, by_channels[1], 1), box_order="yx")
    y, x = np.mgrid[:height, :width].reshape(2, -1)
    cell = np.broadcast_to([1 / width, 1 / height], (height * width, 2))
    reading.anchors = np.concatenate([((x + 0.5) / width)[:, None], ((y + 0.5) / height)[:, None], cell], 1).astype(
        "f4"
    )
    reading.nms = {"background_class": -1, "box_coding": "center_size", "box_scales": [1.0] * 4}
    reading.usual = {"score_threshold": 0.35, "iou_threshold": 0.3}
    reading.picture = PLAIN | SAMPLED
    where = f"outputs {', '.join(repr(value.name) for value, _ in maps)}"
    reading.fact("heads", f"score, y and x offset, logarithms of height and width of {height} x {width} cells", where)
    if not all(named.values()):
        reading.fact("order", f"sizes are {sizes.name!r}, offsets {offsets.name!r}", "usual order of the outputs")
    return reading


def picodet(editor: Editor, front: Front, labels: int) -> Reading | None:
    """PicoDet without its post-processing: scores [B,n,C] and distances [B,n,4·bins] (DFL) of every level."""
    import math

    import numpy as np

    tables = [(value, array.shape) for value, array in outputs(editor, front) if array.ndim == 3]
    scores = _by_size([entry for entry in tables if entry[1][2] == labels])
    sides = _by_size([entry for entry in tables if entry[1][2] in (32, 4 * 17, 4 * 16) and entry[1][2] != labels])
    if len(scores) < 2 or [size[1] for _, size in scores] != [size[1] for _, size in sides]:
        return None
    strides = []
    for _, size in sides:
        fitting = [
            s for s in (4, 8, 16, 32, 64, 128) if math.ceil(front.height / s) * math.ceil(front.width / s) == size[1]
        ]
        if len(fitting) != 1:
            return None
        strides += fitting
    bins = sides[0][1][2] // 4
    boxes = []
    for (value, size), stride in zip(sides, strides, strict=True):
        across = math.ceil(front.width / stride)
        y, x = np.divmod(np.arange(size[1]), across)
        centre = editor.number(((np.stack([x, y], 1) + 0.5) * stride)[None].astype("f4"))
        spread = editor.op("Softmax", editor.reshape(value, -1, size[1], 4, bins), axis=-1)
        distance = editor.op("MatMul", spread, editor.number(np.arange(bins, dtype="f4")[:, None] * stride))
        distance = editor.reshape(distance, -1, size[1], 4)
        ends = [editor.op(op, centre, editor.columns(distance, i, i + 2)) for op, i in (("Sub", 0), ("Add", 2))]
        boxes.append(editor.concat(ends, 2))
    joined = editor.op("Div", editor.concat(boxes, 1), editor.number([front.width, front.height] * 2))
    reading = Reading("picodet", joined, editor.concat([value for value, _ in scores], 1), boxes_are="decoded")
    reading.box_order, reading.nms = "xyxy", {"background_class": -1}
    reading.usual = {"iou_threshold": 0.6, "score_threshold": 0.025, "topk_per_class": 1000, "clip_boxes": True}
    reading.picture = IMAGENET | SAMPLED
    reading.fact("distances", f"{bins} bins a side, strides {', '.join(map(str, strides))}", f"{len(sides)} outputs")
    return reading


def two_heads(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Boxes [B,N,4] or [B,4,N] and scores [B,N,C] or [B,C,N]; whether the boxes are decoded is found out later."""
    pairs = _pairs(editor, front, labels)
    if not pairs:
        return None
    if len(pairs) > 1:  # scores are softmaxed, boxes are not
        pairs = [p for p in pairs if _sums_to_one(p[1][1]) and not _sums_to_one(p[0][1])] or pairs
    if len(pairs) > 1:
        by_boxes = [[p for p in pairs if _named(p[0][0], word)] for word in ("box", "loc", "reg", "delta")]
        by_scores = [[p for p in pairs if _named(p[1][0], word)] for word in ("score", "conf", "cls", "logit", "class")]
        said = next((chosen for chosen in (*by_boxes, *by_scores) if len(chosen) == 1), None)
        if said is None:
            listed = " or ".join(f"{boxes[0].name!r} and {scores[0].name!r}" for boxes, scores in pairs[:3])
            raise ImportModelError(
                f"{editor.path}: boxes and scores can be {listed}",
                why="both have 4 columns, so the shapes do not tell",
                fix="name them: --boxes NAME --logits NAME",
            )
        pairs = said
    (boxes, array), (scores, other) = pairs[0]
    named = {str(boxes.name).lower(), str(scores.name).lower()}
    probabilities = bool((other >= 0).all() and (other <= 1).all())
    reading = Reading("raw-heads", boxes, scores, boxes_are="")
    if named == {"ploc", "plabel"}:
        reading = Reading("nvidia-ssd300", boxes, scores, boxes_are="deltas", picture=IMAGENET)
        reading.presets = ("nvidia-ssd300", "mlperf-ssd-resnet34")
    elif named == {"scores", "boxes"} and probabilities:
        reading = Reading("pytorch-ssd", boxes, scores, boxes_are="", box_order="xyxy")
        reading.picture = {"mean": [127.0] * 3, "std": [128.0] * 3} | SAMPLED
        reading.usual = {"score_threshold": 0.4, "iou_threshold": 0.45, "clip_boxes": False}
        reading.presets = ("pytorch-ssd-mobilenet", "ultraface")
    elif _named(boxes, "raw_detection_boxes"):
        reading = Reading("tf-object-detection", boxes, scores, boxes_are="decoded", box_order="yxyx")
        reading.picture = PLAIN | SAMPLED
    shapes = f"outputs {boxes.name!r} {list(array.shape)}, {scores.name!r} {list(other.shape)}"
    count = array.size // 4
    reading.fact("heads", f"{count} boxes, {other.size // count} columns of scores", shapes)
    return reading


def _sums_to_one(array: NDArray[Any]) -> bool:
    return bool((array >= 0).all()) and any(abs(array.sum(axis) - 1).max() < 1e-3 for axis in (-1, -2))


def _named(value: ir.Value, word: str) -> bool:
    return word in str(value.name).lower()


def _pairs(editor: Editor, front: Front, labels: int) -> list[tuple[Output, Output]]:
    """Pairs of outputs that can be boxes and scores of as many rows: those of the labels' count, else of any."""
    tables = [(value, array) for value, array in outputs(editor, front) if array.ndim in (2, 3) and array.size > 1]
    fitting: list[tuple[Output, Output]] = []
    others: list[tuple[Output, Output]] = []
    for boxes in tables:
        if 4 not in boxes[1].shape[-2:] or boxes[1].size % 4:
            continue
        count = boxes[1].size // 4
        for scores in tables:
            if scores is boxes or scores[1].size % count or count not in scores[1].shape[-2:]:
                continue
            columns_ = scores[1].size // count
            if columns_ in (labels, labels + 1):
                fitting.append((boxes, scores))
            elif len(tables) == 2:
                others.append((boxes, scores))
    return fitting or others


def levels(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Two outputs for each level, [B,A·4,H,W] and [B,A·C,H,W], or channels last: joined from the largest map on."""
    maps = outputs(editor, front)
    if len(maps) < 2 or any(array.ndim != 4 for _, array in maps):
        return None
    # A map has about the picture's proportions, which tells channels first from channels last.
    lasts = sorted(
        (False, True), key=lambda last: _distortion(maps[0][1].shape[1:3] if last else maps[0][1].shape[2:], front)
    )
    for last in lasts:
        groups: dict[tuple[int, int], list[tuple[ir.Value, int]]] = {}
        for value, array in maps:
            place = array.shape[1:3] if last else array.shape[2:]
            groups.setdefault((place[0], place[1]), []).append((value, array.shape[3 if last else 1]))
        pairs = [_level_pair(members, labels) for members in groups.values()]
        if all(pairs):
            break
    else:
        return None
    boxes, scores = [], []
    for pair in (pair for pair in pairs if pair is not None):
        box, score, classes = pair
        boxes.append(maps_to_rows(editor, box, 4, last))
        scores.append(maps_to_rows(editor, score, classes, last))
    reading = Reading("per-level", editor.concat(boxes, 1), editor.concat(scores, 1), boxes_are="")
    order = "channels last" if last else "channels first"
    reading.fact("levels", ", ".join(f"{h} x {w}" for h, w in groups), f"{len(maps)} outputs, {order}")
    return reading


def _distortion(place: tuple[int, ...], front: Front) -> float:
    return abs(place[0] / place[1] - front.height / front.width)


def _level_pair(members: Sequence[tuple[ir.Value, int]], labels: int) -> tuple[ir.Value, ir.Value, int] | None:
    """Boxes, scores and C of the two maps of a level."""
    if len(members) != 2:
        return None
    for box, scores in (members, members[::-1]):
        for classes in (labels + 1, labels):
            if box[1] % 4 == 0 and scores[1] == box[1] // 4 * classes:
                return box[0], scores[0], classes
    return None


def maps_to_rows(editor: Editor, value: ir.Value, wide: int, channels_last: bool = False) -> ir.Value:
    """[B,A·wide,H,W] or [B,H,W,A·wide] → [B,H·W·A,wide]."""
    return editor.reshape(value if channels_last else editor.transpose(value, 0, 2, 3, 1), 0, -1, wide)


def _turned_rows(editor: Editor, value: ir.Value) -> ir.Value:
    """[B,columns,N] → [B,N,columns]: what a Transpose at the end was made from, or one more."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Transpose" else None
    if node is not None and source is not None and list(node.attributes["perm"].as_ints()) == [0, 2, 1]:
        return source
    return editor.transpose(value, 0, 2, 1)


def _by_size(entries: Sequence[tuple[ir.Value, tuple[int, ...]]]) -> list[tuple[ir.Value, tuple[int, ...]]]:
    """From the most rows to the fewest: the order of strides, and of anchors."""
    return sorted(entries, key=lambda entry: -entry[1][1])


def _one_table(editor: Editor, front: Front) -> Output | None:
    """The only output of three dimensions."""
    tables = [entry for entry in outputs(editor, front) if entry[1].ndim == 3]
    return tables[0] if len(tables) == 1 else None
