"""API-shape tests: what differs between TensorRT 8.6, 10 and 11, against names recorded from the real packages."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from build.errors import EngineError, RuntimeUnavailableError
from build.tensorrt import compat
from build.tensorrt.plugins import PluginBuildError
from tests.build.tensorrt.fake_tensorrt import SURFACES, VERSIONS, FakeTensorRT

OLD, FIRST_10, LAST_10, NEW = VERSIONS


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> FakeTensorRT:
    return FakeTensorRT(request.param)


def test_the_versions_differ_as_the_code_believes() -> None:
    """The facts that compat.py exists for; a new recording that says otherwise must be looked at."""
    assert "STRONGLY_TYPED" not in SURFACES[OLD]["NetworkDefinitionCreationFlag"]
    assert "EXPLICIT_BATCH" not in SURFACES[NEW]["NetworkDefinitionCreationFlag"]
    values = [SURFACES[v]["NetworkDefinitionCreationFlag"].get("STRONGLY_TYPED") for v in VERSIONS]
    assert values == [None, 1, 1, 0]  # it moved: never a number in the code
    assert [SURFACES[v]["BuilderFlag"]["TF32"] for v in VERSIONS] == [7, 6, 6, 6]
    assert ["FP16" in SURFACES[v]["BuilderFlag"] for v in VERSIONS] == [True, True, True, False]
    assert ["IProgressMonitor" in SURFACES[v] for v in VERSIONS] == [False, True, True, True]
    assert ["get_creator" in SURFACES[v]["IPluginRegistry"] for v in VERSIONS] == [False, True, True, True]
    assert ["get_plugin_creator" in SURFACES[v]["IPluginRegistry"] for v in VERSIONS] == [True, True, True, False]
    assert ["device_memory_size" in SURFACES[v]["ICudaEngine"] for v in VERSIONS] == [True, True, True, False]
    assert all("execute_async_v3" in SURFACES[v]["IExecutionContext"] for v in VERSIONS)


@pytest.mark.parametrize(("version", "bits"), [(OLD, 0b01), (FIRST_10, 0b11), (LAST_10, 0b11), (NEW, 0b01)])
def test_network_flags_by_name(version: str, bits: int) -> None:
    trt = FakeTensorRT(version)
    compat.create_network(trt, trt.Builder(compat.logger(trt, lambda *_: None)))
    assert trt.seen.network_flags == bits
    assert compat.strongly_typed(trt) is (version != OLD)


def _typed(trt: FakeTensorRT, types: dict[str, str]) -> None:
    """Parses Conv (x → y) and Cast (y → z), then sets the types."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["y"], name="conv"),
        helper.make_node("Cast", ["y"], ["z"], name="cast", to=1),
    ]
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [tensor("x", TensorProto.FLOAT, ["b", 3])], [tensor("z", 1, None)])
    builder = trt.Builder(compat.logger(trt, lambda *_: None))
    network, config = compat.create_network(trt, builder), builder.create_builder_config()
    trt.OnnxParser(network, None).parse(helper.make_model(graph).SerializeToString())
    compat.set_types(trt, network, config, types)


def test_old_versions_are_held_to_the_graphs_types() -> None:
    trt = FakeTensorRT(OLD)
    _typed(trt, {"x": "HALF", "y": "HALF", "z": "FLOAT"})
    assert {"FP16", "OBEY_PRECISION_CONSTRAINTS"} <= trt.seen.flags
    conv, cast = trt.seen.layers
    assert (conv.precision.name, conv.assigned[0]) == ("HALF", "HALF")
    assert cast.assigned[0] == "FLOAT"


def test_old_versions_leave_quantised_layers_to_their_q_and_dq() -> None:
    trt = FakeTensorRT(OLD)
    _typed(trt, {"x": "INT8", "y": "FLOAT"})
    assert "INT8" in trt.seen.flags
    assert "OBEY_PRECISION_CONSTRAINTS" not in trt.seen.flags
    assert not any(layer.assigned for layer in trt.seen.layers)


def test_old_versions_refuse_types_that_they_lack() -> None:
    with pytest.raises(EngineError, match=r"a graph of type BF16 needs BuilderFlag\.BF16.*8\.6\.0"):
        _typed(FakeTensorRT(OLD), {"x": "BF16"})


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_strongly_typed_versions_get_no_flag(version: str) -> None:
    trt = FakeTensorRT(version)
    _typed(trt, {"x": "HALF", "y": "INT8"})
    assert trt.seen.flags == {"TF32"}  # TensorRT's default


def test_flags_go_on_and_off(trt: FakeTensorRT) -> None:
    config = trt.Builder(compat.logger(trt, lambda *_: None)).create_builder_config()
    compat.set_flag(trt, config, "TF32", False, "precision fp32")
    assert "TF32" not in trt.seen.flags
    compat.set_flag(trt, config, "TF32", True, "precision tf32")
    assert "TF32" in trt.seen.flags
    compat.set_flag(trt, config, "NO_SUCH", False, "nothing")
    with pytest.raises(EngineError, match=r"this needs BuilderFlag\.NO_SUCH"):
        compat.set_flag(trt, config, "NO_SUCH", True, "this")


def test_tactic_sources(trt: FakeTensorRT) -> None:
    config = trt.Builder(compat.logger(trt, lambda *_: None)).create_builder_config()
    compat.set_tactic_sources(trt, config, ())
    assert "tactic_sources" not in config.assigned
    compat.set_tactic_sources(trt, config, ("jit_convolutions",))
    assert config.assigned["tactic_sources"] == 1 << SURFACES[trt.__version__]["TacticSource"]["JIT_CONVOLUTIONS"]
    if trt.__version__ == NEW:
        with pytest.raises(EngineError, match=r"TacticSource\.CUDNN.*11"):
            compat.set_tactic_sources(trt, config, ("cudnn",))


def test_hardware_compatibility(trt: FakeTensorRT) -> None:
    config = trt.Builder(compat.logger(trt, lambda *_: None)).create_builder_config()
    compat.set_hardware_compatibility(trt, config, "none")
    assert not config.assigned
    compat.set_hardware_compatibility(trt, config, "ampere_plus")
    assert config.assigned["hardware_compatibility_level"].name == "AMPERE_PLUS"
    if trt.__version__ in (OLD, FIRST_10):
        with pytest.raises(EngineError, match="SAME_COMPUTE_CAPABILITY"):
            compat.set_hardware_compatibility(trt, config, "same_compute_capability")


def test_progress_where_there_is_a_monitor(trt: FakeTensorRT) -> None:
    config = trt.Builder(compat.logger(trt, lambda *_: None)).create_builder_config()
    told: list[Any] = []
    can = compat.set_progress(trt, config, lambda *args: told.append(args), lambda: len(told) < 3)
    assert can is (trt.__version__ != OLD)
    if can:
        monitor = config.assigned["progress_monitor"]
        monitor.phase_start("Building", None, 7)
        assert monitor.step_complete("Building", 0) is True
        assert monitor.step_complete("Building", 1) is False
        monitor.phase_finish("Building")
        assert told == [("Building", 0, 7), ("Building", 1, 7), ("Building", 2, 7), ("Building", 0, 0)]


def test_creator_and_its_absence(trt: FakeTensorRT) -> None:
    assert compat.plugin_creator(trt, "SSDNMS", "1") is not None
    assert compat.plugin_creator(trt, "SSDNMS", "2") is None


def test_a_library_that_cannot_be_loaded(trt: FakeTensorRT, tmp_path: Path) -> None:
    broken = tmp_path / "libssd_nms.so"
    with pytest.raises(PluginBuildError, match=r"libssd_nms\.so cannot be read[\s\S]*build-plugins"):
        compat.load_plugins(trt, None, broken)
    broken.write_bytes(b"no library")
    with pytest.raises(PluginBuildError, match=r"libssd_nms\.so is not the SSDNMS plugin"):
        compat.load_plugins(trt, None, broken)
    broken.write_bytes(marker(trt.__version__))
    with pytest.raises(EngineError, match=r"libssd_nms\.so cannot be loaded[\s\S]*build-plugins"):
        compat.load_plugins(trt, None, broken)


def test_a_plugin_of_another_tensorrt_is_not_loaded_at_all(trt: FakeTensorRT, tmp_path: Path) -> None:
    """Loading it would end the process: TensorRT 8.6.0 and a plugin for 11 did."""
    library = tmp_path / "libssd_nms.so"
    library.write_bytes(marker("9.3.0"))
    with pytest.raises(EngineError, match=rf"built for TensorRT 9\.3\.0, here is TensorRT {trt.__version__}"):
        compat.load_plugins(trt, None, library)


def marker(tensorrt: str) -> bytes:
    """What build/tensorrt/plugins.py finds in a library of this TensorRT."""
    return f'SSD_NMS_PLUGIN_INFO:{{"plugin": "SSDNMS", "plugin_version": "1", "tensorrt": "{tensorrt}"}}\0'.encode()


def test_a_library_is_loaded(trt: FakeTensorRT, tmp_path: Path) -> None:
    source, library = tmp_path / "p.c", tmp_path / "libp.so"
    text = json.dumps(marker(trt.__version__).decode().rstrip("\0"))
    source.write_text(f"char const* const info = {text};\nint ssd_test_marker(void) {{ return 42; }}")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    compat.load_plugins(trt, None, library)
    assert ctypes.CDLL(None).ssd_test_marker() == 42  # visible to all: RTLD_GLOBAL


def test_device_memory_and_io(trt: FakeTensorRT) -> None:
    engine = trt.engine({"images": ("INPUT", "UINT8", (-1, 8, 8, 3)), "n": ("OUTPUT", "INT32", (-1, 1))}, [(1, 2, 4)])
    assert compat.device_memory(engine) == 1000
    images, number = compat.io_table(engine)
    assert images == compat.Tensor(
        "images", "INPUT", "UINT8", (-1, 8, 8, 3), (((1, 8, 8, 3), (2, 8, 8, 3), (4, 8, 8, 3)),)
    )
    assert number == compat.Tensor("n", "OUTPUT", "INT32", (-1, 1))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeUnavailableError, match=r"tensorrt is not installed[\s\S]*install-tensorrt"):
        compat.load()
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeUnavailableError, match=r"cannot be imported: libnvinfer\.so\.10"):
        compat.load()
