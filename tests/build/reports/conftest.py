"""What several tests of the reports need."""

from __future__ import annotations

import pytest

from build import spec
from build.files import MODELS
from build.graph.attach import attach
from build.reports.fusion import picture
from build.reports.fusion_model import Report
from build.reports.fusion_onnxruntime import onnxruntime_report
from tests.build.reports.networks import CEILINGS


@pytest.fixture(scope="session")
def shapes() -> Report:
    """Report of the model shapes in ONNX Runtime."""
    checked = spec.load(MODELS / "shapes")
    feeds = checked.nms.feeds(picture(checked.input.height, checked.input.width)[None])
    return onnxruntime_report("shapes", attach(checked), "fp32", feeds, threads=1, runs=3, ceilings=CEILINGS)
