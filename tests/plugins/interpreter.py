"""The kernels' compiled PTX, interpreted on a CPU: what nvcc made is run, on no GPU.

`tests/plugins/ptx/` parses the PTX and stands in for libcudart, so the library's own host code launches its kernels
unchanged. Threads go on independently, in lockstep or in random and hostile orders. Checked are: bounds, alignment,
writes to inputs, uninitialised memory and registers, races, barriers and warp operations that not all reach, and masks.
Instructions that it does not know are refused.

It also counts instructions and models one block alone on a multiprocessor. The model is not calibrated: it compares two
versions of a kernel and is never a time.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import subprocess
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.tensorrt.plugins import PLUGINS, find_nvcc
from tests.plugins.library import Library, Tensors, params_of, shape_of
from tests.ssd_nms_oracle import Case, Outputs

SOURCES = Path(__file__).parent / "ptx"
KERNELS = PLUGINS / "ssd_nms"
HOST_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
INPUTS = ("box_deltas", "class_logits", "anchors", "score_threshold", "iou_threshold")
OUTPUTS = ("number", "boxes", "scores", "labels")


@dataclass(frozen=True)
class Mode:
    """In which order threads go on.

    Attributes:
        order: 0 = a warp's lanes in lockstep, 1 = at random, 2 = the last warp first, 3 = the first warp first.
        burst: how many instructions a group of lanes runs before others do, on average.
        subset: percent of the times when only some lanes of a group go on.
    """

    order: int = 0
    burst: int = 16
    subset: int = 0


MODES = (
    Mode(),
    Mode(1, burst=1, subset=50),
    Mode(1, burst=12, subset=25),
    Mode(2, burst=40, subset=10),
    Mode(3, burst=200),
    Mode(1, burst=300, subset=30),
)


def _cached(name: str, sources: list[Path], commands: list[list[str]], tool: str) -> Path:
    """A folder with what the commands write into it (they run there), kept by the content of everything that counts."""
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    texts = [repr(commands), version, *(f"{path.name}\n{path.read_text()}" for path in sorted(sources))]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd-on-triton" / "ptx"
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    folder = cache / f"{name}-{digest}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as outer:
        scratch = Path(outer) / folder.name
        scratch.mkdir()
        first = [subprocess.Popen(c, cwd=scratch, stderr=subprocess.PIPE, text=True) for c in commands[:-1]]
        failures = [errors for process in first for _, errors in [process.communicate()] if process.returncode != 0]
        assert not failures, failures[0]
        done = subprocess.run(commands[-1], cwd=scratch, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        try:
            scratch.rename(folder)
        except OSError:  # another process was as quick
            assert folder.is_dir()
    return folder


def build_interpreter(compiler: str) -> Path:
    """The interpreter's library."""
    sources = sorted(SOURCES.glob("*.cpp"))
    flags = [*HOST_FLAGS, "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
    objects = [[compiler, *flags, "-c", str(path)] for path in sources]
    link = [compiler, *flags, "-shared", *(f"{path.stem}.o" for path in sources), "-o", "libptx.so"]
    return _cached("interpreter", [*sources, *SOURCES.glob("*.h")], [*objects, link], compiler) / "libptx.so"


def build_kernels(architecture: str, compiler: str) -> Path:
    """A folder with libcore.so, which needs a libcudart of the process, and its kernels.ptx."""
    nvcc = find_nvcc()
    assert nvcc is not None
    code = f"--generate-code=arch=compute_{architecture},code=[compute_{architecture}]"
    flags = [str(nvcc), "-O3", "-DNDEBUG", "-std=c++17", code, "-fmad=false", "-Werror=all-warnings", f"-I{KERNELS}"]
    host = ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror,-ffp-contract=off", "-ccbin", compiler]
    kernels, checks = KERNELS / "kernels.cu", KERNELS / "checks.cpp"
    ptx = [*flags, *host, "-lineinfo", "-ptx", str(kernels), "-o", "kernels.ptx"]
    library = [*flags, *host, "-shared", "-cudart", "none", str(kernels), str(checks), "-o", "libcore.so"]
    sources = [*KERNELS.glob("*.cuh"), *KERNELS.glob("*.h"), kernels, checks]
    return _cached(f"kernels{architecture}", sources, [ptx, library], str(nvcc))


@dataclass(frozen=True)
class Result:
    """What came of one call.

    Attributes:
        outputs: number, boxes, scores, labels; what was not written is full of 0xA5.
        failure: why the launch failed, or an empty text.
        findings: a line for each thing that is wrong, whatever the outputs are.
    """

    outputs: Outputs
    failure: str
    findings: list[str]


class _Memory:
    """Bytes at an address that 16 divides, with others around them that nobody may write."""

    def __init__(self, nbytes: int, random: np.random.Generator | None) -> None:
        self.whole = np.full(nbytes + 512, 0xA5, np.uint8)
        start = -self.whole.ctypes.data % 256 + (16 * int(random.integers(0, 16)) if random else 0)
        self.bytes = self.whole[start : start + nbytes]
        self._around = (self.whole[:start], self.whole[start + nbytes :])

    def is_whole(self) -> bool:
        return all(bool((part == 0xA5).all()) for part in self._around)


class Interpreter:
    """One process has one: the library of the kernels finds the interpreter as its libcudart.

    Args:
        library: of `build_interpreter`.
        kernels: the folder of `build_kernels`.
        ptx: other PTX of the same kernels.
        reordered: puts instructions in an order in which an assembler might, for the model.
    """

    def __init__(self, library: Path, kernels: Path, ptx: Path | None = None, *, reordered: bool = False) -> None:
        self.c = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name in ("ptxLoad", "ptxFindings", "ptxReport", "ptxError"):
            getattr(self.c, name).restype = ctypes.c_char_p
        self.load(ptx or kernels / "kernels.ptx", reordered=reordered)
        self.core = Library(kernels / "libcore.so")

    def load(self, ptx: Path, *, reordered: bool = False) -> None:
        """Takes another PTX of the same kernels."""
        problem = self.c.ptxLoad(str(ptx).encode(), int(reordered)).decode()
        assert not problem, f"{ptx}: {problem}"

    def run(
        self,
        case: Case,
        mode: Mode = MODES[0],
        *,
        seed: int = 1,
        timing: bool = False,
        checks: bool = True,
        most: int = 0,
    ) -> Result:
        """One call.

        Args:
            case: the inputs.
            mode: in which order threads go on.
            seed: of everything that is random about it, the alignment of the tensors included.
            timing: runs the model; in lockstep only, with tensors that are well aligned.
            checks: looks for races and uninitialised memory, which takes most of the time.
            most: instructions that a launch may take; 0 = any number.
        """
        random = None if timing else np.random.default_rng(seed)
        self.c.ptxReset()
        words = (ctypes.c_uint64(seed), *astuple(mode)[1:], int(timing), int(checks), ctypes.c_uint64(most))
        self.c.ptxSet(mode.order, *words)
        params, shape = params_of(case.nms), shape_of(case)
        rows, detections = shape.batch, case.nms.max_detections
        size = self.core.workspace_size(params, shape)
        sizes = {"number": 4 * rows, "boxes": 16 * rows * detections, "scores": 4 * rows * detections}
        sizes |= {"labels": sizes["scores"], "workspace": size}
        memory: dict[str, _Memory] = {}
        for name, array in case.inputs().items():
            memory[name] = _Memory(array.nbytes, random)
            memory[name].bytes[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
        memory |= {name: _Memory(nbytes, random) for name, nbytes in sizes.items()}
        for name, each in memory.items():
            place = (ctypes.c_uint64(each.bytes.ctypes.data), ctypes.c_uint64(each.bytes.nbytes))
            self.c.ptxRegister(*place, name in INPUTS, name.encode())
        pointers = [memory[name].bytes.ctypes.data if name in memory else None for name in (*INPUTS, *OUTPUTS)]
        status = self.core.launch(params, shape, Tensors(*pointers), memory["workspace"].bytes.ctypes.data, size)
        findings = self.c.ptxFindings().decode().splitlines()
        findings += [f"writes beside its {name}" for name, each in memory.items() if not each.is_whole()]
        failure = "" if status == "ok" else f"{status}: {self.c.ptxError().decode()}"
        outputs = [memory[name].bytes.view(np.float32 if name in ("boxes", "scores") else np.int32) for name in OUTPUTS]
        shapes = ((rows, 1), (rows, detections, 4), (rows, detections), (rows, detections))
        shaped: Any = tuple(output.reshape(shape) for output, shape in zip(outputs, shapes, strict=True))
        return Result(shaped, failure, findings)

    def report(self) -> dict[str, Any]:
        """Counters of the last call's launches."""
        told: dict[str, Any] = json.loads(self.c.ptxReport().decode())
        return told


def difference(got: Outputs, want: Outputs) -> str:
    """What differs in bits, or an empty text; a NaN equals every NaN."""
    for name, a, b in zip(OUTPUTS, got, want, strict=True):
        different: NDArray[np.bool_] = (a.view(np.int32) != b.view(np.int32)) & ~(np.isnan(a) & np.isnan(b))
        if different.any():
            first = tuple(np.argwhere(different)[0].tolist())
            return f"{name}: {int(different.sum())} differ, first at {first}: {a[first]} instead of {b[first]}"
    return ""
