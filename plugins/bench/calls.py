"""Builds the libraries behind ssd_nms.h, and calls them on torch tensors."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch
from params import Params, Settings

SOURCE = Path(__file__).resolve().parent.parent / "ssd_nms"
HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-shared"]


@dataclass
class Inputs:
    """Tensors of one call."""

    deltas: torch.Tensor
    logits: torch.Tensor
    anchors: torch.Tensor
    score_thresholds: torch.Tensor | None = None
    iou_thresholds: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor | None]:
        return [self.deltas, self.logits, self.anchors, self.score_thresholds, self.iou_thresholds]

    def to(self, device: str) -> Inputs:
        return Inputs(*(None if tensor is None else tensor.to(device) for tensor in self.tensors()))  # type: ignore[arg-type]

    def row(self, index: int) -> Inputs:
        rows = [None if t is None else t[index : index + 1].clone() for t in self.tensors()]
        rows[2] = self.anchors
        return Inputs(*rows)  # type: ignore[arg-type]


@dataclass
class Call:
    """One library, settings and inputs, with outputs and workspace of their own."""

    library: ctypes.CDLL
    settings: Settings
    inputs: Inputs
    workspace: torch.Tensor | None = None
    outputs: tuple[torch.Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        inputs, settings = self.inputs, self.settings
        batch, anchors, classes = inputs.logits.shape
        flags = [
            inputs.deltas.dtype == torch.float16,
            inputs.logits.dtype == torch.float16,
            inputs.score_thresholds is not None,
            inputs.iou_thresholds is not None,
        ]
        values = {**settings.__dict__, "box_scales": (ctypes.c_float * 4)(*settings.box_scales)}
        self.params = Params(**values)
        self.shape = (ctypes.c_int32 * 7)(batch, anchors, classes, *map(int, flags))
        most, device = settings.max_detections, inputs.logits.device
        self.outputs = (
            torch.full((batch, 1), -7, dtype=torch.int32, device=device),
            torch.full((batch, most, 4), -7.0, device=device),
            torch.full((batch, most), -7.0, device=device),
            torch.full((batch, most), -7, dtype=torch.int32, device=device),
        )
        size = self.library.ssdNmsWorkspaceSize(ctypes.byref(self.params), self.shape)
        if self.workspace is None:
            self.workspace = torch.full((max(size, 16),), 0xA5, dtype=torch.uint8, device=device)
        pointers = [None if t is None else t.data_ptr() for t in (*inputs.tensors(), *self.outputs)]
        self.tensors = (ctypes.c_void_p * 9)(*pointers)

    def launch(self, stream: int = 0) -> None:
        """Enqueues it."""
        assert self.workspace is not None
        status = self.library.ssdNmsLaunch(
            ctypes.byref(self.params),
            self.shape,
            self.tensors,
            ctypes.c_void_p(self.workspace.data_ptr()),
            ctypes.c_size_t(self.workspace.numel()),
            ctypes.c_void_p(stream),
        )
        if status != 0:
            raise RuntimeError(f"ssdNmsLaunch: {self.library.ssdNmsStatusString(status).decode()}")

    def result(self) -> list[torch.Tensor]:
        """Launches, waits, and gives the outputs on the CPU."""
        cuda = self.inputs.logits.is_cuda
        self.launch(torch.cuda.current_stream().cuda_stream if cuda else 0)
        if cuda:
            torch.cuda.synchronize()
        return [output.cpu().clone() for output in self.outputs]


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.ssdNmsStatusString.restype = ctypes.c_char_p
    library.ssdNmsWorkspaceSize.restype = ctypes.c_size_t
    return library


def build(folder: Path) -> tuple[Path, Path]:
    """Compiles reference and core as plugins/CMakeLists.txt does, the core for this GPU."""
    reference, core = folder / "libssd_nms_reference.so", folder / "libssd_nms_core.so"
    checks = str(SOURCE / "checks.cpp")
    compiler = os.environ.get("CXX", "c++")
    subprocess.run(
        [compiler, *HOST_FLAGS, checks, str(SOURCE / "reference" / "reference.cpp"), "-o", str(reference)], check=True
    )
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        flags = ["-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{major}{minor}", "-lineinfo", "-shared"]
        host = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
        subprocess.run([nvcc, *flags, host, checks, str(SOURCE / "kernels.cu"), "-o", str(core)], check=True)
    return reference, core
