"""Operators and patterns of real detectors: every Conv runs in integers, answers stay close, nothing gets slower."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from build.graph.attach import FRONT_CONSTANTS, attach, before_nms
from build.quantization import qdq
from build.session import runner, session
from build.spec import load
from tests.build import tiny_model
from tests.build.quantization.operators import BODIES, clips_of, network

IMAGES = np.random.default_rng(7).normal(0, 1, (8, 3, 8, 8)).astype(np.float32)


def forms(body: str, images: np.ndarray = IMAGES, **size: int) -> dict[str, onnx.ModelProto]:
    source = qdq.fold(network(body, **size))
    clips = clips_of(source, images)
    written = qdq.quantize(source, clips).model
    return {
        "fp32": source,
        "as written": written,
        "onnxruntime": qdq.for_onnxruntime(qdq.quantize(source, clips, kernels=True).model),
    }


@pytest.mark.parametrize("body", BODIES)
def test_every_conv_runs_in_integers_with_answers_close_to_fp32(body: str, tmp_path: Path) -> None:
    graphs = forms(body)
    exact = runner(graphs["fp32"])({"images": IMAGES})
    for form, literal in (("as written", True), ("onnxruntime", False)):
        found = runner(graphs[form], literal=literal)({"images": IMAGES})
        for name, right in exact.items():
            error = np.sqrt(np.mean(np.square(found[name] - right)) / np.mean(np.square(right)))
            assert 0 < error < 0.06, (form, name)
    session(graphs["onnxruntime"], written=tmp_path / "optimised.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == len(qdq.convs(graphs["fp32"]))
    assert "Conv" not in kinds
    assert "FusedConv" not in kinds


@pytest.mark.long
@pytest.mark.parametrize("body", BODIES)
def test_int8_is_never_slower_than_fp32(body: str) -> None:
    """On a CPU with VNNI, side by side, by processor time; the least of ten runs, since a test shares its machine."""
    if "vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a CPU with AVX512-VNNI or AVX-VNNI")
    images = np.random.default_rng(0).normal(0, 1, (1, 3, 160, 160)).astype(np.float32)
    graphs = forms(body, images, channels=64, size=160)
    runners = {name: runner(graphs[name], threads=1) for name in ("fp32", "onnxruntime")}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(10):
        for name, run in runners.items():
            begun = time.process_time()
            run({"images": images})
            times[name].append(time.process_time() - begun)
    ratio = min(times["fp32"]) / min(times["onnxruntime"])
    print(f"{body}: {ratio:.2f} times as fast, median {statistics.median(times['onnxruntime']) * 1e3:.2f} ms")
    assert ratio > (1.5 if body not in ("depthwise", "matmul", "einsum") else 1.0)


def test_the_front_is_not_read_over_rows_of_three_values(tmp_path: Path) -> None:
    """ONNX Runtime puts channels last up to the pixels; mean and deviation by channel then cost more than a network."""
    spec = load(tiny_model.write(tmp_path / "tiny", network("relu")))
    source = qdq.fold(network("relu"))
    placed = qdq.quantize(source, clips_of(source, IMAGES), kernels=True)
    written = before_nms(attach(spec, placed.model))
    form = qdq.for_onnxruntime(written)
    sizes: dict[str, Any] = {
        name: [list(one.dims) for one in model.graph.initializer if one.name in FRONT_CONSTANTS]
        for name, model in (("written", written), ("form", form))
    }
    assert sizes == {"written": [[1, 3, 1, 1]] * 2, "form": [[1, 3, 1, 8]] * 2}
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    session(form, written=tmp_path / "optimised.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert "Transpose" not in kinds[: kinds.index("QLinearConv")], "no layout was changed: this test says nothing"
    narrow = onnx.ModelProto()
    narrow.CopyFrom(form)
    for place, one in enumerate(narrow.graph.initializer):
        if one.name in FRONT_CONSTANTS:
            (value,) = (each for each in written.graph.initializer if each.name == one.name)
            narrow.graph.initializer[place].CopyFrom(value)
    exact, found = runner(narrow)({"images": pixels}), runner(form)({"images": pixels})
    for name in exact:
        np.testing.assert_array_equal(found[name], exact[name])
