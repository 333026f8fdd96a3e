"""Times TensorRT's own EfficientNMS_TRT, with softmax and box decoding, on the inputs that bench.py gives SSDNMS.

It runs in a process of its own, in the Python that SSD_TENSORRT_PYTHON names or in the running one: that Python needs
tensorrt (8.6 to 11), cuda-python, numpy and onnx, and no torch. Whatever goes wrong there, a crash too, comes back as
"not measured: <reason>".

The peer gets its own best case: deltas divided by the box scales, a softmax, then its fused decoder (three inputs,
box_coding 1), which decodes survivors only; a network of its own for each batch, type and threshold, with fixed shapes.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

NAME, VERSION, DOMAIN = "EfficientNMS_TRT", "1", "TRT"
CUT = 4096
CAVEATS = (
    f"looks at the best {CUT} candidates of an image only (5,000 in older versions): beyond that it drops detections",
    "boxes are not clipped, neither before the IoU nor in the output",
    "of a float16 network the scores, the decoding and the coordinates of the IoU are float16 too",
    "equal scores come in an order that may change from run to run",
)
OWN_KERNELS = ("edge_mask_convolutions", "jit_convolutions")  # the network has nothing for cuDNN or cuBLAS
TIME_LIMIT = 240.0  # seconds for one case: the build of its engine and the runs
_ROOT = Path(__file__).resolve().parents[2]


#
# In the process with TensorRT
#


def attributes(case: Mapping[str, Any]) -> dict[str, int | float]:
    """The plugin's attributes."""
    return {
        "score_threshold": float(case["score_threshold"]),
        "iou_threshold": float(case["iou_threshold"]),
        "max_output_boxes": int(case["max_detections"]),
        "background_class": int(case["background_class"]),
        "score_activation": 0,  # scores come from the softmax
        "box_coding": 1,  # centre and size
    }


def model(case: Mapping[str, Any]) -> onnx.ModelProto:
    """The network: box_deltas [B,N,4], class_logits [B,N,C] → the plugin's four outputs."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    batch, count, classes, most = (case[key] for key in ("batch", "anchors", "classes", "max_detections"))
    kind = np.dtype(case["type"])
    element = helper.np_dtype_to_tensor_dtype(kind)
    scales = np.asarray(case["box_scales"], np.float64)
    anchors = np.fromfile(case["anchors_file"], np.float32).reshape(1, count, 4)
    constants = {"inverse_scales": (1 / scales).astype(kind).reshape(1, 1, 4), "anchors": anchors.astype(kind)}
    outputs = ("num_detections", "detection_boxes", "detection_scores", "detection_classes")
    fields: dict[str, Any] = {**attributes(case)}
    nodes = [
        helper.make_node("Mul", ["box_deltas", "inverse_scales"], ["offsets"], name="offsets"),
        helper.make_node("Softmax", ["class_logits"], ["scores"], name="scores", axis=-1),
        helper.make_node(NAME, ["offsets", "scores", "anchors"], outputs, name="nms", domain=DOMAIN, **fields),
    ]
    shapes = [(batch, 1), (batch, most, 4), (batch, most), (batch, most)]
    kinds = [TensorProto.INT32, element, element, TensorProto.INT32]
    graph = helper.make_graph(
        nodes,
        "peer",
        [
            helper.make_tensor_value_info("box_deltas", element, (batch, count, 4)),
            helper.make_tensor_value_info("class_logits", element, (batch, count, classes)),
        ],
        [helper.make_tensor_value_info(*facts) for facts in zip(outputs, kinds, shapes, strict=True)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def creator(trt: Any, logger: Any, case: Mapping[str, Any]) -> Any:
    """The plugin's creator, with every attribute that is given to it.

    Raises:
        EngineError: this TensorRT does not have it.
    """
    from build.errors import EngineError
    from build.tensorrt import compat

    compat.load_plugins(trt, logger, None)
    registered = compat.plugin_creator(trt, NAME, VERSION)
    if registered is None:
        raise EngineError(f"TensorRT {compat.version(trt)} has no plugin {NAME} of version {VERSION}")
    lacking = sorted(set(attributes(case)) - {field.name for field in registered.field_names})
    if lacking:  # the parser would drop them silently
        raise EngineError(f"{NAME} of TensorRT {compat.version(trt)} has no attribute {', '.join(lacking)}")
    return registered


def build(trt: Any, case: Mapping[str, Any]) -> tuple[Any, float]:
    """The engine, and the seconds that building it took.

    Raises:
        EngineError: TensorRT refuses; says why.
    """
    from build.errors import EngineError
    from build.tensorrt import compat, plan

    log = plan.Log()
    logger = compat.logger(trt, log)
    creator(trt, logger, case)
    try:
        builder = trt.Builder(logger)
    except TypeError:
        raise EngineError(f"TensorRT's builder does not start: {log.last() or 'it gives no reason'}") from None
    network = compat.create_network(trt, builder)
    parser = trt.OnnxParser(network, logger)
    network_model = model(case)
    if not parser.parse(network_model.SerializeToString()):
        faults = "; ".join(fault.text for fault in compat.parser_faults(parser))
        raise EngineError(f"TensorRT's parser refuses the network: {faults or log.last()}")
    config = builder.create_builder_config()
    compat.set_tactic_sources(trt, config, OWN_KERNELS)
    if case["type"] == "float16":
        floats = ("box_deltas", "class_logits", "offsets", "scores", "detection_boxes", "detection_scores")
        compat.set_types(trt, network, config, dict.fromkeys(floats, "HALF"))
    started = time.monotonic()
    data = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - started
    if data is None:
        raise EngineError(f"TensorRT could not build the engine: {log.last() or 'it gives no reason'}")
    return plan.deserialize(trt, bytes(data), logger, log, NAME), seconds


def run(cuda: Any, engine: Any, case: Mapping[str, Any]) -> dict[str, Any]:
    """Times the engine as bench.py times SSDNMS: events around a CUDA graph of one call for each set of inputs.

    Raises:
        EngineError: TensorRT or CUDA refuses.
    """
    import numpy as np

    from build.errors import EngineError
    from build.tensorrt import compat, plan
    from build.tensorrt.cuda import Buffer

    table = compat.io_table(engine)
    sets = case["sets"]
    with contextlib.ExitStack() as closing:
        stream = cuda("cudaStreamCreate")
        closing.callback(cuda, "cudaStreamDestroy", stream)
        start, end = (cuda("cudaEventCreate") for _ in range(2))
        for event in (start, end):
            closing.callback(cuda, "cudaEventDestroy", event)
        calls: list[dict[str, Buffer]] = []
        for files in sets:
            buffers = {}
            for tensor in table:
                kind = np.dtype(plan.DTYPES[tensor.dtype])
                buffer = buffers[tensor.name] = closing.enter_context(Buffer(cuda, tensor.shape, kind))
                host = buffer.host(tensor.shape)
                if tensor.mode == "INPUT":
                    given = np.fromfile(files[tensor.name], case["type"])
                    if given.dtype != kind or given.size != host.size:
                        raise EngineError(f"{tensor.name} is {tensor.dtype}{list(tensor.shape)} in the engine")
                    host[...] = given.reshape(tensor.shape)
                else:
                    host.view(np.uint8)[...] = 0xA5
                buffer.upload(buffer.nbytes, stream)
            calls.append(buffers)
        cuda("cudaStreamSynchronize", stream)
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(f"no execution context: it needs {compat.device_memory(engine) >> 20} MiB of the GPU")

        def enqueue() -> None:
            for buffers in calls:
                for name, buffer in buffers.items():
                    context.set_tensor_address(name, buffer.device)
                if not context.execute_async_v3(int(stream)):
                    raise EngineError("TensorRT cannot run the engine")

        enqueue()  # TensorRT sets itself up in the first run: it must not be recorded
        cuda("cudaStreamSynchronize", stream)
        detections = []
        for buffers in calls:
            buffers["num_detections"].download(buffers["num_detections"].nbytes, stream)
            cuda("cudaStreamSynchronize", stream)
            detections.append(float(buffers["num_detections"].host((case["batch"], 1)).mean()))
        cuda("cudaStreamBeginCapture", stream, cuda.module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            enqueue()
        finally:
            captured = cuda("cudaStreamEndCapture", stream)
        closing.callback(cuda, "cudaGraphDestroy", captured)
        graph = cuda("cudaGraphInstantiate", captured, 0)
        closing.callback(cuda, "cudaGraphExecDestroy", graph)
        times = []
        for _ in range(3 + case["replays"]):
            cuda("cudaEventRecord", start, stream)
            cuda("cudaGraphLaunch", graph, stream)
            cuda("cudaEventRecord", end, stream)
            cuda("cudaEventSynchronize", end)
            times.append(float(cuda("cudaEventElapsedTime", start, end)) * 1000 / len(calls))
        times = times[3:]
        return {
            "us": round(statistics.median(times), 2),
            "us, fastest": round(min(times), 2),
            "detections per image": round(statistics.mean(detections), 1),
            "device memory, MB": round(compat.device_memory(engine) / 1e6, 1),
        }


def serve() -> None:
    """Answers each line on standard input, a case, with a line on standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not an answer
    sys.path.insert(0, str(_ROOT))

    def answer(told: Mapping[str, Any]) -> None:
        print(json.dumps(told), file=answers, flush=True)

    try:
        import numpy
        import onnx

        from build.tensorrt import compat
        from build.tensorrt.cuda import Cuda

        trt, cuda = compat.load(), Cuda()
        gpu = cuda.gpu()  # without one, TensorRT ends the process
        started = {"tensorrt": compat.version(trt), "gpu": gpu.as_dict()}
        answer(started | {"numpy": numpy.__version__, "onnx": onnx.__version__})
    except Exception as error:
        answer({"reason": _line(error)})
        return
    for line in sys.stdin:
        case = json.loads(line)
        try:
            engine, seconds = build(trt, case)
            answer(run(cuda, engine, case) | {"engine build, s": round(seconds, 1)})
            del engine
        except Exception as error:
            answer({"reason": _line(error)})


def _line(error: Exception) -> str:
    """An error in one line."""
    what = getattr(error, "what", "") or f"{type(error).__name__}: {error}"
    return " ".join(str(what).split())[:300]


#
# In the benchmark
#


def not_measured(reason: str) -> str:
    """What stands in the place of a figure."""
    return f"not measured: {reason}"


class Peer:
    """The process with TensorRT, started with the first case and again after a crash.

    Args:
        folder: for the inputs.
        python: which runs it; None = see the module.
        command: instead of this file in that Python.
    """

    def __init__(self, folder: Path, python: str | None = None, command: Sequence[str] | None = None) -> None:
        interpreter = python or os.environ.get("SSD_TENSORRT_PYTHON") or sys.executable
        self._command = list(command or (interpreter, str(Path(__file__).resolve())))
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._written: Any = None
        self.state: dict[str, Any] | str = not_measured("no case was asked for")
        self._useless = False

    def summary(self) -> dict[str, Any] | str:
        """What ran, with its caveats; or why nothing did."""
        return self.state if isinstance(self.state, str) else self.state | {"caveats": list(CAVEATS)}

    def measure(self, key: Any, inputs: Sequence[Any], settings: Any, replays: int) -> dict[str, Any] | str:
        """The peer's figures for one case; a string says why there are none.

        Args:
            key: of the inputs: equal keys mean equal inputs, which are then not written again.
            inputs: the sets (calls.Inputs), of one shape and type.
            settings: params.Settings.
            replays: how many are timed.
        """
        try:
            return self._measure(key, inputs, settings, replays)
        except Exception as error:
            self._end()
            return not_measured(_line(error))

    def _measure(self, key: Any, inputs: Sequence[Any], settings: Any, replays: int) -> dict[str, Any] | str:
        chosen = (settings.score_activation, settings.box_coding, settings.topk_per_class, settings.class_agnostic)
        if any(chosen) or inputs[0].deltas.dtype != inputs[0].logits.dtype:
            return not_measured("the peer is set up for softmax, centre coding and one type of inputs, without a cap")
        if self._process is None and not self._useless:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            told = self._answer()
            self._useless = "reason" in told  # the next start would end alike
            self.state = not_measured(told["reason"]) if self._useless else told
        if self._useless or self._process is None:
            self._end()
            return self.summary() if isinstance(self.state, str) else not_measured("the process does not start")
        if key != self._written:
            self._write(inputs)
            self._written = key
        batch, count, classes = inputs[0].logits.shape
        names = ("score_threshold", "iou_threshold", "max_detections", "background_class", "box_scales")
        case = {name: getattr(settings, name) for name in names}
        case |= {"batch": batch, "anchors": count, "classes": classes, "replays": replays}
        case |= {"type": str(inputs[0].logits.dtype)}
        case |= {"sets": [self._files(i) for i in range(len(inputs))], "anchors_file": str(self._folder / "anchors")}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(case) + "\n")
        self._process.stdin.flush()
        told = self._answer()
        return not_measured(told["reason"]) if "reason" in told else told

    def _files(self, index: int) -> dict[str, str]:
        return {name: str(self._folder / f"{name}.{index}") for name in ("box_deltas", "class_logits")}

    def _write(self, inputs: Sequence[Any]) -> None:
        self._written = None
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._folder.iterdir():
            old.unlink()
        inputs[0].anchors.tofile(self._folder / "anchors")
        for index, given in enumerate(inputs):
            files = self._files(index)
            given.deltas.tofile(files["box_deltas"])
            given.logits.tofile(files["class_logits"])

    def _answer(self) -> dict[str, Any]:
        """The next line; a process that ends or takes too long instead has the reason in it."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(TIME_LIMIT, stop)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
        if line.endswith("\n"):
            told: dict[str, Any] = json.loads(line)
            return told
        self._end()
        ended = f"the process with TensorRT ended with {process.returncode}"
        return {"reason": f"no answer in {TIME_LIMIT:.0f} s" if late.is_set() else ended}

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()


if __name__ == "__main__":
    serve()
