"""Exports that carry their post-processing, as tiny networks (layouts.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.build.sources.layouts import GRID, Layout, Layouts, cast, in_graph_decoding, variations
from tests.build.sources.layouts_tensorflow import TENSORFLOW
from tests.build.sources.networks import (
    INDEX,
    LEVELS,
    SIZE,
    Array,
    Network,
    anchors,
    corners,
    decoded,
    sigmoid,
    softmax,
)

WITH_NMS: Layouts = {**TENSORFLOW}

# -- Caffe -------------------------------------------------------------------------------------------------------------


def caffe(
    prior: str = "lists",
    flatten: bool = True,
    softmax_rows: bool = False,
    code_type: Any = 2,
    background: int = 0,
    keep: Any = 200,
    encoded: int = 0,
    clip: int = 0,
    flip: int = 1,
    step: float | None = None,
    sizes: int = 1,
    maximum: bool = True,
    second_input: bool = False,
    inputs: int = 3,
    batch: str = "1",
    opset: int = 17,
) -> Layout:
    """DetectionOutput over two levels; `prior` says how the anchors are written."""
    columns = 4
    net = Network({"box": 4, "cls": columns}, batch=1, name="data", scale=2, opset=opset)
    loc = net.reshape(net.rows("box", batch), 1, -1)
    conf = net.rows("cls", batch)
    if softmax_rows:
        conf = net.add("Softmax", net.reshape(conf, -1, columns), axis=1)
        conf = net.reshape(conf, 1, -1) if flatten else net.reshape(conf, 1, -1, columns)
    else:
        conf = net.add("Softmax", conf, axis=2)
        conf = net.add("Flatten", conf, axis=1) if flatten else conf
    # three boxes a cell: min, sqrt(min·max), ratio 2 (no flip); or min, ratio 2, ratio 1/2 (no max size)
    levels = [(20.0, 30.0), (40.0, 50.0)]
    ratio_names = {
        "lists": ("min_sizes", "max_sizes", "aspect_ratios", "variances"),
        "scalars": ("min_size", "max_size", "aspect_ratio", "variance"),
    }
    variances = [0.1, 0.1, 0.2, 0.2]
    priors, table = [], []
    height = width = SIZE
    for number, (low, high) in enumerate(levels):
        side = LEVELS[number][0]
        pixels = [(low, low)]
        if sizes == 3:
            pixels = [(low, low), (low * 1.5, low * 1.5), (low * 2, low * 2)]
        elif maximum:
            pixels += [((low * high) ** 0.5,) * 2, (low * 2**0.5, low / 2**0.5)]
        else:
            pixels += [(low * 2**0.5, low / 2**0.5), (low / 2**0.5, low * 2**0.5)]
        boxes = np.array([
            ((x + 0.5) * (step or width / side) / width, (y + 0.5) * (step or height / side) / height, w, h)
            for y in range(side) for x in range(side) for w, h in np.array(pixels) / [width, height]
        ])  # fmt: skip
        if clip:
            ends = np.clip(corners(boxes), 0, 1)
            boxes = np.concatenate([(ends[:, :2] + ends[:, 2:]) / 2, ends[:, 2:] - ends[:, :2]], 1)
        table.append(boxes)
        if prior == "constant":
            numbers = np.stack([corners(boxes).ravel(), np.tile(variances, len(boxes))])[None]
            priors.append(net.const(numbers, name=f"prior{number}"))
            continue
        names = ratio_names[prior]
        attributes: dict[str, Any] = {
            "clip": clip,
            "flip": flip if not maximum else 0,
            "offset": 0.5,
            names[3]: variances,
        }
        if prior == "scalars":
            attributes[names[0]] = low
            attributes["step"] = step or 0.0
        else:
            attributes[names[0]] = [low] if sizes != 3 else [low, low * 1.5, low * 2]
            if step is not None:
                attributes["steps"] = [step, step]
        if sizes != 3:
            attributes[names[2]] = 2.0 if prior == "scalars" else [2.0]
            if maximum:
                attributes[names[1]] = high if prior == "scalars" else [high]
        read = [net.maps()[number], *([net.input] if second_input else [])]
        priors.append(net.add("PriorBox", *read, **attributes))
    joined = net.add("Concat", *priors, axis=2) if len(priors) > 1 else priors[0]
    options: dict[str, Any] = {
        "num_classes": columns,
        "share_location": 1,
        "background_label_id": background,
        "nms_threshold": 0.45,
        "confidence_threshold": 0.01,
        "top_k": 400,
        "keep_top_k": keep,
        "code_type": code_type,
    }
    if encoded:
        options["variance_encoded_in_target"] = encoded
    more = [conf, loc] if inputs == 5 else []
    out = net.add("DetectionOutput", loc, conf, joined, *more, **options)
    net.out(out, "detection_out", [1, 1, "n", 7])
    all_anchors = np.concatenate(table)
    corner = code_type in (1, "caffe.PriorBoxParameter.CORNER")

    def truth(pixels: Array) -> tuple[Array, Array]:
        deltas = net.numbers(pixels, "box")
        if corner:
            boxes = corners(all_anchors) + deltas * ([1] * 4 if encoded else variances)
        else:
            boxes = decoded(deltas, all_anchors, [1] * 4 if encoded else [10, 10, 5, 5])
        scores = softmax(net.numbers(pixels, "cls"))
        return boxes, scores[..., 1:] if background == 0 else scores

    return Layout(
        net.build(),
        columns - (background == 0),
        truth,
        "caffe-ssd",
        nms={"iou_threshold": 0.45, "score_threshold": 0.01, "topk_per_class": 400},
    )


variations(
    WITH_NMS,
    "caffe",
    caffe,
    lists={},
    scalars={"prior": "scalars"},
    scalar_step={"prior": "scalars", "step": 7.0},
    steps={"step": 7.5},
    second_input={"second_input": True},
    several_min_sizes={"sizes": 3, "maximum": False},
    no_max_size={"maximum": False},
    clip={"clip": 1},
    step_zero={"step": 0.0},
    constant={"prior": "constant"},
    not_flat={"flatten": False},
    softmax_of_rows={"softmax_rows": True},
    softmax_of_rows_not_flat={"softmax_rows": True, "flatten": False},
    five_inputs={"inputs": 5},
    no_background={"background": -1},
    corner={"code_type": 1},
    code_type_as_text={"code_type": "caffe.PriorBoxParameter.CENTER_SIZE"},
    keep_as_list={"keep": [100]},
    keep_all={"keep": -1},
    encoded={"encoded": 1},
    corner_encoded={"code_type": 1, "encoded": 1},
    open_batch={"batch": "0"},
    opset_9={"opset": 9},
    opset_11_rows={"opset": 11, "softmax_rows": True},
)


# -- NMS in the main graph ---------------------------------------------------------------------------------------------


def nms_inside(
    tail: str = "gather",
    centred: bool = False,
    sliced: bool = True,
    first: int | str = 1,
    opset: int = 17,
    activation: str = "Softmax",
    pixels: bool = False,
    most: int = 50,
    labels: int = 3,
) -> Layout:
    net = Network({"box": 4, "cls": 4}, batch=first, name="image", scale=2, opset=opset)
    batch = "1" if first == 1 else "0"
    boxes = in_graph_decoding(net, net.rows("box", batch), "cxcywh" if centred else "xyxy", pixels, batch)
    logits = net.rows("cls", batch)
    scores = net.add("Softmax", logits, axis=2) if activation == "Softmax" else net.add("Sigmoid", logits)
    if sliced:
        scores = net.cut(scores, 1, 4, 2)
    turned = net.add("Transpose", scores, perm=[0, 2, 1])
    selected = net.add(
        "NonMaxSuppression", boxes, turned, net.const([most], INDEX), net.const([0.5]), net.const([0.1]),
        to="selected", center_point_box=int(centred),
    )  # fmt: skip
    column_1, column_2 = (net.const([i], INDEX) for i in (1, 2))
    if tail == "gather":
        index = net.axes("Squeeze", net.add("Gather", selected, net.const([2], INDEX), axis=1), 1)
        classes = net.axes("Squeeze", net.add("Gather", selected, net.const([1], INDEX), axis=1), 1)
        kept = net.add("Gather", net.axes("Squeeze", boxes, 0), index, axis=0)
        net.out(kept, "bboxes", ["n", 4])
        net.out(classes, "labels", ["n"], TensorProto.INT64)
    else:
        places = net.add("Gather", selected, net.const([0, 2], INDEX), axis=1)
        kept = net.add("GatherND", boxes, places)
        which = net.add("GatherND", turned, selected)
        classes = cast(net, net.add("Slice", selected, column_1, column_2, column_1))
        net.out(net.add("Concat", kept, net.axes("Unsqueeze", which, 1), classes, axis=1), "detections", ["n", 6])

    def truth(values: Array) -> tuple[Array, Array]:
        logits = net.numbers(values, "cls")
        scores = softmax(logits) if activation == "Softmax" else sigmoid(logits)
        return decoded(net.numbers(values, "box"), anchors()), scores[..., 1:] if labels == 3 else scores

    return Layout(net.build(), labels, truth, "nms-inside", nms={"iou_threshold": 0.5, "score_threshold": 0.1})


variations(
    WITH_NMS,
    "nms",
    nms_inside,
    gather={},
    gather_nd={"tail": "nd"},
    centred={"centred": True},
    open_batch={"first": "batch", "tail": "nd"},
    background_kept={"sliced": False},
    background_is_a_label={"sliced": False, "labels": 4},
    sigmoid={"activation": "Sigmoid"},
    pixels={"pixels": True},
    opset_11={"opset": 11},
)


def plugin(
    kind: str = "EfficientNMS_TRT", coding: int = 0, activated: bool = True, four: bool = True, anchored: bool = False
) -> Layout:
    efficient = "Efficient" in kind
    net = Network({"box": 4, "cls": 3}, scale=2)
    raw = net.rows("box")
    boxes = raw if anchored else in_graph_decoding(net, raw, "cxcywh" if coding else "xyxy", False, "0")
    scores = net.rows("cls")
    if activated:
        scores = net.add("Sigmoid", scores)
    if not efficient and four:
        boxes = net.axes("Unsqueeze", boxes, 2)
    options: dict[str, Any] = (
        {"score_threshold": 0.2, "iou_threshold": 0.55, "max_output_boxes": 30, "background_class": -1,
         "score_activation": int(not activated), "box_coding": int(coding or anchored), "plugin_version": "1"}
        if efficient else
        {"scoreThreshold": 0.2, "iouThreshold": 0.55, "keepTopK": 30, "topK": 200, "backgroundLabelId": -1,
         "shareLocation": 1, "isNormalized": 1, "clipBoxes": 0}
    )  # fmt: skip
    read = [boxes, scores, *([net.const(anchors()[None])] if anchored else [])]
    net.nodes.append(
        helper.make_node(
            kind, read, ["num", "det_boxes", "det_scores", "det_classes"], name="nms", domain="TRT", **options
        )
    )
    net.outputs += [
        ("num", TensorProto.INT32, ["batch", 1]),
        ("det_boxes", 1, ["batch", 30, 4]),
        ("det_scores", 1, ["batch", 30]),
        ("det_classes", TensorProto.INT32, ["batch", 30]),
    ]

    def truth(values: Array) -> tuple[Array, Array]:
        scales = [1] * 4 if anchored else [10, 10, 5, 5]
        return decoded(net.numbers(values, "box"), anchors(), scales), sigmoid(net.numbers(values, "cls"))

    return Layout(
        net.build(domains={"TRT": 1}),
        3,
        truth,
        "nms-plugin",
        nms={"iou_threshold": 0.55, "score_threshold": 0.2, "max_detections": 30},
    )


variations(
    WITH_NMS,
    "plugin",
    plugin,
    efficient={},
    efficient_cxcywh={"coding": 1},
    efficient_logits={"activated": False},
    efficient_anchors={"anchored": True},
    batched={"kind": "BatchedNMS_TRT"},
    batched_dynamic={"kind": "BatchedNMSDynamic_TRT"},
)


def end_to_end() -> Layout:
    """YOLOv10's export: the best 50 anchors by their best class, then the best 50 of their classes: [B,50,6]."""
    net = Network({"box": 4, "cls": 3}, scale=1)
    box = net.rows("box")
    grid, stride = net.const(GRID[None, :, :2]), net.const(GRID[None, :, 2:])
    centre = net.add("Mul", net.add("Add", net.cut(box, 0, 2, 2), grid), stride)
    extent = net.add("Mul", net.add("Exp", net.cut(box, 2, 4, 2)), stride)
    half = net.add("Div", extent, net.const(2.0))
    boxes = net.add("Concat", net.add("Sub", centre, half), net.add("Add", centre, half), axis=2)
    scores = net.add("Sigmoid", net.rows("cls"))
    best = net.add("ReduceMax", scores, axes=[2], keepdims=0)
    net.nodes.append(
        helper.make_node("TopK", [best, net.const([50], INDEX)], ["values", "places"], axis=1, name="n/topk")
    )
    places = net.axes("Unsqueeze", "places", 2)
    kept_boxes = net.add("GatherElements", boxes, net.add("Tile", places, net.const([1, 1, 4], INDEX)), axis=1)
    kept_scores = net.add("GatherElements", scores, net.add("Tile", places, net.const([1, 1, 3], INDEX)), axis=1)
    flat = net.reshape(kept_scores, 0, -1)
    net.nodes.append(
        helper.make_node("TopK", [flat, net.const([50], INDEX)], ["best", "index"], axis=1, name="n/topk2")
    )
    classes = net.add("Mod", "index", net.const(3, INDEX))
    rows = net.axes("Unsqueeze", net.add("Div", "index", net.const(3, INDEX)), 2)
    last = net.add("GatherElements", kept_boxes, net.add("Tile", rows, net.const([1, 1, 4], INDEX)), axis=1)
    net.out(
        net.add("Concat", last, net.axes("Unsqueeze", "best", 2), net.axes("Unsqueeze", cast(net, classes), 2), axis=2),
        "output0",
        ["batch", 50, 6],
    )

    def truth(values: Array) -> tuple[Array, Array]:
        raw = net.numbers(values, "box")
        boxes = np.concatenate([(raw[..., :2] + GRID[:, :2]) * GRID[:, 2:], np.exp(raw[..., 2:]) * GRID[:, 2:]], -1)
        return corners(boxes) / SIZE, sigmoid(net.numbers(values, "cls"))

    return Layout(net.build(), 3, truth, "end-to-end", nms={"max_detections": 50, "iou_threshold": 1.0})


WITH_NMS["yolo: end to end, cut before its TopK"] = end_to_end
