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
    times = ssd_nms.measure(8)
    low = times.pop("low_threshold")
    for figures, threshold, runs in ((times, 0.25, 8), (low, 0.01, 2)):
        assert 0 < figures["low_ms"] <= figures["median_ms"] <= figures["high_ms"]
        assert (figures["anchors"], figures["classes"], figures["score_threshold"], figures["runs"]) == (
            8732,
            21,
            threshold,
            runs,
        )
        assert figures["detections"] > 50
    assert low["median_ms"] > times["median_ms"]  # thousands of candidates instead of hundreds
