"""Builds the libraries behind ssd_nms.h, and calls them on numpy arrays that it puts where the library wants them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from device import Array
from params import Params, Settings

SOURCE = Path(__file__).resolve().parent.parent / "ssd_nms"
HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-shared"]


@dataclass
class Inputs:
    """Arrays of one call, in the host's memory."""

    deltas: Array
    logits: Array
    anchors: Array
    score_thresholds: Array | None = None
    iou_thresholds: Array | None = None

    def arrays(self) -> list[Array | None]:
        return [self.deltas, self.logits, self.anchors, self.score_thresholds, self.iou_thresholds]

    def rows(self) -> list[Inputs]:
        """Each image alone."""

        def part(array: Array | None, index: int) -> Array | None:
            return None if array is None else array[index : index + 1]

        thresholds = self.score_thresholds, self.iou_thresholds
        return [
            Inputs(deltas[None], logits[None], self.anchors, *(part(array, index) for array in thresholds))
            for index, (deltas, logits) in enumerate(zip(self.deltas, self.logits, strict=True))
        ]


@dataclass
class Call:
    """One library, settings and inputs on a device, with outputs of their own and, unless it is given, a workspace."""

    library: Any
    settings: Settings
    inputs: Inputs
    device: Any
    workspace: Any = None
    blocks: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        inputs, settings = self.inputs, self.settings
        batch, anchors, classes = inputs.logits.shape
        flags = [
            inputs.deltas.dtype == np.float16,
            inputs.logits.dtype == np.float16,
            inputs.score_thresholds is not None,
            inputs.iou_thresholds is not None,
        ]
        values = {**settings.__dict__, "box_scales": (ctypes.c_float * 4)(*settings.box_scales)}
        self.params = Params(**values)
        self.shape = (ctypes.c_int32 * 7)(batch, anchors, classes, *map(int, flags))
        most = settings.max_detections
        self.outputs: tuple[tuple[tuple[int, ...], Any], ...] = (
            ((batch, 1), np.int32),
            ((batch, most, 4), np.float32),
            ((batch, most), np.float32),
            ((batch, most), np.int32),
        )
        self.given = [None if array is None else self._placed(array) for array in inputs.arrays()]
        self.blocks = [self.device.block(int(np.prod(shape)) * 4) for shape, _ in self.outputs]
        size = int(self.library.ssdNmsWorkspaceSize(ctypes.byref(self.params), self.shape))
        if self.workspace is None:
            self.workspace = self.device.block(max(size, 16))
        for block in (*self.blocks, self.workspace):
            block.fill(0xA5)
        pointers = [None if block is None else block.address for block in (*self.given, *self.blocks)]
        self.tensors = (ctypes.c_void_p * 9)(*pointers)

    def _placed(self, array: Array) -> Any:
        block = self.device.block(array.nbytes)
        block.write(array)
        return block

    def launch(self) -> None:
        """Enqueues it."""
        status = self.library.ssdNmsLaunch(
            ctypes.byref(self.params),
            self.shape,
            self.tensors,
            ctypes.c_void_p(self.workspace.address),
            ctypes.c_size_t(self.workspace.nbytes),
            ctypes.c_void_p(self.device.stream),
        )
        if status != 0:
            reason = self.library.ssdNmsLastError().decode()
            raise RuntimeError(f"ssdNmsLaunch: {self.library.ssdNmsStatusString(status).decode()} {reason}")

    def read(self) -> list[Array]:
        """The outputs as they are now."""
        return [block.read(shape, dtype) for block, (shape, dtype) in zip(self.blocks, self.outputs, strict=True)]

    def result(self) -> list[Array]:
        """Launches, waits, and gives the outputs."""
        self.launch()
        self.device.synchronize()
        return self.read()


def load(path: Path) -> Any:
    """The library, with the types of its results."""
    library = ctypes.CDLL(str(path))
    library.ssdNmsStatusString.restype = library.ssdNmsLastError.restype = ctypes.c_char_p
    library.ssdNmsWorkspaceSize.restype = ctypes.c_size_t
    return library


def build(folder: Path, capability: str) -> tuple[Path, Path]:
    """Compiles reference and core as plugins/CMakeLists.txt does, the core for this GPU ("9.0"); "": no core."""
    reference, core = folder / "libssd_nms_reference.so", folder / "libssd_nms_core.so"
    checks = str(SOURCE / "checks.cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, *HOST_FLAGS, checks, str(SOURCE / "reference" / "reference.cpp"), "-o", str(reference)], check=True
    )
    if capability:
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        architecture = f"sm_{capability.replace('.', '')}"
        flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch={architecture}", "-lineinfo", "-shared"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
        subprocess.run([nvcc, *flags, host, checks, str(SOURCE / "kernels.cu"), "-o", str(core)], check=True)
    return reference, core
