"""What every layout must show: recognised, and the same boxes and scores as its truth, in batches of one and two."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx

from build import contract
from build.session import runner
from build.sources.foreign import Foreign, understand
from tests.build.sources.layouts import Layout
from tests.build.sources.networks import SIZE, Array, decoded, sigmoid, softmax


def imported(layout: Layout, folder: Path) -> Foreign:
    """The layout, understood."""
    onnx.save(layout.model, folder / "detector.onnx")
    wishes = layout.wishes
    if layout.table is not None:
        np.save(folder / "anchors.npy", layout.table)
        wishes = dataclasses.replace(wishes, anchors=str(folder / "anchors.npy"))
    return understand(folder / "detector.onnx", [f"label{i}" for i in range(layout.labels)], wishes)


def heads(foreign: Foreign, pixels: Array) -> tuple[Array, Array]:
    """Boxes and foreground scores that SSDNMS makes of the adapted heads (docs/design.md), in NumPy."""
    outputs = runner(foreign.adapted.model)({"pixels": pixels})
    boxes, scores = (outputs[name].astype(np.float64) for name in contract.HEADS)
    nms = contract.SpecNms(**foreign.adapted.nms)
    if nms.needs_anchors:
        assert foreign.adapted.anchors is not None
        table = foreign.adapted.anchors
        boxes = decoded(boxes, table, nms.box_scales) if nms.box_coding == "center_size" else _corner(boxes, table, nms)
    scores = {"softmax": softmax, "sigmoid": sigmoid, "none": np.asarray}[nms.score_activation](scores)
    kept = [column for column in range(scores.shape[-1]) if column != nms.background_class]
    return boxes, scores[..., kept]


def _corner(deltas: Array, table: Array, nms: contract.SpecNms) -> Array:
    ends = np.concatenate([table[:, :2] - table[:, 2:] / 2, table[:, :2] + table[:, 2:] / 2], 1)
    return ends + deltas / np.array(nms.box_scales)


def check(layout: Layout, folder: Path) -> Foreign:
    foreign = imported(layout, folder)
    assert foreign.reading.family == layout.family
    picture = foreign.adapted.picture
    pixels = np.random.default_rng(3).uniform(0, 255, (3, 3, picture["height"], picture["width"])).astype(np.float32)
    assert pixels.shape[2:] == (SIZE, SIZE)
    pixels = pixels.round() if foreign.front.normalised else (pixels - 127) / 128
    boxes, scores = layout.truth(pixels)
    for batch in (pixels[:1], pixels[:2], pixels):
        ours = heads(foreign, batch)
        np.testing.assert_allclose(ours[0], boxes[: len(batch)], atol=2e-5, rtol=2e-5)
        np.testing.assert_allclose(ours[1], scores[: len(batch)], atol=2e-5)
    for key, value in layout.nms.items():
        assert foreign.adapted.nms[key] == value, (key, foreign.adapted.nms[key])
    return foreign
