"""What the steps of the GPU check need, and whether it is on this machine. Nothing is loaded that could crash."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from build import tritonserver
from build.errors import SSDError
from build.machine import Machine, find_gpu, package_version, tensorrt_version
from build.releases import numbers
from build.tensorrt import plugins
from build.tensorrt.cuda import Gpu

_SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer",)


@dataclass(frozen=True)
class Found:
    """A need, looked for.

    Attributes:
        text: what is there, or what is missing and how to get it.
        there: whether it is.
    """

    text: str
    there: bool


@dataclass
class Here:
    """This machine, as far as the steps ask.

    Attributes:
        site: a folder of packages that belongs to the machine beside this Python's own; None = there is none.
        repositories: the folder in which the steps publish their plans, one repository for each precision.
        gpu: the GPU; None = there is none.
        tensorrt: the version of the Python package; empty where it is not installed.
    """

    site: Path | None
    repositories: Path
    machine: Machine = field(default_factory=Machine)
    gpu: Gpu | None = None
    tensorrt: str = ""

    def __post_init__(self) -> None:
        if self.site is not None and str(self.site) not in sys.path:
            sys.path.append(str(self.site))
            importlib.invalidate_caches()
        self.gpu = find_gpu(self.machine)
        self.tensorrt = tensorrt_version()

    def environment(self) -> dict[str, str]:
        """Variables for a step's process: packages, programs and libraries of `site` are found."""
        variables = dict(os.environ)
        if self.site is None:
            return variables
        nvidia = self.site / "nvidia"

        def prepend(name: str, *paths: Path) -> None:
            variables[name] = os.pathsep.join(filter(None, [*map(str, paths), variables.get(name, "")]))

        prepend("PYTHONPATH", self.site)
        libraries = (*nvidia.glob("*/lib"), self.site / "tensorrt", self.site / "tensorrt_libs")
        prepend("LD_LIBRARY_PATH", *(path for path in libraries if path.is_dir()))
        prepend("PATH", *nvidia.glob("*/bin"), *nvidia.glob("*/compute-sanitizer"))
        return variables | {"PYTHONDONTWRITEBYTECODE": "1"}  # the folder may be read-only

    def plans(self) -> list[str]:
        """The precisions whose plans the steps have published."""
        return sorted(path.parent.parent.parent.parent.name for path in self.repositories.glob("*/*/*/*/model.plan"))


def look(here: Here, need: str) -> Found:
    """One need.

    Raises:
        KeyError: there is no such need.
    """
    return _NEEDS[need](here)


def _gpu(here: Here) -> Found:
    if here.gpu is None:
        return Found("an NVIDIA GPU with its driver (nvidia-smi names none; containers: --gpus all)", False)
    return Found(f"{here.gpu.name}, compute capability {here.gpu.compute_capability}", True)


def _package(name: str, package: str, how: str) -> Callable[[Here], Found]:
    def look(here: Here) -> Found:
        if importlib.util.find_spec(name) is None:
            return Found(f"the Python package {package} ({how})", False)
        return Found(f"{package} {package_version(package)}".strip(), True)

    return look


def _nvcc(here: Here) -> Found:
    nvcc = _nvcc_of(here)
    if nvcc is None and not _core().is_file():
        return Found("nvcc (./invoke build-plugins brings one)", False)
    return Found(str(nvcc or f"{_core().name}, built before"), True)


def _nvcc_of(here: Here) -> Path | None:
    in_site = sorted((here.site / "nvidia").glob("*/bin/nvcc")) if here.site else []
    return plugins.find_nvcc() or next(iter(in_site), None)


def _core() -> Path:
    return plugins.LIB / "libssd_nms_core.so"


def _built_core(here: Here) -> Found:
    if not _core().is_file():
        return Found("the CUDA core (the step plugin builds it)", False)
    return Found(_core().name, True)


def _compiler(here: Here) -> Found:
    if _core().is_file():
        return Found("libraries built before", True)
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return Found(str(compiler or "a C++ compiler (g++)"), bool(compiler))


def _sanitizer(here: Here) -> Found:
    path = shutil.which("compute-sanitizer", path=here.environment().get("PATH"))
    path = path or next((name for name in _SANITIZERS if Path(name).exists()), None)
    return Found(path or "compute-sanitizer (it comes with the CUDA toolkit)", path is not None)


def _plugin(here: Here) -> Found:
    try:
        made_for = plugins.plugin_info(plugins.PLUGIN)["tensorrt"]
    except SSDError:
        return Found(
            f"{plugins.PLUGIN.name} for TensorRT (the step plugin builds it where TensorRT's headers are)", False
        )
    if here.tensorrt and numbers(made_for)[:1] != numbers(here.tensorrt)[:1]:
        return Found(f"a plugin for TensorRT {here.tensorrt}: {plugins.PLUGIN.name} is for {made_for}", False)
    return Found(f"{plugins.PLUGIN.name} for TensorRT {made_for}", True)


def _at_least(capability: str, tensorrt: str = "", below: str = "") -> Callable[[Here], Found]:
    """A GPU and a TensorRT that can do a precision."""

    def look(here: Here) -> Found:
        if tensorrt and here.tensorrt and numbers(here.tensorrt) < numbers(tensorrt):
            return Found(f"TensorRT {tensorrt} or later, here is {here.tensorrt}", False)
        if below and here.tensorrt and numbers(here.tensorrt) >= numbers(below):
            return Found(f"a TensorRT before {below}, which took calibrators away; here is {here.tensorrt}", False)
        if here.gpu is not None and numbers(here.gpu.compute_capability) < numbers(capability):
            there = here.gpu.compute_capability
            return Found(f"a GPU of compute capability {capability} or later, here is {there}", False)
        return Found("", True)

    return look


def _plan(here: Here) -> Found:
    plans = here.plans()
    if not plans:
        return Found("a plan (the steps plan-... make them)", False)
    return Found(f"plans in {', '.join(plans)}", True)


def _server(here: Here) -> Found:
    try:
        installed = tritonserver.find()
    except SSDError as error:
        return Found(error.what, False)
    if not (installed.backends / "tensorrt").is_dir():
        where = "the wheel's tritonserver" if installed.from_wheel else str(installed.binary)
        return Found(f"a tritonserver with the tensorrt backend ({where} has none; NVIDIA's container has it)", False)
    return Found(f"tritonserver {installed.version} with the tensorrt backend", True)


_NEEDS: dict[str, Callable[[Here], Found]] = {
    "gpu": _gpu,
    "numpy": _package("numpy", "numpy", "./invoke installs it"),
    "cuda-python": _package("cuda", "cuda-python", "./invoke install-tensorrt"),
    "tensorrt": _package("tensorrt", "tensorrt", "./invoke install-tensorrt"),
    "onnx": _package("onnx", "onnx", "./invoke installs it"),
    "onnxruntime": _package("onnxruntime", "onnxruntime", "./invoke installs it"),
    "pycocotools": _package("pycocotools", "pycocotools", "./invoke installs it"),
    "tritonclient": _package("tritonclient", "tritonclient", "./invoke installs it"),
    "torchvision": _package("torchvision", "torchvision", "pip install torch torchvision"),
    "nvcc": _nvcc,
    "compiler": _compiler,
    "core": _built_core,
    "compute-sanitizer": _sanitizer,
    "plugin": _plugin,
    "plan": _plan,
    "server": _server,
    "for tf32": _at_least("8.0"),
    "for bf16": _at_least("8.0", "10.0"),
    "for int8": _at_least("7.5"),
    "for fp8": _at_least("8.9", "10.0"),
    "for implicit": _at_least("7.5", below="11.0"),
}
