"""Which kind of detector a foreign graph is: its boxes, its scores, and what its own post-processing does with them.

Each family is a function that looks for the family's marks and gives a `Reading`, or None. The first that recognises
the graph wins; `--family` names one. A reading says where every fact was seen, and what is only usual for the family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from build.errors import ImportModelError, OptionError
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
ACTIVATIONS = ("Softmax", "Sigmoid")


@dataclass
class Reading:
    """What a graph is.

    Attributes:
        family: its name.
        boxes, scores: tensors of the main graph.
        boxes_are: deltas (the anchors are still to be applied) or decoded.
        box_order: of decoded boxes xyxy, yxyx, xywh or cxcywh; of deltas `xy` or `yx`: which comes first.
        scores_are: logits or probabilities.
        scores_stated: whether the user said so, which an activation in the graph does not overrule.
        unit: of decoded boxes, where it is known: pixels; empty = it is measured.
        turned: whether rows and columns of `boxes` are exchanged: [B,columns,N].
        pick: of tensors that hold more: boxes are columns [0], scores columns [1], objectness column [2] or -1; None =
            the tensors are what they are called.
        nms: keys of [nms] that the graph itself says.
        picture: keys of [input] that exports of this family usually want; the file cannot say them.
        anchors: FP32 [N,4] of cx,cy,w,h in 0..1 where the graph holds them.
        facts: (what, value, where it was seen) for people.
        selection: what a proof compares with: names of the tensors (boxes, scores, selected indices) of a
            NonMaxSuppression in the main graph, or of the four outputs of TensorFlow's post-processing.
    """

    family: str
    boxes: ir.Value
    scores: ir.Value
    boxes_are: str = "deltas"
    box_order: str = ""
    scores_are: str = "logits"
    scores_stated: bool = False
    unit: str = ""
    turned: bool = False
    pick: tuple[tuple[int, int], tuple[int, int], int] | None = None
    nms: dict[str, Any] = field(default_factory=dict)
    picture: dict[str, Any] = field(default_factory=dict)
    anchors: NDArray[np.float32] | None = None
    facts: list[tuple[str, str, str]] = field(default_factory=list)
    selection: dict[str, str] = field(default_factory=dict)

    def fact(self, what: str, value: object, where: str) -> None:
        self.facts.append((what, str(value), where))


@dataclass(frozen=True)
class Family:
    """A kind of detector.

    Attributes:
        name: for --family.
        about: which exports these are.
        look: finds it in a graph.
    """

    name: str
    about: str
    look: Callable[[Editor, Front, int], Reading | None]


def recognise(editor: Editor, front: Front, labels: int, family: str = "") -> Reading:
    """What the graph is.

    Args:
        editor: the graph.
        front: its input.
        labels: how many foreground labels there are.
        family: one to look for; empty = all in their order.

    Raises:
        OptionError: there is no such family.
        ImportModelError: none, or not the named one, recognises it.
    """
    known = {entry.name: entry for entry in FAMILIES}
    if family and family not in known:
        raise OptionError(
            f"family is {family!r}, but must be one of {', '.join(known)}", fix="--family list explains them"
        )
    for entry in [known[family]] if family else FAMILIES:
        reading = entry.look(editor, front, labels)
        if reading is not None:
            return reading
    outputs = ", ".join(f"{value.name!r} {_shown(value)}" for value in editor.graph.outputs)
    raise ImportModelError(
        f"{editor.path}: is {'no ' + family if family else 'of no known family'}; it has the outputs {outputs}",
        why=f"its heads are laid out in another way, or the model has other classes than the {labels} labels",
        fix="say which tensors hold boxes and scores: --boxes NAME --logits NAME; --family list explains the families",
    )


# -- exports with their own post-processing ----------------------------------------------------------------------------


def caffe(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Caffe's SSD: DetectionOutput over mbox_loc, mbox_conf and PriorBox nodes (Liu et al. 2016, Caffe's `ssd`)."""
    import numpy as np

    from build.sources.anchors import corners_to_centers, priorbox_node

    node = next((n for n in editor.graph if n.op_type == "DetectionOutput"), None)
    if node is None:
        return None
    boxes, scores, priors = node.inputs[:3]
    assert boxes is not None
    assert scores is not None
    assert priors is not None
    options = _attributes(node)
    where = f"DetectionOutput {node.name!r}"
    if not options.get("share_location", 1):
        raise ImportModelError(f"{editor.path}: {where} has boxes of its own for every class (share_location = 0)")
    codings = {1: "corner", 2: "center_size"}
    coding = codings.get(int(options.get("code_type", 1)))
    if coding is None:
        raise ImportModelError(
            f"{editor.path}: {where} has code_type {options['code_type']}, which SSDNMS does not have"
        )
    reading = Reading("caffe-ssd", boxes, scores, picture=CAFFE | SAMPLED)
    variances: list[float] = []
    parts = []
    for prior in _parts(priors):
        producer = prior.producer()
        if producer is not None and producer.op_type == "PriorBox":
            feature = producer.inputs[0]
            assert feature is not None
            (array,) = editor.measure(front.example(), [feature])
            parts.append(priorbox_node(_attributes(producer), array.shape[2:], (front.height, front.width)))
            variances = list(_attributes(producer).get("variance", _attributes(producer).get("variances", [0.1])))
            reading.fact(
                "anchors",
                f"{len(parts[-1])} of {array.shape[3]} x {array.shape[2]} cells",
                f"PriorBox {producer.name!r}",
            )
        else:
            table = editor.constant(prior)
            if table is None:
                raise ImportModelError(
                    f"{editor.path}: the anchors of {where} come from {prior.name!r}, which is no constant"
                )
            rows = np.asarray(table).reshape(2, -1, 4)
            parts.append(corners_to_centers(rows[0], "xyxy"))
            variances = rows[1][0].tolist()
            reading.fact("anchors", len(rows[0]), f"constant {prior.name!r}")
    reading.anchors = np.concatenate(parts).astype(np.float32)
    variances = variances * 4 if len(variances) == 1 else variances
    encoded = bool(options.get("variance_encoded_in_target", 0))
    reading.nms = {
        "box_coding": coding,
        "box_scales": [1.0] * 4 if encoded else [float(f"{1 / value:.6g}") for value in variances],
        "background_class": int(options.get("background_label_id", 0)),
        "score_threshold": _decimal(max(0.0, options.get("confidence_threshold", 0.01))),
        "iou_threshold": _decimal(options.get("nms_threshold", 0.45)),
        "topk_per_class": max(0, int(options.get("top_k", -1))),
        "max_detections": int(options.get("keep_top_k", 200)) if int(options.get("keep_top_k", 200)) > 0 else 200,
        "clip_boxes": False,
    }
    _state(reading, where)
    reading.selection = {"detection_out": str(node.outputs[0].name)}
    return reading


def tensorflow(editor: Editor, front: Front, labels: int) -> Reading | None:
    """TensorFlow's Object Detection API: a Loop with NonMaxSuppression over decoded boxes (Postprocessor)."""
    loops = [n for n in editor.graph if n.op_type in ("Loop", "Scan") and _inside(n, "NonMaxSuppression")]
    outputs = {str(value.name).split(":")[0]: value for value in editor.graph.outputs}
    if not loops or not {"detection_boxes", "detection_scores", "num_detections"} <= outputs.keys():
        return None
    loop = loops[-1]
    node = _inside(loop, "NonMaxSuppression")[0]
    where = f"NonMaxSuppression {node.name!r}"
    outer = _captured(loop)
    examples = editor.measure(front.example(), outer)
    boxes = scores = None
    for value, array in zip(outer, examples, strict=True):
        if array.ndim >= 2 and array.shape[-1] == 4 and array.dtype.kind == "f" and array.size > 4 and boxes is None:
            boxes = value
        elif array.ndim == 3 and array.dtype.kind == "f" and array.shape[-1] != 4 and scores is None:
            scores = value
    if boxes is None or scores is None:
        raise ImportModelError(
            f"{editor.path}: the boxes and scores that {where} reads are not in the main graph",
            fix="say which tensors hold them: --boxes NAME --logits NAME",
        )
    reading = Reading(
        "tf-object-detection", boxes, scores, boxes_are="decoded", box_order="yxyx", picture=PLAIN | SAMPLED
    )
    reading.scores_are = "probabilities"
    iou, score = (editor.constant(node.inputs[i]) if len(node.inputs) > i else None for i in (3, 4))
    most = _size(editor, outputs["detection_boxes"], front) or 100
    reading.nms = {"max_detections": most, "topk_per_class": 0, "clip_boxes": False}
    if iou is not None:
        reading.nms["iou_threshold"] = _decimal(iou)
    if score is not None:
        reading.nms["score_threshold"] = _decimal(score)
    _state(reading, where)
    reading.selection = {
        name: str(outputs[name].name)
        for name in ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
        if name in outputs
    }
    return reading


def suppressed(editor: Editor, front: Front, labels: int) -> Reading | None:
    """An export that ends in NonMaxSuppression, such as MLPerf's SSD-ResNet34, or in one of TensorRT's NMS plugins."""
    plugin = next(
        (
            n
            for n in editor.graph
            if n.op_type in ("EfficientNMS_TRT", "EfficientNMS_ONNX_TRT", "BatchedNMS_TRT", "BatchedNMSDynamic_TRT")
        ),
        None,
    )
    if plugin is not None:
        return _plugin(editor, plugin)
    node = next((n for n in editor.graph if n.op_type == "NonMaxSuppression"), None)
    if node is None:
        return None
    where = f"NonMaxSuppression {node.name!r}"
    boxes, scores = node.inputs[0], node.inputs[1]
    assert boxes is not None
    assert scores is not None
    centred = bool(_attributes(node).get("center_point_box", 0))
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
    reading.nms = {"clip_boxes": False, "iou_threshold": _decimal(iou) if iou is not None else 0.0}
    if score is not None:
        reading.nms["score_threshold"] = _decimal(score)
    if most is not None:
        reading.nms["topk_per_class"] = 0
        reading.nms["max_detections"] = min(int(_decimal(most)), 1000) or 100
    _state(reading, where)
    reading.selection = {"boxes": str(boxes.name), "scores": str(scores.name), "selected": str(node.outputs[0].name)}
    return reading


def _plugin(editor: Editor, node: ir.Node) -> Reading:
    """TensorRT's NMS plugins, whose attributes say all of it (TensorRT's efficientNMSPlugin, batchedNMSPlugin)."""
    options, where = _attributes(node), f"{node.op_type} {node.name!r}"
    boxes, scores = node.inputs[0], node.inputs[1]
    assert boxes is not None
    assert scores is not None
    reading = Reading("nms-plugin", boxes, scores, boxes_are="decoded", box_order="xyxy", scores_are="probabilities")
    if "Efficient" in node.op_type:
        coded = int(options.get("box_coding", 0))
        anchors = editor.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        reading.box_order = "cxcywh" if coded and anchors is None else "xyxy"
        if anchors is not None:
            raise ImportModelError(
                f"{editor.path}: {where} decodes with anchors of its own, which is not imported yet",
                fix="name the tensors and the anchors: --boxes NAME --logits NAME --anchors FILE",
            )
        reading.scores_are = "logits" if options.get("score_activation", 0) else "probabilities"
        if reading.scores_are == "logits":
            reading.nms["score_activation"] = "sigmoid"
        reading.nms |= {
            "score_threshold": _decimal(options.get("score_threshold", 0.25)),
            "iou_threshold": _decimal(options.get("iou_threshold", 0.5)),
            "max_detections": int(options.get("max_output_boxes", 100)),
            "background_class": int(options.get("background_class", -1)),
            "class_agnostic": bool(options.get("class_agnostic", 0)),
        }
    else:
        reading.nms |= {
            "score_threshold": _decimal(options.get("scoreThreshold", 0.25)),
            "iou_threshold": _decimal(options.get("iouThreshold", 0.5)),
            "max_detections": int(options.get("keepTopK", 100)),
            "topk_per_class": int(options.get("topK", 0)),
            "background_class": int(options.get("backgroundLabelId", -1)),
        }
    reading.nms["clip_boxes"] = bool(options.get("clipBoxes", 0))
    _state(reading, where)
    return reading


# -- exports without ---------------------------------------------------------------------------------------------------


def keras(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Keras SSD (ssd_keras): one output [B,N,C+12]: softmax, four deltas, the anchor, the variances."""
    output = _only_output(editor)
    if output is None:
        return None
    (array,) = editor.measure(front.example(), [output])
    if array.ndim != 3 or array.shape[2] != labels + 13:
        return None
    classes = labels + 1
    reading = Reading(
        "keras-ssd", output, output, picture=PLAIN | {"color_order": "BGR", "mean": [104.0, 117.0, 123.0]}
    )
    reading.pick = ((classes, classes + 4), (0, classes), -1)
    reading.scores_are = "probabilities"
    reading.nms = {"background_class": 0}
    reading.fact(
        "columns",
        f"{classes} scores, 4 deltas, 4 of the anchor, 4 variances",
        f"output {output.name!r} {list(array.shape)}",
    )
    return reading


def yolo(editor: Editor, front: Front, labels: int) -> Reading | None:
    """YOLOv5, v7, v8, v9, v11 and YOLOX: one output with boxes in pixels and a score for each class."""
    output = _only_output(editor)
    if output is None:
        return None
    (array,) = editor.measure(front.example(), [output])
    if array.ndim != 3:
        return None
    turned = array.shape[1] in (labels + 4, labels + 5) and array.shape[2] not in (labels + 4, labels + 5)
    columns = array.shape[1] if turned else array.shape[2]
    if columns not in (labels + 4, labels + 5):
        return None
    objectness = columns == labels + 5
    count = array.shape[2] if turned else array.shape[1]
    cells = sum((front.height // stride) * (front.width // stride) for stride in (8, 16, 32))
    rows = array.transpose(0, 2, 1) if turned else array
    raw = objectness and count == cells and bool((rows[..., 2:4] < 0).any())
    name = "yolox" if raw else "yolov5" if objectness else "yolov8"
    reading = Reading(name, output, output, boxes_are="decoded", box_order="cxcywh", scores_are="probabilities")
    reading.turned, first = turned, 5 if objectness else 4
    reading.pick = ((0, 4), (first, columns), 4 if objectness else -1)
    reading.picture = {**PLAIN, "std": [255.0] * 3, "resize": "letterbox", "pad_value": 114} | SAMPLED
    if raw:
        reading.boxes_are = "cells"
        reading.picture = {**PLAIN, "color_order": "BGR", "resize": "letterbox_top_left", "pad_value": 114} | SAMPLED
    reading.nms = {
        "background_class": -1,
        "score_activation": "none",
        "iou_threshold": 0.45,
        "score_threshold": 0.25,
        "max_detections": 300,
        "clip_boxes": False,
    }
    shape = f"output {output.name!r} {list(array.shape)}"
    reading.fact(
        "columns",
        f"4 of the box{', objectness' if objectness else ''}, {labels} scores{'; rows are columns' if turned else ''}",
        shape,
    )
    return reading


def mediapipe(editor: Editor, front: Front, labels: int) -> Reading | None:
    """MediaPipe's BlazeFace: regressors [B,N,16] (box, then key points) and classificators [B,N,1]."""
    sizes = _output_sizes(editor, front)
    pairs = [(a, b) for a in sizes for b in sizes if a[1][-1] == 16 and b[1][-1] == 1 and len(a[1]) == len(b[1]) == 3]
    if labels != 1 or not pairs:
        return None
    (boxes, size), (scores, _) = pairs[0]
    reading = Reading(
        "blazeface", boxes, scores, boxes_are="linear", picture=HALF | SAMPLED | {"resize": "letterbox", "pad_value": 0}
    )
    reading.pick = ((0, 4), (0, 1), -1)
    reading.nms = {
        "background_class": -1,
        "score_activation": "sigmoid",
        "score_threshold": 0.5,
        "iou_threshold": 0.3,
        "clip_boxes": False,
    }
    reading.fact("columns", "4 of the box, 12 of key points, which are left out", f"output {boxes.name!r} {list(size)}")
    return reading


def retinaface(editor: Editor, front: Front, labels: int) -> Reading | None:
    """RetinaFace: loc [B,N,4], conf [B,N,2] and landms [B,N,10]."""
    sizes = _output_sizes(editor, front)
    by_last = {size[-1]: value for value, size in sizes if len(size) == 3}
    if labels != 1 or not {4, 2, 10} <= by_last.keys():
        return None
    reading = Reading("retinaface", by_last[4], by_last[2], picture=CAFFE | SAMPLED)
    reading.nms = {
        "background_class": 0,
        "box_scales": [10.0, 10.0, 5.0, 5.0],
        "iou_threshold": 0.4,
        "score_threshold": 0.02,
        "topk_per_class": 5000,
        "max_detections": 750,
        "clip_boxes": False,
    }
    reading.fact("landmarks", "left out", f"output {by_last[10].name!r}")
    return reading


def two_heads(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Two outputs, boxes [B,N,4] or [B,4,N] and scores [B,N,C] or [B,C,N]."""
    sizes = [(value, size) for value, size in _output_sizes(editor, front) if len(size) == 3]
    classes = (labels + 1, labels)
    for boxes, size in sizes:
        for scores, other in sizes:
            if boxes is scores:
                continue
            box_axis = 2 if size[2] == 4 else 1 if size[1] == 4 else 0
            axis = 2 if other[2] in classes else 1 if other[1] in classes else 0
            if not (box_axis and axis) or size[3 - box_axis] != other[3 - axis]:
                continue
            count = size[3 - box_axis]
            named = {str(boxes.name).lower(), str(scores.name).lower()}
            activated = activation_of(scores)
            if named == {"ploc", "plabel"}:
                reading = Reading("nvidia-ssd300", boxes, scores, picture=IMAGENET)
            elif named == {"scores", "boxes"} and activated is not None:
                reading = Reading("pytorch-ssd", boxes, scores, boxes_are="", box_order="xyxy")
                reading.picture = {"mean": [127.0] * 3, "std": [128.0] * 3} | SAMPLED
                reading.nms = {"score_threshold": 0.4, "iou_threshold": 0.45, "clip_boxes": False}
            else:
                reading = Reading("raw-heads", boxes, scores, picture={})
            reading.fact(
                "heads",
                f"{count} boxes, {other[axis]} classes",
                f"outputs {boxes.name!r} {list(size)}, {scores.name!r} {list(other)}",
            )
            return reading
    return None


def levels(editor: Editor, front: Front, labels: int) -> Reading | None:
    """Two outputs for each level, [B,A·4,H,W] and [B,A·C,H,W], or channels last: joined in the order of the outputs."""
    sizes = _output_sizes(editor, front)
    if len(sizes) < 2 or any(len(size) != 4 for _, size in sizes):
        return None
    classes = labels + 1
    boxes: list[ir.Value] = []
    scores: list[ir.Value] = []
    groups: dict[tuple[int, int], list[tuple[ir.Value, int, bool]]] = {}
    for value, size in sizes:
        first = size[2:] if size[1] % 4 == 0 or size[1] % classes == 0 or size[1] % max(labels, 1) == 0 else size[1:3]
        last = first != size[2:]
        groups.setdefault(tuple(first), []).append((value, size[3] if last else size[1], last))  # type: ignore[arg-type]
    for members in groups.values():
        if len(members) != 2:
            return None
        fitting = [
            (box, other, count)
            for box, other in (members, members[::-1])
            for count in (classes, labels)
            if box[1] % 4 == 0 and other[1] == box[1] // 4 * count
        ]
        if not fitting:
            return None
        box, other, count = fitting[0]
        boxes.append(_rows(editor, box[0], 4, box[2]))
        scores.append(_rows(editor, other[0], count, other[2]))
    reading = Reading("per-level", editor.concat(boxes, 1), editor.concat(scores, 1))
    reading.fact("levels", ", ".join(f"{h} x {w}" for h, w in groups), f"{len(sizes)} outputs")
    return reading


FAMILIES = (
    Family("caffe-ssd", "Caffe's SSD with PriorBox and DetectionOutput, through caffe2onnx and others", caffe),
    Family(
        "tf-object-detection",
        "TensorFlow Object Detection API, frozen graph or saved model through tf2onnx",
        tensorflow,
    ),
    Family(
        "nms-inside",
        "an export that ends in NonMaxSuppression (MLPerf's SSD-ResNet34), or in a TensorRT NMS plugin",
        suppressed,
    ),
    Family("keras-ssd", "ssd_keras: one output `predictions` [B,N,C+12]", keras),
    Family("yolo", "YOLOv5, v7, v8, v9, v11 and YOLOX: one output in pixels", yolo),
    Family("blazeface", "MediaPipe's face detectors: regressors [B,N,16], classificators [B,N,1]", mediapipe),
    Family("retinaface", "RetinaFace: loc, conf and landms", retinaface),
    Family(
        "two-heads", "boxes and scores: NVIDIA's SSD300, pytorch-ssd, jetson-inference, UltraFace, raw heads", two_heads
    ),
    Family("per-level", "boxes and scores of every feature map as outputs of their own", levels),
)


def activation_of(value: ir.Value) -> ir.Node | None:
    """The Softmax or Sigmoid that made a tensor, behind nothing but changes of shape."""
    start = value
    while (node := start.producer()) is not None:
        if node.op_type in ACTIVATIONS:
            return node
        if node.op_type not in SHAPING or node.op_type == "Concat" or node.inputs[0] is None:
            return None
        start = node.inputs[0]
    return None


def _rows(editor: Editor, value: ir.Value, columns: int, channels_last: bool) -> ir.Value:
    """[B,A·columns,H,W] or [B,H,W,A·columns] → [B,H·W·A,columns]."""
    return editor.reshape(value if channels_last else editor.transpose(value, 0, 2, 3, 1), 0, -1, columns)


def _parts(value: ir.Value) -> list[ir.Value]:
    """The tensors that a concatenation joins, or the tensor itself."""
    node = value.producer()
    if node is None or node.op_type not in ("Concat", *SHAPING):
        return [value]
    inputs = [read for read in node.inputs if read is not None]
    return [part for read in (inputs if node.op_type == "Concat" else inputs[:1]) for part in _parts(read)]


def _only_output(editor: Editor) -> ir.Value | None:
    return editor.graph.outputs[0] if len(editor.graph.outputs) == 1 else None


def _output_sizes(editor: Editor, front: Front) -> list[tuple[ir.Value, tuple[int, ...]]]:
    outputs = list(editor.graph.outputs)
    return [
        (value, array.shape) for value, array in zip(outputs, editor.measure(front.example(), outputs), strict=True)
    ]


def _inside(node: ir.Node, op_type: str) -> list[ir.Node]:
    """Nodes of an operator in a node's subgraphs."""
    return [
        inner
        for attribute in node.attributes.values()
        if attribute.type.name == "GRAPH"
        for inner in attribute.as_graph().all_nodes()
        if inner.op_type == op_type
    ]


def _captured(node: ir.Node) -> list[ir.Value]:
    """The tensors of the main graph that a node or its subgraphs read, constants left out."""
    own = node.graph
    values: dict[str, ir.Value] = {}
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            for inner in attribute.as_graph().all_nodes():
                for read in inner.inputs:
                    if read is not None and read.const_value is None and read.graph is own and read.name:
                        values[read.name] = read
    return list(values.values())


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {
        name: list(attribute.value) if isinstance(attribute.value, (tuple, list)) else attribute.value
        for name, attribute in node.attributes.items()
    }


def _size(editor: Editor, value: ir.Value, front: Front) -> int:
    (array,) = editor.measure(front.example(), [value])
    return int(array.shape[1]) if array.ndim == 3 else 0


def _decimal(value: Any) -> float:
    """A float32 as the decimal that was meant: 0.45, not 0.44999998807907104."""
    import numpy as np

    return float(str(np.float32(np.asarray(value).ravel()[0])))


def _state(reading: Reading, where: str) -> None:
    for key, value in reading.nms.items():
        reading.fact(key, value, where)


def _shown(value: ir.Value) -> str:
    return "[" + ", ".join(str(size) for size in value.shape or ()) + "]"
