"""The TensorRT adapters, with every set of headers at hand, over the reference; and a real TensorRT takes the plugin.

A real TensorRT is that of the running Python, or of the one that SSD_TENSORRT_PYTHON names. Registration, creation and
serialisation need no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build.contract import ATTRIBUTES
from build.tensorrt.plugins import PLUGINS, PluginBuild, build_plugins, find_nvcc, find_tensorrt, plugin_info
from tests.plugins.conftest import EMULATOR, compile_host, need_cmake

# Runs in the Python that has TensorRT; prints one line of JSON.
PROBE = Path(__file__).parent / "tensorrt_probe.py"


def header_sets() -> list[Path]:
    """What `build-plugins` has fetched, and what TENSORRT_ROOT and the system give."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd-on-triton" / "tensorrt"
    fetched = {include.parent.parent for include in cache.glob("*/include/NvInfer.h")}
    configured = find_tensorrt()
    return sorted(fetched | ({configured} if configured else set()))


def cuda_include() -> Path:
    """The folder of cuda_runtime_api.h."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc and the headers beside it")
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    match = re.search(r'INCLUDES="-I([^"]+)"', told.stdout + told.stderr)
    assert match, told.stderr
    return Path(match[1].strip())


@pytest.mark.parametrize("root", header_sets() or [None], ids=lambda root: root.name if root else "none")
def test_the_adapter_compiles_and_does_what_tensorrt_asks_of_it(root: Path | None, tmp_path: Path) -> None:
    if root is None:
        pytest.skip("needs TensorRT's headers (TENSORRT_ROOT, or once ./invoke build-plugins --tensorrt-ref v10.16)")
    definitions = [f'-DSSD_NMS_{name}="x"' for name in ("GIT", "CUDA_VERSION", "ARCHITECTURES")]
    include = [f"-isystem{path}" for path in (root / "include", cuda_include())]
    source = PLUGINS / "ssd_nms"
    flags = ["-Wno-deprecated-declarations", *definitions, *include, f"-I{source}"]
    compile_host(tmp_path / "plugin.o", *flags, "-c", source / "tensorrt" / "plugin.cpp")
    library = [source / "checks.cpp", source / "reference" / "reference.cpp"]
    adapters = compile_host(tmp_path / "adapters", "-O0", *flags, EMULATOR / "adapters.cpp", *library)
    done = subprocess.run([adapters], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


def python_with_tensorrt() -> str:
    """An interpreter that can import tensorrt."""
    configured = os.environ.get("SSD_TENSORRT_PYTHON")
    if configured:
        return configured
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("needs the tensorrt package in this Python, or in the one that SSD_TENSORRT_PYTHON names")
    return sys.executable


@pytest.fixture(scope="module")
def tensorrt_python() -> tuple[str, int]:
    """The interpreter, and its TensorRT's major version."""
    python = python_with_tensorrt()
    told = subprocess.run(
        [python, "-c", "import tensorrt; print(tensorrt.__version__)"], capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    return python, int(told.stdout.split(".")[0])


@pytest.fixture(scope="module")
def plugin(tensorrt_python: tuple[str, int], tmp_path_factory: pytest.TempPathFactory) -> PluginBuild:
    """Built against headers of the installed TensorRT's major version."""
    need_cmake()
    major = tensorrt_python[1]
    fitting = []
    for root in header_sets():
        include = root / "include"
        text = (include / "NvInferVersion.h").read_text() if (include / "NvInferVersion.h").is_file() else ""
        if re.search(rf"define (NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) {major}\b", text):
            fitting.append(root)
    if not fitting or find_nvcc() is None:
        pytest.skip(f"needs nvcc and the headers of TensorRT {major} (./invoke build-plugins --tensorrt-ref ...)")
    folder = tmp_path_factory.mktemp("plugin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORRT_ROOT", str(fitting[-1]))
        return build_plugins(stage="plugin", architectures="90", output=folder, work=folder / "out")


def test_the_plugin_says_what_it_is_and_exports_nothing_else(
    plugin: PluginBuild, tensorrt_python: tuple[str, int]
) -> None:
    library, major = plugin.libraries[-1], tensorrt_python[1]
    info = plugin_info(library)
    assert info["plugin"] == "SSDNMS"
    assert info["tensorrt"].split(".")[0] == str(major)
    assert info["architectures"] == "90"
    symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    entry_point = "getCreators" if major >= 10 else "getPluginCreators"
    exported = {line.split()[-1] for line in symbols.splitlines()}
    assert exported == {entry_point, "setLoggerFinder", "ssdNmsPluginInfo"}
    dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert f"[libnvinfer.so.{major}]" in dynamic
    assert f"[libssd_nms.so.{major}]" in dynamic


@pytest.mark.tensorrt
def test_a_real_tensorrt_creates_and_serialises_the_plugin(
    plugin: PluginBuild, tensorrt_python: tuple[str, int]
) -> None:
    python, major = tensorrt_python
    done = subprocess.run(
        [python, PROBE, plugin.libraries[-1]], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["fields"] == list(ATTRIBUTES)
    assert told["refused"] == dict.fromkeys(told["refused"], True)
    assert len(told["refused"]) >= 10
    for words in (
        "score_threshold is 2, must be in [0, 1]",
        "attribute score_activation is 'tanh', must be one of 'softmax', 'sigmoid', 'none'",
        "unknown attribute 'foo'; known: score_threshold",
        "attribute box_scales must be 4 floats, got 2 of type FP32",
        "attribute max_detections must be 1 integer, got 1 of type FP32",
    ):
        assert words in done.stderr
    if major < 10:
        assert told["outputs"] == 4
        assert told["round_trip"] is True
        assert "serialization version 9, this library reads 2" in done.stderr
