"""What a precision gains on a CPU: whole models timed side by side, and what ONNX Runtime does in each layer."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract, files
from build.gate import datasets
from build.graph.attach import before_nms
from build.publish import openvino
from build.quantization import qdq
from build.quantization.candidates import Candidate, all_calibrators, candidates
from build.reports import cpu
from build.reports.profiling import profile
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.table import Table

    from build.session import Runner


_WARM_UP = 3  # rounds
_SHOWN = 8  # kernels
_SUFFIX = re.compile(r"(_nchwc|_token_\d+|_nhwc|_quant)+$")  # of ONNX Runtime's names for what it fused
_FLOAT = frozenset(
    [
        *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "MatMul", "FusedMatMul", "Add", "Mul", "Clip"),
        *("Relu", "LeakyRelu", "PRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Elu", "Tanh", "Softmax", "Resize"),
        *("MaxPool", "AveragePool", "GlobalAveragePool"),
    ]
)
_REORDER = "another layout for a floating-point convolution: quantise its neighbours too, or leave them out, too"
_CONVERSIONS = {
    "QuantizeLinear": "floats become integers: behind a layer that is left in floating point, or at the input",
    "DequantizeLinear": "integers become floats: before a layer that is left in floating point, or at the heads",
    "ReorderInput": _REORDER,
    "ReorderOutput": _REORDER,
    "Transpose": "another layout: integer kernels want channels last",
    "Cast": "another type",
}


def measure(
    spec: Spec,
    artifacts: Path,
    *,
    precisions: Sequence[str] = ("fp32", "int8"),
    rounds: int = 60,
    console: Console | None = None,
) -> dict[str, Any]:
    """Times the graphs of several precisions in ONNX Runtime, on one thread and one picture, in turn in each round.

    Args:
        spec: the model.
        artifacts: where calibration is kept; `audit/speed.json` in it receives the result.
        precisions: what to time; the first is what the others are compared with.
        rounds: how often each is timed; the result has the medians.
        console: for the tables.

    Returns:
        {precision: {whole_ms, before_nms_ms, whole_ratio, before_nms_ratio}, "layers": [{conv, before_ms, after_ms,
        why}], "kernels": {precision: [{node, kernel, ms, what, advice}]}, "cpu": its name}. A layer has its time in the
        first and in the last precision; `why` is the likely reason where the last is not faster. Kernels are those of a
        quantised precision that stayed in floating point, and conversions, the longest first. Where OpenVINO is
        installed, its rows are called "fp32, OpenVINO" and so on.

    Raises:
        SSDError: there are no pictures, or a graph cannot be made or run.
    """
    from rich.console import Console

    show = console or Console(highlight=False)
    pictures = datasets.held_out(spec, artifacts / "datasets")
    pixels = [datasets.load(path, spec.input)[0][None] for path in pictures.paths[:16]]
    chosen = {
        kind: candidates(spec, kind, artifacts, calibrators=all_calibrators(kind)[:1], console=show)[0]
        for kind in precisions
    }
    runners = {}
    for kind, candidate in chosen.items():
        runners[kind, "whole"] = runner(candidate.runs, threads=1)
        runners[kind, "before_nms"] = runner(before_nms(candidate.runs), threads=1)
    if openvino.installed():
        runners |= _with_openvino(spec, chosen, artifacts)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    for number in range(-_WARM_UP, rounds):
        for key, run in runners.items():
            picture = pixels[number % len(pixels)]
            feeds = spec.nms.feeds(picture) if key[1] == "whole" else {contract.IMAGES: picture}
            begun = time.perf_counter()
            run(feeds)
            if number >= 0:
                times[key].append((time.perf_counter() - begun) * 1e3)
    result: dict[str, Any] = {}
    first = precisions[0]
    named = list(dict.fromkeys(kind for kind, _ in times))
    for kind in named:
        parts = [part for part in ("whole", "before_nms") if (kind, part) in times]
        result[kind] = {f"{part}_ms": statistics.median(times[kind, part]) for part in parts}
        for part in parts:
            result[kind][f"{part}_ratio"] = result[first][f"{part}_ms"] / result[kind][f"{part}_ms"]
    before, after = (layer_times(chosen[kind], pixels[0]) for kind in (first, precisions[-1]))
    result["layers"] = _compared(chosen[precisions[-1]], before, after)
    result["kernels"] = {
        kind: kernels(candidate, pixels[0]) for kind, candidate in chosen.items() if candidate.kind.quantised
    }
    result["cpu"] = cpu.int8()
    files.write_json(artifacts / "audit" / "speed.json", result)
    show.print(_table(named, result))
    for kind, rows in result["kernels"].items():
        total = sum(row["ms"] for row in rows)
        show.print(f"{kind} in ONNX Runtime: {total:.2f} ms are not integer arithmetic; the longest:", markup=False)
        for row in rows[:_SHOWN]:
            text = f"  {row['ms']:.2f} ms {row['what']} {row['kernel']} {row['node']}: {row['advice']}"
            show.print(text, markup=False, soft_wrap=True)
    if not openvino.installed():
        show.print('OpenVINO is not installed: [serving] engine = "auto" installs and compares it', markup=False)
    elif openvino.hint("bf16") == "f32":
        show.print("bf16: this CPU has no instructions for it (AVX512-BF16 or AMX)", markup=False)
    return result


def _with_openvino(spec: Spec, chosen: Mapping[str, Candidate], artifacts: Path) -> dict[tuple[str, str], Runner]:
    """The same graphs, as TensorRT gets them, on OpenVINO; FP32's graph also in BF16 where the CPU has it."""
    made: dict[tuple[str, str], Runner] = {}
    for kind, candidate in chosen.items():
        path = artifacts / spec.model.name / kind / "speed-openvino.onnx"
        files.write(path, openvino.readable(candidate.graph).SerializeToString())
        made[f"{kind}, OpenVINO", "whole"] = openvino.runner(path)
        if kind == contract.BASELINE and openvino.hint("bf16") == "bf16":
            made["bf16, OpenVINO", "whole"] = openvino.runner(path, precision="bf16")
    return made


def kernels(candidate: Candidate, pixels: NDArray[np.uint8], runs: int = 20) -> list[dict[str, Any]]:
    """What a quantised graph does in ONNX Runtime that is no integer arithmetic, the longest first.

    Returns:
        {node, kernel, ms, what: "float" or "conversion", advice}; ms is the median of the runs, on one thread.
    """
    quantised = set(candidate.quantised)
    left = {conv.name for conv in qdq.convs(candidate.source)} - quantised
    times: dict[tuple[str, str], list[float]] = {}
    model = before_nms(candidate.runs)
    owners = _owners(model)
    readers, constants = qdq.readers_of(model), qdq.constants_of(model)
    rounded = {node.input[0].removesuffix("/raw") for node in model.graph.node if node.op_type == "QuantizeLinear"}
    unrounded = {
        conv.name
        for conv in qdq.convs(model)
        if conv.name in quantised and qdq.behind(conv, readers, constants).removesuffix("/raw") not in rounded
    }
    for event in profile(model, {contract.IMAGES: pixels}, runs, threads=1):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["name"].removesuffix("_kernel_time"), event["args"]["op_name"])
            times.setdefault(key, []).append(event["dur"] / 1e3)
    rows = []
    for (node, kernel), values in times.items():
        what = "conversion" if kernel in _CONVERSIONS else "float" if kernel in _FLOAT else ""
        if not what:
            continue
        label = _SUFFIX.sub("", node)
        owner = owners.get(label, label)
        if what == "conversion":
            advice = _CONVERSIONS[kernel]
        elif owner in left:
            advice = "left unquantised: exclude_nodes of spec.toml names it"
        elif owner in unrounded:
            advice = "a small head: rounding its answer would cost more accuracy than time"
        elif owner in quantised:
            advice = 'ONNX Runtime has no integer kernel here: try [serving] engine = "auto"'
        else:
            advice = "between quantised layers, and no part of one: it costs a conversion before and behind it"
        rows.append({"node": node, "kernel": kernel, "ms": statistics.median(values), "what": what, "advice": advice})
    return sorted(rows, key=lambda row: -row["ms"])


def layer_times(candidate: Candidate, pixels: NDArray[np.uint8], runs: int = 20) -> dict[str, float]:
    """Median milliseconds of each Conv in ONNX Runtime, one thread, by its name; "other" is the rest."""
    model = before_nms(candidate.runs)
    owners = _owners(model)
    times: dict[str, list[float]] = {}
    for event in profile(model, {contract.IMAGES: pixels}, runs, threads=1):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            label = _SUFFIX.sub("", event["name"].removesuffix("_kernel_time"))
            is_conv = event["args"]["op_name"] in ("Conv", "FusedConv", "QLinearConv", "NhwcFusedConv")
            owner = owners.get(label, "other") if is_conv else "other"
            times.setdefault(owner, []).append(event["dur"] / 1e3)
    return {
        name: statistics.median(values) if name != "other" else sum(values) / runs for name, values in times.items()
    }


def _owners(model: onnx.ModelProto) -> dict[str, str]:
    """The name of each Conv by the names that ONNX Runtime gives its kernel: its own, its output's, its epilogue's."""
    owners: dict[str, str] = {}
    readers = {name: node for node in model.graph.node for name in node.input}
    for conv in qdq.convs(model):
        owner = conv.name or f"Conv/{conv.output[0]}"
        names, node = [conv.name, conv.output[0]], readers.get(conv.output[0])
        while node is not None and node.op_type in ("BatchNormalization", "Relu", "Clip"):
            names += [node.name, node.output[0]]
            node = readers.get(node.output[0])
        owners |= dict.fromkeys(filter(None, names), owner)
    return owners


def _compared(candidate: Candidate, before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each Conv's time before and after, the longest first, and the likely reason where it is not faster."""
    import numpy as np
    from onnx import numpy_helper

    constants = {constant.name: constant for constant in candidate.source.graph.initializer}
    shapes = {}
    for conv in qdq.convs(candidate.source):
        name = conv.input[1].removesuffix("/dq")
        weights = constants.get(name) or constants.get(f"{name}/rounded")
        shapes[conv.name] = np.shape(numpy_helper.to_array(weights)) if weights is not None else ()
    rows = []
    for name in sorted({*before, *after}, key=lambda name: -before.get(name, 0.0)):
        old, new = before.get(name), after.get(name)
        why = ""
        if name == "other":
            why = "layout changes, quantising outputs of FP32 layers, and operators other than Conv"
        elif name not in candidate.quantised:
            why = "left unquantised"
        elif old is not None and new is not None and new >= old:
            channels = shapes[name][1] if len(shapes.get(name, ())) > 1 else 0
            few = f"{channels} input channels: too few for the integer kernel's vectors"
            why = few if channels < 16 else "no integer kernel took it"
        rows.append({"conv": name, "before_ms": old, "after_ms": new, "why": why})
    return rows


def _table(precisions: Sequence[str], result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"one thread, one picture, in turn: medians ({result['cpu']})")
    for column in ("precision", "whole, ms", "speed-up", "before SSDNMS, ms", "speed-up"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for kind in precisions:
        figures = ("whole_ms", "whole_ratio", "before_nms_ms", "before_nms_ratio")
        table.add_row(kind, *(f"{result[kind][name]:.2f}" if name in result[kind] else "" for name in figures))
    return table
