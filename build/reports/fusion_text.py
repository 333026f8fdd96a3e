"""What a fusion report says, in words and figures, and the report as Markdown."""

from __future__ import annotations

from collections import Counter

from build.reports.fusion_model import Kernel, Node, Report
from build.reports.html import Table, number
from build.reports.roofline import Ceilings

KINDS = {
    "vertical": "several nodes in a row became one kernel",
    "pointwise": "element-wise nodes became one kernel",
    "horizontal": "nodes side by side became one kernel",
    "single": "one node, one kernel",
    "expansion": "one node became several kernels",
    "added": "added by the runtime: a change of layout",
    "unmapped": "no evidence says which nodes it is",
}
FUSED = ("vertical", "pointwise", "horizontal")
FATES = {
    "kernel": "became (part of) a kernel",
    "folded": "folded: a constant of the plan",
    "merged": "merged: an equal node does its work",
    "eliminated": "eliminated: nothing runs for it",
    "dead": "dead: no output needs it",
    "unmapped": "unmapped",
}


def title(report: Report, kernel: Kernel) -> str:
    """What a kernel does, in terms of the source: its first node and the types of the others."""
    if not kernel.nodes:
        return f"{kernel.op} ({kernel.evidence})"
    nodes = [report.nodes[i] for i in kernel.nodes]
    first = "/".join(nodes[0].name.strip("/").split("/")[-2:])
    if kernel.kind == "expansion":
        return f"{first}: {kernel.op}"
    named = first if nodes[0].op.lower() in first.lower() else f"{first} ({nodes[0].op})"
    return " + ".join([named, *(node.op for node in nodes[1:])])


def summary(report: Report) -> list[tuple[str, str]]:
    """The figures that come first, by name."""
    groups = len(report.groups("Conv+BatchNormalization+Relu"))
    rows = [
        ("nodes → kernels", f"{report.computing_nodes()} → {len(report.kernels)}"),
        ("Conv+BN+Relu, one kernel each", str(groups)),
    ]
    if report.milliseconds is not None:
        rows.append(("one image, all kernels", f"{number(report.milliseconds)} ms"))
    if report.milliseconds and report.unfused_milliseconds:
        times = report.unfused_milliseconds / report.milliseconds
        name = f"without optimisation ({report.unfused_kernels} kernels)"
        rows.append((name, f"{number(report.unfused_milliseconds)} ms ({times:.1f}×)"))
    unmapped = sum(kernel.evidence == "unmapped" for kernel in report.kernels)
    rows.append(("unmapped kernels, nodes", f"{unmapped}, {len(report.fates().get('unmapped', []))}"))
    return rows


def longest(report: Report) -> Table:
    """The ten kernels that take longest."""
    heads = ("kernel", "ms", "share", "precision", "MFLOP", "MB", "FLOP/byte", "bound", "of ceiling", "INT8 would be")
    rows = [
        (
            title(report, kernel),
            number(kernel.milliseconds),
            percent(kernel.share),
            kernel.precision,
            *(number(None if value is None else value / 1e6) for value in (kernel.operations, kernel.traffic)),
            number(kernel.intensity),
            kernel.bound,
            percent(kernel.efficiency),
            kernel.int8,
        )
        for kernel in report.top()
    ]
    return Table(heads, rows)


def every_kernel(report: Report) -> Table:
    """Each kernel with its source nodes, and how that is known."""
    rows = [
        (k.op, " + ".join(report.nodes[i].name for i in k.nodes) or "–", k.kind, k.evidence, number(k.milliseconds))
        for k in report.kernels
    ]
    return Table(("kernel", "source nodes", "kind", "evidence", "ms"), rows, words=4)


def percent(value: float | None) -> str:
    """A share; empty for None."""
    return "" if value is None else f"{value:.1%}"


def ceilings(limits: Ceilings) -> str:
    """What the machine can do at most."""
    int8 = "" if limits.int8 is None else f", {limits.int8 / 1e9:.0f} GOP/s INT8"
    memory = ", ".join(f"{size / 2**20:g} MiB: {speed / 1e9:.0f} GB/s" for size, speed in limits.bandwidth)
    peak = f"{limits.operations / 1e9:.0f} GFLOP/s{int8}"
    return f"{peak}; copy by working set: {memory}. Measured as the {limits.method}."


def int8_estimate(report: Report) -> str:
    """What INT8 would change for the whole model; empty where nothing can be said."""
    changed = [kernel for kernel in report.kernels if kernel.int8_milliseconds is not None]
    before = sum(kernel.milliseconds or 0 for kernel in changed)
    if not changed or not report.milliseconds:
        return ""
    after = sum(kernel.int8_milliseconds or 0 for kernel in changed)
    whole = sum(kernel.milliseconds or 0 for kernel in report.kernels)
    return (
        f"In INT8 the {len(changed)} convolutions and matrix products would take {number(after)} ms instead of "
        f"{number(before)} ms, and all kernels {number(whole - before + after)} ms instead of {number(whole)} ms. "
        "The estimate assumes that every kernel keeps its present share of its ceiling, and counts no conversions "
        "between types."
    )


def fusions(report: Report) -> list[tuple[str, list[list[Node]]]]:
    """Fused groups by pattern, the most frequent first."""
    patterns: dict[str, list[list[Node]]] = {}
    for kernel in report.kernels:
        if kernel.kind in FUSED:
            nodes = [report.nodes[i] for i in kernel.nodes]
            patterns.setdefault(f"{kernel.pattern} ({kernel.kind})", []).append(nodes)
    return sorted(patterns.items(), key=lambda item: -len(item[1]))


def findings(report: Report) -> list[str]:
    """What else happened and what did not, one sentence each."""
    fates, sentences = report.fates(), []
    for fate in ("folded", "merged", "eliminated", "dead"):
        if fate in fates:
            counts = sorted(Counter(node.op for node in fates[fate]).items())
            sentences.append(f"{FATES[fate]}: " + ", ".join(f"{count} {op}" for op, count in counts) + ".")
    concats = [node for node in report.nodes if node.op == "Concat"]
    if concats:
        gone = sum(node.fate == "eliminated" for node in concats)
        sentences.append(f"Concat elimination: {gone} of {len(concats)} Concat nodes need no kernel.")
    kinds = Counter(kernel.kind for kernel in report.kernels)
    sentences.append(
        f"Horizontal fusion: {kinds['horizontal']} kernel(s) do several convolutions of one source; "
        f"{len(report.not_merged)} source(s) feed several convolutions that stayed apart."
    )
    if kinds["added"]:
        sentences.append(f"The runtime added {kinds['added']} kernel(s) that only change a layout.")
    return sentences


def markdown(report: Report) -> str:
    """The report for a terminal, a pull request or a diff."""
    lines = [f"# Fusion report: {report.model}, {report.runtime} {report.version}, {report.precision}", ""]
    lines += [f"- {name}: **{value}**" for name, value in summary(report)]
    lines += [f"- machine: {report.machine}", f"- how: {report.how}"]
    if report.ceilings:
        lines.append(f"- ceilings: {ceilings(report.ceilings)}")
    lines += [f"- note: {note}" for note in report.notes]
    lines += ["", "## The ten kernels that take longest", "", *longest(report).markdown()]
    if int8_estimate(report):
        lines += ["", int8_estimate(report)]
    lines += ["", "## Which nodes became one kernel", ""]
    for pattern, groups in fusions(report):
        lines += [f"### {pattern}: {len(groups)}", ""]
        lines += ["- " + " + ".join(f"`{node.name}`" for node in group) for group in groups]
        lines.append("")
    lines += ["## What else happened", "", *(f"- {text}" for text in findings(report))]
    lines += [f"- stayed apart: {', '.join(f'`{name}`' for name in names)}" for names in report.not_merged]
    lines += ["", "## Every kernel", "", *every_kernel(report).markdown()]
    return "\n".join(lines) + "\n"
