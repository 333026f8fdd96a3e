"""What a machine can do at most, measured: operations and bytes per second, for the fusion report's roofline.

The roofline model is Williams, Waterman and Patterson's (2009): a kernel can be no faster than its operations at the
compute ceiling, nor than its bytes at the memory ceiling.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.errors import SSDError
from build.reports.profiling import profile

# In bytes, source and target of the copy together: from a core's own cache to main memory.
WORKING_SETS = tuple(1 << bits for bits in (20, 21, 22, 24, 27, 29))
_CHUNK = 1 << 20
_ROUNDS = 3


class FusionError(SSDError):
    """A fusion report cannot be made from what is there."""


@dataclass
class Ceilings:
    """What this machine can do at most, as measured.

    Attributes:
        threads: threads used, the same as in the report's runs.
        operations: floating-point operations per second in the report's precision.
        int8: operations per second in INT8; None where it was not measured.
        bandwidth: (working set in bytes, bytes read and written per second) from small to large.
        method: how they were measured.
    """

    threads: int
    operations: float
    int8: float | None
    bandwidth: list[tuple[float, float]]
    method: str

    def bytes_per_second(self, working_set: float) -> float:
        """The bandwidth of the smallest measured working set that holds this one."""
        return next((speed for size, speed in self.bandwidth if size >= working_set), self.bandwidth[-1][1])


def measure_ceilings(threads: int, seconds: float = 1.0) -> Ceilings:
    """Measures the best that ONNX Runtime (FP32, INT8) and a copy of memory reach here.

    Every timed piece of work takes well under a millisecond: even on a busy machine some pass undisturbed.

    Args:
        threads: as in the report's runs.
        seconds: for each ceiling.
    """
    operations = int8 = 0.0
    bandwidth = dict.fromkeys(WORKING_SETS, 0.0)
    for _ in range(_ROUNDS):  # apart in time: a disturbance then does not lower a single ceiling
        operations = max(operations, _throughput(threads, seconds / _ROUNDS, int8=False))
        int8 = max(int8, _throughput(threads, seconds / _ROUNDS, int8=True))
        for size, best in bandwidth.items():
            bandwidth[size] = max(best, _copy_speed(size, threads, seconds / _ROUNDS / 4))
    return Ceilings(
        threads,
        operations,
        int8,
        [(float(size), speed) for size, speed in bandwidth.items()],
        f"best within {seconds:g} s, {threads} thread(s): a convolution 3×3, 128→128 channels, 19×19, in ONNX Runtime, "
        "in FP32 and in symmetric INT8 (Q/DQ); copies whose source and target together have the named size",
    )


def _throughput(threads: int, seconds: float, *, int8: bool) -> float:
    """Operations per second of the fastest convolution in a chain of them, by ONNX Runtime's own profile."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    length, channels, side = 6, 128, 19
    constants: dict[str, Any] = {
        "scale": np.float32(0.05),
        "zero": np.int8(0),
        "weight_scale": np.full(channels, 0.01, np.float32),
        "weight_zero": np.zeros(channels, np.int8),
        "bias": np.zeros(channels, np.float32),
    }
    nodes: list[Any] = []
    current = "x"

    def quantised(i: int, tensor: str) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [tensor, "scale", "zero"], [f"q{i}"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"q{i}", "scale", "zero"], [f"d{i}"]))
        return f"d{i}"

    for i in range(length):
        weight = random.integers(-20, 21, (channels, channels, 3, 3)).astype(np.int8)
        if int8:
            constants[f"w{i}"] = weight
            current = quantised(i, current)
            parts = [f"w{i}", "weight_scale", "weight_zero"]
            nodes.append(helper.make_node("DequantizeLinear", parts, [f"v{i}"], axis=0))
        else:
            constants[f"v{i}"] = weight.astype(np.float32) / 1000
        inputs = [current, f"v{i}", "bias"]
        nodes.append(helper.make_node("Conv", inputs, [f"y{i}"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]))
        current = f"y{i}"
    if int8:
        current = quantised(length, current)
    shape = [1, channels, side, side]
    graph = helper.make_graph(
        nodes,
        "ceiling",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = {"x": random.normal(0, 1, shape).astype(np.float32)}
    events = profile(model, feeds, 10, seconds=seconds, threads=threads)
    wanted = "QLinearConv" if int8 else "Conv"
    fastest = min(event["dur"] for event in events if event.get("args", {}).get("op_name") == wanted and event["dur"])
    return 2.0 * channels * channels * 9 * side * side / (float(fastest) * 1e-6)


def _copy_speed(working_set: int, threads: int, seconds: float) -> float:
    """Bytes read and written per second by threads that copy their part of the working set, chunk after chunk."""
    import numpy as np

    part = working_set // 2 // threads
    chunk = min(part, _CHUNK)
    speeds = [0.0] * threads

    def copy(index: int) -> None:
        source, target = np.ones(part, np.uint8), np.zeros(part, np.uint8)
        took: list[float] = []
        until = time.perf_counter() + seconds
        while len(took) * chunk < 2 * part or time.perf_counter() < until:
            start = len(took) % (part // chunk) * chunk
            started = time.perf_counter()
            np.copyto(target[start : start + chunk], source[start : start + chunk])
            took.append(time.perf_counter() - started)
        speeds[index] = 2 * chunk / statistics.median(took[part // chunk :])

    workers = [threading.Thread(target=copy, args=(index,)) for index in range(1, threads)]
    for worker in workers:
        worker.start()
    copy(0)
    for worker in workers:
        worker.join()
    return sum(speeds)


def read_ceilings(path: Path) -> Ceilings:
    """Ceilings that were measured elsewhere, from the JSON object of the same fields.

    Raises:
        FusionError: the file is not such an object.
    """
    data = read_json(path)
    try:
        pairs = sorted((float(size), float(speed)) for size, speed in data["bandwidth"])
        int8 = data.get("int8")
        ceilings = Ceilings(
            int(data.get("threads", 1)),
            float(data["operations"]),
            None if int8 is None else float(int8),
            pairs,
            str(data["method"]),
        )
        if not pairs or ceilings.operations <= 0 or any(speed <= 0 for _, speed in pairs):
            raise ValueError("a ceiling is not above 0")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FusionError(
            f"{path}: is not a description of ceilings: {error}",
            fix='write {"operations": 1e12, "int8": 4e12, "bandwidth": [[1e6, 9e11]], "method": "..."}, per second',
        ) from None
    return ceilings


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        FusionError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FusionError(f"{path}: cannot be read: {error.strerror}", fix="give the file's path") from None
    except ValueError as error:
        raise FusionError(f"{path}: no valid JSON: {error}", why="the file is truncated or of another kind") from None
