"""OpenVINO as the engine on a CPU: its installation, its sessions, and which of the two engines is faster here.

It lies in an environment folder of its own (`.venv/openvino`), from requirements/openvino.lock, and is installed when a
spec asks for it. Served through Triton's python backend (backends/python/openvino_session.py).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import optional
from build.errors import RuntimeUnavailableError
from build.files import ROOT

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from build.session import Runner

NAME, OTHER = "openvino", "onnxruntime"
PACKAGES, LOCK = optional.folder_of(NAME), optional.lock_of(NAME)
SESSION = Path(__file__).resolve().parent / "backends" / "python" / "openvino_session.py"
ROUNDS = 15
MARGIN = 1.1  # times faster: the C++ backend that ONNX Runtime has serves so much faster than the python backend
_PATIENCE = 600


@dataclass(frozen=True)
class Choice:
    """Which engine serves an ONNX file.

    Attributes:
        engine: onnxruntime or openvino.
        why: the reason, with both figures where both were timed.
        ms: milliseconds of one picture on the threads of one instance, the fastest of ROUNDS runs, by engine; empty if
            nothing was timed.
    """

    engine: str
    why: str
    ms: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {"engine": self.engine, "why": self.why, "ms": dict(self.ms)}


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


def runner(path: Path, threads: int = 1, precision: str = "f32") -> Runner:
    """A session in this process, as an instance has it.

    Args:
        path: an ONNX file that `readable` made.
        threads: of the session.
        precision: f32, or bf16 on a CPU with its instructions (`has_bf16`).

    Raises:
        RuntimeUnavailableError: OpenVINO cannot be imported, or cannot run the file.
    """
    spec = importlib.util.spec_from_file_location("ssd_openvino_session", SESSION)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        session = module.Session(path, threads, str(PACKAGES), precision)
    except Exception as error:  # OpenVINO's own exceptions have no common type
        raise RuntimeUnavailableError(
            f"OpenVINO cannot run {path}: {str(error).strip().splitlines()[-1]}",
            fix='set [serving] engine = "onnxruntime"',
        ) from None
    names = [tensor.name for tensor in session.get_outputs()]

    def run(feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def has_bf16() -> bool:
    """Whether this CPU multiplies BF16 (AVX512-BF16 or AMX)."""
    try:
        return any(name in Path("/proc/cpuinfo").read_text() for name in ("avx512_bf16", "amx_bf16"))
    except OSError:
        return False


def choose(files: Mapping[str, Path], feeds: Mapping[str, NDArray[Any]], threads: int) -> Choice:
    """The faster engine, timed in turn in a process of its own, because an engine that cannot compile a file may crash.

    Args:
        files: the ONNX file of each engine.
        feeds: one picture's inputs.
        threads: of an instance.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "feeds.npz"
        np.savez(inputs, **feeds)  # type: ignore[arg-type]
        command = [sys.executable, "-m", __name__, str(files[OTHER]), str(files[NAME]), str(inputs), str(threads)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, cwd=ROOT)
            ms = {name: float(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
            last = (
                done.stderr.strip().splitlines()[-1:] if isinstance(error, (ValueError, IndexError)) else [str(error)]
            )
            reason = last[0] if last else f"its process ended with status {done.returncode}"
            return Choice(OTHER, f"OpenVINO cannot run this file here: {reason}", {})
    gain = ms[OTHER] / ms[NAME]
    figures = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    why = (
        f"OpenVINO is {gain:.2f} times as fast, {MARGIN:g} are asked for; one picture on {threads} thread(s): {figures}"
    )
    return Choice(NAME if gain >= MARGIN else OTHER, why, ms)


def _time(files: Mapping[str, Path], inputs: Path, threads: int) -> dict[str, float]:
    """Milliseconds of the fastest run by engine, in turn: other work on the machine only adds to a run.

    On one thread the time is the processor's, which leaves out when other programs had the core.
    """
    import numpy as np
    import onnx

    from build import session

    with np.load(inputs) as held:
        feeds = dict(held)
    runs = {
        OTHER: session.runner(onnx.load(files[OTHER]), threads=threads, spinning=False),
        NAME: runner(files[NAME], threads),
    }
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, ROUNDS):
        for name, run in runs.items():
            begun = clock()
            run(feeds)
            if turn >= 0:
                times[name].append((clock() - begun) * 1e3)
    return {name: min(values) for name, values in times.items()}


if __name__ == "__main__":
    first, second, given, count = sys.argv[1:]
    print(json.dumps(_time({OTHER: Path(first), NAME: Path(second)}, Path(given), int(count))))
