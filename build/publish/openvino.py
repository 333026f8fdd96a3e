"""OpenVINO as the engine on a CPU: its installation, its libraries and its sessions in this process.

It lies in an environment folder of its own (`.venv/openvino`), from requirements/openvino.lock, and is installed when a
spec asks for it. Served through this project's backend, whose folder gets the libraries that it needs (`libraries`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import optional
from build.errors import RuntimeUnavailableError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from build.session import Runner

NAME, OTHER = "openvino", "onnxruntime"
PACKAGES, LOCK = optional.folder_of(NAME), optional.lock_of(NAME)
# What compiles and runs an ONNX file on a CPU; the package's other libraries are for other devices and formats.
_LIBRARIES = (
    "libopenvino_c.so.*",
    "libopenvino.so.*",
    "libopenvino_onnx_frontend.so.*",
    "libopenvino_intel_cpu_plugin.so",
    "libtbb.so.*",
    "libtbbbind_2_5.so.*",
    "libhwloc.so.*",
)
# OpenVINO's name for what a precision computes in, and the instructions that it takes: without them it would compute in
# FP32 and be no faster.
_HINTS = {"bf16": ("bf16", ("avx512_bf16", "amx_bf16")), "fp16": ("f16", ("avx512_fp16", "amx_fp16"))}


def installed() -> bool:
    """Whether the locked version is there."""
    return optional.installed(PACKAGES, LOCK)


def install() -> None:
    """Installs it, if it is not there yet.

    Raises:
        RuntimeUnavailableError: that fails.
    """
    fix = 'check the network and pip\'s index, or set [serving] engine = "onnxruntime"'
    optional.install(PACKAGES, LOCK, "OpenVINO", fix=fix, size="180 MB", error=RuntimeUnavailableError)


def readable(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that OpenVINO can read: SSDNMS's function is put in the place of its node."""
    from onnx import inliner

    return inliner.inline_local_functions(model)


def libraries() -> dict[str, Path]:
    """The files of the installed package that a server needs, by name.

    Raises:
        RuntimeUnavailableError: it is not installed, or another than the locked version.
    """
    folder = PACKAGES / "openvino" / "libs"
    found = {pattern: sorted(folder.glob(pattern)) for pattern in _LIBRARIES}
    missing = [pattern for pattern, paths in found.items() if len(paths) != 1]
    if missing:
        raise RuntimeUnavailableError(
            f"{folder} does not hold one {missing[0]}", fix=f"install it again: remove {PACKAGES} and build again"
        )
    return {path.name: path for (path,) in found.values()}


def licences() -> dict[str, Path]:
    """The texts that go with the libraries, by the name that they get beside them."""
    return {
        f"openvino-{path.name}": path for path in PACKAGES.glob("openvino-*.dist-info/licenses/**/*") if path.is_file()
    }


def hint(precision: str) -> str:
    """In what OpenVINO computes a model of a precision here, by OpenVINO's name: f32, bf16 or f16.

    FP16's hint was never run: no CPU with its instructions was at hand.
    """
    name, instructions = _HINTS.get(precision, ("f32", ()))
    return name if _has(instructions) else "f32"


def require(precision: str) -> None:
    """That BF16 is faster here than FP32, if that is the precision.

    Raises:
        RuntimeUnavailableError: this CPU does not multiply BF16.
    """
    if precision == "bf16" and hint(precision) == "f32":
        raise RuntimeUnavailableError(
            "this CPU has no instructions for BF16 (AVX512-BF16 or AMX)",
            why="it would be computed in FP32, and not be faster than that",
            fix="build --precision fp32 or int8",
        )


def _has(instructions: tuple[str, ...]) -> bool:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return not flags.isdisjoint(instructions)


def runner(path: Path, threads: int = 1, precision: str = "f32") -> Runner:
    """The only one of `runners`."""
    return runners(path, 1, threads, precision)[0]


def runners(path: Path, count: int, threads: int, precision: str) -> list[Runner]:
    """What runs a file in this process as the backend does (backends/ssd_onnxruntime/engine_openvino.cpp).

    It is compiled for one picture; the pictures of a batch run one after the other.

    Args:
        path: an ONNX file that `readable` made.
        count: how many requests run at once: the streams of one compiled model.
        threads: of each.
        precision: as `hint` gives it.

    Raises:
        RuntimeUnavailableError: OpenVINO cannot be imported, or cannot run the file.
    """
    import numpy as np

    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))  # last: NumPy and the rest stay those that are installed
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": count,
        "INFERENCE_NUM_THREADS": count * threads,
        "ENABLE_CPU_PINNING": False,
    }
    try:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        model.reshape({port.get_any_name(): [1, *list(port.partial_shape)[1:]] for port in model.inputs})
        compiled = core.compile_model(model, "CPU", settings)
        requests = [compiled.create_infer_request() for _ in range(count)]
    except Exception as error:  # OpenVINO's own exceptions have no common type
        raise RuntimeUnavailableError(
            f"OpenVINO cannot run {path}: {str(error).strip().splitlines()[-1]}",
            fix='set [serving] engine = "onnxruntime"',
        ) from None
    names = [port.get_any_name() for port in compiled.outputs]

    def run(request: Any, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        rows = []
        for row in range(len(next(iter(feeds.values())))):
            request.infer({name: values[row : row + 1] for name, values in feeds.items()}, share_inputs=True)
            rows.append([request.get_output_tensor(place).data.copy() for place in range(len(names))])
        return {name: np.concatenate(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}

    return [functools.partial(run, request) for request in requests]
