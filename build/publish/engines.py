"""Which engine serves a model on this CPU: ONNX Runtime or OpenVINO, compared side by side if the spec leaves it open.

build/throughput.py compares them as they serve. Where no server is, they are timed in this process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import files
from build.contract import Target
from build.errors import OptionError, RuntimeUnavailableError
from build.publish import openvino
from build.publish.openvino import NAME, OTHER
from build.spec import Spec

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

FILE = "openvino.onnx"  # beside an artifact: what OpenVINO gets of it
ROUNDS = 15
EQUAL = 1.02  # times as fast is no difference: ONNX Runtime is there anyway
_PATIENCE = 600


@dataclass(frozen=True)
class Choice:
    """The engines that may serve an ONNX file.

    Attributes:
        order: onnxruntime or openvino, or both: the second serves if the first does not pass the gate.
        why: the reason, with both figures where both were measured.
        served_ips: images per second through a real server, the median of several rounds, by engine; empty if they
            were not served.
        ms: milliseconds of one picture on the threads of one instance, the fastest of ROUNDS runs, by engine; empty if
            they were not timed in this process.
    """

    order: tuple[str, ...]
    why: str
    served_ips: Mapping[str, float] = field(default_factory=dict)
    ms: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, gain: float, figures: str, **measured: Mapping[str, float]) -> Choice:
        """The faster one first, by how many times as fast OpenVINO is; `figures` and `measured` are told."""
        order = (NAME, OTHER) if gain > EQUAL else (OTHER, NAME)
        return cls(order, f"OpenVINO is {gain:.2f} times as fast; {figures}", **measured)

    def as_dict(self, engine: str) -> dict[str, Any]:
        """For the manifest; `engine` is what serves in the end."""
        return {"engine": engine, "why": self.why, "served_ips": dict(self.served_ips), "ms": dict(self.ms)}


def require(spec: Spec, target: Target) -> None:
    """That an engine here can serve a precision.

    Raises:
        OptionError: the spec wants ONNX Runtime, which does not compute in BF16 on a CPU.
        RuntimeUnavailableError: this CPU has no instructions for BF16.
    """
    if target.runtime != OTHER or target.precision != "bf16":
        return
    if spec.serving.engine == OTHER:
        raise OptionError(
            f"{spec.path}: the engine is onnxruntime, which does not compute in BF16 on a CPU",
            fix='set [serving] engine = "auto" or "openvino", or build --precision fp32 or int8',
        )
    openvino.require(target.precision)


def choose(
    spec: Spec,
    target: Target,
    graph: onnx.ModelProto,
    artifact: Path,
    picture: NDArray[Any],
    threads: int,
    serve: Callable[[Mapping[str, Path]], Choice] | None,
) -> Choice:
    """The engines to try for a model, the best first; writes OpenVINO's file beside the artifact where it is one.

    Args:
        spec: the model.
        target: what it is built for.
        graph: the typed graph, as TensorRT would get it.
        artifact: ONNX Runtime's file.
        picture: UINT8 [1,H,W,3].
        threads: of an instance.
        serve: serves the files of the engines that are open and compares them; None = no server is here.

    Raises:
        RuntimeUnavailableError: OpenVINO was asked for, or is needed, and cannot be installed or run the file.
    """
    asked = spec.serving.engine == NAME
    if spec.serving.engine == OTHER:
        return Choice((OTHER,), "asked for")
    needed = asked or target.precision == "bf16"
    try:
        openvino.install()
    except RuntimeUnavailableError as error:
        if needed:
            raise
        return Choice((OTHER,), error.what)
    path = artifact.with_name(FILE)
    files.write(path, openvino.readable(graph).SerializeToString(deterministic=True))
    if target.precision == "bf16":
        return Choice((NAME,), "asked for" if asked else "ONNX Runtime does not compute in BF16 on a CPU")
    if serve:
        choice = serve({NAME: path} if asked else {OTHER: artifact, NAME: path})
    else:
        feeds, hint = spec.nms.feeds(picture), openvino.hint(target.precision)
        choice = compare({OTHER: artifact, NAME: path}, feeds, threads, hint)
    if not asked:
        return choice
    if NAME not in choice.order:
        raise RuntimeUnavailableError(choice.why, fix='set [serving] engine = "onnxruntime" or "auto"')
    return replace(choice, order=(NAME,), why="; ".join(filter(None, ("asked for", choice.why))))


def compare(
    paths: Mapping[str, Path], feeds: Mapping[str, NDArray[Any]], threads: int, precision: str = "f32"
) -> Choice:
    """The engines, the faster first, timed in turn in a process of their own: one that cannot compile a file may crash.

    Args:
        paths: the ONNX file of each engine.
        feeds: one picture's inputs.
        threads: of an instance.
        precision: in which OpenVINO computes what is not quantised.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "feeds.npz"
        np.savez(inputs, **feeds)  # type: ignore[arg-type]
        given = [str(paths[OTHER]), str(paths[NAME]), str(inputs), str(threads), precision]
        command = [sys.executable, "-m", __name__, *given]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, cwd=files.ROOT)
            ms = {name: float(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
            last = (
                done.stderr.strip().splitlines()[-1:] if isinstance(error, (ValueError, IndexError)) else [str(error)]
            )
            reason = last[0] if last else f"its process ended with status {done.returncode}"
            return Choice((OTHER,), f"OpenVINO cannot run this file here: {reason}")
    figures = ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
    return Choice.of(ms[OTHER] / ms[NAME], f"one picture on {threads} thread(s): {figures}", ms=ms)


def _time(paths: Mapping[str, Path], inputs: Path, threads: int, precision: str) -> dict[str, float]:
    """Milliseconds of the fastest run by engine, in turn: other work on the machine only adds to a run.

    On one thread the time is the processor's, which leaves out when other programs had the core.
    """
    import numpy as np
    import onnx

    from build import session

    with np.load(inputs) as held:
        feeds = dict(held)
    runs = {
        OTHER: session.runner(onnx.load(paths[OTHER]), threads=threads, spinning=False),
        NAME: openvino.runner(paths[NAME], threads, precision),
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
    first, second, given, count, kind = sys.argv[1:]
    print(json.dumps(_time({OTHER: Path(first), NAME: Path(second)}, Path(given), int(count), kind)))
