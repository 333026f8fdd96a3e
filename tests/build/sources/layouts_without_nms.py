"""Exports that end at the network's heads, as tiny networks (layouts.py)."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from build.sources.foreign import Wishes
from tests.build.sources.layouts import GRID, Layout, Layouts, cast, in_graph_decoding, variations
from tests.build.sources.layouts_faces import FACES
from tests.build.sources.networks import (
    BOXES,
    CELL,
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

WITHOUT_NMS: Layouts = {**FACES}

# -- two heads ---------------------------------------------------------------------------------------------------------


def two_heads(
    names: tuple[str, str] = ("boxes", "scores"),
    classes: int = 4,
    decode: str = "",
    pixels: bool = False,
    batch: str = "0",
    activation: str = "",
    turned: bool = False,
    family: str = "raw-heads",
    opset: int = 17,
    channels_last: bool = False,
    picture: str = "float32",
    swapped: bool = False,
    first: int | str = "batch",
    wishes: dict[str, str] | None = None,
    squeezed: bool = False,
    spelt_out: bool = False,
    labels: int = 0,
    half: bool = False,
) -> Layout:
    net = Network(
        {"box": 4, "cls": classes},
        opset=opset,
        batch=first,
        channels_last=channels_last,
        picture=picture,
        scale=2,
        half=half,
    )
    if picture == "uint8":
        value = cast(net, net.input)
        net.maps(net.add("Transpose", value, perm=[0, 3, 1, 2]) if channels_last else value)
    boxes, scores = net.rows("box", batch), net.rows("cls", batch)
    if decode:
        boxes = in_graph_decoding(net, boxes, decode, pixels, batch, squeezed)
    if spelt_out:
        powers = net.add("Exp", scores)
        total = (
            net.add("ReduceSum", powers, net.const([2], INDEX), keepdims=1)
            if opset >= 13
            else net.add("ReduceSum", powers, axes=[2], keepdims=1)
        )
        scores = net.add("Div", powers, total)
    elif activation == "Softmax":
        scores = net.add("Softmax", scores, axis=2)
    elif activation:
        scores = net.add(activation, scores)
    shapes: dict[str, list[int | str]] = {"box": [first, BOXES, 4], "cls": [first, BOXES, classes]}
    if turned:
        boxes, scores = (net.add("Transpose", value, perm=[0, 2, 1]) for value in (boxes, scores))
        shapes = {"box": [first, 4, BOXES], "cls": [first, classes, BOXES]}
    outs = [(boxes, names[0], shapes["box"]), (scores, names[1], shapes["cls"])]
    if squeezed and decode:
        outs[0] = (boxes, names[0], [BOXES, 4])
    for value, name, shape in outs[::-1] if swapped else outs:
        net.out(value, name, shape)
    table = anchors()

    def truth(values: Array) -> tuple[Array, Array]:
        logits = net.numbers(values, "cls")
        scores = sigmoid(logits) if activation == "Sigmoid" else softmax(logits)
        return decoded(net.numbers(values, "box"), table), scores[..., 1:]

    return Layout(
        net.build(), labels or classes - 1, truth, family, Wishes(**(wishes or {})), table=None if decode else table
    )


variations(
    WITHOUT_NMS,
    "heads",
    two_heads,
    plain={},
    opset_7={"opset": 7},
    opset_9={"opset": 9},
    opset_11={"opset": 11},
    opset_12={"opset": 12},
    softmaxed_opset_11={"opset": 11, "activation": "Softmax", "names": ("loc", "conf")},
    turned={"turned": True},
    four_columns_five={"classes": 5},
    nvidia={"names": ("ploc", "plabel"), "turned": True, "family": "nvidia-ssd300"},
    nvidia_swapped={"names": ("ploc", "plabel"), "turned": True, "swapped": True, "family": "nvidia-ssd300"},
    other_names={"names": ("321", "cls_logits"), "classes": 21},
    softmaxed={"activation": "Softmax", "names": ("loc", "conf")},
    softmax_spelt_out={"spelt_out": True, "names": ("loc", "conf")},
    batch_of_one={"first": 1, "batch": "1"},
    batch_from_shape={"batch": "shape"},
    half={"picture": "float16"},
    bytes={"picture": "uint8"},
    bytes_channels_last={"picture": "uint8", "channels_last": True},
    channels_last={"channels_last": True},
    pytorch_ssd={
        "names": ("boxes", "scores"),
        "decode": "xyxy",
        "activation": "Softmax",
        "family": "pytorch-ssd",
        "swapped": True,
        "first": 1,
        "batch": "1",
    },
    pytorch_ssd_open={
        "names": ("boxes", "scores"),
        "decode": "xyxy",
        "activation": "Softmax",
        "family": "pytorch-ssd",
        "swapped": True,
        "batch": "-1",
    },
    ultraface={
        "names": ("boxes", "scores"),
        "classes": 2,
        "decode": "xyxy",
        "activation": "Softmax",
        "family": "pytorch-ssd",
        "first": 1,
        "batch": "1",
    },
    pytorch_ssd_cxcywh={
        "names": ("boxes", "scores"),
        "decode": "cxcywh",
        "activation": "Softmax",
        "family": "pytorch-ssd",
        "batch": "1",
        "first": 1,
    },
    pytorch_ssd_in_pixels={
        "names": ("boxes", "scores"),
        "decode": "xyxy",
        "pixels": True,
        "activation": "Softmax",
        "family": "pytorch-ssd",
    },
    decoded_of_other_names={
        "names": ("out_b", "out_s"),
        "decode": "xyxy",
        "activation": "Softmax",
        "family": "raw-heads",
    },
    decoded_without_batch={
        "names": ("boxes", "scores"),
        "decode": "xyxy",
        "activation": "Softmax",
        "family": "pytorch-ssd",
        "first": 1,
        "batch": "1",
        "squeezed": True,
    },
)


def half_weights() -> Layout:
    """FP16 through and through, as trtexec users export."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    given = two_heads(names=("loc", "conf"), activation="Softmax", half=True)
    given.model = convert_float_to_float16(given.model)
    return given


def per_level(channels_last: bool = False, joined: bool = False, classes: int = 4) -> Layout:
    net = Network({"box": 4, "cls": classes}, scale=2)
    for head in ("box", "cls"):
        for number, (height, width) in enumerate(LEVELS):
            value = net.level(head, number)
            columns = CELL * (4 if head == "box" else classes)
            if channels_last:
                value = net.add("Transpose", value, perm=[0, 2, 3, 1])
            net.out(
                value,
                f"{head}{number}",
                ["batch", height, width, columns] if channels_last else ["batch", columns, height, width],
            )

    def truth(values: Array) -> tuple[Array, Array]:
        return decoded(net.numbers(values, "box"), anchors()), softmax(net.numbers(values, "cls"))[..., 1:]

    return Layout(net.build(), classes - 1, truth, "per-level", table=anchors())


variations(
    WITHOUT_NMS,
    "levels",
    per_level,
    channels_first={},
    channels_last={"channels_last": True},
    many_classes={"classes": 21},
)


# -- one output --------------------------------------------------------------------------------------------------------


def keras(
    activated: bool = True,
    channels_last: bool = True,
    batch: str = "-1",
    pixels: bool = False,
    first: int | str = "batch",
) -> Layout:
    """ssd_keras: class scores, deltas, anchors and variances in a row; the last two are constants."""
    net = Network({"box": 4, "cls": 4}, channels_last=channels_last, batch=first, scale=2, name="input_1")
    logits = net.rows("cls", batch)
    scores = net.add("Softmax", logits, axis=2) if activated else logits
    deltas = net.rows("box", batch)
    table = anchors() * (SIZE if pixels else 1)
    constant = np.concatenate([table, np.tile(np.float32([0.1, 0.1, 0.2, 0.2]), (BOXES, 1))], 1)[None]
    count = net.add("Shape", deltas)
    repeats = net.add("Concat", net.cut(count, 0, 1, 0), net.const([1, 1], INDEX), axis=0)
    tiled = net.add("Tile", net.const(constant), repeats)
    net.out(net.add("Concat", scores, deltas, tiled, axis=2), "predictions", [first, BOXES, 16])

    def truth(values: Array) -> tuple[Array, Array]:
        return decoded(net.numbers(values, "box"), anchors()), softmax(net.numbers(values, "cls"))[..., 1:]

    return Layout(net.build(), 3, truth, "keras-ssd")


variations(
    WITHOUT_NMS,
    "keras",
    keras,
    plain={},
    without_softmax={"activated": False},
    channels_first={"channels_last": False},
    pixels={"pixels": True},
    batch_of_one={"batch": "1", "first": 1},
)


def yolo(
    kind: str = "v5",
    classes: int = 3,
    turned: bool = False,
    first: int | str = "batch",
    batch: str = "0",
    extra: bool = False,
) -> Layout:
    """One output of cx,cy,w,h in pixels and scores; `kind` is how it is computed."""
    has_object = kind in ("v5", "v5 parts", "x", "x raw")
    net = Network({"box": 4, "obj": 1, "cls": classes}, batch=first, scale=1)
    box, scores = net.rows("box", batch), net.rows("cls", batch)
    grid, stride = GRID[None, :, :2], GRID[None, :, 2:]
    if kind in ("v5", "v5 parts"):
        centre = net.add(
            "Mul",
            net.add(
                "Add", net.add("Mul", net.add("Sigmoid", net.cut(box, 0, 2, 2)), net.const(2.0)), net.const(grid - 0.5)
            ),
            net.const(stride),
        )
        extent = net.add(
            "Mul",
            net.add("Pow", net.add("Mul", net.add("Sigmoid", net.cut(box, 2, 4, 2)), net.const(2.0)), net.const(2.0)),
            net.const(stride * 2),
        )
    elif kind == "x raw":
        centre, extent = net.cut(box, 0, 2, 2), net.cut(box, 2, 4, 2)
    else:
        centre = net.add("Mul", net.add("Add", net.cut(box, 0, 2, 2), net.const(grid)), net.const(stride))
        extent = net.add("Mul", net.add("Exp", net.cut(box, 2, 4, 2)), net.const(stride))
    parts = [centre, extent]
    if kind == "v5":  # one Sigmoid over objectness and classes
        parts.append(net.add("Sigmoid", net.add("Concat", net.rows("obj", batch), scores, axis=2)))
    else:
        parts += [net.add("Sigmoid", net.rows("obj", batch))] if has_object else []
        parts.append(net.add("Sigmoid", scores))
    value = net.add("Concat", *parts, axis=2)
    columns = 4 + has_object + classes
    shape: list[int | str] = [first, BOXES, columns]
    if turned:
        value, shape = net.add("Transpose", value, perm=[0, 2, 1]), [first, columns, BOXES]
    net.out(value, "output0", shape)
    if extra:  # the levels before they are joined, as YOLOv5's training export has them
        for number, (height, width) in enumerate(LEVELS):
            net.out(net.add("Identity", net.maps()[number]), f"onnx::Sigmoid_{number}", [first, 16, height, width])

    def truth(values: Array) -> tuple[Array, Array]:
        raw = net.numbers(values, "box")
        if kind in ("v5", "v5 parts"):
            centre, extent = (
                (sigmoid(raw[..., :2]) * 2 + grid - 0.5) * stride,
                (sigmoid(raw[..., 2:]) * 2) ** 2 * stride * 2,
            )
        else:
            centre, extent = (raw[..., :2] + grid) * stride, np.exp(raw[..., 2:]) * stride
        scores = sigmoid(net.numbers(values, "cls"))
        if has_object:
            scores = scores * sigmoid(net.numbers(values, "obj"))
        return corners(np.concatenate([centre, extent], -1)) / SIZE, scores

    family = {"x raw": "yolox"}.get(kind, "yolov5" if has_object else "yolov8")
    wishes, table = Wishes(), None
    if kind == "x raw":
        table = np.concatenate([GRID[:, :2] * GRID[:, 2:], np.repeat(GRID[:, 2:], 2, 1)], 1).astype(np.float32) / SIZE
    return Layout(net.build(), classes, truth, family, wishes, table=table)


variations(
    WITHOUT_NMS,
    "yolo",
    yolo,
    v5={},
    v5_one_label={"classes": 1},
    v5_parts={"kind": "v5 parts"},
    v5_more_outputs={"extra": True},
    v8={"kind": "v8", "turned": True},
    v8_one_label={"kind": "v8", "turned": True, "classes": 1},
    v8_two_labels={"kind": "v8", "turned": True, "classes": 2},
    v8_rows={"kind": "v8"},
    x={"kind": "x"},
    x_raw={"kind": "x raw"},
    batch_of_one={"first": 1, "batch": "1"},
    v8_batch_of_one={"kind": "v8", "turned": True, "first": 1, "batch": "1"},
)


def dfl() -> Layout:
    """YOLOv8's own head: 16 bins a side, softmax, distances from the cell's centre, in pixels."""
    net = Network({"box": 64, "cls": 2}, scale=0.5)
    bins = net.reshape(net.rows("box"), 0, BOXES, 4, 16)
    distances = net.axes(
        "Squeeze", net.add("MatMul", net.add("Softmax", bins, axis=3), net.const(np.arange(16.0)[:, None])), 3
    )
    centre, stride = net.const(GRID[None, :, :2] + 0.5), net.const(GRID[None, :, 2:])
    low = net.add("Sub", centre, net.cut(distances, 0, 2, 2))
    high = net.add("Add", centre, net.cut(distances, 2, 4, 2))
    middle = net.add("Div", net.add("Add", low, high), net.const(2.0))
    boxes = net.add("Mul", net.add("Concat", middle, net.add("Sub", high, low), axis=2), stride)
    value = net.add("Concat", boxes, net.add("Sigmoid", net.rows("cls")), axis=2)
    net.out(net.add("Transpose", value, perm=[0, 2, 1]), "output0", ["batch", 6, BOXES])

    def truth(values: Array) -> tuple[Array, Array]:
        bins = softmax(net.numbers(values, "box").reshape(len(values), BOXES, 4, 16)) @ np.arange(16.0)
        ends = np.concatenate([GRID[:, :2] + 0.5 - bins[..., :2], GRID[:, :2] + 0.5 + bins[..., 2:]], -1)
        return ends * GRID[:, 2:] / SIZE, sigmoid(net.numbers(values, "cls"))

    return Layout(net.build(), 2, truth, "yolov8")


def one_table(scores_first: bool = False, activation: str = "") -> Layout:
    """Raw deltas and scores in one output."""
    net = Network({"box": 4, "cls": 4}, scale=2)
    scores = net.rows("cls")
    if activation:
        scores = net.add(activation, scores, **({"axis": 2} if activation == "Softmax" else {}))
    parts = [net.rows("box"), scores]
    value = net.add("Concat", *(parts[::-1] if scores_first else parts), axis=2)
    net.out(value, "output", ["batch", BOXES, 8])

    def truth(values: Array) -> tuple[Array, Array]:
        return decoded(net.numbers(values, "box"), anchors()), softmax(net.numbers(values, "cls"))[..., 1:]

    return Layout(net.build(), 3, truth, "raw-heads", table=anchors())


def picodet() -> Layout:
    """PicoDet up to its heads: sigmoid scores and 8 bins a side of strides 8 and 16, and Paddle's extra inputs."""
    net = Network({"cls": 3, "side": 32}, scale=1, cells=1)
    net.inputs += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("im_shape", "scale_factor")
    ]
    for number, side in enumerate((8, 4)):
        for head, columns in (("cls", 3), ("side", 32)):
            value = net.add("Transpose", net.level(head, number), perm=[0, 2, 3, 1])
            value = net.reshape(value, 0, side * side, columns)
            net.out(
                net.add("Sigmoid", value) if head == "cls" else value,
                f"{head}{number}",
                ["batch", side * side, columns],
            )
    cells = np.array([(x + 0.5, y + 0.5, s) for side, s in ((8, 8), (4, 16)) for y in range(side) for x in range(side)])

    def truth(values: Array) -> tuple[Array, Array]:
        bins = net.numbers(values, "side")
        distance = softmax(bins.reshape(*bins.shape[:2], 4, 8)) @ np.arange(8.0)
        ends = np.concatenate([cells[:, :2] - distance[..., :2], cells[:, :2] + distance[..., 2:]], -1)
        return ends * cells[:, 2:] / SIZE, sigmoid(net.numbers(values, "cls"))

    return Layout(net.build(), 3, truth, "picodet")


WITHOUT_NMS["yolo: DFL decoded in the graph"] = dfl
variations(
    WITHOUT_NMS,
    "one table",
    one_table,
    softmaxed={"activation": "Softmax"},
    softmaxed_scores_first={"activation": "Softmax", "scores_first": True},
)
WITHOUT_NMS["picodet: plain"] = picodet
WITHOUT_NMS["heads: half weights"] = half_weights
