"""Triton `python` backend model: one session on the CPU behind the contract of docs/design.md.

Published as `<version>/model.py` beside `<version>/model.onnx`; it reads nothing but that folder and config.pbtxt.
Every request runs alone: the session reads the request's own memory (no concatenation, no copy), so that a row's bits
never depend on its neighbours, and one bad request is answered with its own error while the others of the call go on.
"""

import contextlib
import ctypes
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

CONTRACT = "1"
# Triton's type name → ONNX Runtime's, for the types of the contract.
ORT_TYPES = {"TYPE_UINT8": "tensor(uint8)", "TYPE_INT32": "tensor(int32)", "TYPE_FP32": "tensor(float)"}
THRESHOLDS = ("score_threshold", "iou_threshold")
TAKEN = b"used_dltensor"
# Upper bounds of the histograms' buckets.
EXECUTION_BOUNDS = [
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10),
]
DETECTIONS_BOUNDS = [0, 1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000]
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = [ctypes.py_object, ctypes.c_char_p]


class TritonPythonModel:
    """What the backend calls: `initialize` once per instance, `execute` per call, `finalize` at the end."""

    def initialize(self, args):
        """Loads the session, checks it against config.pbtxt and runs one blank image through it.

        Args:
            args: Triton's strings: `model_config` (JSON), `model_repository`, `model_version`, ...

        Raises:
            TritonModelException: the model cannot be served as configured; Triton reports the text as the load failure.
        """
        config = json.loads(args["model_config"])
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        try:
            self._session = _session(path, config)
            _check_contract(self._session, config)
            self._warm_up(config)
            self._metrics = _Metrics(config["name"], args["model_version"])
        except _RefusedError as error:
            raise pb_utils.TritonModelException(f"{config['name']} version {args['model_version']}: {error}") from None
        except Exception as error:
            message = f"{config['name']} version {args['model_version']}: ONNX Runtime cannot run {path}: {error}"
            raise pb_utils.TritonModelException(message) from error

    def execute(self, requests):
        """Answers every request, each with its result or with its own error."""
        # The server's queue drops what its client gave up; of several that it hands over together, some may be given
        # up while the others run. (Asking costs a message to the server, so a single one is not asked.)
        several = len(requests) > 1
        return [_given_up() if several and request.is_cancelled() else self._answer(request) for request in requests]

    def finalize(self):
        """Frees the session before the interpreter goes."""
        self._session = None
        self._metrics.close()

    def _answer(self, request):
        begun = time.monotonic()
        try:
            # By DLPack, which copies nothing. The backend's own conversions (as_numpy, Tensor(name, array)) take every
            # element for 0 bytes wide where a stub from before NumPy 2 meets NumPy 2.
            feeds = {tensor.name(): np.from_dlpack(tensor) for tensor in request.inputs()}
            for name in THRESHOLDS:
                if name in feeds:
                    _check_threshold(name, feeds[name])
            arrays = self._session.run(self._outputs, feeds)
            tensors = [_tensor(name, array) for name, array in zip(self._outputs, arrays, strict=True)]
            self._metrics.count_answer(time.monotonic() - begun, _counts(request, self._outputs, arrays))
            return pb_utils.InferenceResponse(output_tensors=tensors)
        except _RefusedError as error:
            self._metrics.count_client_error()
            return _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            pb_utils.Logger.log_error(f"request {request.request_id() or '(no id)'} failed: {error}")
            return _failed(f"ONNX Runtime failed on this request: {error}", pb_utils.TritonError.INTERNAL)

    def _warm_up(self, config):
        """One blank image: the first client does not pay for first allocations, and what cannot run does not load."""
        self._outputs = [output["name"] for output in config["output"]]
        feeds = {
            entry["name"]: np.zeros([1, *map(int, entry["dims"])], pb_utils.triton_string_to_numpy(entry["data_type"]))
            for entry in config["input"]
        }
        for entry, array in zip(config["output"], self._session.run(self._outputs, feeds), strict=True):
            expected = [1, *map(int, entry["dims"])]
            if list(array.shape) != expected:
                raise _RefusedError(
                    f"output {entry['name']} has shape {list(array.shape)}, config.pbtxt says {expected}"
                )


class _RefusedError(Exception):
    """A finding of this file, worded for the person who reads it."""


def _tensor(name, array):
    """An output that shares the array's memory."""
    capsule = array.__dlpack__()
    tensor = pb_utils.Tensor.from_dlpack(name, capsule)
    # The protocol's name of a capsule that was taken. Stubs give it another, and NumPy, which then believes that nobody
    # took it, prints a traceback for every output.
    _set_capsule_name(capsule, TAKEN)
    return tensor


def _counts(request, names, arrays):
    """The detections of each image; nothing where the request does not ask for them."""
    wanted = "num_detections" in request.requested_output_names()
    return arrays[names.index("num_detections")].ravel().tolist() if wanted else []


def _failed(message, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _given_up():
    return _failed("the client gave the request up before it ran", pb_utils.TritonError.CANCELLED)


class _Metrics:
    """The metrics of this version, as build/publish/backends/ssd_onnxruntime/metrics.h has them.

    Nothing is counted where the server has no metrics; no histogram where its stub knows none (2.51 does).
    """

    def __init__(self, model, version):
        self._families = []
        labels = {"model": model, "version": version}
        self._client_errors = self._metric(
            "COUNTER",
            "ssd_client_errors",
            "Requests that were answered as invalid: their client's fault, and no failure of the model",
            labels,
        )
        self._execution = self._metric(
            "HISTOGRAM",
            "ssd_execution_seconds",
            "Seconds from the moment an instance takes a request to its answer, of answered requests; without the "
            "queue",
            labels,
            buckets=EXECUTION_BOUNDS,
        )
        self._detections = self._metric(
            "HISTOGRAM",
            "ssd_detections_per_image",
            "Detections of an image at the thresholds of its request; requests that do not ask for num_detections are "
            "left out",
            labels,
            buckets=DETECTIONS_BOUNDS,
        )

    def count_client_error(self):
        if self._client_errors is not None:
            with contextlib.suppress(Exception):
                self._client_errors.increment(1)

    def count_answer(self, seconds, detections):
        """Counts an answered request: its seconds, and the detections of each of its images."""
        with contextlib.suppress(Exception):
            if self._execution is not None:
                self._execution.observe(seconds)
            if self._detections is not None:
                for count in detections:
                    self._detections.observe(count)

    def close(self):
        """Frees the metrics before their families, as Triton wants it."""
        self._client_errors = self._execution = self._detections = None
        self._families.clear()

    def _metric(self, kind, name, description, labels, **arguments):
        try:
            family = pb_utils.MetricFamily(
                name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind)
            )
            metric = family.Metric(labels=labels, **arguments)
        except Exception:
            return None
        self._families.append(family)
        return metric


def _content(path, config):
    """model.onnx, as it was published: the bytes that were compared are the ones that are loaded."""
    if not path.is_file():
        raise _RefusedError(f"{path} is missing: publish the model again")
    content = path.read_bytes()
    digest = _parameter(config, "model_sha256")
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise _RefusedError(
            f"{path} is not the file that was published (SHA-256 differs): it is damaged or half-copied; publish the "
            "model again"
        )
    return content


def _session(path, config):
    """The session of one instance, with as many threads as config.pbtxt's parameter `threads` gives each instance."""
    content = _content(path, config)
    try:
        import onnxruntime
    except ImportError as error:
        raise _RefusedError(
            f"the Python that the server runs models with ({sys.prefix}) cannot import onnxruntime ({error}): install "
            "it there, or put the bin folder of the environment that has it first on PATH"
        ) from error
    threads = _threads(config)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # An explicit number also keeps ONNX Runtime from pinning its threads: instances would be pinned to the same cores.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads that spin take their core from the server's own threads and from the other instances.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _parameter(config, name, default=""):
    return config.get("parameters", {}).get(name, {}).get("string_value", default)


def _threads(config):
    text = _parameter(config, "threads", "1")
    if not text.isdigit() or int(text) < 1:
        raise _RefusedError(f"parameter threads is {text!r}, expected a whole number of at least 1")
    return int(text)


def _check_contract(session, config):
    """Compares names, types and shapes of config.pbtxt with the ONNX file's, and the version of the contract.

    Raises:
        _RefusedError: naming the first difference.
    """
    contract = _parameter(config, "contract")
    if contract != CONTRACT:
        raise _RefusedError(
            f"config.pbtxt speaks contract {contract!r}, this model.py speaks {CONTRACT!r}: publish again"
        )
    sides = (("input", config["input"], session.get_inputs()), ("output", config["output"], session.get_outputs()))
    for side, entries, found in sides:
        held = {tensor.name: tensor for tensor in found}
        named = {entry["name"] for entry in entries}
        if named != set(held):
            raise _RefusedError(f"config.pbtxt has the {side}s {sorted(named)}, model.onnx has {sorted(held)}")
        for entry in entries:
            name, tensor = entry["name"], held[entry["name"]]
            if tensor.type != ORT_TYPES.get(entry["data_type"]):
                raise _RefusedError(
                    f"{side} {name} is {entry['data_type']} in config.pbtxt and {tensor.type} in model.onnx"
                )
            # ONNX Runtime gives a name or None in place of a size that the file leaves open; the first is the batch.
            sizes = [int(size) for size in entry["dims"]]
            batch, *rest = tensor.shape
            same = len(rest) == len(sizes) and all(
                not isinstance(size, int) or size == wanted for size, wanted in zip(rest, sizes, strict=True)
            )
            if not same or isinstance(batch, int):
                raise _RefusedError(
                    f"{side} {name} is [batch, *{sizes}] in config.pbtxt and {tensor.shape} in model.onnx"
                )


def _check_threshold(name, values):
    # Not by NumPy: for the one value of most requests its operators cost six times as much.
    values = values.ravel().tolist()
    if not all(0 <= value <= 1 for value in values):  # false for NaN as well
        raise _RefusedError(f"{name} must lie in 0..1, got {values}")
