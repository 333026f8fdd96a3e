"""The plugin library, loaded in every way that TensorRT's users have, by a program compiled with its headers alone.

For each set of headers at hand, over the CPU reference: with a stand-in of TensorRT's library, and with a real one
where the running Python, or the one that SSD_TENSORRT_PYTHON names, has the `tensorrt` package of these very headers.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from build.tensorrt.plugins import PLUGINS
from tests.plugins.conftest import compile_host
from tests.plugins.test_tensorrt import cuda_include, header_sets, python_with_tensorrt

SOURCE = PLUGINS / "ssd_nms"
LOADING = Path(__file__).parent / "loading"
WAYS = ("dlopen", "load", "side-by-side", "loggers", "preload", "preload-and-load")
ENTRY_POINTS = {True: "getCreators", False: "getPluginCreators"}  # from TensorRT 10 on


def version_of(root: Path) -> tuple[int, int, int]:
    """Of a set of headers."""
    text = (root / "include" / "NvInferVersion.h").read_text()
    parts = ("MAJOR", "MINOR", "PATCH")
    found = [re.search(rf"define (?:NV_TENSORRT_{part}|TRT_{part}_ENTERPRISE) (\d+)", text) for part in parts]
    major, minor, patch = (int(match[1]) for match in found if match)
    return major, minor, patch


class Program:
    """The host program, the plugin's library and another plugin library, compiled against one set of headers."""

    def __init__(self, root: Path, nvinfer: Path | None, folder: Path) -> None:
        self.root, self.folder, self.major = root, folder, version_of(root)[0]
        include = [f"-isystem{path}" for path in (root / "include", cuda_include())]
        flags = ["-O0", "-Wno-deprecated-declarations", *include, f"-I{SOURCE}"]
        shared = [*flags, "-shared", "-Wl,--allow-shlib-undefined"]
        if nvinfer is None:
            nvinfer = folder / f"libnvinfer.so.{self.major}"
            soname = f"-Wl,-soname,{nvinfer.name}"
            compile_host(nvinfer, *shared, "-fvisibility=default", soname, LOADING / "nvinfer.cpp")
        definitions = [f'-DSSD_NMS_{name}="x"' for name in ("GIT", "CUDA_VERSION", "ARCHITECTURES")]
        sources = [SOURCE / name for name in ("tensorrt/plugin.cpp", "checks.cpp", "reference/reference.cpp")]
        exports = f"-Wl,--version-script={SOURCE / 'tensorrt' / 'exports.map'}"
        self.library, self.host, self.other = (folder / name for name in ("libssd_nms.so", "host", "other.so"))
        jobs: list[tuple[Path, list[str | Path]]] = [
            (self.library, [*shared, *definitions, *sources, exports, nvinfer]),
            (self.other, [*shared, LOADING / "other_plugin.cpp"]),
            (self.host, [*flags, LOADING / "host.cpp", nvinfer, "-Wl,--allow-shlib-undefined", "-ldl"]),
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda job: compile_host(job[0], *job[1]), jobs))
        nvidia = nvinfer.parent.parent / "nvidia"  # the CUDA libraries of a wheel's TensorRT
        self.libraries = ":".join(map(str, (nvinfer.parent, *nvidia.glob("*/lib"))))

    def run(self, way: str, library: Path | None = None) -> tuple[int, str]:
        """Status and output."""
        path = str(library or self.library)
        preload = {"LD_PRELOAD": path} if way.startswith("preload") else {}
        # env, so that nothing but the host itself is preloaded
        variables = [f"{name}={value}" for name, value in ({"LD_LIBRARY_PATH": self.libraries} | preload).items()]
        command = ["env", *variables, self.host, way, path, self.other]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        return done.returncode, done.stdout


@pytest.fixture(scope="module", params=header_sets() or [None], ids=lambda root: root.name if root else "none")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Over the stand-in of TensorRT's library."""
    root: Path | None = request.param
    if root is None:
        pytest.skip("needs TensorRT's headers (TENSORRT_ROOT, or once ./invoke build-plugins --tensorrt-ref v10.16)")
    if version_of(root)[0] < 10:
        pytest.skip("the stand-in is of TensorRT 10 and later; a real 8.6 has a test of its own")
    return Program(root, None, tmp_path_factory.mktemp("loading"))


@pytest.mark.parametrize("way", WAYS)
def test_a_program_loads_the_library(program: Program, way: str) -> None:
    assert program.run(way) == (0, "ok\n")


def test_a_copy_of_the_library_loads_as_a_plan_that_holds_it_would(program: Program, tmp_path: Path) -> None:
    """TensorRT writes the library of such a plan to a file of its own and loads that."""
    copy = shutil.copy(program.library, tmp_path / "tensorrt-temporary-file")
    assert program.run("load", copy) == (0, "ok\n")


def test_only_what_tensorrt_looks_up_is_exported(program: Program) -> None:
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", program.library], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in symbols.splitlines()}
    assert names == {ENTRY_POINTS[program.major >= 10], "setLoggerFinder", "ssdNmsPluginInfo"}


def real_tensorrt() -> tuple[tuple[int, int, int], Path]:
    """Version and libnvinfer of the `tensorrt` package."""
    ask = "import tensorrt; print(tensorrt.__version__, tensorrt.__path__[0])"
    told = subprocess.run([python_with_tensorrt(), "-c", ask], capture_output=True, text=True, check=True).stdout
    version, folder = told.strip().split(" ", 1)
    major, minor, patch = map(int, version.split(".")[:3])
    nvinfer = Path(folder) / f"libnvinfer.so.{major}"
    if not nvinfer.is_file():
        pytest.skip(f"needs {nvinfer.name} in the package tensorrt")
    return (major, minor, patch), nvinfer


@pytest.mark.tensorrt
def test_a_real_tensorrt_loads_the_library_in_every_way(tmp_path: Path) -> None:
    version, nvinfer = real_tensorrt()
    fitting = [root for root in header_sets() if version_of(root) == version]
    if not fitting:
        pytest.skip(f"needs the headers of TensorRT {version} (TENSORRT_ROOT)")
    program = Program(fitting[0], nvinfer, tmp_path)
    assert {way: program.run(way) for way in WAYS} == dict.fromkeys(WAYS, (0, "ok\n"))


@pytest.mark.tensorrt
def test_headers_of_another_8_6_do_no_harm(tmp_path: Path) -> None:
    """8.6.0 and 8.6.1 have different plugin registries: the library then only registers itself, and stays."""
    version, nvinfer = real_tensorrt()
    headers = {version_of(root): root for root in header_sets()}
    if version != (8, 6, 0) or not {(8, 6, 0), (8, 6, 1)} <= set(headers):
        pytest.skip("needs TensorRT 8.6.0 and the headers of 8.6.0 and 8.6.1")
    (tmp_path / "host").mkdir()
    (tmp_path / "other").mkdir()
    program = Program(headers[(8, 6, 0)], nvinfer, tmp_path / "host")
    stranger = Program(headers[(8, 6, 1)], nvinfer, tmp_path / "other").library
    assert program.run("preload", stranger) == (0, "ok\n")
    status, output = program.run("load", stranger)
    assert status == 1, "refused, not crashed"
    assert "FAILED: loadLibrary" in output
