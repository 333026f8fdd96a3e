"""Exports of TensorFlow's Object Detection API, as tiny networks (layouts.py)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.build.sources.layouts import Layout, Layouts, cast, variations
from tests.build.sources.networks import (
    BOXES,
    CELL,
    INDEX,
    Array,
    Network,
    anchors,
    decoded,
    sigmoid,
    softmax,
)

TENSORFLOW: Layouts = {}

# -- TensorFlow's Object Detection API ---------------------------------------------------------------------------------


def tensorflow_front(net: Network, how: str) -> tuple[str, Callable[[Array], Array]]:
    """The preprocessing in the graph; gives the tensor [B,3,H,W] and the same in NumPy for [B,3,H,W] pixels."""
    value = net.input
    if net.picture == "uint8":
        value = cast(net, value)
    if how == "scaled":  # 2/255 and -1, channels last
        value = net.add("Sub", net.add("Mul", value, net.const(2 / 255)), net.const(1.0))
    elif how == "mean":
        value = net.add("Div", net.add("Sub", value, net.const([123.0, 117.0, 104.0])), net.const([58.0, 57.0, 56.0]))
    value = net.add("Transpose", value, perm=[0, 3, 1, 2])

    def same(pixels: Array) -> Array:
        if how == "scaled":
            return pixels * (2 / 255) - 1
        if how == "mean":
            shape = (1, 3, 1, 1)
            return (pixels - np.reshape([123.0, 117, 104], shape)) / np.reshape([58.0, 57, 56], shape)
        return pixels

    return value, same


def tf_decode(net: Network, encodings: str, how: str) -> str:
    """[B,N,4] ty,tx,th,tw → [B,N,4] y1,x1,y2,x2 as tf2onnx writes it: everything transposed, flat over the batch."""
    table = anchors()
    if how == "meshgrid":  # centres from Range, sizes from constants
        parts = []
        for side, scale in ((8, 0.2), (4, 0.45)):
            numbers = net.add("Range", net.const(0.0), net.const(float(side)), net.const(1.0))
            line = net.add("Mul", net.add("Add", numbers, net.const(0.5)), net.const(1 / side))
            shape = net.const([side, side, CELL], INDEX)
            xs = net.add("Expand", net.reshape(line, 1, side, 1), shape)
            ys = net.add("Expand", net.reshape(line, side, 1, 1), shape)
            w, h = (
                net.add("Expand", net.const(np.reshape(s, (1, 1, CELL))), shape)
                for s in (scale * np.array([1, 1.4, 0.7]), scale * np.array([1, 0.7, 1.4]))
            )
            parts.append(net.add("Concat", *(net.reshape(v, side * side * CELL, 1) for v in (ys, xs, h, w)), axis=1))
        source = net.add("Transpose", net.add("Concat", *parts, axis=0), perm=[1, 0])
    else:
        source = net.const(table[:, [1, 0, 3, 2]].T)
    ya, xa, ha, wa = (net.reshape(net.cut(source, i, i + 1, 0), 1, BOXES) for i in range(4))
    ty, tx, th, tw = (net.reshape(net.cut(encodings, i, i + 1, 2), -1, BOXES) for i in range(4))
    scaled = [net.add("Div", v, net.const(s)) for v, s in ((ty, 10.0), (tx, 10.0), (th, 5.0), (tw, 5.0))]
    y = net.add("Add", net.add("Mul", scaled[0], ha), ya)
    x = net.add("Add", net.add("Mul", scaled[1], wa), xa)
    h, w = net.add("Mul", net.add("Exp", scaled[2]), ha), net.add("Mul", net.add("Exp", scaled[3]), wa)
    half = net.const(2.0)
    ends = [net.add(op, c, net.add("Div", s, half)) for op in ("Sub", "Add") for c, s in ((y, h), (x, w))]
    return net.add("Concat", *(net.axes("Unsqueeze", end, 2) for end in ends), axis=2)


def _nms_body(net: Network, boxes: str, scores: str, classes: int, most: int, nested: bool) -> onnx.GraphProto:
    """One image: NMS for each class, everything joined and cut to `most`; five outputs of the Loop's body."""
    make = helper.make_node

    def k1(values: list[int], name: str) -> onnx.NodeProto:
        value = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return make("Constant", [], [name], value=value)

    def first_axis(op_type: str, value: str, output: str) -> onnx.NodeProto:
        if net.opset < 13:
            return make(op_type, [value], [output], axes=[0])
        return make(op_type, [value, "i_zero"], [output])

    nodes = [
        k1([1], "i_one"),
        k1([0], "i_zero"),
        k1([most], "i_most"),
        k1([most * classes], "i_pad"),
        k1([-1], "i_flat"),
        make("Constant", [], ["i_iou"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.6])),
        make("Constant", [], ["i_thr"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1e-8])),
        make("Gather", [boxes, "i"], ["i_boxes4"], axis=0),  # [N,1,4] or [N,4]
        k1([1, -1, 4], "i_shape"),
        make("Reshape", ["i_boxes4", "i_shape"], ["i_boxes"]),
        make("Gather", [scores, "i"], ["i_scores"], axis=0),  # [N,C]
        make("Transpose", ["i_scores"], ["i_turned"], perm=[1, 0]),
        first_axis("Unsqueeze", "i_turned", "i_by_class"),
        make("NonMaxSuppression", ["i_boxes", "i_by_class", "i_most", "i_iou", "i_thr"], ["i_rows"], name="body/nms"),
        k1([2], "i_two"),
        k1([3], "i_three"),
        make("Slice", ["i_rows", "i_one", "i_two", "i_one"], ["i_c1"]),
        make("Reshape", ["i_c1", "i_flat"], ["i_c"]),
        make("Slice", ["i_rows", "i_two", "i_three", "i_one"], ["i_b1"]),
        make("Reshape", ["i_b1", "i_flat"], ["i_b"]),
        first_axis("Squeeze", "i_boxes", "i_plain"),
        make("Gather", ["i_plain", "i_b"], ["i_kept"], axis=0),
        make("Concat", ["i_b1", "i_c1"], ["i_bc"], axis=1),
        make("GatherND", ["i_scores", "i_bc"], ["i_ks"]),
        make("Shape", ["i_ks"], ["i_count"]),
        make("Min", ["i_count", "i_most"], ["i_k"]),
        make("TopK", ["i_ks", "i_k"], ["i_best", "i_places"]),
        make("Gather", ["i_kept", "i_places"], ["i_fb"], axis=0),
        make("Gather", ["i_c", "i_places"], ["i_fc"], axis=0),
        make("Cast", ["i_fc"], ["i_fcf"], to=1),
        make("Constant", [], ["i_1f"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])),
        make("Add", ["i_fcf", "i_1f"], ["i_fc1"]),
        make("Sub", ["i_most", "i_k"], ["i_rest"]),
        make("Concat", ["i_zero", "i_rest"], ["i_pad1"], axis=0),
        make("Concat", ["i_zero", "i_zero", "i_rest", "i_zero"], ["i_pad2"], axis=0),
        make("Pad", ["i_best", "i_pad1"], ["o_scores"]),
        make("Pad", ["i_fc1", "i_pad1"], ["o_classes"]),
        make("Pad", ["i_fb", "i_pad2"], ["o_boxes"]),
        make("Cast", ["i_k"], ["i_kf"], to=1),
        first_axis("Squeeze", "i_kf", "o_num"),
        make("Identity", ["go"], ["go_on"]),
    ]
    info = helper.make_tensor_value_info
    outs = [
        info("o_boxes", 1, [most, 4]),
        info("o_scores", 1, [most]),
        info("o_classes", 1, [most]),
        info("o_num", 1, []),
    ]
    if nested:  # the whole work inside an If
        inner = helper.make_graph(nodes[:-1], "then", [], outs)
        nodes = [make("If", ["go"], [v.name for v in outs], then_branch=inner, else_branch=inner), nodes[-1]]
    return helper.make_graph(
        nodes,
        "body",
        [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, [])],
        [info("go_on", TensorProto.BOOL, []), *outs],
    )


def tensorflow(
    classes: int = 3,
    activation: str = "Sigmoid",
    background: str = "cut",
    front: str = "scaled",
    picture: str = "uint8",
    anchors_from: str = "constant",
    four: bool = False,
    nested: bool = False,
    names: str = "plain",
    raw: bool = False,
    loop: bool = True,
    opset: int = 13,
    batch: int | str = "batch",
    agnostic: bool = False,
    most: int = 20,
) -> Layout:
    net = Network(
        {"box": 4, "cls": classes + 1},
        channels_last=True,
        picture=picture,
        batch=batch,
        name="input_tensor",
        opset=opset,
        scale=2,
    )
    source, same = tensorflow_front(net, front)
    net.maps(source)
    encodings = net.rows("box", "shape")
    if four:
        encodings = net.reshape(encodings, 0, BOXES, 1, 4)
        encodings = net.axes("Squeeze", encodings, 2)
    boxes = tf_decode(net, encodings, anchors_from)
    if four:
        boxes = net.axes("Unsqueeze", boxes, 2)
    logits = net.rows("cls", "shape")
    scores = net.add("Softmax", logits, axis=2) if activation == "Softmax" else net.add("Sigmoid", logits)
    if background == "cut":
        scores = net.cut(scores, 1, classes + 1, 2)
    suffix = {"plain": "", "zero": ":0", "identity": ""}[names]
    labels = {
        "boxes": "detection_boxes",
        "scores": "detection_scores",
        "classes": "detection_classes",
        "num": "num_detections",
    }
    if names == "identity":
        labels = {"boxes": "Identity_1", "scores": "Identity_4", "classes": "Identity_2", "num": "Identity_5"}
    columns = classes + (background != "cut")
    shapes = {"boxes": [batch, most, 4], "scores": [batch, most], "classes": [batch, most], "num": [batch]}
    if loop:
        count = net.axes("Squeeze", net.cut(net.add("Shape", boxes), 0, 1, 0), 0)
        body = _nms_body(net, boxes, scores, columns, most, nested)
        go = net.const(True, bool)
        net.nodes.append(
            helper.make_node(
                "Loop", [count, go], [labels[k] + suffix for k in shapes], name="Postprocessor/Loop", body=body
            )
        )
        net.outputs += [(labels[k] + suffix, 1, shape) for k, shape in shapes.items()]
    if raw:
        net.outputs += [("raw_detection_boxes" if names != "identity" else "Identity_6", 1, [batch, BOXES, 4])]
        net.nodes.append(helper.make_node("Reshape", [boxes, net.const([0, BOXES, 4], INDEX)], [net.outputs[-1][0]]))
        net.outputs += [
            ("raw_detection_scores" if names != "identity" else "Identity_7", 1, [batch, BOXES, classes + 1])
        ]
        net.nodes.append(helper.make_node("Identity", [logits], [net.outputs[-1][0]]))

    def truth(pixels: Array) -> tuple[Array, Array]:
        numbers = same(pixels)
        encoded = net.numbers(numbers, "box")[..., [1, 0, 3, 2]]
        logits = net.numbers(numbers, "cls")
        scores = softmax(logits) if activation == "Softmax" else sigmoid(logits)
        return decoded(encoded, anchors()), scores[..., 1:]

    return Layout(
        net.build(),
        classes,
        truth,
        "tf-object-detection",
        nms={"iou_threshold": 0.6, "score_threshold": 1e-8, "max_detections": most},
    )


variations(
    TENSORFLOW,
    "tf",
    tensorflow,
    sigmoid={},
    classes_90={"classes": 90},
    one_class={"classes": 1},
    softmax={"activation": "Softmax"},
    softmax_4_columns={"activation": "Softmax", "classes": 4},
    anchors_computed={"anchors_from": "meshgrid"},
    encodings_of_four_dimensions={"four": True},
    nested_in_if={"nested": True},
    saved_model={"names": "identity", "raw": True},
    names_with_zero={"names": "zero"},
    raw_outputs={"raw": True},
    float_input={"picture": "float32"},
    mean_and_std_inside={"front": "mean"},
    plain_input={"front": "none", "picture": "float32"},
    batch_of_one={"batch": 1},
    opset_12={"opset": 12},
    opset_12_nested={"opset": 12, "nested": True},
    background_kept={"background": "kept"},
)
