"""Up to the builder on a stand-in (API-shape tests), the parser and builder for real in test_legality.py."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from build.contract import Target
from build.errors import EngineError, RuntimeUnavailableError
from build.graph.attach import attach, before_nms
from build.quantization import implicit
from build.spec import Spec, load
from build.tensorrt import engine
from build.tensorrt.cuda import Gpu
from build.tensorrt.plugins import PluginBuildError
from tests.build import pictures, tiny_model
from tests.build.tensorrt.fake_tensorrt import VERSIONS, FakeTensorRT

OLD, NEW = VERSIONS[0], VERSIONS[-1]
GPU = Gpu("NVIDIA H200", "9.0", 143771, "570.86", "12.8", "12.8")
INFO = b'\0SSD_NMS_PLUGIN_INFO:{"plugin": "SSDNMS", "plugin_version": "1", "tensorrt": "10.13.2"}\0'
IO = {
    "images": ("INPUT", "UINT8", (-1, 8, 8, 3)),
    "score_threshold": ("INPUT", "FLOAT", (-1, 1)),
    "iou_threshold": ("INPUT", "FLOAT", (-1, 1)),
    "num_detections": ("OUTPUT", "INT32", (-1, 1)),
    "detection_boxes": ("OUTPUT", "FLOAT", (-1, 5, 4)),
    "detection_scores": ("OUTPUT", "FLOAT", (-1, 5)),
    "detection_classes": ("OUTPUT", "INT32", (-1, 5)),
}


class FakeCuda:
    def gpu(self) -> Gpu:
        return GPU


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny_model.write(tmp_path / "tiny")


@pytest.fixture
def spec(path: Path) -> Spec:
    return load(path)


@pytest.fixture
def model(spec: Spec) -> onnx.ModelProto:
    return attach(spec)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    library = tmp_path / "libssd_nms.so"
    library.write_bytes(INFO)
    return library


def serialize(spec: Spec, model: onnx.ModelProto, trt: FakeTensorRT, precision: str = "fp32", **options: Any) -> bytes:
    return engine.serialize(spec, model, Target("tensorrt", precision), trt=trt, **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_parser_gets_the_node_without_its_function(version: str, spec: Spec, model: onnx.ModelProto) -> None:
    trt = FakeTensorRT(version)
    assert serialize(spec, model, trt) == b"plan"
    assert [node.op_type for node in trt.seen.parsed.graph.node][-1] == "SSDNMS"
    assert not trt.seen.parsed.functions
    assert model.functions  # the one handed in keeps its own


@pytest.mark.parametrize("version", VERSIONS)
def test_options(version: str, path: Path) -> None:
    path.write_text(path.read_text() + "\n[tensorrt]\nworkspace_mib = 64\noptimization_level = 5\n")
    spec, trt = load(path), FakeTensorRT(version)
    serialize(spec, attach(spec), trt)
    config = trt.seen.config
    assert config.assigned["WORKSPACE"] == 64 << 20
    assert config.assigned["builder_optimization_level"] == 5
    assert config.assigned["profiling_verbosity"].name == "DETAILED"
    assert trt.seen.flags == set()  # fp32 never rounds to TF32


@pytest.mark.parametrize(
    ("precision", "key", "on"),
    [("fp32", True, False), ("tf32", False, True), ("fp16", False, False), ("fp16", True, True)],
)
def test_tf32(path: Path, precision: str, key: bool, on: bool) -> None:
    path.write_text(f"{path.read_text()}\n[tensorrt]\ntf32 = {str(key).lower()}\n")
    spec, trt = load(path), FakeTensorRT(NEW)
    serialize(spec, attach(spec), trt, precision)
    assert ("TF32" in trt.seen.flags) is on


def test_version_compatible(path: Path) -> None:
    path.write_text(path.read_text() + "\n[tensorrt]\nversion_compatible = true\n")
    spec, trt = load(path), FakeTensorRT(NEW)
    serialize(spec, attach(spec), trt)
    assert "VERSION_COMPATIBLE" in trt.seen.flags


def test_profiles_for_every_input(path: Path) -> None:
    profiles = ((1, 1, 1), (2, 3, 4))
    lines = ("\n[[tensorrt.profiles]]\nmin = {}\nopt = {}\nmax = {}\n".format(*sizes) for sizes in profiles)
    path.write_text(path.read_text() + "".join(lines))
    spec, trt = load(path), FakeTensorRT(NEW)
    serialize(spec, attach(spec), trt)
    assert trt.seen.profiles == [
        {
            "images": tuple((size, 8, 8, 3) for size in sizes),
            "score_threshold": tuple((size, 1) for size in sizes),
            "iou_threshold": tuple((size, 1) for size in sizes),
        }
        for sizes in profiles
    ]


def test_a_profile_outside_the_models_range(spec: Spec, model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(EngineError, match=r"profile 0 \(batch 1 to 4\).*'images' has the fixed batch 2"):
        serialize(spec, model, FakeTensorRT(NEW))


@pytest.mark.parametrize("version", VERSIONS)
def test_parser_errors_name_node_operator_and_types(version: str, spec: Spec, model: onnx.ModelProto) -> None:
    relu = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Relu")
    trt = FakeTensorRT(version, faults=((relu, "Unsupported."), (len(model.graph.node) - 1, "No importer.")))
    with pytest.raises(EngineError) as caught:
        serialize(spec, model, trt)
    text = str(caught.value)
    assert "node 'relu' (Relu; bn: FLOAT[batch,6,2,2]): Unsupported." in text
    assert "node 'ssd/nms' (SSDNMS; box_deltas: FLOAT[batch,8,4], class_logits: FLOAT[batch,8,3]" in text


def test_a_missing_plugin(spec: Spec, model: onnx.ModelProto, tmp_path: Path) -> None:
    trt = FakeTensorRT(NEW, creators=set())
    with pytest.raises(PluginBuildError, match=r"libssd_nms\.so cannot be read"):
        serialize(spec, model, trt, plugin=tmp_path / "libssd_nms.so")
    with pytest.raises(EngineError, match=r"no plugin SSDNMS of version 1[\s\S]*LD_PRELOAD"):
        serialize(spec, model, trt)
    of_version_2 = FakeTensorRT(NEW, creators={("SSDNMS", "2")})
    with pytest.raises(EngineError, match="no plugin SSDNMS of version 1"):
        serialize(spec, model, of_version_2)


def test_a_graph_without_the_node_needs_no_plugin(spec: Spec, model: onnx.ModelProto) -> None:
    assert serialize(spec, before_nms(model), FakeTensorRT(NEW, creators=set())) == b"plan"


@pytest.mark.parametrize(
    ("says", "cause"),
    [
        ("[virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (Requested size was 9 bytes.)", "no memory left"),
        ("Error Code 10: Could not find any implementation for node conv + relu.", "no kernel for conv"),
        ("Something else.", "could not build the engine: Something else."),
    ],
)
def test_a_build_that_fails(says: str, cause: str, spec: Spec, model: onnx.ModelProto) -> None:
    with pytest.raises(EngineError, match=cause):
        serialize(spec, model, FakeTensorRT(NEW, plan=None, says=(says,)))


def test_without_a_gpu(spec: Spec, model: onnx.ModelProto) -> None:
    trt = FakeTensorRT(OLD, gpu=False, says=("CUDA initialization failure with error: 100",))
    with pytest.raises(RuntimeUnavailableError, match=r"error: 100[\s\S]*no NVIDIA GPU"):
        serialize(spec, model, trt)


def test_the_timing_cache_is_read_and_written(spec: Spec, model: onnx.ModelProto, tmp_path: Path) -> None:
    with engine.timing_cache(tmp_path, GPU, "10.13.2") as cache:
        assert cache.name == "nvidia-h200-sm90-tensorrt-10.13.2.cache"
        serialize(spec, model, FakeTensorRT(NEW), cache=cache)
        assert cache.read_bytes() == b"+"
        serialize(spec, model, FakeTensorRT(NEW), cache=cache)
    assert cache.read_bytes() == b"++"


def test_a_foreign_timing_cache_is_refused(spec: Spec, model: onnx.ModelProto, tmp_path: Path) -> None:
    cache = tmp_path / "a.cache"
    cache.write_bytes(b"foreign")
    with pytest.raises(EngineError, match=r"a\.cache is not of this GPU and TensorRT[\s\S]*delete it"):
        serialize(spec, model, FakeTensorRT(NEW, foreign_cache=True), cache=cache)
    assert cache.read_bytes() == b"foreign"


def test_two_builds_at_once(tmp_path: Path) -> None:
    with engine.timing_cache(tmp_path, GPU, "10.13.2"):
        with (
            pytest.raises(EngineError, match=r"another build for NVIDIA H200 is under way"),
            engine.timing_cache(tmp_path, GPU, "10.13.2"),
        ):
            pass
        with engine.timing_cache(tmp_path, GPU, "11.1"):  # another TensorRT has its own
            pass
    with engine.timing_cache(tmp_path, GPU, "10.13.2"):
        pass


@pytest.fixture
def _sigint_as_in_a_terminal() -> Iterator[None]:
    """A shell hands SIGINT down ignored to what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_sigint_as_in_a_terminal")
def test_ctrl_c_stops_the_builder(spec: Spec, model: onnx.ModelProto) -> None:
    asked, finished = [], threading.Event()

    def slow(config: Any) -> None:
        monitor = config.assigned["progress_monitor"]
        monitor.phase_start("Timing", None, 1000)
        time.sleep(0.3)  # until it is waited for
        os.kill(os.getpid(), signal.SIGINT)
        for step in range(1000):
            asked.append(step)
            if not monitor.step_complete("Timing", step):
                time.sleep(0.3)  # it may take its time to end
                finished.set()
                return
            time.sleep(0.02)

    with pytest.raises(KeyboardInterrupt):
        serialize(spec, model, FakeTensorRT(NEW, script=slow))
    assert len(asked) < 1000
    assert finished.is_set()  # a builder that still runs when the process ends would abort it
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_sigint_as_in_a_terminal")
def test_ctrl_c_waits_where_the_version_cannot_stop(spec: Spec, model: onnx.ModelProto) -> None:
    finished = threading.Event()

    def slow(config: Any) -> None:
        time.sleep(0.3)  # until it is waited for
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.6)
        finished.set()

    with pytest.raises(KeyboardInterrupt):
        serialize(spec, model, FakeTensorRT(OLD, script=slow))
    assert finished.is_set()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_whole_stage(version: str, spec: Spec, model: onnx.ModelProto, plugin: Path, tmp_path: Path) -> None:
    trt = FakeTensorRT(version, engine=lambda fake: fake.engine(IO, [(1, 4, 4)]))
    plan = tmp_path / "out" / "model.plan"
    manifest = engine.build(
        spec,
        model,
        Target("tensorrt"),
        plan,
        plugin=plugin,
        timing_caches=tmp_path / "caches",
        trt=trt,
        cuda=FakeCuda(),  # type: ignore[arg-type]
    )
    assert plan.read_bytes() == b"plan"
    assert [path.name for path in plan.parent.iterdir()] == ["model.plan"]
    assert json.loads(json.dumps(manifest))  # all of it is JSON
    told = (manifest["tensorrt"], manifest["gpu"]["name"], manifest["precision"], manifest["tf32"])
    assert told == (version, GPU.name, "fp32", False)
    assert manifest["strongly_typed"] is (version != OLD)
    assert manifest["plugin"]["tensorrt"] == "10.13.2"
    assert manifest["profiles"] == [{"min": 1, "opt": 4, "max": 4}]
    assert [tensor["name"] for tensor in manifest["io"]] == list(IO)
    assert manifest["io"][0]["profiles"] == (((1, 8, 8, 3), (4, 8, 8, 3), (4, 8, 8, 3)),)
    assert manifest["device_memory_bytes"] == 1000
    assert len({manifest[key] for key in ("plan_sha256", "onnx_sha256", "spec_sha256")}) == 3


def calibrated(path: Path, quantization: str = "") -> Spec:
    """The tiny model's spec with pictures to calibrate on."""
    pictures.write(path.parent / "pictures", 9, tiny_model.LABELS)
    path.write_text(f'{path.read_text()}\n[data]\ncalibration = "pictures"\n\n[quantization]\n{quantization}\n')
    return load(path)


def build_implicitly(spec: Spec, trt: FakeTensorRT, plugin: Path, folder: Path) -> dict[str, Any]:
    return engine.build(
        spec,
        attach(spec),
        Target("tensorrt", "int8", "implicit"),
        folder / "model.plan",
        plugin=plugin,
        timing_caches=folder / "caches",
        calibrator=partial(implicit.calibrator, spec, folder / "artifacts"),
        trt=trt,
        cuda=FakeCuda(),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("version", VERSIONS[:-1])
@pytest.mark.parametrize(
    ("quantization", "base", "flags"),
    [
        ("", "IInt8EntropyCalibrator2", {"INT8"}),
        ('calibrator = "minmax"\nrest = "fp16"', "IInt8MinMaxCalibrator", {"INT8", "FP16"}),
        ('calibrator = "percentile"', "IInt8LegacyCalibrator", {"INT8"}),
    ],
)
def test_implicit_calibration(
    version: str, quantization: str, base: str, flags: set[str], path: Path, plugin: Path, tmp_path: Path
) -> None:
    spec = calibrated(path, quantization)
    trt = FakeTensorRT(version, engine=lambda fake: fake.engine(IO, [(1, 4, 4)]))
    manifest = build_implicitly(spec, trt, plugin, tmp_path)
    config = trt.seen.config
    assert isinstance(config.assigned["int8_calibrator"], getattr(trt, base))
    assert config.assigned["int8_calibrator"].get_batch_size() == 4  # the most that is served
    assert config.assigned["calibration"]["images"] == ((4, 8, 8, 3),) * 3
    assert trt.seen.flags - {"TF32"} == flags
    typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    assert typed is None or not trt.seen.network_flags & 1 << typed
    assert not any(layer.assigned for layer in trt.seen.layers)
    assert "BatchNormalization" in {node.op_type for node in trt.seen.parsed.graph.node}
    assert (manifest["precision"], manifest["strongly_typed"]) == ("int8", False)


@pytest.mark.parametrize("version", VERSIONS[:-1])
@pytest.mark.parametrize(("rest", "kind"), [("fp32", "FLOAT"), ("fp16", "HALF")])
def test_implicit_calibration_leaves_layers_out(
    version: str, rest: str, kind: str, path: Path, plugin: Path, tmp_path: Path
) -> None:
    name = next(node.name for node in tiny_model.source().graph.node if node.op_type == "Conv")
    spec = calibrated(path, f'rest = "{rest}"\nexclude_nodes = ["{name}"]')
    trt = FakeTensorRT(version, engine=lambda fake: fake.engine(IO, [(1, 4, 4)]))
    build_implicitly(spec, trt, plugin, tmp_path)
    assert "OBEY_PRECISION_CONSTRAINTS" in trt.seen.flags
    kinds = {layer.name: layer.assigned["precision"].name for layer in trt.seen.layers if layer.assigned}
    assert kinds == {name: kind}
    path.write_text(path.read_text().replace(f'"{name}"', '"nowhere"'))
    with pytest.raises(EngineError, match="names 'nowhere', but TensorRT's network has no layer of that name"):
        build_implicitly(load(path), trt, plugin, tmp_path)


def test_implicit_calibration_is_gone(path: Path, plugin: Path, tmp_path: Path) -> None:
    spec = calibrated(path)
    with pytest.raises(
        RuntimeUnavailableError, match=r"TensorRT 11\.4\.0\.106 has no IInt8EntropyCalibrator2[\s\S]*explicit"
    ):
        build_implicitly(spec, FakeTensorRT(NEW), plugin, tmp_path)
    with pytest.raises(
        EngineError, match=r"int8_calibrator, which TensorRT 11\.4\.0\.106 does not have[\s\S]*explicit"
    ):
        serialize(spec, attach(spec), FakeTensorRT(NEW), "int8", calibrator=object())
    assert not (tmp_path / "model.plan").exists()


def test_a_failed_build_leaves_the_last_plan(spec: Spec, model: onnx.ModelProto, plugin: Path, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"good")
    options = SimpleNamespace(plugin=plugin, timing_caches=tmp_path / "c", cuda=FakeCuda())
    for trt in (FakeTensorRT(NEW, plan=None), FakeTensorRT(NEW, engine=None)):  # neither builds nor can be read again
        with pytest.raises(EngineError):
            engine.build(spec, model, Target("tensorrt"), plan, trt=trt, **vars(options))
    assert plan.read_bytes() == b"good"
