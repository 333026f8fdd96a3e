"""Runs a TensorRT plan in this process: for the gate, for audits, and to time it as trtexec does.

    with Plan(Path("model.plan"), manifest["engine"], plugin=Path("plugins/lib/libssd_nms.so")) as plan:
        outputs = plan({"images": pictures})
        print(plan.benchmark({"images": pictures}))

This has never run on a GPU. Without one, the tests cover all but the calls of CUDA and TensorRT themselves; those go to
stand-ins that have the names of the real packages and no others.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from build.errors import EngineError
from build.tensorrt import compat
from build.tensorrt.cuda import Buffer, Cuda, Gpu
from build.tensorrt.plugins import plugin_info
from build.tensorrt.timing import Run, Timing, profile_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

# TensorRT's DataType → numpy's.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
}

# First match wins: what TensorRT logged when it refused a plan, and why.
_REFUSALS = (
    (
        r"(?i)could not find plugin|Cannot find plugin|plugin(?:Creator)? .*not found|getPluginCreator",
        "the plan holds a plugin that is not loaded here, or another version of it",
    ),
    (
        r"(?i)version tag does not match|incompatible.*version|serialized engine.*version|Current Version",
        "the plan is of another TensorRT",
    ),
    (r"(?i)incompatible device|compute capability|different (?:GPU|device)", "the plan is of another GPU"),
    (r"(?i)magic ?tag|corrupt|checksum|deserializ|truncat|Assertion .*size", "the file is truncated or no plan at all"),
)


class Log:
    """Keeps the errors that TensorRT logs: call it with severity and message."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, severity: str, message: str) -> None:
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self.errors.append(message)

    def last(self) -> str:
        """The first error: those after it only follow from it. Empty where there is none."""
        return self.errors[0] if self.errors else ""


def foreign(engine: Mapping[str, Any], gpu: Gpu, tensorrt: str) -> str:
    """Why this machine cannot run a plan, naming both sides; empty where it can.

    Args:
        engine: the manifest's part `engine`.
        gpu: of this machine.
        tensorrt: its version here.
    """
    options = engine.get("options", {})
    built, here = str(engine["tensorrt"]), tensorrt
    older = options.get("version_compatible") and compat.version_numbers(built) <= compat.version_numbers(here)
    if built != here and not older:
        return f"it was built with TensorRT {built}, here is TensorRT {here}"
    planned = engine["gpu"]
    capability = planned["compute_capability"]
    level = options.get("hardware_compatible", "none")
    fits = {
        "none": (planned["name"], capability) == (gpu.name, gpu.compute_capability),
        "same_compute_capability": capability == gpu.compute_capability,
        "ampere_plus": compat.version_numbers(gpu.compute_capability) >= (8, 0),
    }
    if not fits[level]:
        return (
            f"it was built for {planned['name']} (compute capability {capability}), "
            f"here is {gpu.name} ({gpu.compute_capability})"
        )
    return ""


def deserialize(trt: Any, data: bytes, logger: Any, log: Log, what: str, *, version_compatible: bool = False) -> Any:
    """The engine of a plan, whose plugins are loaded already.

    Raises:
        EngineError: TensorRT refuses it; says why, as far as its log shows.
    """
    runtime = trt.Runtime(logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        logged = "\n".join(log.errors)
        why = next((why for pattern, why in _REFUSALS if re.search(pattern, logged)), "")
        raise EngineError(
            f"{what}: TensorRT {compat.version(trt)} cannot read the plan: {log.last() or 'it gives no reason'}",
            why=why,
            fix="build it on this machine: ./invoke build-engines --runtime tensorrt --force",
        )
    return engine


class Plan:
    """A plan that is ready to run; one thread at a time.

    Args:
        path: the plan.
        engine: the manifest's part `engine`; None = there is none, then only TensorRT itself can tell what is wrong.
        plugin: the library with the plugin that it holds; None = it holds none, or one that is loaded already.
        cuda_graphs: whether the second and later runs of a batch size are replayed from a CUDA graph.
        trt, cuda: the packages; None = the installed ones.

    Raises:
        EngineError: the plan is damaged, of another machine, or needs a plugin that is not there.
        RuntimeUnavailableError: there is no TensorRT, no cuda-python or no GPU here.
    """

    def __init__(
        self,
        path: Path,
        engine: Mapping[str, Any] | None = None,
        *,
        plugin: Path | None = None,
        cuda_graphs: bool = False,
        trt: Any = None,
        cuda: Cuda | None = None,
    ) -> None:
        self._trt = trt = trt or compat.load()
        self._cuda = cuda or Cuda()
        gpu = self._cuda.gpu()
        data = _checked(path, engine, gpu, compat.version(trt), plugin)
        self._log = Log()
        self._logger = compat.logger(trt, self._log)  # must outlive the engine
        compat.load_plugins(trt, self._logger, plugin)
        version_compatible = bool(engine and engine.get("options", {}).get("version_compatible"))
        self._engine = deserialize(trt, data, self._logger, self._log, str(path), version_compatible=version_compatible)
        self._closing = contextlib.ExitStack()
        self._graphs: dict[int, Any] = {}
        self._seen: set[int] = set()
        self.cuda_graphs = cuda_graphs
        try:
            self._open()
        except BaseException:
            self._closing.close()
            raise

    def _open(self) -> None:
        import numpy as np

        self.tensors = compat.io_table(self._engine)
        self._inputs = [tensor for tensor in self.tensors if tensor.mode == "INPUT"]
        self._outputs = [tensor for tensor in self.tensors if tensor.mode == "OUTPUT"]
        self.max_batch = max(shapes[2][0] for tensor in self._inputs for shapes in tensor.profiles)
        # What is destroyed last is made first.
        self._stream = self._cuda("cudaStreamCreate")
        self._closing.callback(self._cuda, "cudaStreamDestroy", self._stream)
        self._events = [self._cuda("cudaEventCreate") for _ in range(4)]
        for event in self._events:
            self._closing.callback(self._cuda, "cudaEventDestroy", event)
        self._buffers = {
            tensor.name: self._closing.enter_context(
                Buffer(self._cuda, (self.max_batch, *tensor.shape[1:]), np.dtype(DTYPES[tensor.dtype]))
            )
            for tensor in self.tensors
        }
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(
                f"TensorRT cannot make an execution context: {self._log.last()}",
                why=f"it needs {compat.device_memory(self._engine) / 2**20:.0f} MiB on the GPU",
                fix="end other programs on the GPU (nvidia-smi names them)",
            )
        self._closing.callback(self._drop_context)
        self._profile = 0

    def _drop_context(self) -> None:
        for graph in self._graphs.values():
            self._cuda("cudaGraphExecDestroy", graph)
        self._graphs.clear()
        self._context = None

    def close(self) -> None:
        """Frees everything that it holds on the GPU."""
        self._cuda("cudaStreamSynchronize", self._stream)
        self._closing.close()
        self._engine = None

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """One run: inputs by name, all of the same batch → outputs by name, in memory of their own.

        Raises:
            EngineError: an input is missing, of another type or shape, or the batch is in no profile.
        """
        batch = self._fill(inputs)
        self._upload(batch)
        self._enqueue(batch)
        self._download(batch)
        self._cuda("cudaStreamSynchronize", self._stream)
        return {t.name: self._buffers[t.name].host((batch, *t.shape[1:])).copy() for t in self._outputs}

    def benchmark(
        self, inputs: Mapping[str, NDArray[Any]], *, seconds: float = 3.0, warmup: float = 0.5, least: int = 10
    ) -> Timing:
        """Runs again and again, one after another.

        Args:
            inputs: as for a call.
            seconds: how long at least.
            warmup: seconds before that do not count.
            least: how many runs at least.
        """
        batch = self._fill(inputs)
        runs: list[Run] = []
        end = time.perf_counter() + warmup
        while time.perf_counter() < end:
            self._timed(batch)
        started = time.perf_counter()
        while len(runs) < least or time.perf_counter() < started + seconds:
            runs.append(self._timed(batch))
        return Timing.of(runs, batch, time.perf_counter() - started, bool(self._graphs.get(batch)))

    def layer_times(self, inputs: Mapping[str, NDArray[Any]], runs: int = 50) -> list[dict[str, Any]]:
        """Each layer's time (`profile_rows`), measured apart from `benchmark`: the measuring costs time."""
        times: dict[str, list[float]] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[misc, name-defined]
            def __init__(self, trt: Any) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.setdefault(layer_name, []).append(ms)

        batch = self._fill(inputs)
        self._upload(batch)
        self._launch(batch)
        self._cuda("cudaStreamSynchronize", self._stream)
        self._context.profiler = Profiler(self._trt)
        self._context.enqueue_emits_profile = True
        for _ in range(runs):
            self._launch(batch)
            self._cuda("cudaStreamSynchronize", self._stream)
        # TensorRT keeps a profiler until another takes its place: the context is made anew.
        self._drop_context()
        self._seen.clear()
        self._profile = 0
        self._context = self._engine.create_execution_context()
        return profile_rows(times)

    def layers(self) -> dict[str, Any]:
        """The engine inspector's JSON, as trtexec --exportLayerInfo writes it."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        layers: dict[str, Any] = json.loads(text)
        return layers

    def _fill(self, inputs: Mapping[str, NDArray[Any]]) -> int:
        """Writes the inputs into pinned memory and sets their shapes; the batch."""
        wanted = {tensor.name for tensor in self._inputs}
        if set(inputs) != wanted:
            raise EngineError(f"the plan takes {sorted(wanted)}, but was given {sorted(inputs)}")
        batch = len(next(iter(inputs.values())))
        for tensor in self._inputs:
            array, kind = inputs[tensor.name], DTYPES[tensor.dtype]
            if array.dtype != kind or array.shape != (batch, *tensor.shape[1:]):
                raise EngineError(
                    f"input {tensor.name!r} is {array.dtype}{list(array.shape)}, "
                    f"but must be {kind}{[batch, *tensor.shape[1:]]}"
                )
        profile = choose_profile(batch, [(low[0], high[0]) for low, _, high in self._inputs[0].profiles])
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._handle()):
                raise EngineError(f"TensorRT cannot switch to profile {profile}: {self._log.last()}")
            self._cuda("cudaStreamSynchronize", self._stream)
            self._profile = profile
        for tensor in self._inputs:
            self._buffers[tensor.name].host((batch, *tensor.shape[1:]))[...] = inputs[tensor.name]
            self._context.set_input_shape(tensor.name, (batch, *tensor.shape[1:]))
        for tensor in self.tensors:
            self._context.set_tensor_address(tensor.name, self._buffers[tensor.name].device)
        return batch

    def _handle(self) -> int:
        return int(self._stream)

    def _upload(self, batch: int) -> None:
        self._each(self._inputs, batch, Buffer.upload)

    def _download(self, batch: int) -> None:
        self._each(self._outputs, batch, Buffer.download)

    def _each(self, tensors: Sequence[compat.Tensor], batch: int, copy: Callable[[Buffer, int, Any], None]) -> None:
        for tensor in tensors:
            buffer = self._buffers[tensor.name]
            copy(buffer, batch * math.prod(tensor.shape[1:]) * buffer.dtype.itemsize, self._stream)

    def _launch(self, batch: int) -> None:
        if not self._context.execute_async_v3(self._handle()):
            raise EngineError(f"TensorRT cannot run batch {batch}: {self._log.last() or 'it gives no reason'}")

    def _enqueue(self, batch: int) -> None:
        """Launches once: as a graph where one is kept, which the second run of a batch size records."""
        if batch in self._graphs:
            self._cuda("cudaGraphLaunch", self._graphs[batch], self._stream)
            return
        if self.cuda_graphs and batch in self._seen:
            mode = self._cuda.module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self._cuda("cudaStreamBeginCapture", self._stream, mode)
            try:
                self._launch(batch)
            finally:
                graph = self._cuda("cudaStreamEndCapture", self._stream)
            self._graphs[batch] = self._cuda("cudaGraphInstantiate", graph, 0)
            self._cuda("cudaGraphDestroy", graph)
            self._cuda("cudaGraphLaunch", self._graphs[batch], self._stream)
            return
        self._seen.add(batch)  # TensorRT sets itself up in the first run: it must not be recorded
        self._launch(batch)

    def _timed(self, batch: int) -> Run:
        first, uploaded, computed, downloaded = self._events
        self._cuda("cudaEventRecord", first, self._stream)
        self._upload(batch)
        self._cuda("cudaEventRecord", uploaded, self._stream)
        started = time.perf_counter()
        self._enqueue(batch)
        enqueue = (time.perf_counter() - started) * 1000
        self._cuda("cudaEventRecord", computed, self._stream)
        self._download(batch)
        self._cuda("cudaEventRecord", downloaded, self._stream)
        self._cuda("cudaStreamSynchronize", self._stream)
        marks = [(first, uploaded), (uploaded, computed), (computed, downloaded)]
        h2d, compute, d2h = (float(self._cuda("cudaEventElapsedTime", *pair)) for pair in marks)
        return Run(h2d, compute, d2h, enqueue)


def choose_profile(batch: int, ranges: Sequence[tuple[int, int]]) -> int:
    """The narrowest profile that holds a batch.

    Args:
        batch: how many images.
        ranges: (min, max) of each profile.

    Raises:
        EngineError: none does.
    """
    fitting = [(high - low, index) for index, (low, high) in enumerate(ranges) if low <= batch <= high]
    if not fitting:
        spans = ", ".join(f"{low} to {high}" for low, high in ranges)
        raise EngineError(f"batch {batch} is in no profile of the plan (they hold {spans})", fix="send another batch")
    return min(fitting)[1]


def _checked(path: Path, engine: Mapping[str, Any] | None, gpu: Gpu, tensorrt: str, plugin: Path | None) -> bytes:
    """The plan's bytes, after all that can be said of them without TensorRT.

    Raises:
        EngineError: see `Plan`.
    """
    fix = "build it on this machine: ./invoke build-engines --runtime tensorrt --force"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}", fix=fix) from None
    if engine is None:
        return data
    if hashlib.sha256(data).hexdigest() != engine["plan_sha256"]:
        raise EngineError(
            f"{path} ({len(data)} bytes) is not the plan that its manifest describes",
            why="the file was truncated or exchanged",
            fix=fix,
        )
    difference = foreign(engine, gpu, tensorrt)
    if difference:
        raise EngineError(f"{path} cannot run here: {difference}", fix=fix)
    if plugin is not None:
        keys, wanted = ("plugin", "plugin_version"), engine["plugin"]
        info = plugin_info(plugin) if plugin.is_file() else None
        if info is None or any(info[key] != wanted[key] for key in keys):
            there = f"holds {' '.join(info[key] for key in keys)}" if info else "is not there"
            raise EngineError(
                f"{path} needs the plugin {' '.join(wanted[key] for key in keys)} of {wanted['file']}, "
                f"but {plugin} {there}",
                fix="build it: ./invoke build-plugins",
            )
    return data
