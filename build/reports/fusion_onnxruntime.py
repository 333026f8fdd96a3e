"""ONNX Runtime's part of a fusion report: runs the model with its profile, and maps its optimised graph back."""

from __future__ import annotations

import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import RuntimeUnavailableError
from build.publish.config import cores
from build.reports import cpu
from build.reports.fusion_analysis import finish
from build.reports.fusion_model import Kernel, Report
from build.reports.profiling import profile
from build.reports.roofline import Ceilings
from build.reports.source_graph import HEAVY, Source, attribute, reads

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

_NCHWC_BLOCK = 16  # channels of the widest block (AVX-512) that ONNX Runtime rounds a depthwise convolution up to
_WARM_UP = 5


def onnxruntime_report(
    name: str,
    model: onnx.ModelProto,
    precision: str,
    feeds: Mapping[str, NDArray[Any]],
    *,
    threads: int,
    runs: int,
    ceilings: Ceilings | None,
) -> Report:
    """Runs the model in ONNX Runtime as it is served, with its profile, and maps the kernels back.

    Args:
        name: of the model.
        model: the served graph.
        precision: its precision.
        feeds: its inputs by name, of one picture.
        threads: of the session.
        runs: profiled runs.
        ceilings: what the machine can do at most; None = no bounds.

    Raises:
        RuntimeUnavailableError: ONNX Runtime is not installed.
        GraphError: it cannot run the model.
    """
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeUnavailableError("onnxruntime is not installed", fix="run through ./invoke") from None
    source = Source(model)
    unfused = _profiled(source.model, feeds, threads, max(5, runs // 4), optimised=False)
    fused = _profiled(source.model, feeds, threads, runs, optimised=True)
    kernels = map_optimised(source, fused.graph)
    for kernel in kernels:
        kernel.milliseconds = fused.times.get(kernel.name)
        kernel.precision = fused.types.get(kernel.name, "")
    report = Report(
        name,
        "onnxruntime",
        onnxruntime.__version__,
        precision,
        cpu.machine(),
        f"{threads} thread(s), {runs} runs after {_WARM_UP}, batch 1, all optimisations (as served), medians",
        kernels,
        ceilings,
        milliseconds=sum(fused.times.values()),
        unfused_milliseconds=sum(unfused.times.values()),
        unfused_kernels=len(unfused.graph.graph.node),
    )
    finish(report, source)
    report.notes += _doubts(report, fused.whole)
    return report


def _doubts(report: Report, whole: float) -> list[str]:
    """What a busy machine did to the figures.

    Args:
        report: the finished report.
        whole: milliseconds of a whole call.
    """
    notes = []
    in_kernels = report.milliseconds or 0
    if whole > 1.3 * in_kernels:
        notes.append(
            f"A whole call took {whole:.1f} ms at the median, its kernels {in_kernels:.1f} ms: other programs "
            f"interrupted it (load {os.getloadavg()[0]:.1f} on {cores()} cores), long kernels too. Shares are less "
            "exact than on an idle machine; the mapping is the same."
        )
    beyond = max((k.efficiency or 0 for k in report.kernels if k.bound == "compute"), default=0)
    if beyond > 1.15:
        notes.append(
            f"A kernel reaches {beyond:.0%} of the compute ceiling. The ceiling is too low: the machine was busy while "
            "it was measured. Do not trust bounds and INT8 estimates before a run on an idle machine."
        )
    return notes


@dataclass
class _Profiled:
    """What ONNX Runtime ran.

    Attributes:
        graph: its optimised graph.
        times: median milliseconds of each node in it.
        types: in which type each node works.
        whole: median milliseconds of a whole call.
    """

    graph: onnx.ModelProto
    times: dict[str, float]
    types: dict[str, str]
    whole: float


def _profiled(
    model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], threads: int, runs: int, *, optimised: bool
) -> _Profiled:
    """Runs the model with the profiler, with all of ONNX Runtime's optimisations or with none.

    Raises:
        GraphError: it cannot run.
    """
    import onnx

    with tempfile.TemporaryDirectory(prefix="ssd-fusion-") as folder:
        written = Path(folder) / "graph.onnx"
        events = profile(
            model, feeds, _WARM_UP + runs, threads=threads, optimised=optimised, spinning=False, written=written
        )
        graph = onnx.load(written)
    op_types = {node.name: node.op_type for node in graph.graph.node}
    calls = [event for event in events if event["name"] == "model_run"]
    warm = calls[_WARM_UP - 1]["ts"] + calls[_WARM_UP - 1]["dur"]
    times: dict[str, list[float]] = {}
    types: dict[str, str] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name == event["name"] or event["ts"] < warm or op_types.get(name) != event["args"].get("op_name"):
            continue  # no kernel, a warm-up run, or a node inside another node's subgraph
        times.setdefault(name, []).append(event["dur"] / 1000)
        types[name] = _precision(event["args"])
    return _Profiled(
        graph,
        {name: statistics.median(values) for name, values in times.items()},
        types,
        statistics.median(call["dur"] for call in calls[_WARM_UP:]) / 1000,
    )


def _precision(args: Mapping[str, Any]) -> str:
    """The type in which a kernel works: that of its first floating or quantised input, else of its first."""
    names = {"float": "FP32", "float16": "FP16", "bfloat16": "BF16", "double": "FP64"}
    kinds = [next(iter(item)) for item in args.get("input_type_shape", []) if item]
    kinds += [next(iter(item)) for item in args.get("output_type_shape", []) if item]
    ranked = sorted(kinds[:2], key=lambda kind: kind not in names)
    return names.get(ranked[0], ranked[0].upper()) if ranked else ""


# -- the optimised graph, mapped back ----------------------------------------------------------------------------------


def map_optimised(source: Source, optimised: onnx.ModelProto) -> list[Kernel]:
    """ONNX Runtime's optimised graph as kernels, each with the source nodes whose work it does.

    A kernel's outputs are known as tensors of the source by their own name, or by the kernel's (ONNX Runtime names a
    fused convolution after the tensor that it makes). Its nodes are those that lie between its inputs and its outputs
    in the source; the claim holds only if they need nothing but those inputs, use all of them, and fit the kernel.
    """
    kernels = [
        Kernel(node.name, node.op_type, [n for n in node.input if n], [n for n in node.output if n])
        for node in optimised.graph.node
    ]
    fixed = {item.name for item in optimised.graph.initializer} - source.inputs
    # What a constant stands for in the source; a name that the optimiser made up is simply a constant.
    identity: dict[str, str] = {
        name: name for node in optimised.graph.node for name in node.output if name in source.tensors
    }
    identity |= {name: name for name in source.inputs}
    folded = {name for name in fixed if name in source.producer}
    _map_functions(source, optimised, kernels)
    claimed: set[int] = set()
    for node, kernel in zip(optimised.graph.node, kernels, strict=True):
        if kernel.evidence != "unmapped":
            continue
        inputs = [name for name in reads(node) if name not in fixed]
        known = {identity[name] for name in inputs if name in identity}
        if len(inputs) == 1 and inputs[0] in identity and _only_layout(node, optimised, identity):
            identity[node.output[0]] = identity[inputs[0]]
            kernel.evidence = "layout"
            continue
        for targets, evidence in _targets(source, node, identity):
            nodes = source.between(targets, known | folded)
            if nodes is None or not _fits(source, node, nodes, known):
                continue
            if any(source.ops[i].op_type in HEAVY for i in nodes & claimed):
                continue
            kernel.nodes, kernel.evidence = sorted(nodes), evidence if nodes else "layout"
            identity.update(zip(node.output, targets, strict=False))
            claimed |= nodes
            break
    return kernels


def _map_functions(source: Source, optimised: onnx.ModelProto, kernels: list[Kernel]) -> None:
    """Kernels of a local function that was inlined: the region between the node's inputs and its outputs."""
    makers = {name: i for i, node in enumerate(optimised.graph.node) for name in node.output if name}
    fixed = {item.name for item in optimised.graph.initializer}
    for index, node in enumerate(source.ops):
        if (node.domain, node.op_type) not in source.functions:
            continue
        region: set[int] = set()
        todo = [name for name in node.output if name in makers]
        inside = bool(todo)
        while todo and inside:
            maker = makers[todo.pop()]
            if maker not in region:
                region.add(maker)
                for name in reads(optimised.graph.node[maker]):
                    if name in node.input or name in fixed:
                        continue
                    inside = inside and name in makers and name not in source.tensors
                    todo.append(name)
        if inside:
            for maker in region:
                kernels[maker].nodes, kernels[maker].evidence = [index], "function"


def _only_layout(node: onnx.NodeProto, optimised: onnx.ModelProto, identity: Mapping[str, str]) -> bool:
    """Whether the runtime put this node in for a kernel that wants its data in another order."""
    if node.output[0] in identity:
        return False
    if node.op_type == "ReorderInput":
        return True
    others = [item for item in optimised.graph.node if attribute(item, "channels_last", 0)]
    enters = [item for item in optimised.graph.node if node.output[0] in item.input]
    leaves = any(node.input[0] in item.output for item in others)
    return node.op_type == "Transpose" and (leaves or (bool(enters) and all(item in others for item in enters)))


def _targets(source: Source, node: onnx.NodeProto, identity: Mapping[str, str]) -> Iterable[tuple[list[str], str]]:
    """What the kernel's outputs may be in the source, the surest first."""
    outputs = [name for name in node.output if name]
    if all(name in identity for name in outputs):
        yield [identity[name] for name in outputs], "tensor"
        return
    plain = re.sub(r"_token_\d+$", "", node.name)
    for name in dict.fromkeys([node.name, plain, re.sub("(_bn)?_nchwc$", "", plain)]):
        if name in source.producer and len(outputs) == 1:
            first = name
        elif name in source.by_name and len(outputs) == 1:
            first = source.ops[source.by_name[name]].output[0]
        else:
            continue
        # The name may be older than the last fusion: then the output lies further down an unbranched way.
        for _ in range(4):
            yield [first], "name"
            users = source.consumers.get(first, [])
            if len(users) != 1 or first in source.outputs:
                break
            first = source.ops[users[0]].output[0]


def _fits(source: Source, node: onnx.NodeProto, nodes: set[int], known: set[str]) -> bool:
    """Whether a kernel can do the work of these nodes and reads nothing that they do not."""
    ops = [source.ops[i] for i in nodes]
    types = [op.op_type for op in ops]
    used = {source.known_as(name) for op in ops for name in reads(op)}
    if not nodes:
        return node.op_type in ("ReorderOutput", "ReorderInput", "Transpose", "Identity", "Cast")
    if not {source.known_as(name) for name in known if name not in source.constant} <= used:
        return False
    activation = attribute(node, "activation", b"")
    if activation and activation.decode() not in types:
        return False
    if node.op_type.startswith("QLinear") and "QuantizeLinear" not in types:
        return False
    mains = [op for op in ops if op.op_type in HEAVY]
    if "Conv" in node.op_type:
        if not mains:  # a BatchNormalization of its own is a convolution of every channel with one number
            return "BatchNormalization" in types
        summed = node.op_type in ("Conv", "FusedConv") and len(node.input) > 3 and node.input[3]
        same = len(mains) == 1 and "Conv" in mains[0].op_type and _convolves_alike(node, mains[0])
        return same and (not summed or "Add" in types or "Sum" in types)
    if "Gemm" in node.op_type or "MatMul" in node.op_type:
        return len(mains) == 1
    return not mains


def _convolves_alike(node: onnx.NodeProto, main: onnx.NodeProto) -> bool:
    """Whether kernel size, strides and groups agree, as far as both say them."""
    shape = attribute(node, "kernel_shape", attribute(main, "kernel_shape", []))
    unit = [1] * len(shape)
    groups, wanted = attribute(node, "group", 1), attribute(main, "group", 1)
    rounded = node.domain == "com.microsoft.nchwc"
    return bool(
        shape == attribute(main, "kernel_shape", shape)
        and attribute(node, "strides", unit) == attribute(main, "strides", unit)
        and (groups == wanted or (rounded and 1 < wanted <= groups < wanted + _NCHWC_BLOCK))
    )
