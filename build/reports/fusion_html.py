"""A fusion report as one HTML file that needs nothing else: tables, the graph before and after, and a roofline plot.

This file places what the pictures show; templates/{fusion.html,graph.svg,roofline.svg} draw it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from build.reports import fusion_text
from build.reports.fusion_model import Kernel, Report
from build.reports.fusion_text import FATES, FUSED, KINDS, title
from build.reports.pages import number, render

_TEMPLATE = Path(__file__).resolve().parent / "templates" / "fusion.html"


def html(report: Report) -> str:
    """The whole report as one file."""
    return render(
        _TEMPLATE,
        report=report,
        text=fusion_text,
        kinds={kernel.kind for kernel in report.kernels},
        graph=graph(report),
        roofline=roofline(report),
    )


# -- the graph ---------------------------------------------------------------------------------------------------------

_ROW, _HEIGHT, _GAP, _LANE = 24, 17, 14, 12
_NODE_WIDTH, _KERNEL_WIDTH = 108, 158


@dataclass
class Box:
    """A node, a kernel, or the frame around the nodes of a kernel."""

    x: float
    y: float
    width: float
    kind: str
    label: str = ""
    hint: str = ""
    side: str = ""
    height: float = _HEIGHT


@dataclass
class Panel:
    """Boxes, and the edges between them as SVG paths."""

    boxes: Sequence[Box]
    lines: Sequence[str]
    width: float


@dataclass
class Graph:
    """Source nodes on the left, kernels on the right, each kernel at the height of its nodes."""

    before: Panel
    after: Panel
    groups: Sequence[Box]
    box_height = _HEIGHT

    @property
    def shift(self) -> float:
        """Where the kernels begin."""
        return self.before.width + 56

    @property
    def width(self) -> float:
        """Of the picture."""
        return self.shift + self.after.width + 12

    @property
    def height(self) -> float:
        """Of the picture."""
        return max(box.y for box in [*self.before.boxes, *self.after.boxes]) + _ROW + 40


def graph(report: Report) -> Graph | None:
    """The picture of the graph before and after; None where the source has no nodes but constants."""
    shown = [i for i, node in enumerate(report.nodes) if node.op != "Constant"]
    place = _layout(shown, [(a, b) for a, b in report.edges if a in set(shown)])
    if not place:
        return None
    before: dict[int, Box] = {}
    for i, (column, row) in place.items():
        node = report.nodes[i]
        kind = report.kernels[node.kernels[0]].kind if node.kernels else node.fate
        label = node.op.replace("BatchNormalization", "BatchNorm")
        hint = f"{node.name}: {FATES[node.fate]}"
        before[i] = Box(column * (_NODE_WIDTH + _GAP), row * _ROW, _NODE_WIDTH, kind, label, hint)
    after = _kernel_boxes(report, before)
    makers = {name: k for k, kernel in enumerate(report.kernels) for name in kernel.outputs}
    links = [(makers[name], k) for k, kernel in enumerate(report.kernels) for name in kernel.inputs if name in makers]
    groups = []
    for kernel in report.kernels:
        boxes = [before[i] for i in kernel.nodes if i in before]
        if kernel.kind in FUSED and boxes:
            x, y = min(box.x for box in boxes) - 4, min(box.y for box in boxes) - 3
            right, bottom = max(box.x + box.width for box in boxes) + 4, max(box.y for box in boxes) + _HEIGHT + 3
            groups.append(Box(x, y, right - x, kernel.kind, height=bottom - y))
    return Graph(
        _panel(before, [(a, b) for a, b in report.edges if a in before and b in before]), _panel(after, links), groups
    )


def _layout(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Column and row of every node: rows by longest way from the start; the longest way down keeps its column."""
    parents: dict[int, list[int]] = {i: [] for i in nodes}
    children: dict[int, list[int]] = {i: [] for i in nodes}
    for a, b in edges:
        parents[b].append(a)
        children[a].append(b)
    row: dict[int, int] = {}
    for i in nodes:  # in topological order
        row[i] = max((row[p] + 1 for p in parents[i]), default=0)
    depth: dict[int, int] = {}
    for i in reversed(nodes):
        depth[i] = max((depth[c] + 1 for c in children[i]), default=0)
    heir = {i: max(children[i], key=lambda c: (depth[c], -row[c])) for i in nodes if children[i]}
    for i in nodes:  # close to what uses it, where nothing is above it
        if not parents[i] and children[i]:
            row[i] = max(0, min(row[c] for c in children[i]) - 1)
    column: dict[int, int] = {}
    taken: set[tuple[int, int]] = set()
    for i in sorted(nodes, key=lambda i: (row[i], -depth[i])):
        heirs = [column[p] for p in parents[i] if heir.get(p) == i and p in column]
        wanted = min(heirs, default=0 if not taken else 1)
        span = [i]
        while span[-1] in heir and row[heir[span[-1]]] == row[span[-1]] + 1:
            span.append(heir[span[-1]])
        while (wanted, row[i]) in taken or (not heirs and any((wanted, row[j]) in taken for j in span)):
            wanted += 1
        column[i] = wanted
        taken.add((wanted, row[i]))
    return {i: (column[i], row[i]) for i in nodes}


def _kernel_boxes(report: Report, before: Mapping[int, Box]) -> dict[int, Box]:
    """A box for every kernel: as high as the middle of its nodes, in their column."""
    after = {}
    columns = sorted({box.x for box in before.values()})
    taken: set[tuple[int, int]] = set()
    last = (0, 0.0)
    for k, kernel in enumerate(report.kernels):
        boxes = [before[i] for i in kernel.nodes if i in before]
        if boxes:
            last = (min(columns.index(box.x) for box in boxes), sum(box.y for box in boxes) / len(boxes))
        column, y = last
        while any((column, round(y / _ROW * 4) + d) in taken for d in range(-3, 4)):
            y += _ROW / 4
        taken.add((column, round(y / _ROW * 4)))
        pattern = "" if kernel.kind == "expansion" else kernel.pattern.replace("BatchNormalization", "BN")
        label = pattern or kernel.op
        label = label if len(label) <= 22 else label[:21] + "…"
        why = f"{KINDS[kernel.kind]}; evidence: {kernel.evidence}"
        hint = f"{title(report, kernel)}\n{kernel.name} ({kernel.op})\n{why}"
        time = "" if kernel.milliseconds is None else f"{number(kernel.milliseconds, 2)} ms"
        after[k] = Box(column * (_KERNEL_WIDTH + _GAP), y, _KERNEL_WIDTH, kernel.kind, label, hint, time)
    return after


def _panel(boxes: Mapping[int, Box], edges: Sequence[tuple[int, int]]) -> Panel:
    """Boxes and edges; an edge that would cross other boxes goes down a lane on the right."""
    right = max(box.x + box.width for box in boxes.values())
    rows: dict[float, list[float]] = {}
    for box in boxes.values():
        rows.setdefault(box.x, []).append(box.y)
    long: dict[int, list[int]] = {}
    lines = []
    for a, b in edges:
        start, end = boxes[a], boxes[b]
        if end.y > start.y and start.x == end.x and not any(start.y < y < end.y for y in rows[start.x]):
            x = start.x + start.width / 2
            lines.append(f"M{x} {start.y + _HEIGHT}V{end.y}")
        elif (
            end.y > start.y
            and end.x > start.x
            and end.y - start.y < 2 * _ROW + _HEIGHT / 2
            and not any(start.y < y < end.y for y in rows[end.x])
        ):
            x, y = start.x + start.width, start.y + _HEIGHT / 2
            # Between two rows the line is above whatever stands in its own row further right.
            lines.append(f"M{x} {y}h{_GAP / 2}V{end.y - 4}H{end.x + end.width / 2}v4")
        else:
            long.setdefault(b, []).append(a)
    busy: list[float] = []  # of every lane, how far down it is used
    for b in sorted(long, key=lambda b: min(boxes[a].y for a in long[b])):
        top = min(boxes[a].y for a in long[b])
        lane = next((i for i, until in enumerate(busy) if until < top), len(busy))
        busy[lane : lane + 1] = [boxes[b].y]
        x = right + _GAP + lane * _LANE
        for a in long[b]:
            start, end = boxes[a], boxes[b]
            y, target = start.y + _HEIGHT / 2, end.y + _HEIGHT / 2 + (3 if start.x == end.x else 0)
            lines.append(f"M{start.x + start.width} {y}H{x - 4}q4 0 4 4V{target - 4}q0 4 -4 4H{end.x + end.width}")
    return Panel(list(boxes.values()), lines, right + _GAP + len(busy) * _LANE)


# -- the roofline ------------------------------------------------------------------------------------------------------


_MOST_NAMES, _LEAST_NAMED = 8, 0.01  # share of the time


@dataclass
class Axis:
    """A logarithmic axis: values from low to high stand at start to end of the picture."""

    low: float
    high: float
    start: float
    end: float

    @property
    def scale(self) -> float:
        """Length for each unit of the natural logarithm."""
        return (self.end - self.start) / math.log(self.high / self.low)

    def at(self, value: float) -> float:
        """Where a value stands."""
        return round(self.start + self.scale * math.log(value / self.low), 1)

    def powers(self) -> list[float]:
        """The powers of ten within."""
        powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
        return [10.0**power for power in powers]


@dataclass
class Label:
    """A text; `turn` is the SVG rotation that lays it along a line."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    turn: str = ""

    @property
    def left(self) -> float:
        """Where it begins, as far as a font's width is known."""
        return self.x - self.width * {"start": 0, "middle": 0.5, "end": 1}[self.anchor]

    @property
    def width(self) -> float:
        """About."""
        return 6.3 * len(self.text)


@dataclass
class Dot:
    """A kernel: its place, its size by share of the time, what bounds it, and what the pointer shows."""

    x: float
    y: float
    radius: float
    bound: str
    hint: str

    def under(self, label: Label) -> bool:
        """Whether the label would lie on it."""
        beside = label.left - self.radius < self.x < label.left + label.width + self.radius
        return beside and abs(self.y - label.y + 4) < 5 + self.radius


@dataclass
class Roofline:
    """Reached operations per second over operations per byte, under this machine's ceilings; area is share of time."""

    x: Axis
    y: Axis
    roofs: Sequence[tuple[str, str]]
    labels: Sequence[Label]
    dots: Sequence[Dot]
    names: Sequence[Label]


def roofline(report: Report) -> Roofline | None:
    """The picture of what bounds the kernels; None where ceilings or times are not known."""
    limits = report.ceilings
    known = [
        (kernel, kernel.intensity, kernel.operations / kernel.milliseconds * 1e3)
        for kernel in report.kernels
        if kernel.intensity and kernel.operations and kernel.milliseconds
    ]
    if limits is None or not known:
        return None
    intensities, speeds = [row[1] for row in known], [row[2] for row in known]
    peaks = {report.precision.upper(): (limits.operations, "GFLOP/s", "")}
    if limits.int8:
        peaks["INT8"] = (limits.int8, "GOP/s", "int8")
    slowest, fastest = limits.bandwidth[-1][1], limits.bandwidth[0][1]
    x = Axis(min(intensities) / 1.6, max(max(intensities) * 1.6, limits.operations / slowest * 4), 64, 1034)
    y = Axis(min(speeds) / 1.8, max(*speeds, *(peak for peak, _, _ in peaks.values())) * 1.6, 414, 18)
    roofs, labels = [], []
    ends = sorted({limits.bandwidth[0], limits.bandwidth[-1]})
    for size, speed in limits.bandwidth:
        start, knee = max(x.low, y.low / speed), min(x.high, limits.operations / speed)
        line = f"M{x.at(start)} {y.at(start * speed)}L{x.at(knee)} {y.at(knee * speed)}"
        roofs.append((line, "" if (size, speed) in ends else "faint"))
    for name, (peak, unit, kind) in peaks.items():
        begin = x.at(max(x.low, limits.operations / fastest))
        roofs.append((f"M{begin} {y.at(peak)}H{x.end}", kind))
        labels.append(Label(begin + 6, y.at(peak) - 6, f"{name}: {peak / 1e9:.0f} {unit}"))
    slope = math.degrees(math.atan2(y.scale, x.scale))
    for (size, speed), offset in zip(ends, (-7, 15), strict=False):
        start = max(x.low * 1.15, y.low * 1.6 / speed)
        across, down = x.at(start), y.at(start * speed)
        text = f"{speed / 1e9:.0f} GB/s ({size / 2**20:g} MiB)"
        labels.append(Label(across, down + offset, text, turn=f"rotate({slope:.1f} {across} {down})"))
    known.sort(key=lambda row: -(row[0].share or 0))  # small ones in front
    dots = []
    for kernel, intensity, speed in known:
        hint = f"{title(report, kernel)}: {number(kernel.milliseconds)} ms, {speed / 1e9:.1f} GFLOP/s"
        radius = round(3 + 34 * math.sqrt(kernel.share or 0) / 1.6, 1)
        dots.append(Dot(x.at(intensity), y.at(speed), radius, kernel.bound, hint))
    return Roofline(x, y, roofs, labels, dots, _names(report, [row[0] for row in known], dots, x))


def _names(report: Report, kernels: Sequence[Kernel], dots: Sequence[Dot], x: Axis) -> list[Label]:
    """Names of the largest dots, where there is room for them: on the right, on the left, above or below."""
    names: list[Label] = []
    for kernel, dot in zip(kernels, dots, strict=True):
        if (kernel.share or 0) < _LEAST_NAMED:
            break
        text, away = title(report, kernel).split(" + ")[0], dot.radius + 4
        for label in (
            Label(dot.x + away, dot.y + 4, text),
            Label(dot.x - away, dot.y + 4, text, "end"),
            Label(dot.x, dot.y - away, text, "middle"),
            Label(dot.x, dot.y + away + 8, text, "middle"),
        ):
            inside = x.start < label.left and label.left + label.width < x.end
            near = (name for name in names if abs(name.y - label.y) < 14)
            apart = all(name.left + name.width < label.left or label.left + label.width < name.left for name in near)
            if inside and apart and not any(other.under(label) for other in dots):
                names.append(label)
                break
    return names[:_MOST_NAMES]
