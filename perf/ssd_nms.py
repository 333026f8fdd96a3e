"""Time of SSDNMS alone: the ONNX function of build/ssd_nms.py in ONNX Runtime on one thread."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from build import contract
from build.contract import Nms
from build.graph import ssd_nms

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

ANCHORS, CLASSES = 8732, 21
THRESHOLD, LOW_THRESHOLD = 0.25, 0.01
LOW_RUNS = 4  # times fewer: each takes several times as long


def measure(runs: int = 200) -> dict[str, Any]:
    """Times SSDNMS on one image of 8,732 anchors × 21 classes, about 200 of them objects, on one thread.

    Args:
        runs: how many are timed.

    Returns:
        median_ms, and low_ms and high_ms, between which nine of ten runs lie; anchors, classes, score_threshold, runs,
        detections; `low_threshold`: the same for a score threshold of 0.01, where thousands of candidates compete.
    """
    inputs = realistic()
    return {
        **_timed(inputs, THRESHOLD, runs),
        "low_threshold": _timed(inputs, LOW_THRESHOLD, max(1, runs // LOW_RUNS)),
    }


def _timed(inputs: dict[str, NDArray[np.float32]], threshold: float, runs: int) -> dict[str, Any]:
    import numpy as np

    from build.session import session

    runs_here = session(model_of(Nms(score_threshold=threshold, topk_per_class=200)), threads=1)
    times = []
    for number in range(-5, runs):  # the first ones allocate
        begun = time.perf_counter()
        detections = runs_here.run(None, inputs)[0]
        if number >= 0:
            times.append((time.perf_counter() - begun) * 1000)
    low, median, high = (float(value) for value in np.percentile(times, (5, 50, 95)))
    return {
        "median_ms": median,
        "low_ms": low,
        "high_ms": high,
        "anchors": ANCHORS,
        "classes": CLASSES,
        "score_threshold": threshold,
        "runs": runs,
        "detections": int(detections[0, 0]),
    }


def model_of(nms: Nms) -> onnx.ModelProto:
    """A model of nothing but the SSDNMS node: FP32, three inputs, any batch."""
    from onnx import TensorProto, helper

    real, whole = TensorProto.FLOAT, TensorProto.INT32
    inputs: list[list[str | int]] = [["B", "N", 4], ["B", "N", "C"], ["N", 4]]
    outputs: list[list[str | int]] = [["B", 1], ["B", "K", 4], ["B", "K"], ["B", "K"]]
    graph = helper.make_graph(
        [],
        "nms",
        [
            helper.make_tensor_value_info(name, real, shape)
            for name, shape in zip(contract.NMS_INPUTS, inputs, strict=True)
        ],
        [
            helper.make_tensor_value_info(name, kind, shape)
            for name, kind, shape in zip(contract.OUTPUTS, (whole, real, real, whole), outputs, strict=True)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ssd_nms.attach(model, ssd_nms.node(nms, contract.NMS_INPUTS))
    return model


def realistic(
    rows: int = 1, anchors: int = ANCHORS, classes: int = CLASSES, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """Inputs of SSDNMS: nearly all anchors are background, about 200 of each image are not."""
    import numpy as np

    random = np.random.default_rng(seed)
    logits = random.normal(0, 1, (rows, anchors, classes)).astype(np.float32)
    logits[..., 0] += 7
    for row in logits:
        hits = random.integers(0, anchors, 200)
        row[hits, 0] -= 7
        row[hits, random.integers(1, classes, 200)] += 6
    boxes = np.concatenate([random.uniform(0, 1, (anchors, 2)), random.uniform(0.05, 0.5, (anchors, 2))], 1)
    deltas = random.normal(0, 1, (rows, anchors, 4)).astype(np.float32)
    return {"box_deltas": deltas, "class_logits": logits, "anchors": boxes.astype(np.float32)}
