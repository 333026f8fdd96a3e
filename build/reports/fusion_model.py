"""What a fusion report holds: the source's nodes, the runtime's kernels, and which kernel does which nodes' work."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from build.reports.roofline import Ceilings


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
    """All that the Markdown, JSON and HTML show.

    Attributes:
        version: of the runtime.
        how: how it was measured, in words.
        edges: pairs of nodes, each from the one that makes a tensor to one that reads it.
        milliseconds: of one picture, all kernels together.
        unfused_milliseconds, unfused_kernels: the same without the runtime's optimisations.
        not_merged: names of convolutions that read the same tensor and stayed kernels of their own.
        notes: what a reader must know before believing a figure.
    """

    model: str
    runtime: str
    version: str
    precision: str
    machine: str
    how: str
    kernels: list[Kernel]
    ceilings: Ceilings | None = None
    nodes: list[Node] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
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
        by_fate: dict[str, list[Node]] = {}
        for node in self.nodes:
            by_fate.setdefault(node.fate, []).append(node)
        return by_fate

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
