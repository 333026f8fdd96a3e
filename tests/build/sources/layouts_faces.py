"""Face detectors' exports, as tiny networks (layouts.py)."""

from __future__ import annotations

import numpy as np

from tests.build.sources.layouts import Layout, Layouts, in_graph_decoding, variations
from tests.build.sources.networks import (
    BOXES,
    CELL,
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

FACES: Layouts = {}


# -- faces -------------------------------------------------------------------------------------------------------------


def retinaface(decode: bool = False, activated: bool = True, per_scale: bool = False, maps: bool = False) -> Layout:
    """loc, conf and landms: joined, or three outputs for each scale (two here)."""
    net = Network({"box": 4, "cls": 2, "landms": 10}, scale=2, name="input0")
    heads = {"loc": "box", "conf": "cls", "landms": "landms"}
    if maps:
        for number, (height, width) in enumerate(LEVELS):
            for name, head in heads.items():
                columns = CELL * (len(net.heads[head][0][1]) // CELL)
                net.out(net.level(head, number), f"{name}{number}", ["batch", columns, height, width])
    elif per_scale:
        counts = [height * width * CELL for height, width in LEVELS]
        for name, head in heads.items():
            rows = net.rows(head)
            start = 0
            for number, count in enumerate(counts):
                value = net.cut(rows, start, start + count, 1)
                value = net.add("Softmax", value, axis=2) if name == "conf" and activated else value
                net.out(value, f"{name}{number}", ["batch", count, len(net.heads[head][0][1]) // CELL])
                start += count
    else:
        for name, head in heads.items():
            value = net.rows(head)
            if name == "conf" and activated:
                value = net.add("Softmax", value, axis=2)
            if name == "loc" and decode:
                value = in_graph_decoding(net, value, "xyxy", False, "0")
            net.out(value, name, ["batch", BOXES, len(net.heads[head][0][1]) // CELL])

    def truth(values: Array) -> tuple[Array, Array]:
        return decoded(net.numbers(values, "box"), anchors()), softmax(net.numbers(values, "cls"))[..., 1:]

    return Layout(net.build(), 1, truth, "retinaface", table=None if decode else anchors())


variations(
    FACES,
    "retinaface",
    retinaface,
    plain={},
    logits={"activated": False},
    decoded={"decode": True},
    nine_outputs={"per_scale": True},
    nine_logits={"per_scale": True, "activated": False},
    nine_maps={"maps": True, "activated": False},
)


def blazeface(
    first: int | str = 1, batch: str = "1", channels_last: bool = True, activated: bool = False, turned: bool = False
) -> Layout:
    net = Network({"box": 16, "cls": 1}, batch=first, channels_last=channels_last, scale=2, name="input")
    boxes, scores = net.rows("box", batch), net.rows("cls", batch)
    if activated:
        scores = net.add("Sigmoid", scores)
    net.out(boxes, "regressors", [first, BOXES, 16])
    net.out(scores, "classificators", [first, BOXES, 1])
    table = anchors()
    table[:, 2:] = 1

    def truth(values: Array) -> tuple[Array, Array]:
        raw = net.numbers(values, "box")[..., :4] / SIZE
        return corners(np.concatenate([raw[..., :2] + table[:, :2], raw[..., 2:]], -1)), sigmoid(
            net.numbers(values, "cls")
        )

    return Layout(net.build(), 1, truth, "blazeface", table=table)


variations(
    FACES,
    "blazeface",
    blazeface,
    plain={},
    channels_first={"channels_last": False},
    activated={"activated": True},
    open_batch={"first": "batch", "batch": "0"},
)


def centerface() -> Layout:
    """CenterFace's four maps of stride 8: heatmap, sizes (h, w), offsets (y, x), landmarks."""
    net = Network({"heat": 1, "size": 2, "off": 2, "land": 10}, scale=1, cells=1, levels=1)
    for name, head in (("heatmap", "heat"), ("scale", "size"), ("offset", "off"), ("landmarks", "land")):
        value = net.level(head, 0)
        value = net.add("Sigmoid", value) if head == "heat" else value
        net.out(value, name, ["batch", len(net.heads[head][0][1]), 8, 8])
    y, x = np.mgrid[:8, :8].reshape(2, -1) + 0.5

    def truth(values: Array) -> tuple[Array, Array]:
        sizes, offsets = np.exp(net.numbers(values, "size")) * 8, net.numbers(values, "off")
        centre = np.stack([(x + offsets[..., 1]) * 8, (y + offsets[..., 0]) * 8], -1)
        boxes = corners(np.concatenate([centre, sizes[..., ::-1]], -1)) / SIZE
        return boxes, sigmoid(net.numbers(values, "heat"))

    return Layout(net.build(), 1, truth, "centerface")


FACES["centerface: plain"] = centerface
