"""What follows from the mapping of kernels to nodes: fates, kinds of fusion, work, bounds, what INT8 would change."""

from __future__ import annotations

from build.reports.fusion_model import Kernel, Node, Report
from build.reports.roofline import Ceilings
from build.reports.source_graph import HEAVY, LAYOUT, POINTWISE, Source, reads

_INT8_LIKE = frozenset(("INT8", "UINT8"))


def finish(report: Report, source: Source) -> None:
    """Fills in what follows from the kernels' nodes: fates, edges, kinds, work, bounds, shares."""
    report.nodes = [Node(op.name, op.op_type) for op in source.ops]
    for k, kernel in enumerate(report.kernels):
        for i in kernel.nodes:
            report.nodes[i].kernels.append(k)
    report.edges = [
        (source.producer[name], i) for i, op in enumerate(source.ops) for name in reads(op) if name in source.producer
    ]
    _decide_fates(report, source)
    whole = sum(kernel.milliseconds or 0 for kernel in report.kernels)
    for kernel in report.kernels:
        _classify(kernel, source)
        _measure(kernel, source, report.ceilings)
        if kernel.milliseconds is not None and whole:
            kernel.share = kernel.milliseconds / whole
    siblings: dict[str, list[int]] = {}
    for i, op in enumerate(source.ops):
        if op.op_type == "Conv":
            siblings.setdefault(op.input[0], []).append(i)
    for nodes in siblings.values():
        if len(nodes) > 1 and len({k for i in nodes for k in report.nodes[i].kernels}) > 1:
            report.not_merged.append([report.nodes[i].name for i in nodes])


def _decide_fates(report: Report, source: Source) -> None:
    """What became of every node; notes the kernels that run for nothing."""
    needed = source.between(source.outputs, source.inputs) or set()
    mapped = {i for kernel in report.kernels for i in kernel.nodes}
    every_kernel_known = all(kernel.evidence != "unmapped" for kernel in report.kernels)
    for i, (node, op) in enumerate(zip(report.nodes, source.ops, strict=True)):
        twin = source.producer.get(source.alias.get(op.output[0], ""))
        if i in mapped:
            node.fate = "kernel"
        elif all(name in source.constant for name in op.output if name):
            node.fate = "folded"
        elif twin in mapped:
            node.fate, node.kernels = "merged", list(report.nodes[twin].kernels)
        elif i not in needed:
            node.fate = "dead"
        elif _only_shapes(source, i):
            node.fate = "folded"
        elif every_kernel_known and op.op_type in LAYOUT | {"Identity", "Dropout", "Cast"}:
            node.fate = "eliminated"
    wasted = [source.ops[i].name for i in sorted(mapped - needed) if source.ops[i].output[0] not in source.alias]
    if wasted:
        report.notes.append(f"No output needs {', '.join(wasted)}, and yet a kernel runs for it.")


def _only_shapes(source: Source, index: int) -> bool:
    """Whether everything that a node reads comes from a Shape node or a constant."""
    todo, seen = [index], set()
    while todo:
        i = todo.pop()
        if i in seen or source.ops[i].op_type == "Shape":
            continue
        seen.add(i)
        names = [name for name in reads(source.ops[i]) if name not in source.constant]
        if not all(name in source.producer for name in names) or not names:
            return False
        todo += [source.producer[name] for name in names]
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
