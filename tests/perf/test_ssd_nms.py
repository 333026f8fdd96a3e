"""SSDNMS alone: times of the right thing."""

from __future__ import annotations

import onnxruntime
from onnx import checker

from build.spec import Nms
from perf import ssd_nms
from tests.build.graph import test_ssd_nms as bounded


def test_the_model_is_ssd_nms_alone() -> None:
    nms = Nms(score_threshold=0.25, topk_per_class=200)
    model = ssd_nms.model_of(nms)
    checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = ssd_nms.realistic(rows=2)
    answers = session.run(None, inputs), bounded.session_of(bounded.model_of(nms)).run(None, inputs)
    assert bounded.same_bits(*answers)


def test_measure() -> None:
    found = ssd_nms.measure(8)
    low = found.pop("low_threshold")
    for one, threshold, runs in ((found, 0.25, 8), (low, 0.01, 2)):
        assert 0 < one["low_ms"] <= one["median_ms"] <= one["high_ms"]
        assert (one["anchors"], one["classes"], one["score_threshold"], one["runs"]) == (8732, 21, threshold, runs)
        assert one["detections"] > 50
    assert low["median_ms"] > found["median_ms"]  # thousands of candidates instead of hundreds
