"""plugins/bench/bench.py: its checks on the CPU, and all of it on stand-ins of CUDA with the emulated kernels.

The stand-in's device memory is the host's, and a graph replays the calls that were recorded. Its times mean nothing.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from build.tensorrt.cuda import Cuda
from build.tensorrt.plugins import PLUGINS
from tests.build.tensorrt.test_plan import FakeCudart
from tests.plugins.library import Library


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, as it is where its folder is the first of sys.path."""
    names = ("bench", "calls", "device", "efficient_nms", "params", "scenes", "torch_peer")
    monkeypatch.syspath_prepend(str(PLUGINS / "bench"))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench as module  # type: ignore[import-not-found]

    yield module
    for name in names:
        sys.modules.pop(name, None)


class Cudart(FakeCudart):
    """With what the benchmark asks for beside a plan's calls."""

    def __init__(self) -> None:
        super().__init__()
        self.cudaMemcpyKind = SimpleNamespace(
            cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
        )
        self.recorded: list[Callable[[], Any]] | None = None
        self.graph: list[Callable[[], Any]] = []

    def _cudaMalloc(self, size: int) -> tuple[int]:  # noqa: N802
        buffer = (ctypes.c_ubyte * size)()
        ctypes.memset(buffer, 0xAB, size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return (ctypes.addressof(buffer),)

    def _cudaGetDeviceProperties(self, device: int) -> tuple[Any]:  # noqa: N802
        (properties,) = super()._cudaGetDeviceProperties(device)
        properties.l2CacheSize, properties.multiProcessorCount = 1 << 10, 132
        return (properties,)

    def _cudaMemcpy(self, to: int, source: int, size: int, kind: int) -> tuple[()]:  # noqa: N802
        return self._cudaMemcpyAsync(to, source, size, kind, 0)

    def _cudaMemset(self, to: int, byte: int, size: int) -> tuple[()]:  # noqa: N802
        ctypes.memset(to, byte, size)
        return ()

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[()]:  # noqa: N802
        self.recorded = []
        return ()

    def _cudaStreamEndCapture(self, stream: int) -> tuple[int]:  # noqa: N802
        self.graph, self.recorded = self.recorded or [], None
        return (88,)

    def _cudaGraphLaunch(self, graph: int, stream: int) -> tuple[()]:  # noqa: N802
        for call in self.graph:
            call()
        return ()


class Recorded:
    """A library whose launches are kept for the graph while one is captured."""

    def __init__(self, library: Any, cudart: Cudart) -> None:
        self._library, self._cudart = library, cudart

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def ssdNmsLaunch(self, *arguments: Any) -> int:  # noqa: N802
        if self._cudart.recorded is not None:
            self._cudart.recorded.append(lambda: self._library.ssdNmsLaunch(*arguments))
            return 0
        return int(self._library.ssdNmsLaunch(*arguments))


@pytest.fixture
def libraries(emulated: Library, reference: Library) -> list[str]:
    """As options."""
    return ["--core", emulated.c._name, "--reference", reference.c._name]


@pytest.mark.timeout(60)
def test_the_reference_ends_where_nearly_all_of_many_boxes_could_be_kept(bench: Any, libraries: list[str]) -> None:
    name, settings, inputs = bench.adversarial(183)  # 360,000 candidates of an image, all of one group, IoU 1
    assert settings.class_agnostic, name
    assert settings.iou_threshold == 1.0, name
    number, *_ = bench.expected(bench.load(Path(libraries[3])), settings, inputs)
    assert number.tolist() == [[settings.max_detections]] * 2


def test_the_checks_find_what_is_wrong(bench: Any, libraries: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(bench.Call):  # type: ignore[misc, name-defined]
        def read(self) -> Any:
            number, boxes, scores, labels = super().read()
            if "emulated" in self.library._name and len(scores) == 2:
                scores[1, 0] += 1e-7
            return [number, boxes, scores, labels]

    monkeypatch.setattr(bench, "Call", Wrong)
    assert bench.main(["--only", "check", "--small", "--device", "cpu", *libraries]) == 1


def test_a_rehearsal_on_stand_ins_goes_through_graphs_events_and_peers(
    bench: Any, libraries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudart, out = Cudart(), tmp_path / "result.json"
    real = bench.load
    monkeypatch.setattr(bench, "load", lambda path: Recorded(real(path), cudart))
    monkeypatch.setattr(bench, "jobs", lambda quick: [("SSD-MobileNet", 1, np.float16, 0.05, "scene")])
    monkeypatch.setattr(bench, "REPLAYS", 1)
    bandwidth = bench.Gpu.copy_bandwidth
    monkeypatch.setattr(bench.Gpu, "copy_bandwidth", lambda gpu: bandwidth(gpu, 1 << 20))
    arguments = [*libraries, "--small", "--out", str(out)]
    assert bench.main(["--only", "check", *arguments], Cuda(cudart)) == 0
    told = json.loads(out.read_text())
    assert told["check"]["failures"] == []
    compared = {"cases": 12, "real sizes": 4, "repeats": 3, "rows": 2, "graph replays": 3}
    assert told["check"]["compared"] == compared
    assert told["check"]["detections in cases"] > 100
    assert told["environment"]["gpu"]["name"] == "NVIDIA H200"
    assert bench.main(["--only", "measure", *arguments], Cuda(cudart)) == 0
    told = json.loads(out.read_text())["measure"]
    (row,) = told["rows"]
    assert row["us"] == 0.25 * 1000 / row["input sets"]
    assert row["us, torchvision"].startswith("not measured: ")
    assert row["us, EfficientNMS_TRT"].startswith("not measured: ")
    assert 0 < row["candidates per image"] < 1917 * 90


def test_without_a_gpu_it_says_so(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cudart = Cudart()
    cudart.fail["cudaGetDevice"] = 35
    assert bench.main(["--only", "check"], Cuda(cudart)) == 2
    assert "no NVIDIA GPU can be used" in capsys.readouterr().err
