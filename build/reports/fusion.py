"""`invoke fusion-report`: which source nodes became which kernel, what each kernel costs, and what bounds it.

Two runtimes give the same `Report`: ONNX Runtime (its optimised graph and its profile) and TensorRT (the JSON of its
engine inspector and of its profile). Every kernel is mapped back to the nodes of the source ONNX by evidence alone: a
tensor that kept its name, a kernel that is named after one, the region of a local function, TensorRT's metadata. Each
claim is then checked on the source's dataflow; a kernel for which nothing holds is reported as unmapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract, files
from build.errors import GraphError, OptionError, RuntimeUnavailableError, SSDError
from build.files import ARTIFACTS, MODELS, REPOSITORY
from build.graph.attach import attach
from build.publish import repository
from build.publish.config import cores, instances_and_threads
from build.reports.roofline import Ceilings, FusionError, measure_ceilings, read_ceilings, read_json
from build.session import session
from build.spec import Spec, load

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray


# fmt: off
ACTIVATIONS = frozenset((
    "Relu", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish", "Elu", "Selu", "Softplus",
    "Gelu", "Mish",
))
POINTWISE = ACTIVATIONS | frozenset((
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Cast", "Where", "Less", "Greater", "Equal",
    "And", "Or", "Not", "Min", "Max", "Floor", "Ceil", "Round", "Erf", "Reciprocal", "Identity", "Dropout",
    "BatchNormalization", "QuantizeLinear", "DequantizeLinear",
))
HEAVY = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
LAYOUT = frozenset((
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Pad", "Expand",
))
# fmt: on
_INT8_LIKE = frozenset(("INT8", "UINT8"))


# -- what a report holds ---------------------------------------------------------------------------------------------


@dataclass
class Node:
    """One node of the source.

    Attributes:
        fate: kernel, folded (its value is a constant of the plan), merged (an equal node does its work), eliminated
            (nothing runs for it), dead (no output needs it), unmapped.
        kernels: indices of the kernels that do its work.
    """

    name: str
    op: str
    fate: str = "unmapped"
    kernels: list[int] = field(default_factory=list)


@dataclass
class Kernel:
    """One thing that the runtime runs.

    Attributes:
        nodes: indices of the source nodes whose work it does; empty for what the runtime added, and where unmapped.
        evidence: tensor, name, function, metadata, layout (a reordering that the runtime added) or unmapped.
        kind: vertical, pointwise, horizontal, expansion (one of several kernels of one node), single, added, unmapped.
        milliseconds: median over the runs; None where the profile has no time for it.
        operations: floating-point operations (a multiply-add is two); None where the data decides.
        traffic: bytes of the inputs, weights and outputs, each moved once; None where unknown.
        bound: compute, memory, or empty where a ceiling or the work is not known.
        efficiency: share of the ceiling that bounds it.
        int8: what INT8 would change, in words.
        int8_milliseconds: the estimate behind it.
    """

    name: str
    op: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[int] = field(default_factory=list)
    evidence: str = "unmapped"
    kind: str = "unmapped"
    pattern: str = ""
    milliseconds: float | None = None
    share: float | None = None
    precision: str = ""
    tactic: str = ""
    operations: float | None = None
    traffic: float | None = None
    bound: str = ""
    efficiency: float | None = None
    int8: str = ""
    int8_milliseconds: float | None = None

    @property
    def intensity(self) -> float | None:
        """Operations per byte."""
        return self.operations / self.traffic if self.operations is not None and self.traffic else None


@dataclass
class Report:
    """All that the Markdown, JSON and HTML show."""

    model: str
    runtime: str
    version: str
    precision: str
    machine: str
    how: str
    nodes: list[Node]
    kernels: list[Kernel]
    edges: list[tuple[int, int]]
    ceilings: Ceilings | None = None
    milliseconds: float | None = None
    unfused_milliseconds: float | None = None
    unfused_kernels: int | None = None
    not_merged: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def groups(self, pattern: str) -> list[list[Node]]:
        """The source nodes of every kernel of this pattern, for example `Conv+BatchNormalization+Relu`."""
        return [[self.nodes[i] for i in kernel.nodes] for kernel in self.kernels if kernel.pattern == pattern]

    def fates(self) -> dict[str, list[Node]]:
        """The source nodes by what became of them."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            found.setdefault(node.fate, []).append(node)
        return found

    def computing_nodes(self) -> int:
        """Nodes of the source without its constants: what would run if each node were a kernel."""
        return sum(node.op != "Constant" for node in self.nodes)

    def top(self, count: int = 10) -> list[Kernel]:
        """The kernels that take longest."""
        timed = [kernel for kernel in self.kernels if kernel.milliseconds is not None]
        return sorted(timed, key=lambda kernel: -(kernel.milliseconds or 0))[:count]

    def as_json(self) -> dict[str, Any]:
        """Everything, with what follows from it, as plain values."""
        data = dataclasses.asdict(self)
        for kernel, plain in zip(self.kernels, data["kernels"], strict=True):
            plain["intensity"] = kernel.intensity
            plain["nodes"] = [self.nodes[i].name for i in kernel.nodes]
        for node, plain in zip(self.nodes, data["nodes"], strict=True):
            plain["kernels"] = [self.kernels[i].name for i in node.kernels]
        data["edges"] = [[self.nodes[a].name, self.nodes[b].name] for a, b in self.edges]
        data["before"], data["after"] = self.computing_nodes(), len(self.kernels)
        return data


# -- the source graph ------------------------------------------------------------------------------------------------


class Source:
    """The source model's dataflow: who makes a tensor, what is constant, how large everything is.

    Args:
        model: the ONNX model; unnamed nodes get names (in place).
        batch: the value for every symbolic first dimension.
    """

    def __init__(self, model: onnx.ModelProto, batch: int = 1) -> None:
        self.model = model
        taken = {node.name for node in model.graph.node}
        for index, node in enumerate(model.graph.node):
            if not node.name:
                node.name = next(n for n in _numbered(f"{node.op_type}_{index}") if n not in taken)
                taken.add(node.name)
        self.ops = list(model.graph.node)
        self.by_name = {node.name: i for i, node in enumerate(self.ops)}
        self.producer = {name: i for i, node in enumerate(self.ops) for name in node.output if name}
        self.weights = {item.name for item in model.graph.initializer}
        self.inputs = {item.name for item in model.graph.input} - self.weights
        self.outputs = {item.name for item in model.graph.output}
        self.tensors = self.inputs | self.weights | set(self.producer)
        self.consumers: dict[str, list[int]] = {}
        for i, node in enumerate(self.ops):
            for name in _reads(node):
                self.consumers.setdefault(name, []).append(i)
        self.functions = {(f.domain, f.name) for f in model.functions}
        self.constant = self._constants()
        self.alias = self._aliases()
        self.shapes = _shapes(model, batch)

    def _constants(self) -> set[str]:
        """Tensors whose value no input can change."""
        constant = set(self.weights)
        for node in self.ops:  # in topological order, as ONNX asks
            if all(name in constant for name in _reads(node)) and not node.op_type.startswith("Random"):
                constant.update(name for name in node.output if name)
        return constant

    def _aliases(self) -> dict[str, str]:
        """Outputs of a node that does what an earlier one does, by the earlier one's."""
        first: dict[Any, onnx.NodeProto] = {}
        alias: dict[str, str] = {}
        for node in self.ops:
            inputs = tuple(alias.get(name, name) for name in node.input)
            settings = sorted(item.SerializeToString(deterministic=True) for item in node.attribute)
            twin = first.setdefault((node.op_type, node.domain, inputs, *settings), node)
            if twin is not node and not node.op_type.startswith("Random"):
                alias.update({b: a for a, b in zip(twin.output, node.output, strict=False) if b not in self.outputs})
        return alias

    def known_as(self, tensor: str) -> str:
        """The tensor of the same value that an earlier equal node makes, or itself."""
        return self.alias.get(tensor, tensor)

    def between(self, targets: Iterable[str], stops: set[str]) -> set[int] | None:
        """The nodes that make `targets` out of `stops` and constants; None where they need something else."""
        found: set[int] = set()
        todo = list(targets)
        stops = {self.known_as(name) for name in stops}
        while todo:
            tensor = self.known_as(todo.pop())
            if tensor in stops or tensor in self.constant:
                continue
            if tensor not in self.producer:
                return None
            index = self.producer[tensor]
            if index not in found:
                found.add(index)
                todo += _reads(self.ops[index])
        return found

    def boundary(self, nodes: Iterable[int]) -> tuple[list[str], list[str], list[str]]:
        """What a group of nodes reads (data, weights) and makes for others."""
        group = set(nodes)
        made = {name for i in group for name in self.ops[i].output if name}
        read = dict.fromkeys(name for i in sorted(group) for name in _reads(self.ops[i]) if name not in made)
        data = [name for name in read if name not in self.constant]
        fixed = [name for name in read if name in self.constant]
        outs = [
            name
            for name in made
            if name in self.outputs or any(user not in group for user in self.consumers.get(name, []))
        ]
        return data, fixed, outs

    def size(self, tensor: str) -> float | None:
        """Bytes of a tensor."""
        if tensor not in self.shapes:
            return None
        shape, width = self.shapes[tensor]
        return math.prod(shape) * width

    def operations(self, index: int) -> float | None:
        """Floating-point operations of one node; None where its shapes or its data decide."""
        node = self.ops[index]
        if (node.domain, node.op_type) in self.functions or node.op_type == contract.OP_TYPE:
            return None
        out = self.shapes.get(node.output[0])
        if out is None:
            return None
        elements = float(math.prod(out[0]))
        if node.op_type in HEAVY:
            weight = self.shapes.get(node.input[1])
            first = self.shapes.get(node.input[0])
            if weight is None or first is None:
                return None
            if node.op_type == "Conv":
                return 2 * elements * math.prod(weight[0][1:])
            if node.op_type == "ConvTranspose":
                return 2 * math.prod(first[0]) * math.prod(weight[0][1:])
            flip = node.op_type == "Gemm" and _attribute(node, "transA", 0)
            return 2 * elements * first[0][-2 if flip else -1]
        if node.op_type in ("MaxPool", "AveragePool"):
            return elements * float(math.prod(_attribute(node, "kernel_shape", [1])))
        if node.op_type in ("GlobalAveragePool", "ReduceMean", "ReduceSum", "ReduceMax"):
            first = self.shapes.get(node.input[0])
            return float(math.prod(first[0])) if first else None
        if node.op_type in ("Identity", "Dropout", "Constant", "Shape", "Resize") or node.op_type in LAYOUT:
            return 0.0
        return elements if node.op_type in POINTWISE else None


def _numbered(name: str) -> Iterable[str]:
    yield name
    for i in range(1, 1_000_000):
        yield f"{name}_{i}"


def _reads(node: onnx.NodeProto) -> list[str]:
    """All tensors that a node reads, those that its subgraphs take from outside included."""
    names = [str(name) for name in node.input if name]
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            if not inner.node:
                continue
            made = {item.name for item in inner.input} | {item.name for item in inner.initializer}
            made |= {name for inside in inner.node for name in inside.output}
            names += [name for inside in inner.node for name in _reads(inside) if name not in made]
    return names


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(item) for item in node.attribute if item.name == name), default)


def _shapes(model: onnx.ModelProto, batch: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Shape and bytes per element of every tensor whose shape is known at this batch."""
    import onnx
    from onnx import TensorProto, helper

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    symbols: dict[str, int] = {}
    for item in fixed.graph.input:
        dims = item.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            symbols[dims[0].dim_param] = batch
            dims[0].dim_value = batch
    for item in [*fixed.graph.value_info, *fixed.graph.output]:
        for dim in item.type.tensor_type.shape.dim:
            if dim.dim_param in symbols:
                dim.dim_value = batch
    with contextlib.suppress(Exception):  # what cannot be inferred stays unknown
        fixed = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    widths: dict[int, float] = {TensorProto.BOOL: 1.0, TensorProto.INT4: 0.5, TensorProto.UINT4: 0.5}
    found: dict[str, tuple[tuple[int, ...], float]] = {}
    for item in [*fixed.graph.input, *fixed.graph.value_info, *fixed.graph.output]:
        tensor = item.type.tensor_type
        dims = tensor.shape.dim
        if tensor.HasField("shape") and tensor.elem_type and all(d.HasField("dim_value") for d in dims):
            width = widths.get(tensor.elem_type) or helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            found[item.name] = (tuple(d.dim_value for d in dims), float(width))
    for weight in fixed.graph.initializer:
        width = widths.get(weight.data_type) or helper.tensor_dtype_to_np_dtype(weight.data_type).itemsize
        found[weight.name] = (tuple(weight.dims), float(width))
    return found


# -- ONNX Runtime's optimised graph, mapped back -----------------------------------------------------------------------


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
        reads = [name for name in _reads(node) if name not in fixed]
        known = {identity[name] for name in reads if name in identity}
        if len(reads) == 1 and reads[0] in identity and _only_layout(node, optimised, identity):
            identity[node.output[0]] = identity[reads[0]]
            kernel.evidence = "layout"
            continue
        for targets, evidence in _targets(source, node, identity):
            found = source.between(targets, known | folded)
            if found is None or found & claimed & _heavy(source, found) or not _fits(source, node, found, known):
                continue
            kernel.nodes, kernel.evidence = sorted(found), evidence if found else "layout"
            identity.update(zip(node.output, targets, strict=False))
            claimed |= found
            break
    return kernels


def _only_layout(node: onnx.NodeProto, optimised: onnx.ModelProto, identity: Mapping[str, str]) -> bool:
    """Whether the runtime put this node in for a kernel that wants its data in another order."""
    if node.output[0] in identity:
        return False
    if node.op_type == "ReorderInput":
        return True
    others = [item for item in optimised.graph.node if _attribute(item, "channels_last", 0)]
    enters = [item for item in optimised.graph.node if node.output[0] in item.input]
    leaves = any(node.input[0] in item.output for item in others)
    return node.op_type == "Transpose" and (leaves or (bool(enters) and all(item in others for item in enters)))


def _heavy(source: Source, nodes: set[int]) -> set[int]:
    return {i for i in nodes if source.ops[i].op_type in HEAVY}


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
                for name in _reads(optimised.graph.node[maker]):
                    if name in node.input or name in fixed:
                        continue
                    inside = inside and name in makers and name not in source.tensors
                    todo.append(name)
        if inside:
            for maker in region:
                kernels[maker].nodes, kernels[maker].evidence = [index], "function"


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
    used = {source.known_as(name) for op in ops for name in _reads(op)}
    if not nodes:
        return node.op_type in ("ReorderOutput", "ReorderInput", "Transpose", "Identity", "Cast")
    if not {source.known_as(name) for name in known if name not in source.constant} <= used:
        return False
    activation = _attribute(node, "activation", b"")
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
    shape = _attribute(node, "kernel_shape", _attribute(main, "kernel_shape", []))
    ones = [1] * len(shape)
    groups, wanted = _attribute(node, "group", 1), _attribute(main, "group", 1)
    rounded = node.domain == "com.microsoft.nchwc"
    return bool(
        shape == _attribute(main, "kernel_shape", shape)
        and _attribute(node, "strides", ones) == _attribute(main, "strides", ones)
        and (groups == wanted or (rounded and 1 < wanted <= groups < wanted + _NCHWC_BLOCK))
    )


_NCHWC_BLOCK = 16  # channels of the widest block (AVX-512) that ONNX Runtime rounds a depthwise convolution up to


def onnxruntime_report(
    spec: Spec, model: onnx.ModelProto, precision: str, threads: int, runs: int, ceilings: Ceilings | None
) -> Report:
    """Runs the model in ONNX Runtime as it is served, with its profile, and maps the kernels back.

    Raises:
        RuntimeUnavailableError: ONNX Runtime is not installed.
        GraphError: it cannot run the model.
    """
    try:
        import onnxruntime
    except ImportError:
        raise RuntimeUnavailableError("onnxruntime is not installed", fix="run through ./invoke") from None
    source = Source(model)
    feeds = spec.nms.feeds(picture(spec.input.height, spec.input.width)[None])
    with tempfile.TemporaryDirectory(prefix="ssd-fusion-") as folder:
        unfused = _profiled(source.model, feeds, threads, max(5, runs // 4), Path(folder), optimise=False)
        fused = _profiled(source.model, feeds, threads, runs, Path(folder), optimise=True)
    kernels = map_optimised(source, fused.graph)
    for kernel in kernels:
        kernel.milliseconds = fused.times.get(kernel.name)
        kernel.precision = fused.types.get(kernel.name, "")
    report = Report(
        spec.model.name,
        "onnxruntime",
        onnxruntime.__version__,
        precision,
        machine(),
        f"{threads} thread(s), {runs} runs after {_WARM_UP}, batch 1, all optimisations (as served), medians",
        [],
        kernels,
        [],
        ceilings,
        milliseconds=sum(fused.times.values()),
        unfused_milliseconds=sum(unfused.times.values()),
        unfused_kernels=len(unfused.graph.graph.node),
    )
    in_kernels = sum(fused.times.values())
    if fused.whole > 1.3 * in_kernels:
        report.notes.append(
            f"A whole call took {fused.whole:.1f} ms at the median, its kernels {in_kernels:.1f} ms: the "
            f"process was interrupted (load {os.getloadavg()[0]:.1f} on {cores()} cores), and long kernels "
            "were, too. Shares are less exact than on an idle machine; the mapping is the same."
        )
    _finish(report, source)
    beyond = max((k.efficiency or 0 for k in report.kernels if k.bound == "compute"), default=0)
    if beyond > 1.15:
        report.notes.append(
            f"A kernel reaches {beyond:.0%} of the compute ceiling, which was thus measured too low on a busy machine: "
            "do not trust bounds and INT8 estimates before a run on an idle one."
        )
    return report


_WARM_UP = 5


@dataclass
class _Profiled:
    """What ONNX Runtime ran: its graph, and of every node in it the median time and the type; a whole call's median."""

    graph: onnx.ModelProto
    times: dict[str, float]
    types: dict[str, str]
    whole: float


def _profiled(
    model: onnx.ModelProto,
    feeds: Mapping[str, NDArray[np.generic]],
    threads: int,
    runs: int,
    folder: Path,
    *,
    optimise: bool,
) -> _Profiled:
    """Runs the model with the profiler, with all of ONNX Runtime's optimisations or with none.

    Raises:
        GraphError: it cannot run.
    """
    import onnx

    written = folder / f"graph-{optimise}.onnx"
    session_here = session(
        model,
        threads=threads,
        optimised=optimise,
        spinning=False,
        profile=folder / f"profile-{optimise}",
        written=written,
    )
    try:
        for _ in range(_WARM_UP + runs):
            session_here.run(None, feeds)
        events = json.loads(Path(session_here.end_profiling()).read_text())
    except Exception as error:  # ONNX Runtime's own exceptions have no common type
        raise GraphError(f"ONNX Runtime cannot run the model: {error}") from error
    graph = onnx.load(written)
    op_types = {node.name: node.op_type for node in graph.graph.node}
    calls = [event for event in events if event["name"] == "model_run"]
    warm = calls[_WARM_UP - 1]["ts"] + calls[_WARM_UP - 1]["dur"]
    times: dict[str, list[float]] = {}
    types: dict[str, str] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name == event["name"] or event["ts"] < warm or op_types.get(name) != event["args"].get("op_name"):
            continue  # no kernel, a warm-up run, or a node inside another one's subgraph
        times.setdefault(name, []).append(event["dur"] / 1000)
        types[name] = _onnxruntime_precision(event["args"])
    return _Profiled(
        graph,
        {name: statistics.median(values) for name, values in times.items()},
        types,
        statistics.median(call["dur"] for call in calls[_WARM_UP:]) / 1000,
    )


def _onnxruntime_precision(args: Mapping[str, Any]) -> str:
    """The type in which a kernel works: that of its first floating or quantised input, else of its first."""
    names = {"float": "FP32", "float16": "FP16", "bfloat16": "BF16", "double": "FP64"}
    kinds = [next(iter(item)) for item in args.get("input_type_shape", []) if item]
    kinds += [next(iter(item)) for item in args.get("output_type_shape", []) if item]
    ranked = sorted(kinds[:2], key=lambda kind: kind not in names) if kinds else []
    return names.get(ranked[0], ranked[0].upper()) if ranked else ""


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """UINT8 [H,W,3], the same every time: shapes of plain colour on a gradient with a little noise."""
    import numpy as np
    from PIL import Image, ImageDraw

    random = np.random.default_rng(0)
    across = np.linspace(60, 190, width)[None, :, None] + np.linspace(-40, 40, height)[:, None, None]
    ground = across + random.normal(0, 4, (height, width, 3)) + random.uniform(-20, 20, 3)
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for number in range(8):
        x, y = random.uniform(0.05, 0.75, 2) * (width, height)
        w, h = random.uniform(0.1, 0.3, 2) * (width, height)
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        (draw.ellipse if number % 2 else draw.rectangle)((x, y, x + w, y + h), fill=colour)
    return np.asarray(image)


# -- TensorRT's engine inspector, mapped back --------------------------------------------------------------------------

_MARKER = re.compile(r"\[ONNX Layer: ([^\x1e\x1f]*?)\](?=[\x1e\x1f\[]|$)")
_TRT_TYPES = {"Float": "FP32", "Half": "FP16", "BFloat16": "BF16", "Int8": "INT8", "FP8": "FP8", "Int32": "INT32"}


def map_layers(source: Source, information: Mapping[str, Any], profile: Sequence[Mapping[str, Any]]) -> list[Kernel]:
    """The layers of an engine inspector's JSON as kernels, with times from a profile in trtexec's format.

    Knows the schema of TensorRT 8 to 10 (`Bindings`, `Format/Datatype`) and that of 11 (`I/O Tensors`, `Format` and
    `DataType`). Nodes come from the metadata's `[ONNX Layer: ...]` markers, else from a layer name that is made of node
    names alone.

    Raises:
        FusionError: the JSON is not of an engine inspector, or has layer names alone.
    """
    layers = information.get("Layers")
    if not isinstance(layers, list) or not layers or not ({"Bindings", "I/O Tensors"} & set(information)):
        raise FusionError(
            "the layer information has no Layers with Bindings (TensorRT 8 to 10) or I/O Tensors (11)",
            why="the file is not an engine inspector's JSON",
            fix="export it with trtexec --exportLayerInfo=layers.json --profilingVerbosity=detailed",
        )
    if any(isinstance(layer, str) for layer in layers):
        raise FusionError(
            "the layer information has the layers' names alone",
            why="the plan was built without detailed profiling verbosity",
            fix="build it with profiling_verbosity DETAILED (trtexec --profilingVerbosity=detailed)",
        )
    times = {str(row["name"]): float(row.get("medianMs", row.get("averageMs", 0))) for row in profile if "name" in row}
    kernels = []
    for layer in layers:
        inputs, outputs = layer.get("Inputs", []), layer.get("Outputs", [])
        name = str(layer["Name"])
        kernel = Kernel(name, str(layer.get("LayerType", "")), _tensor_names(inputs), _tensor_names(outputs))
        kernel.tactic = str(layer.get("TacticName", ""))
        kernel.milliseconds = times.get(name)
        kernel.precision = _trt_precision(layer)
        markers = [m for m in _MARKER.findall(str(layer.get("Metadata", ""))) if m in source.by_name]
        parts = re.split(r" \+ |(?<=\))\s*,\s*|, ", re.sub(r"\b(?:PWN|fused)\(|\)$", "", name))
        if markers:
            kernel.nodes, kernel.evidence = sorted({source.by_name[m] for m in markers}), "metadata"
        elif kernel.op in ("Reformat", "NoOp") or name.startswith("Reformatting CopyNode"):
            kernel.evidence = "layout"
        elif all(part.strip(" )") in source.by_name for part in parts):
            kernel.nodes, kernel.evidence = sorted({source.by_name[part.strip(" )")] for part in parts}), "name"
        kernels.append(kernel)
    return kernels


def _tensor_names(tensors: Sequence[Any]) -> list[str]:
    return [str(tensor["Name"]) for tensor in tensors]


def _trt_precision(layer: Mapping[str, Any]) -> str:
    """The type of the weights where the layer has some, else of what it makes, else of what it reads."""
    weights = layer.get("Weights")
    if isinstance(weights, dict) and weights.get("Type") in _TRT_TYPES:
        return _TRT_TYPES[weights["Type"]]
    for tensor in [*layer.get("Outputs", []), *layer.get("Inputs", [])]:
        kind = str(tensor.get("DataType", ""))
        if kind in _TRT_TYPES:
            return _TRT_TYPES[kind]
        text = str(tensor.get("Format/Datatype", kind))
        found = re.search(r"\b(FP32|FP16|BF16|FP8|INT8|Int8|INT32|Int32)\b", text)
        if found:
            return found[1].upper()
        if text in _TRT_TYPES:
            return _TRT_TYPES[text]
    return ""


def tensorrt_report(
    name: str,
    model: onnx.ModelProto,
    precision: str,
    layers: Path,
    profile: Path | None,
    ceilings: Ceilings | None,
    batch: int = 1,
) -> Report:
    """A report from recorded JSON files of TensorRT; needs neither a GPU nor TensorRT itself.

    Raises:
        FusionError: a file is not what it should be.
    """
    information = read_json(layers)
    if not isinstance(information, dict):
        raise FusionError(f"{layers}: is no JSON object with Layers", fix="give an engine inspector's JSON")
    rows = read_json(profile) if profile else []
    if not isinstance(rows, list):
        raise FusionError(f"{profile}: is no list of layer times", fix="export it with trtexec --exportProfile=...")
    source = Source(model, batch)
    kernels = map_layers(source, information, rows)
    schema = "11" if "I/O Tensors" in information else "8 to 10"
    report = Report(
        name,
        "tensorrt",
        f"schema of {schema}",
        precision,
        str(information.get("Device", "")) or "see the manifest of the plan",
        f"recorded in {layers.name}" + (f" and {profile.name}" if profile else ", without times"),
        [],
        kernels,
        [],
        ceilings,
    )
    times = [kernel.milliseconds for kernel in kernels if kernel.milliseconds is not None]
    report.milliseconds = sum(times) if times else None
    if profile and len(times) < len(kernels):
        report.notes.append(f"{len(kernels) - len(times)} layer(s) have no time in {profile.name}.")
    if ceilings is None:
        report.notes.append("No ceilings were given: what bounds a kernel is not said.")
    _finish(report, source)
    return report


# -- what both have in common ------------------------------------------------------------------------------------------


def _finish(report: Report, source: Source) -> None:
    """Fates of the nodes, kinds of the kernels, work, bounds and shares."""
    report.nodes = [Node(op.name, op.op_type) for op in source.ops]
    for k, kernel in enumerate(report.kernels):
        for i in kernel.nodes:
            report.nodes[i].kernels.append(k)
    needed = source.between(source.outputs, source.inputs) or set()
    mapped = {i for kernel in report.kernels for i in kernel.nodes}
    everything_else_known = all(kernel.evidence != "unmapped" for kernel in report.kernels)
    for i, (node, op) in enumerate(zip(report.nodes, source.ops, strict=True)):
        if i in mapped:
            node.fate = "kernel"
        elif all(name in source.constant for name in op.output if name):
            node.fate = "folded"
        elif op.output[0] in source.alias and source.producer[source.alias[op.output[0]]] in mapped:
            node.fate = "merged"
            node.kernels = list(report.nodes[source.producer[source.alias[op.output[0]]]].kernels)
        elif i not in needed:
            node.fate = "dead"
        elif _only_shapes(source, i):
            node.fate = "folded"
        elif everything_else_known and op.op_type in LAYOUT | {"Identity", "Dropout", "Cast"}:
            node.fate = "eliminated"
    wasted = [source.ops[i].name for i in sorted(mapped - needed) if source.ops[i].output[0] not in source.alias]
    if wasted:
        report.notes.append(f"No output needs {', '.join(wasted)}, and yet a kernel runs for it.")
    for kernel in report.kernels:
        _classify(kernel, source)
        _measure(kernel, source, report.ceilings)
    times = [kernel.milliseconds for kernel in report.kernels if kernel.milliseconds is not None]
    whole = sum(time for time in times)
    for kernel in report.kernels:
        if kernel.milliseconds is not None and whole:
            kernel.share = kernel.milliseconds / whole
    report.edges = [
        (source.producer[name], i) for i, op in enumerate(source.ops) for name in _reads(op) if name in source.producer
    ]
    by_source: dict[str, list[int]] = {}
    for i, op in enumerate(source.ops):
        if op.op_type == "Conv":
            by_source.setdefault(op.input[0], []).append(i)
    for siblings in by_source.values():
        kernels = {k for i in siblings for k in report.nodes[i].kernels}
        if len(siblings) > 1 and len(kernels) > 1:
            report.not_merged.append([report.nodes[i].name for i in siblings])


def _only_shapes(source: Source, index: int) -> bool:
    """Whether a node works on shapes alone: on the way from a Shape node."""
    todo, seen = [index], set()
    while todo:
        i = todo.pop()
        if i in seen or source.ops[i].op_type == "Shape":
            continue
        seen.add(i)
        reads = [name for name in _reads(source.ops[i]) if name not in source.constant]
        if not all(name in source.producer for name in reads) or not reads:
            return False
        todo += [source.producer[name] for name in reads]
    return True


def _classify(kernel: Kernel, source: Source) -> None:
    ops = [source.ops[i] for i in kernel.nodes]
    types = [op.op_type for op in ops if op.op_type != "Constant"]
    kernel.pattern = "+".join(types)
    heavy = [op for op in ops if op.op_type in HEAVY]
    if kernel.evidence == "layout":
        kernel.kind = "added"
    elif kernel.evidence == "unmapped":
        kernel.kind = "unmapped"
    elif kernel.evidence == "function":
        kernel.kind = "expansion"
    elif len(heavy) > 1 and len({op.input[0] for op in heavy}) < len(heavy):
        kernel.kind = "horizontal"
    elif len(types) < 2:
        kernel.kind = "single"
    else:
        kernel.kind = "pointwise" if all(kind in POINTWISE for kind in types) else "vertical"


def _measure(kernel: Kernel, source: Source, ceilings: Ceilings | None) -> None:
    """Operations, bytes, the bound and what INT8 would change."""
    if kernel.evidence == "layout":
        kernel.operations = 0.0
        size = next((source.size(name) for name in [*kernel.outputs, *kernel.inputs] if name in source.shapes), None)
        kernel.traffic = None if size is None else 2 * size
    elif kernel.nodes and kernel.kind != "expansion":
        work = [source.operations(i) for i in kernel.nodes if not _folded_in(source, kernel, i)]
        data, weights, outputs = source.boundary(kernel.nodes)
        sizes = [source.size(name) for name in [*data, *weights, *outputs]]
        kernel.operations = None if None in work else sum(value for value in work if value is not None)
        kernel.traffic = None if None in sizes else sum(size for size in sizes if size is not None)
    if ceilings is None or kernel.operations is None or not kernel.traffic:
        return
    compute = kernel.operations / ceilings.operations
    memory = kernel.traffic / ceilings.bytes_per_second(kernel.traffic)
    kernel.bound = "compute" if compute > memory else "memory"
    if not kernel.milliseconds:
        return
    kernel.efficiency = max(compute, memory) / (kernel.milliseconds / 1000)
    heavy = any(source.ops[i].op_type in HEAVY for i in kernel.nodes)
    if kernel.precision in _INT8_LIKE or not heavy:
        kernel.int8 = "is INT8 already" if heavy else "nothing by itself: it moves data"
        return
    if ceilings.int8 is None:
        return
    width = {"FP16": 2.0, "BF16": 2.0}.get(kernel.precision, 4.0)
    smaller = kernel.traffic / width
    then = max(kernel.operations / ceilings.int8, smaller / ceilings.bytes_per_second(smaller))
    kernel.int8_milliseconds = kernel.milliseconds * then / max(compute, memory)
    kernel.int8 = f"{kernel.milliseconds / kernel.int8_milliseconds:.1f}× faster"


def _folded_in(source: Source, kernel: Kernel, index: int) -> bool:
    """Whether a BatchNormalization costs nothing: its factors went into the weights of the convolution before it."""
    op = source.ops[index]
    maker = source.producer.get(op.input[0]) if op.input else None
    return op.op_type == "BatchNormalization" and maker in kernel.nodes and source.ops[maker].op_type in HEAVY


# -- the task ----------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Processor, cores and system, in words."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {cores()} core(s), {platform.system()} {platform.release()}"


# -- the task ----------------------------------------------------------------------------------------------------------


def fusion_report(
    runtime: str = "onnxruntime",
    model: str = "shapes",
    precision: str = "fp32",
    *,
    layers: Path | None = None,
    profile: Path | None = None,
    ceilings: Path | None = None,
    threads: int = 0,
    runs: int = 50,
    models: Path = MODELS,
    artifacts: Path = ARTIFACTS,
    published: Path = REPOSITORY,
) -> Path:
    """Writes report.md, report.json and report.html, and prints the essence.

    Args:
        runtime: onnxruntime, or tensorrt.
        model: a folder of `models`.
        precision: fp32, or another one that has been built.
        layers: tensorrt: the engine inspector's JSON; default: what the published plan says on the GPU here, which is
            kept as artifacts/<model>/<precision>/layers.json, or else what was kept there before.
        profile: tensorrt: times in trtexec's format; default profile.json beside it, where it is there.
        ceilings: a JSON file of ceilings; default: measured here for onnxruntime, ceilings.json beside the layers.
        threads: for onnxruntime; 0 = as many as a served instance has.
        runs: profiled runs.
        models: where the source models are.
        artifacts: where built models are and where the report goes.
        published: the model repository.

    Returns:
        The folder with the three files: artifacts/<model>/<precision>/fusion-<runtime>.

    Raises:
        SSDError: the model, the precision or a file is not there or not right.
    """
    import onnx

    from build.reports import fusion_html

    if runtime not in ("onnxruntime", "tensorrt"):
        raise OptionError(f"runtime is {runtime!r}, but must be onnxruntime or tensorrt")
    if runs < 1:
        raise OptionError(f"runs is {runs}, but must be at least 1")
    if threads < 0:
        raise OptionError(f"threads is {threads}, but must be 0 or more")
    spec = load(models / model)
    built = artifacts / spec.model.name / precision
    if precision == "fp32":
        source = attach(spec)
    elif (built / "model.onnx").is_file():
        source = onnx.load(built / "model.onnx")
    else:
        raise FusionError(
            f"{built / 'model.onnx'} is not there", fix=f"build it: invoke build-engines --precision {precision}"
        )
    if runtime == "onnxruntime":
        threads = threads or instances_and_threads(spec, runtime)[1]
        limits = read_ceilings(ceilings) if ceilings else measure_ceilings(threads)
        report = onnxruntime_report(spec, source, precision, threads, runs, limits)
    else:
        if layers is None:
            layers = built / "layers.json"
            record_layers(spec, source, precision, published, layers, runs)
        beside = layers.with_name("profile.json")
        profile = profile or (beside if beside.is_file() else None)
        beside = layers.with_name("ceilings.json")
        ceilings = ceilings or (beside if beside.is_file() else None)
        limits_given = read_ceilings(ceilings) if ceilings else None
        report = tensorrt_report(spec.model.name, source, precision, layers, profile, limits_given)
    folder = built / f"fusion-{runtime}"
    files.write_json(folder / "report.json", report.as_json())
    files.write(folder / "report.md", fusion_html.markdown(report))
    files.write(folder / "report.html", fusion_html.html(report))
    _print(report, folder)
    return folder


def record_layers(spec: Spec, model: onnx.ModelProto, precision: str, published: Path, layers: Path, runs: int) -> None:
    """Asks the published plan for its layers and their times, on the GPU that it was built for; keeps both as JSON.

    Where that cannot be done, what was recorded before is kept.

    Raises:
        FusionError: there is no plan of this precision, and nothing was recorded before.
        SSDError: the plan cannot be run here, and nothing was recorded before.
    """
    from build.tensorrt.plan import Plan
    from build.tensorrt.plugins import PLUGIN

    folder = published / spec.model.name / str(repository.served_version(published, spec.model.name))
    try:
        if not (folder / "model.plan").is_file():
            raise FusionError(
                f"{layers} is not there, and no plan of {spec.model.name} is published in {published}",
                fix="build one on a machine with a GPU, or name a file of trtexec --exportLayerInfo with --layers",
            )
        manifest = json.loads((folder / repository.MANIFEST).read_bytes())
        if manifest.get("precision") != precision:
            raise FusionError(
                f"{folder / 'model.plan'} is {manifest.get('precision')}, not {precision}",
                fix=f"publish that one: ./invoke build-engines --runtime tensorrt --precision {precision}",
            )
        with Plan(folder / "model.plan", manifest.get("engine"), plugin=PLUGIN) as plan:
            found, rows = (
                plan.layers(),
                plan.layer_times(spec.nms.feeds(picture(spec.input.height, spec.input.width)[None]), runs),
            )
    except SSDError:
        if layers.is_file():
            return
        raise
    files.write_json(layers, found)
    files.write_json(layers.with_name("profile.json"), rows)


def _print(report: Report, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(
        title=f"{report.model} in {report.runtime} {report.version}, {report.precision}", title_justify="left"
    )
    for column in ("kernel does", "ms", "share", "FLOP/byte", "bound", "INT8"):
        table.add_column(column, justify="left" if column in ("kernel does", "bound", "INT8") else "right")
    from build.reports.fusion_html import number, title

    for kernel in report.top():
        share = "" if kernel.share is None else f"{kernel.share:.1%}"
        cells = (number(kernel.milliseconds), share, number(kernel.intensity), kernel.bound, kernel.int8)
        table.add_row(title(report, kernel).replace("BatchNormalization", "BN"), *cells)
    console.print(table)
    fates = report.fates()
    unmapped = sum(kernel.evidence == "unmapped" for kernel in report.kernels)
    console.print(
        f"{report.computing_nodes()} nodes → {len(report.kernels)} kernels; "
        f"{len(report.groups('Conv+BatchNormalization+Relu'))} Conv+BatchNormalization+Relu became one kernel each; "
        f"unmapped: {unmapped} kernels, {len(fates.get('unmapped', []))} nodes"
    )
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"written: {folder}/report.md, report.json, report.html", markup=False, soft_wrap=True)
