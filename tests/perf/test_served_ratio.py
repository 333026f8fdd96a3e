"""Served against raw, on the real server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from build.errors import ServeError
from build.serve import TritonServer
from models.shapes.scenes import scene
from perf import served_ratio


@pytest.mark.triton
@pytest.mark.slow
def test_served_ratio(triton_server: TritonServer) -> None:
    busy = served_ratio.other_load()
    if busy > 0.2:
        pytest.skip(f"needs an idle machine: other programs take {busy:.0%} of its cores")
    pictures = [scene("held_out", index).image for index in range(4)]
    load = served_ratio.measure(triton_server, "shapes", pictures, quick=True)
    assert set(load["served_ratio"]) == {"shm", "grpc"}
    assert set(load["throughput_ips"]) == {"1", "2", "4"}
    assert 0 < load["latency_ms"]["p50"] <= load["latency_ms"]["p90"] <= load["latency_ms"]["p99"]
    assert load["raw_ips"] > 0
    # The demo's full run shows the real figures; this short one swings with whatever else the machine does.
    assert 0.3 < load["served_ratio"]["shm"] < 3
    assert 0.3 < load["served_ratio"]["grpc"] < 3


@pytest.mark.triton
def test_raw_runs_the_published_file_with_the_servers_threads(triton_server: TritonServer, repository: Path) -> None:
    threads = served_ratio._threads(triton_server, "shapes")
    assert threads >= 1
    images = [np.zeros((300, 300, 3), np.uint8)]
    feeds = served_ratio._feeds(images, {"score_threshold": 0.25, "iou_threshold": 0.45})
    raw = served_ratio.fastest_raw(repository / "shapes" / "1" / "model.onnx", feeds, threads)
    assert raw.sessions * raw.threads == threads
    assert raw.throughput(0.5) > 0


@pytest.mark.triton
def test_a_model_without_onnx_has_no_raw_side(
    triton_server: TritonServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(triton_server, "repository", tmp_path)
    with pytest.raises(ServeError, match=r"model\.onnx is not there"):
        served_ratio.measure(triton_server, "shapes", [np.zeros((8, 8, 3), np.uint8)])
