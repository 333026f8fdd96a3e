"""Which kind of detector a foreign graph is: its boxes, its scores, and what its own post-processing does with them.

Each family is a function that looks for the family's marks and gives a `Reading`, or None. The first that recognises
the graph wins; `--family` names one. A reading says where every fact was seen, and what is only usual for the family.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from build.errors import ImportModelError, OptionError
from build.sources.editor import Editor
from build.sources.families_with_nms import caffe, end_to_end, suppressed, tensorflow
from build.sources.families_without_nms import (
    centerface,
    keras,
    levels,
    mediapipe,
    one_table,
    picodet,
    retinaface,
    two_heads,
    yolo,
)
from build.sources.front import Front
from build.sources.reading import Reading, shown

# Operators that choose boxes: the standard ones, TensorRT's plugins, and exporters' own.
_SELECTING = re.compile(r"TopK|NonMaxSuppression|\w*(NMS|Nms)\w*|\w*DetectionOutput\w*|\w*Detection_?PostProcess\w*")


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
    Family("end-to-end", "finished detections chosen by a TopK (YOLOv10, YOLO26): cut before it", end_to_end),
    Family("keras-ssd", "ssd_keras: one output `predictions` [B,N,C+12]", keras),
    Family("one-table", "raw boxes and scores side by side in one output: [B,N,4+C] or [B,N,C+4]", one_table),
    Family("yolo", "YOLOv5 to v12 and YOLOX: one output of boxes in pixels and scores", yolo),
    Family("blazeface", "MediaPipe's face detectors: regressors [B,N,16], classificators [B,N,1]", mediapipe),
    Family("retinaface", "RetinaFace: loc, conf and landms, joined or for each scale", retinaface),
    Family("centerface", "CenterFace: heatmap, sizes, offsets and landmarks of one map", centerface),
    Family("picodet", "PicoDet without post-processing: scores and distances of every level", picodet),
    Family(
        "two-heads", "boxes and scores: NVIDIA's SSD300, pytorch-ssd, jetson-inference, UltraFace, raw heads", two_heads
    ),
    Family("per-level", "boxes and scores of every feature map as outputs of their own", levels),
)


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
    outputs = ", ".join(f"{value.name!r} {shown(value)}" for value in editor.graph.outputs)
    node = next((n for n in editor.nodes() if _SELECTING.fullmatch(n.op_type)), None)
    if node is not None:
        reads = ", ".join(repr(value.name) for value in node.inputs[:2] if value is not None)
        raise ImportModelError(
            f"{editor.path}: ends in its own post-processing ({node.op_type}), in a form that is not known; it has the "
            f"outputs {outputs}",
            why=f"its node {node.name or '(unnamed)'!r} selects the boxes inside the model",
            fix="export the network up to its raw heads: boxes [B,N,4] and class scores [B,N,C] (switch NMS or "
            f"post-processing off in the export); or name tensors before that node, which reads {reads}: --boxes NAME "
            "--logits NAME",
        )
    raise ImportModelError(
        f"{editor.path}: is {'no ' + family if family else 'of no known family'}; it has the outputs {outputs}",
        why=f"its heads are laid out in another way, or the model has other classes than the {labels} labels",
        fix="say which tensors hold boxes and scores: --boxes NAME --logits NAME; --family list explains the families",
    )
