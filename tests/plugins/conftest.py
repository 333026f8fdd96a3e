"""Libraries under test: the reference by CMake, the kernels in the CPU emulator, the CUDA core where there is nvcc."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from build.tensorrt.plugins import PLUGINS, build_plugins, find_nvcc
from tests.conftest import once
from tests.plugins.library import Library

EMULATOR = Path(__file__).parent / "emulator"
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]


def cxx() -> str:
    """The host compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler:
        pytest.skip("needs a C++ compiler (g++)")
    return compiler


def need_cmake() -> None:
    """Skips where nothing can be built."""
    cxx()
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")


def compile_host(output: Path, *arguments: str | Path) -> Path:
    """Runs the host compiler with the project's warnings as errors."""
    flags = ["-std=c++17", "-O2", "-g", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", *WARNINGS]
    command = [cxx(), *flags, *map(str, arguments), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return output


def _built(tmp_path_factory: pytest.TempPathFactory, stage: str, **options: str) -> Library:
    """The last library of a stage of `build_plugins`."""

    def make(folder: Path) -> None:
        build = build_plugins(stage=stage, output=folder, work=folder / "out", **options)
        (folder / "library").write_text(str(build.libraries[-1]))

    return Library(Path((once(tmp_path_factory, stage, make) / "library").read_text()))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The CPU reference."""
    need_cmake()
    return _built(tmp_path_factory, "reference")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """ssd_nms/kernels.cu, its threads run one after the other; undefined behaviour ends the program."""
    source = PLUGINS / "ssd_nms"
    sanitizer = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    include = [f"-I{EMULATOR}", f"-I{source}", "-Wno-unknown-pragmas", "-shared", '-DSSD_NMS_ARCHITECTURES="75-real"']
    kernels = ["-x", "c++", source / "kernels.cu", source / "checks.cpp"]
    own = [EMULATOR / "emulator.cpp", EMULATOR / "numerics.cpp"]

    def make(folder: Path) -> None:
        compile_host(folder / "libssd_nms_emulated.so", *sanitizer, *include, *kernels, *own)

    return Library(once(tmp_path_factory, "emulator", make) / "libssd_nms_emulated.so")


@pytest.fixture(scope="session")
def core(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The CUDA library, for one architecture; what needs no GPU of it can be called anywhere."""
    need_cmake()
    if find_nvcc() is None:
        pytest.skip("needs nvcc (PATH, CUDA_HOME or pip install nvidia-cuda-nvcc nvidia-cuda-runtime)")
    return _built(tmp_path_factory, "core", architectures="90")
