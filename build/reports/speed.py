"""What a precision gains in ONNX Runtime: whole models timed side by side, and layer by layer."""

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
from build.quantization import qdq
from build.quantization.candidates import Candidate, all_calibrators, candidates
from build.reports import cpu
from build.reports.profiling import profile
from build.session import runner
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.console import Console
    from rich.table import Table


_WARM_UP = 3  # rounds


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
        why}], "cpu": its name}. A layer has its time in the first and in the last precision; `why` is the likely reason
        where the last is not faster.

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
    for kind in precisions:
        result[kind] = {f"{part}_ms": statistics.median(times[kind, part]) for part in ("whole", "before_nms")}
        for part in ("whole", "before_nms"):
            result[kind][f"{part}_ratio"] = result[first][f"{part}_ms"] / result[kind][f"{part}_ms"]
    before, after = (layer_times(chosen[kind], pixels[0]) for kind in (first, precisions[-1]))
    result["layers"] = _compared(chosen[precisions[-1]], before, after)
    result["cpu"] = cpu.int8()
    files.write_json(artifacts / "audit" / "speed.json", result)
    show.print(_table(precisions, result))
    return result


def layer_times(candidate: Candidate, pixels: NDArray[np.uint8], runs: int = 20) -> dict[str, float]:
    """Median milliseconds of each Conv in ONNX Runtime, one thread, by its name; "other" is the rest."""
    model = before_nms(candidate.runs)
    owners: dict[str, str] = {}
    readers = {name: node for node in model.graph.node for name in node.input}
    for conv in qdq.convs(model):
        owner = conv.name or f"Conv/{conv.output[0]}"
        names, node = [conv.name, conv.output[0]], readers.get(conv.output[0])
        while node is not None and node.op_type in ("BatchNormalization", "Relu"):
            names += [node.name, node.output[0]]
            node = readers.get(node.output[0])
        owners |= dict.fromkeys(filter(None, names), owner)
    times: dict[str, list[float]] = {}
    for event in profile(model, {contract.IMAGES: pixels}, runs, threads=1):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            label = re.sub(r"(_nchwc|_token_\d+|_nhwc|_quant)+$", "", event["name"].removesuffix("_kernel_time"))
            is_conv = event["args"]["op_name"] in ("Conv", "FusedConv", "QLinearConv", "NhwcFusedConv")
            owner = owners.get(label, "other") if is_conv else "other"
            times.setdefault(owner, []).append(event["dur"] / 1e3)
    return {
        name: statistics.median(values) if name != "other" else sum(values) / runs for name, values in times.items()
    }


def _compared(candidate: Candidate, before: Mapping[str, float], after: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each Conv's time before and after, the longest first, and the likely reason where it is not faster."""
    import numpy as np
    from onnx import numpy_helper

    constants = {constant.name: constant for constant in candidate.source.graph.initializer}
    shapes = {}
    for conv in qdq.convs(candidate.source):
        weights = constants.get(conv.input[1].removesuffix("/dq"))
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

    table = Table(title=f"ONNX Runtime, one thread, one picture, in turn: medians ({result['cpu']})")
    for column in ("precision", "whole, ms", "speed-up", "before SSDNMS, ms", "speed-up"):
        table.add_column(column, justify="left" if column == "precision" else "right")
    for kind in precisions:
        figures = ("whole_ms", "whole_ratio", "before_nms_ms", "before_nms_ratio")
        table.add_row(kind, *(f"{result[kind][name]:.2f}" for name in figures))
    return table
