"""What follows from the mapping: work, bounds, and what INT8 would change."""

from __future__ import annotations

import pytest

from build.reports.fusion_model import Kernel
from build.reports.source_graph import Source
from tests.build.reports.networks import CBR, network, report_of, residual_nodes


def test_operations_bytes_bound_and_int8() -> None:
    source = Source(network(residual_nodes(), ["r2_out"]))
    kernels = [
        Kernel("k", "Conv", [], ["r1_out"], nodes=[0, 1, 2], evidence="tensor", milliseconds=0.1, precision="FP32")
    ]
    report = report_of(source, kernels)
    kernel = report.kernels[0]
    pixels = 16 * 16
    # The batch normalisation is folded into the convolution; ReLU is one operation for each element.
    assert kernel.operations == 2 * 27 * 8 * pixels + 8 * pixels
    assert kernel.traffic == 4 * (3 * pixels + 8 * pixels + 8 * 27 + 4 * 8)
    assert kernel.intensity == pytest.approx(kernel.operations / kernel.traffic)
    memory, compute = kernel.traffic / 50e9, kernel.operations / 100e9
    assert kernel.bound == ("compute" if compute > memory else "memory") == "compute"
    assert kernel.efficiency == pytest.approx(compute / 1e-4)
    then = max(kernel.operations / 400e9, kernel.traffic / 4 / 50e9)
    assert kernel.int8_milliseconds == pytest.approx(0.1 * then / compute)
    assert report.kernels[0].pattern == CBR
    assert report.kernels[0].kind == "vertical"
