"""Timing and what a manifest tells, for real; running on stand-ins of CUDA and TensorRT (API-shape tests)."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.build.tensorrt.fake_tensorrt import VERSIONS, FakeTensorRT

from build.errors import EngineError, RuntimeUnavailableError
from build.tensorrt import plan
from build.tensorrt.cuda import Cuda, Gpu, driver_version

OLD, NEW = VERSIONS[0], VERSIONS[-1]
GPU = Gpu("NVIDIA H200", "9.0", 143771, "570.86", "12.8", "12.8")
IO = {"images": ("INPUT", "UINT8", (-1, 2, 2, 3)), "sums": ("OUTPUT", "INT32", (-1, 1))}


class FakeCudart:
    """cuda-python's runtime module over the host's memory: addresses are real, copies copy, events count launches."""

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.fail: dict[str, int] = {}
        self.cudaError_t = SimpleNamespace(cudaErrorMemoryAllocation=2)
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, {2: b"out of memory", 35: b"driver is insufficient"}.get(error, b"unknown")

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.fail:
                return self.fail[name], None
            return 0, *getattr(self, f"_{name}", lambda *_: ())(*args)

        return call

    def _allocate(self, size: int) -> tuple[int]:
        buffer = (ctypes.c_ubyte * size)(*([0xAB] * size))  # poisoned
        self.memory[ctypes.addressof(buffer)] = buffer
        return (ctypes.addressof(buffer),)

    _cudaMalloc = _cudaMallocHost = _allocate  # noqa: N815

    def _cudaFree(self, address: int) -> tuple[()]:  # noqa: N802
        del self.memory[address]
        return ()

    _cudaFreeHost = _cudaFree  # noqa: N815

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[()]:  # noqa: N802
        ctypes.memmove(to, source, size)
        return ()

    def _cudaGetDevice(self) -> tuple[int]:  # noqa: N802
        return (0,)

    def _cudaGetDeviceProperties(self, device: int) -> tuple[Any]:  # noqa: N802
        return (SimpleNamespace(name=b"NVIDIA H200", major=9, minor=0, totalGlobalMem=143771 << 20),)

    def _cudaDriverGetVersion(self) -> tuple[int]:  # noqa: N802
        return (12080,)

    _cudaRuntimeGetVersion = _cudaDriverGetVersion  # noqa: N815

    def _cudaStreamCreate(self) -> tuple[int]:  # noqa: N802
        return (77,)

    _cudaEventCreate = _cudaStreamCreate  # noqa: N815

    def _cudaStreamEndCapture(self, stream: int) -> tuple[int]:  # noqa: N802
        return (88,)

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[int]:  # noqa: N802
        assert (graph, flags) == (88, 0)
        return (99,)

    def _cudaEventElapsedTime(self, first: Any, second: Any) -> tuple[float]:  # noqa: N802
        return (0.25,)


@pytest.fixture
def cudart() -> FakeCudart:
    return FakeCudart()


def add_up(context: Any) -> bool:
    """What the stand-in's engine does: sums[b] = the sum of picture b, read from and written to "device" memory."""
    shape = context.assigned["shapes"]["images"]
    source = (ctypes.c_ubyte * int(np.prod(shape))).from_address(context.assigned["addresses"]["images"])
    images = np.frombuffer(source, np.uint8).reshape(shape)
    sums = images.reshape(shape[0], -1).sum(1, dtype=np.int32)
    ctypes.memmove(context.assigned["addresses"]["sums"], sums.tobytes(), sums.nbytes)
    return True


def fake(version: str, **options: Any) -> FakeTensorRT:
    return FakeTensorRT(version, engine=lambda one: one.engine(IO, [(1, 1, 1), (2, 4, 8)]), execute=add_up, **options)


def manifest(data: bytes, tensorrt: str, **changes: Any) -> dict[str, Any]:
    return {
        "plan_sha256": hashlib.sha256(data).hexdigest(),
        "tensorrt": tensorrt,
        "gpu": GPU.as_dict(),
        "plugin": {"file": "libssd_nms.so", "plugin": "SSDNMS", "plugin_version": "1"},
        "options": {"version_compatible": False, "hardware_compatible": "none"},
    } | changes


def opened(tmp_path: Path, cudart: FakeCudart, version: str = NEW, **options: Any) -> plan.Plan:
    path = tmp_path / "model.plan"
    path.write_bytes(b"plan")
    return plan.Plan(path, manifest(b"plan", version), trt=fake(version), cuda=Cuda(cudart), **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_and_frees_everything(version: str, tmp_path: Path, cudart: FakeCudart) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    with opened(tmp_path, cudart, version) as one:
        assert one.max_batch == 8
        outputs = one({"images": images})
        assert outputs["sums"].dtype == np.int32
        assert outputs["sums"].ravel().tolist() == images.reshape(3, -1).sum(1).tolist()
        kept = outputs["sums"].copy()
        one({"images": images[:1]})  # in profile 0
        assert (outputs["sums"] == kept).all()  # memory of its own
    assert not cudart.memory
    created, destroyed = ("cudaStreamCreate", "cudaEventCreate"), ("cudaStreamDestroy", "cudaEventDestroy")
    assert [cudart.calls.count(name) for name in created] == [cudart.calls.count(name) for name in destroyed]


def test_profiles_are_switched(tmp_path: Path, cudart: FakeCudart) -> None:
    trt = fake(NEW)
    (tmp_path / "model.plan").write_bytes(b"plan")
    with plan.Plan(tmp_path / "model.plan", trt=trt, cuda=Cuda(cudart)) as one:
        one({"images": np.zeros((4, 2, 2, 3), np.uint8)})
        assert trt.seen.context.assigned["profile"] == 1
        one({"images": np.zeros((1, 2, 2, 3), np.uint8)})
        assert trt.seen.context.assigned["profile"] == 0
        with pytest.raises(EngineError, match=r"batch 9 is in no profile of the plan \(they hold 1 to 1, 2 to 8\)"):
            one({"images": np.zeros((9, 2, 2, 3), np.uint8)})


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({}, r"takes \['images'\], but was given \[\]"),
        ({"images": np.zeros((1, 2, 2, 3), np.float32)}, r"is float32\[1, 2, 2, 3\], but must be uint8"),
        ({"images": np.zeros((1, 3, 2, 3), np.uint8)}, r"uint8\[1, 3, 2, 3\], but must be uint8\[1, 2, 2, 3\]"),
    ],
)
def test_wrong_inputs(inputs: Any, complaint: str, tmp_path: Path, cudart: FakeCudart) -> None:
    with opened(tmp_path, cudart) as one, pytest.raises(EngineError, match=complaint):
        one(inputs)


def test_cuda_graphs_from_the_second_run_on(tmp_path: Path, cudart: FakeCudart) -> None:
    images = {"images": np.ones((2, 2, 2, 3), np.uint8)}
    with opened(tmp_path, cudart, cuda_graphs=True) as one:
        for _ in range(4):
            one(images)
        names = ("cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphLaunch")
        assert [cudart.calls.count(name) for name in names] == [1, 1, 1, 3]
        assert one.benchmark(images, seconds=0, warmup=0).cuda_graph
    assert cudart.calls.count("cudaGraphExecDestroy") == 1


def test_benchmark(tmp_path: Path, cudart: FakeCudart) -> None:
    with opened(tmp_path, cudart) as one:
        timing = one.benchmark({"images": np.ones((2, 2, 2, 3), np.uint8)}, seconds=0.01, warmup=0, least=20)
    assert timing.runs >= 20
    assert (timing.compute.median, timing.latency.p99, timing.batch) == (0.25, 0.75, 2)
    assert json.loads(json.dumps(timing.as_dict()))["h2d"]["max"] == 0.25
    assert "images/s" in str(timing)


def test_out_of_gpu_memory_frees_what_was_taken(tmp_path: Path, cudart: FakeCudart) -> None:
    cudart.fail["cudaMallocHost"] = 2
    with pytest.raises(EngineError, match=r"cudaMallocHost: out of memory[\s\S]*nvidia-smi"):
        opened(tmp_path, cudart)
    assert not cudart.memory


def test_no_gpu(tmp_path: Path, cudart: FakeCudart) -> None:
    cudart.fail["cudaGetDevice"] = 35
    with pytest.raises(
        RuntimeUnavailableError, match=r"no NVIDIA GPU can be used: cudaGetDevice: driver is insufficient"
    ):
        opened(tmp_path, cudart)


def test_no_driver_library() -> None:
    def get_device() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(RuntimeUnavailableError, match=r"libcuda\.so\.1"):
        Cuda(SimpleNamespace(cudaGetDevice=get_device)).gpu()


def test_the_gpus_facts(cudart: FakeCudart, tmp_path: Path) -> None:
    found = Cuda(cudart).gpu()
    assert (found.name, found.compute_capability, found.memory_mib) == ("NVIDIA H200", "9.0", 143771)
    assert (found.cuda_driver, found.cuda_runtime) == ("12.8", "12.8")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\nGCC version: 12\n"
    )
    assert driver_version(tmp_path / "version") == "570.86.15"
    assert driver_version(tmp_path / "none") == ""


def test_truncated_missing_and_exchanged_plans(tmp_path: Path, cudart: FakeCudart) -> None:
    path = tmp_path / "model.plan"
    with pytest.raises(EngineError, match=r"model\.plan: cannot be read"):
        plan.Plan(path, trt=fake(NEW), cuda=Cuda(cudart))
    path.write_bytes(b"pla")
    with pytest.raises(EngineError, match=r"model\.plan \(3 bytes\) is not the plan.*[\s\S]*truncated"):
        plan.Plan(path, manifest(b"plan", NEW), trt=fake(NEW), cuda=Cuda(cudart))


def test_the_plugin_is_not_there(tmp_path: Path, cudart: FakeCudart) -> None:
    library = tmp_path / "libssd_nms.so"
    with pytest.raises(EngineError, match=r"needs the plugin SSDNMS 1 of .*is not there[\s\S]*build-plugins"):
        opened(tmp_path, cudart, plugin=library)
    library.write_bytes(b'SSD_NMS_PLUGIN_INFO:{"plugin": "SSDNMS", "plugin_version": "2"}\0')
    with pytest.raises(EngineError, match=r"needs the plugin SSDNMS 1 of .*holds SSDNMS 2"):
        opened(tmp_path, cudart, plugin=library)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        (
            "IRuntime::deserializeCudaEngine: Error Code 1: could not find plugin: SSDNMS version: 1",
            "a plugin that is not loaded",
        ),
        ("Version tag does not match. Note: Current Version: 232, Serialized Engine Version: 213", "another TensorRT"),
        ("The engine plan file is generated on an incompatible device, expecting compute 9.0", "another GPU"),
        ("Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match", "truncated"),
    ],
)
def test_what_tensorrt_refuses(says: str, why: str, tmp_path: Path, cudart: FakeCudart) -> None:
    (tmp_path / "model.plan").write_bytes(b"plan")
    trt = FakeTensorRT(NEW, engine=None, says=(says,))
    with pytest.raises(EngineError, match=rf"cannot read the plan[\s\S]*{why}"):
        plan.Plan(tmp_path / "model.plan", trt=trt, cuda=Cuda(cudart))
    assert not cudart.memory


@pytest.mark.parametrize(
    ("changes", "tensorrt", "gpu", "expected"),
    [
        ({}, "10.13.2", GPU, ""),
        ({}, "11.1.0", GPU, "built with TensorRT 10.13.2, here is TensorRT 11.1.0"),
        ({"options": {"version_compatible": True}}, "11.1.0", GPU, ""),
        ({"options": {"version_compatible": True}}, "8.6.0", GPU, "here is TensorRT 8.6.0"),
        (
            {},
            "10.13.2",
            Gpu("NVIDIA L4", "8.9", 1, "", "", ""),
            r"built for NVIDIA H200 .*9\.0.*, here is NVIDIA L4 \(8\.9\)",
        ),
        ({}, "10.13.2", Gpu("NVIDIA H100", "9.0", 1, "", "", ""), "here is NVIDIA H100"),
        (
            {"options": {"hardware_compatible": "same_compute_capability"}},
            "10.13.2",
            Gpu("NVIDIA H100", "9.0", 1, "", "", ""),
            "",
        ),
        ({"options": {"hardware_compatible": "ampere_plus"}}, "10.13.2", Gpu("NVIDIA L4", "8.9", 1, "", "", ""), ""),
        (
            {"options": {"hardware_compatible": "ampere_plus"}},
            "10.13.2",
            Gpu("Tesla T4", "7.5", 1, "", "", ""),
            "Tesla T4",
        ),
    ],
)
def test_foreign(changes: Any, tensorrt: str, gpu: Gpu, expected: str) -> None:
    import re

    found = plan.foreign(manifest(b"", "10.13.2", **changes), gpu, tensorrt)
    assert re.search(expected, found) if expected else found == ""


def test_a_foreign_plan_is_refused_before_tensorrt_sees_it(tmp_path: Path, cudart: FakeCudart) -> None:
    path, trt = tmp_path / "model.plan", fake(NEW)
    path.write_bytes(b"plan")
    with pytest.raises(EngineError, match=r"cannot run here: it was built with TensorRT 9\.9"):
        plan.Plan(path, manifest(b"plan", "9.9"), trt=trt, cuda=Cuda(cudart))
    assert not trt.seen.runtimes


def test_summary_follows_trtexec() -> None:
    one = plan.Summary.of([float(value) for value in range(100, 0, -1)])
    assert (one.min, one.mean, one.median, one.p90, one.p99, one.max) == (1, 50.5, 50.5, 90, 99, 100)
    assert plan.Summary.of([3.0, 1.0, 2.0]).median == 2.0
    assert plan.Summary.of([7.0]) == plan.Summary(7.0, 7.0, 7.0, 7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no samples"):
        plan.Summary.of([])


def test_profile_rows_are_trtexecs() -> None:
    rows = plan.profile_rows({"conv": [1.0, 3.0, 2.0], "nms": [2.0, 2.0, 2.0]})
    assert rows[0] == {"count": 3}
    assert rows[1] == {"name": "conv", "timeMs": 6.0, "averageMs": 2.0, "medianMs": 2.0, "percentage": 50.0}
    assert sum(row.get("percentage", 0) for row in rows) == 100


def test_the_narrowest_profile_is_chosen() -> None:
    assert plan.choose_profile(1, [(1, 32), (1, 1)]) == 1
    assert plan.choose_profile(2, [(1, 32), (1, 1)]) == 0
