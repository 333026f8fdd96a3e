"""Exports that carry their post-processing: DetectionOutput, TensorFlow's Loop, NonMaxSuppression, plugins, TopK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError
from build.session import runner
from build.sources.editor import SHAPING, Editor
from build.sources.front import Front
from build.sources.reading import (
    CAFFE,
    IMAGENET,
    PLAIN,
    SAMPLED,
    USUAL,
    Reading,
    attributes,
    captured,
    decimal,
    inside,
    outputs,
    parts_of,
)

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray

PLUGINS = ("EfficientNMS_TRT", "EfficientNMS_ONNX_TRT", "BatchedNMS_TRT", "BatchedNMSDynamic_TRT")
# Caffe's own names, which are singular, and OpenVINO's → those of anchors.priorbox_node.
_PRIORBOX = {
    "min_size": "min_sizes",
    "max_size": "max_sizes",
    "aspect_ratio": "aspect_ratios",
    "variance": "variances",
    "img_size": "img_sizes",
}
_CODE_TYPES = {"1": "corner", "2": "center_size", "CORNER": "corner", "CENTER_SIZE": "center_size"}
_MOST = 1000  # detections of an export that keeps all
_NEITHER = "NonMaxSuppression does not do that"
_NAME_THEM = "say which tensors hold them: --boxes NAME --logits NAME"
_NO_NMS = "export it again without NMS (Ultralytics: nms=False, end2end=False), up to boxes and class scores"


def caffe(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Caffe's SSD: DetectionOutput over mbox_loc, mbox_conf and PriorBox nodes (Liu et al. 2016, Caffe's `ssd`)."""
    import numpy as np

    node = next((n for n in editor.graph if n.op_type == "DetectionOutput"), None)
    if node is None:
        return None
    boxes, scores, priors = _inputs(node, 3)
    options = attributes(node)
    where = f"DetectionOutput {node.name!r}"
    if not options.get("share_location", 1):
        raise ImportModelError(f"{editor.path}: {where} has boxes of its own for every class (share_location = 0)")
    coding = _CODE_TYPES.get(str(options.get("code_type", 1)).rpartition(".")[2].upper())
    if coding is None:
        raise ImportModelError(
            f"{editor.path}: {where} has code_type {options['code_type']}, which SSDNMS does not have"
        )
    reading = Reading("caffe-ssd", boxes, scores, picture=CAFFE | SAMPLED)
    tables = [_priors(editor, front, reading, prior, options) for prior in parts_of(priors)]
    reading.anchors = np.concatenate([rows for rows, _ in tables]).astype(np.float32)
    variances = np.concatenate([numbers for _, numbers in tables])
    encoded = bool(int(_first(options.get("variance_encoded_in_target", 0))))
    if not encoded and np.ptp(variances, axis=0).max() > 1e-6:
        raise ImportModelError(
            f"{editor.path}: {where} has other variances for other anchors, which SSDNMS does not have",
            fix="export it with the same variances for every PriorBox",
        )
    kept, top = (int(_first(options.get(name, otherwise))) for name, otherwise in (("keep_top_k", 200), ("top_k", -1)))
    columns = labels + 1
    reading.nms = {
        "box_coding": coding,
        "box_scales": [1.0] * 4 if encoded else [float(f"{1 / value:.6g}") for value in variances[0]],
        "background_class": int(_first(options.get("background_label_id", 0))),
        "score_threshold": decimal(max(0.0, float(_first(options.get("confidence_threshold", 0.01))))),
        "iou_threshold": decimal(options.get("nms_threshold", 0.45)),
        "topk_per_class": max(0, top),
        "max_detections": kept if kept > 0 else min(_MOST, columns * (top if top > 0 else len(reading.anchors))),
        "clip_boxes": bool(int(_first(options.get("clip_before_nms", 0)) or _first(options.get("clip_after_nms", 0)))),
    }
    clips = f"{where} does not say that it clips" if not reading.nms["clip_boxes"] else where
    scales = where if encoded else "1 / variances of PriorBox"
    reading.state_nms(where, box_scales=scales, clip_boxes=clips)
    reading.selection = {"detection_out": str(node.outputs[0].name)}
    return reading


def _priors(
    editor: Editor, front: Front, reading: Reading, prior: ir.Value, options: Mapping[str, Any]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Anchors [n,4] and variances [n,4] of a PriorBox node, or of the constant that one was folded to."""
    import numpy as np

    from build.sources.anchors import corners_to_centers, priorbox_node

    producer = prior.producer()
    if producer is not None and producer.op_type == "PriorBox":
        given = {_PRIORBOX.get(name, name): value for name, value in attributes(producer).items()}
        if "step_h" in given and "step_w" in given:
            given["steps"] = [given["step_h"], given["step_w"]]
        if "img_h" in given and "img_w" in given:
            given["img_sizes"] = [given["img_h"], given["img_w"]]
        (feature,) = _inputs(producer, 1)
        (array,) = editor.measure(front.example(), [feature])
        rows = priorbox_node(given, array.shape[2:], (front.height, front.width))
        variances = np.ravel(given.get("variances") or [0.1]).astype(np.float64)
        reading.fact(
            "anchors", f"{len(rows)} of {array.shape[3]} x {array.shape[2]} cells", f"PriorBox {producer.name!r}"
        )
        return rows, np.tile(variances if len(variances) == 4 else variances[:1].repeat(4), (len(rows), 1))
    table = editor.constant(prior)
    if table is None or table.size % 8:
        raise ImportModelError(
            f"{editor.path}: the anchors of DetectionOutput come from {prior.name!r}, which is no constant [1,2,4·N]",
            fix="give them: --boxes NAME --logits NAME --anchors FILE",
        )
    corners, variances = np.asarray(table, np.float64).reshape(2, -1, 4)
    pixels = not int(_first(options.get("normalized", 1)))
    size = (front.width, front.height) if pixels else (1, 1)
    reading.fact("anchors", len(corners), f"constant {prior.name!r}")
    return corners_to_centers(corners, "xyxy", *size), variances


def tensorflow(editor: Editor, front: Front, labels: int) -> Reading | None:
    """TensorFlow's Object Detection API: NonMaxSuppression in a Loop over the pictures, or its outputs' names."""
    loops = [n for n in editor.graph if n.op_type in ("Loop", "Scan", "If") and inside(n, "NonMaxSuppression")]
    names = {str(value.name).split(":")[0] for value in editor.graph.outputs}
    flat = [n for n in editor.graph if n.op_type == "NonMaxSuppression"]
    if not loops and not (flat and {"detection_boxes", "detection_scores"} <= names):
        return None
    node = inside(loops[-1], "NonMaxSuppression")[0] if loops else flat[-1]
    where = f"NonMaxSuppression {node.name!r}"
    boxes, scores = _read_by(editor, front, loops[-1], labels, where) if loops else _inputs(node, 2)
    reading = Reading(
        "tf-object-detection", boxes, scores, boxes_are="decoded", box_order="yxyx", picture=PLAIN | SAMPLED
    )
    reading.scores_are = "probabilities"
    iou, score = (editor.constant(node.inputs[i]) if len(node.inputs) > i else None for i in (3, 4))
    values = _as_exported(editor, front)
    (size,) = (array.shape for array in editor.measure(front.example(), [scores]))
    reading.sees_background = size[-1] == labels + 1
    reading.selection = _detection_outputs(values)
    most = next(
        (array.shape[1] for value, array in values if value.name == reading.selection.get("detection_boxes")), 100
    )
    reading.nms = {"max_detections": int(most), "topk_per_class": 0, "clip_boxes": False}
    if iou is not None:
        reading.nms["iou_threshold"] = decimal(iou)
    if score is not None:
        reading.nms["score_threshold"] = min(1.0, max(0.0, decimal(score)))
    output = reading.selection.get("detection_boxes")
    kept = f"output {output!r}" if output else f"{USUAL} the file's own post-processing did not run"
    reading.state_nms(where, max_detections=kept, topk_per_class=_NEITHER, clip_boxes=_NEITHER)
    return reading


def _as_exported(editor: Editor, front: Front) -> list[tuple[ir.Value, NDArray[Any]]]:
    """The outputs of the file as it is; none where ONNX Runtime cannot run its post-processing."""
    try:
        answers = runner(editor.original)(front.example())
    except Exception:  # ONNX Runtime's own exceptions have no common type; the network itself may run all the same
        return []
    return [(value, answers[str(value.name)]) for value in editor.graph.outputs if value.name in answers]


def _read_by(editor: Editor, front: Front, loop: ir.Node, labels: int, where: str) -> tuple[ir.Value, ir.Value]:
    """The boxes and scores among the tensors that a loop reads.

    Raises:
        ImportModelError: they are not there.
    """
    outer = [value for value in captured(loop) if not str(value.dtype or "").startswith("STRING")]
    arrays = dict(zip(outer, editor.measure(front.example(), outer), strict=True))
    real = [(value, array.shape) for value, array in arrays.items() if array.dtype.kind == "f"]
    pairs = [
        (boxes, scores)
        for boxes, size in real
        for scores, other in real
        if boxes is not scores and size[-1] == 4 and len(size) > 2 and len(other) == 3
        if other[-1] in (labels, labels + 1) and other[1] == size[1]
    ]
    if not pairs:
        shapes = ", ".join(f"{value.name!r} {list(size)}" for value, size in real)
        raise ImportModelError(
            f"{editor.path}: among the tensors that the loop of {where} reads ({shapes or 'none'}), none are boxes "
            f"[B,N,4] and scores [B,N,C] of {labels} labels",
            why="the labels are those of another model, or the loop decodes the boxes itself",
            fix=f"give the labels of this model, or {_NAME_THEM}",
        )
    return pairs[0]


def _detection_outputs(values: list[tuple[ir.Value, NDArray[Any]]]) -> dict[str, str]:
    """TensorFlow's names of the outputs that a proof needs → the tensors' own, which the values tell if need be."""
    roles = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
    named = {str(value.name).split(":")[0]: str(value.name) for value, _ in values}
    result = {role: named[role] for role in roles if role in named}
    if len(result) >= 3:
        return result
    boxes = next(((v, a) for v, a in values if a.ndim == 3 and a.shape[2] == 4), None)
    counts = [v for v, a in values if a.size == 1]
    if boxes is None or len(counts) != 1:
        return {}
    for value, array in values:
        if array.shape == boxes[1].shape[:2]:
            whole = bool((array == array.round()).all()) and array.max() > 1
            falling = bool((array[:, 1:] <= array[:, :-1]).all()) and array.max() <= 1
            role = "detection_scores" if falling else "detection_classes" if whole else ""
            if role and role not in result:
                result[role] = str(value.name)
    if "detection_scores" not in result or "detection_classes" not in result:
        return {}
    return result | {"num_detections": str(counts[0].name), "detection_boxes": str(boxes[0].name)}


def suppressed(editor: Editor, front: Front, labels: int) -> Reading | None:
    """An export that ends in NonMaxSuppression, such as MLPerf's SSD-ResNet34, or in one of TensorRT's NMS plugins."""
    plugin = next((n for n in editor.graph if n.op_type in PLUGINS), None)
    if plugin is not None:
        return _plugin(editor, plugin)
    node = next((n for n in editor.graph if n.op_type == "NonMaxSuppression"), None)
    if node is None:
        return None
    where = f"NonMaxSuppression {node.name!r}"
    boxes, scores = _inputs(node, 2)
    size, other = (array.shape for array in editor.measure(front.example(), [boxes, scores]))
    chosen = any(value.producer() is not None and value.producer().op_type in ("NonZero", "TopK")  # type: ignore[union-attr]
                 for value in editor.ancestors(boxes))  # fmt: skip
    if other[1] == 1 < labels or chosen:
        reason = (
            "candidates are chosen before it, so it does not see every box"
            if chosen
            else f"it sees one score a box ({list(other)}) and not one for each of the {labels} labels: the boxes of "
            "each class are moved apart instead"
        )
        raise ImportModelError(
            f"{editor.path}: {where} reads {boxes.name!r} {list(size)} and {scores.name!r} {list(other)}, which are no "
            "heads to cut at",
            why=reason,
            fix=f"{_NO_NMS}; or {_NAME_THEM}",
        )
    centred = bool(attributes(node).get("center_point_box", 0))
    reading = Reading(
        "nms-inside",
        boxes,
        scores,
        boxes_are="decoded",
        box_order="cxcywh" if centred else "xyxy",
        scores_are="probabilities",
        picture=IMAGENET | SAMPLED,
    )
    most, iou, score = (editor.constant(node.inputs[i]) if len(node.inputs) > i else None for i in (2, 3, 4))
    reading.nms = {"clip_boxes": False, "iou_threshold": decimal(iou) if iou is not None else 0.0}
    if score is not None:
        reading.nms["score_threshold"] = min(1.0, max(0.0, decimal(score)))
    if most is not None:
        # It keeps `most` of each class. Where that cuts nothing off, everything is kept; else the best `most` of all
        # classes are the same.
        kept = max(1, int(decimal(most)))
        reading.nms["topk_per_class"] = 0
        reading.nms["max_detections"] = min(_MOST, kept if kept < size[1] else size[1] * labels)
    reading.state_nms(where, topk_per_class=_NEITHER, clip_boxes=_NEITHER)
    reading.selection = {"boxes": str(boxes.name), "scores": str(scores.name), "selected": str(node.outputs[0].name)}
    return reading


def _plugin(editor: Editor, node: ir.Node) -> Reading:
    """TensorRT's NMS plugins, whose attributes say all of it (TensorRT's efficientNMSPlugin, batchedNMSPlugin)."""
    import numpy as np

    options, where = attributes(node), f"{node.op_type} {node.name!r}"
    boxes, scores = _inputs(node, 2)
    reading = Reading("nms-plugin", boxes, scores, boxes_are="decoded", box_order="xyxy", scores_are="probabilities")
    if "Efficient" in node.op_type:
        centred = bool(options.get("box_coding", 0))
        reading.box_order = "cxcywh" if centred else "xyxy"
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            table = editor.constant(node.inputs[2])
            if table is None:
                raise ImportModelError(
                    f"{editor.path}: the anchors {node.inputs[2].name!r} of {where} are no constant", fix=_NAME_THEM
                )
            from build.sources.anchors import corners_to_centers

            reading.boxes_are, reading.box_order = "deltas", "xy"
            rows = np.asarray(table, np.float32).reshape(-1, 4)
            reading.anchors = corners_to_centers(rows, "cxcywh" if centred else "xyxy")
            reading.nms |= {"box_coding": "center_size" if centred else "corner", "box_scales": [1.0] * 4}
            reading.fact("anchors", len(rows), f"input {node.inputs[2].name!r} of {where}")
        if options.get("score_activation", 0):
            reading.scores_are, reading.nms["score_activation"] = "logits", "sigmoid"
        reading.nms |= {
            "score_threshold": decimal(options.get("score_threshold", 0.25)),
            "iou_threshold": decimal(options.get("iou_threshold", 0.5)),
            "max_detections": int(options.get("max_output_boxes", 100)),
            "class_agnostic": bool(options.get("class_agnostic", 0)),
            "clip_boxes": False,
        }
        background = int(options.get("background_class", -1))
    else:
        if not options.get("shareLocation", 1):
            raise ImportModelError(f"{editor.path}: {where} has boxes of its own for every class (shareLocation = 0)")
        reading.nms |= {
            "score_threshold": decimal(options.get("scoreThreshold", 0.0)),
            "iou_threshold": decimal(options.get("iouThreshold", 0.5)),
            "max_detections": int(options.get("keepTopK", 100)),
            "topk_per_class": max(0, int(options.get("topK", 0))),
            "clip_boxes": bool(options.get("clipBoxes", 1)),
        }
        background = int(options.get("backgroundLabelId", -1))
    reading.nms["background_class"] = max(-1, background)
    reading.state_nms(where)
    return reading


def end_to_end(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Rows of finished detections (YOLOv10, YOLO26): the graph is cut before the TopK that chooses them."""
    chooser = next((n for n in editor.graph if n.op_type == "TopK"), None)
    values = outputs(editor, front)
    rows = [(value, array) for value, array in values if array.ndim in (2, 3) and array.shape[-1] in (6, 7)]
    if len(rows) != 1 or (chooser is None and not (len(values) == 1 and rows[0][1].shape[-2] in (100, 300))):
        return None
    output, array = rows[0]
    most = int(array.shape[-2])
    cut = _before(editor, front, chooser, labels) if chooser is not None else None
    if cut is None:
        if chooser is None and labels in (1, 2):
            return None  # 6 columns are also a box, objectness and a label, or a box and two labels
        raise ImportModelError(
            f"{editor.path}: its output {output.name!r} {list(array.shape)} has finished detections (x1,y1,x2,y2, "
            "score, class), and the boxes and class scores that they are chosen from are not told",
            why=f"TopK {chooser.name!r} does not choose from class scores of {labels} labels" if chooser else "",
            fix=_NO_NMS,
        )
    reading = Reading("end-to-end", *cut, boxes_are="decoded", scores_are="probabilities")
    reading.nms = {"max_detections": most, "iou_threshold": 1.0, "background_class": -1, "clip_boxes": False}
    assert chooser is not None
    reading.state_nms(f"TopK {chooser.name!r}: no NMS, the best {most}")
    reading.selection = {"rows": str(output.name)}
    reading.usual = {"score_threshold": 0.25}
    reading.picture = {**PLAIN, "std": [255.0] * 3, "resize": "letterbox", "pad_value": 114} | SAMPLED
    return reading


def _before(editor: Editor, front: Front, chooser: ir.Node, labels: int) -> tuple[ir.Value, ir.Value] | None:
    """The boxes [B,N,4] and scores [B,N,C] that a TopK chooses from."""
    (best,) = _inputs(chooser, 1)
    scores = editor.back(best, lambda node: node.op_type in {"ReduceMax", *SHAPING} - {"Concat"})
    (size,) = (array.shape for array in editor.measure(front.example(), [scores]))
    if size[-1] != labels or len(size) != 3:
        return None
    behind, queue = set(), list(chooser.outputs[1:])
    while queue:  # everything that the places of the best lead to
        for node, _ in queue.pop().uses():
            if node not in behind:
                behind.add(node)
                queue += list(node.outputs)
    reads = [node.inputs[0] for node in behind if node.op_type.startswith("Gather") and node.inputs[0] is not None]
    before = [value for value in reads if value.producer() not in behind and editor.constant(value) is None]
    for value, array in zip(before, editor.measure(front.example(), before), strict=True):
        if array.shape[-1] == 4 and array.ndim == 3 and array.shape[1] == size[1]:
            return value, scores
        if array.shape[-1] == 4 + labels and array.shape[:-1] == size[:-1]:  # boxes and scores are one tensor
            return editor.columns(value, 0, 4), editor.columns(value, 4, 4 + labels)
    return None


def _inputs(node: ir.Node, count: int) -> list[ir.Value]:
    reads = [value for value in node.inputs[:count] if value is not None]
    if len(reads) < count:
        raise ImportModelError(f"{node.op_type} {node.name!r} has {len(reads)} inputs, but must have {count}")
    return reads


def _first(value: Any) -> Any:
    """A number of an attribute that some exporters write as a list."""
    return value[0] if isinstance(value, list) else value
