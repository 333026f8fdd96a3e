"""What is on this machine: its GPU, TensorRT, plugin libraries and shared memory, as `doctor` and reports ask for it.

Nothing here changes anything. It imports neither CUDA nor a plugin into its own process: whatever can crash runs in a
process of its own.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from build.errors import SSDError
from build.files import MODELS, REPOSITORY, ROOT
from build.publish import backend
from build.tensorrt import plugins
from build.tensorrt.cuda import Gpu
from build.tensorrt.system import run
from build.tritonserver import SHM_PREFIX

PACKAGES = ("numpy", "onnx", "onnxruntime", "tritonclient")  # that nothing works without
PORTS = (8000, 8001, 8002)
SHM = Path("/dev/shm")


@dataclass
class Machine:
    """Where doctor looks; tests give other places.

    Attributes:
        libraries: the folder of the plugin.
        backends: the folder of this project's backends.
        run: runs a command and gives its status and its output; status -1 where it cannot be run.
    """

    models: Path = MODELS
    repository: Path = REPOSITORY
    libraries: Path = plugins.LIB
    shm: Path = SHM
    ports: Sequence[int] = PORTS
    run: Callable[[Sequence[str]], tuple[int, str]] = lambda command: run(command)
    backends: Path = backend.BACKENDS


def package_version(name: str) -> str:
    """The version of an installed package; empty where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_gpu(machine: Machine) -> Gpu | None:
    """The first GPU, as nvidia-smi names it; None where there is none."""
    query = "--query-gpu=name,compute_cap,memory.total,driver_version"
    status, output = machine.run(["nvidia-smi", query, "--format=csv,noheader,nounits"])
    fields = [field.strip() for field in output.splitlines()[0].split(",")] if status == 0 and output else []
    if len(fields) != 4 or not re.fullmatch(r"\d+\.\d+", fields[1]):
        return None
    memory = int(fields[2]) if fields[2].isdigit() else 0
    _, text = machine.run(["nvidia-smi"])
    cuda = re.search(r"CUDA Version:\s*([\d.]+)", text)
    return Gpu(fields[0], fields[1], memory, fields[3], cuda[1] if cuda else "", "")


_TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")


def tensorrt_version() -> str:
    """The version of the Python package tensorrt; empty where it is not installed."""
    return next((version for name in _TENSORRT_PACKAGES if (version := package_version(name))), "")


# Asks a library what it is, in a process of its own: loading it may need what is not there, or crash.
_ASK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.ssdNmsPluginInfo.restype = ctypes.c_char_p
print(library.ssdNmsPluginInfo().decode())
"""
# Whether TensorRT finds the creator once the library is loaded.
_RESOLVE = """
import ctypes, sys
sys.path.insert(0, sys.argv[4])
import tensorrt
from build.tensorrt import compat
compat.load_plugins(tensorrt, tensorrt.Logger(tensorrt.Logger.ERROR), None)
ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
raise SystemExit(compat.plugin_creator(tensorrt, sys.argv[2], sys.argv[3]) is None)
"""


def ask_plugin(machine: Machine, library: Path) -> tuple[dict[str, str], str]:
    """What a plugin library tells of itself, and why it cannot be loaded here (empty where it can)."""
    status, output = machine.run([sys.executable, "-c", _ASK, str(library)])
    last = output.splitlines()[-1] if output else f"ended with {status}"
    if status == 0:
        with contextlib.suppress(ValueError):
            info: dict[str, str] = json.loads(last)
            return info, ""
    info = {}
    with contextlib.suppress(SSDError, ValueError):
        info = plugins.plugin_info(library)  # as the file has it: what it would need
    return info, last.removeprefix("OSError: ")


def unresolvable(machine: Machine, library: Path, name: str, version: str) -> str:
    """Why this process could not resolve a plan's plugin from a library; empty where it could."""
    command = [sys.executable, "-B", "-c", _RESOLVE, str(library), name, version, str(ROOT)]
    status, output = machine.run(command)
    if status == 0:
        return ""
    return f"TensorRT finds no creator {name} version {version} in it" if status == 1 and not output else output[-200:]


_REGIONS = (f"{SHM_PREFIX}-*", "triton_python_backend_shm_region_*")


def unused_regions(machine: Machine) -> dict[str, list[Path]]:
    """Shared memory of servers that no process has open or mapped: a killed server left it. By a pattern for rm."""
    used = used_regions()
    servers: dict[str, list[Path]] = {}
    for path in sorted(path for pattern in _REGIONS for path in machine.shm.glob(pattern)):
        match = re.match(rf"{SHM_PREFIX}-[0-9a-f]+-", path.name)
        servers.setdefault(f"{match[0]}*" if match else path.name, []).append(path)
    return {name: paths for name, paths in servers.items() if not any(str(path) in used for path in paths)}


def used_regions() -> set[str]:
    """The files under /dev/shm that a process of this user has mapped or open."""
    used: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used.update(re.findall(r"(/dev/shm/\S+)", (process / "maps").read_text(errors="replace")))
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(descriptor.readlink())
                    if target.startswith("/dev/shm/"):
                        used.add(target)
    return used
