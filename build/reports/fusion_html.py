"""A fusion report as Markdown and as one HTML file: the graph before and after, a roofline plot, and the tables.

The HTML needs nothing else: its pictures are inline SVG in colours that follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from build.reports.fusion import Kernel, Node, Report
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
FATES = {
    "kernel": "became (part of) a kernel",
    "folded": "folded: a constant of the plan",
    "merged": "merged: an equal node does its work",
    "eliminated": "eliminated: nothing runs for it",
    "dead": "dead: no output needs it",
    "unmapped": "unmapped",
}


def number(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits and no exponent; empty for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def title(report: Report, kernel: Kernel) -> str:
    """What a kernel does, in terms of the source: its first node and the types of the others."""
    if not kernel.nodes:
        return f"{kernel.op} ({kernel.evidence})"
    nodes = [report.nodes[i] for i in kernel.nodes]
    first = "/".join(nodes[0].name.strip("/").split("/")[-2:])
    if kernel.kind == "expansion":
        return f"{first}: {kernel.op}"
    rest = " + ".join(node.op for node in nodes[1:])
    kept = first if nodes[0].op.lower() in first.lower() else f"{first} ({nodes[0].op})"
    return f"{kept} + {rest}" if rest else kept


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


_HEADS = ("kernel", "ms", "share", "precision", "MFLOP", "MB", "FLOP/byte", "bound", "of ceiling", "INT8 would be")


def _row(report: Report, kernel: Kernel) -> tuple[str, ...]:
    mega = (None if value is None else value / 1e6 for value in (kernel.operations, kernel.traffic))
    return (
        title(report, kernel),
        number(kernel.milliseconds),
        _percent(kernel.share),
        kernel.precision,
        *(number(value) for value in mega),
        number(kernel.intensity),
        kernel.bound,
        _percent(kernel.efficiency),
        kernel.int8,
    )


def _summary(report: Report) -> list[tuple[str, str]]:
    """The figures that come first."""
    groups = len(report.groups("Conv+BatchNormalization+Relu"))
    found = [("nodes → kernels", f"{report.computing_nodes()} → {len(report.kernels)}")]
    found.append(("Conv+BN+Relu, one kernel each", str(groups)))
    if report.milliseconds is not None:
        found.append(("one image, all kernels", f"{number(report.milliseconds)} ms"))
    if report.milliseconds and report.unfused_milliseconds:
        times = report.unfused_milliseconds / report.milliseconds
        found.append(
            (
                f"without optimisation ({report.unfused_kernels} kernels)",
                f"{number(report.unfused_milliseconds)} ms ({times:.1f}×)",
            )
        )
    unmapped = sum(kernel.evidence == "unmapped" for kernel in report.kernels)
    found.append(("unmapped kernels, nodes", f"{unmapped}, {len(report.fates().get('unmapped', []))}"))
    return found


def _ceiling_text(ceilings: Ceilings) -> str:
    int8 = "" if ceilings.int8 is None else f", {ceilings.int8 / 1e9:.0f} GOP/s INT8"
    memory = ", ".join(f"{size / 2**20:g} MiB: {speed / 1e9:.0f} GB/s" for size, speed in ceilings.bandwidth)
    peak = f"{ceilings.operations / 1e9:.0f} GFLOP/s{int8}"
    return f"{peak}; copy by working set: {memory}. Measured as the {ceilings.method}."


def _int8_text(report: Report) -> str:
    """The estimate for the whole model; empty where nothing can be said."""
    changed = [kernel for kernel in report.kernels if kernel.int8_milliseconds is not None]
    before = sum(kernel.milliseconds or 0 for kernel in changed)
    if not changed or not report.milliseconds:
        return ""
    after = sum(kernel.int8_milliseconds or 0 for kernel in changed)
    whole = sum(kernel.milliseconds or 0 for kernel in report.kernels)
    return (
        f"In INT8 the {len(changed)} convolutions and matrix products would take {number(after)} ms instead of "
        f"{number(before)} ms, and all kernels {number(whole - before + after)} ms instead of {number(whole)} ms: an "
        "estimate that keeps every kernel's present share of its ceiling and leaves conversions between types out."
    )


def _fusions(report: Report) -> list[tuple[str, list[list[Node]]]]:
    """Fused groups by pattern, the most frequent first."""
    patterns: dict[str, list[list[Node]]] = {}
    for kernel in report.kernels:
        if kernel.kind in ("vertical", "pointwise", "horizontal"):
            nodes = [report.nodes[i] for i in kernel.nodes]
            patterns.setdefault(f"{kernel.pattern} ({kernel.kind})", []).append(nodes)
    return sorted(patterns.items(), key=lambda item: -len(item[1]))


def _findings(report: Report) -> list[str]:
    """What happened and what did not, one sentence each."""
    fates, found = report.fates(), []
    for fate in ("folded", "merged", "eliminated", "dead"):
        if fate in fates:
            kinds: dict[str, int] = {}
            for node in fates[fate]:
                kinds[node.op] = kinds.get(node.op, 0) + 1
            found.append(f"{FATES[fate]}: " + ", ".join(f"{count} {op}" for op, count in sorted(kinds.items())) + ".")
    concats = [node for node in report.nodes if node.op == "Concat"]
    if concats:
        gone = sum(node.fate == "eliminated" for node in concats)
        found.append(f"Concat elimination: {gone} of {len(concats)} Concat nodes need no kernel.")
    merged = sum(kernel.kind == "horizontal" for kernel in report.kernels)
    found.append(
        f"Horizontal fusion: {merged} kernel(s) do several convolutions of one source; "
        f"{len(report.not_merged)} source(s) feed several convolutions that stayed apart."
    )
    added = sum(kernel.kind == "added" for kernel in report.kernels)
    if added:
        found.append(f"The runtime added {added} kernel(s) that only change a layout.")
    return found


# -- Markdown ----------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report for a terminal, a pull request or a diff."""
    lines = [f"# Fusion report: {report.model}, {report.runtime} {report.version}, {report.precision}", ""]
    lines += [f"- {name}: **{value}**" for name, value in _summary(report)]
    lines += [f"- machine: {report.machine}", f"- how: {report.how}"]
    if report.ceilings:
        lines.append(f"- ceilings: {_ceiling_text(report.ceilings)}")
    lines += [f"- note: {note}" for note in report.notes]
    lines += [
        "",
        "## The ten kernels that take longest",
        "",
        *markdown_table(_HEADS, (_row(report, k) for k in report.top())),
    ]
    if _int8_text(report):
        lines += ["", _int8_text(report)]
    lines += ["", "## Which nodes became one kernel", ""]
    for pattern, groups in _fusions(report):
        lines += [f"### {pattern}: {len(groups)}", ""]
        lines += ["- " + " + ".join(f"`{node.name}`" for node in group) for group in groups]
        lines.append("")
    lines += ["## What else happened", "", *(f"- {text}" for text in _findings(report))]
    lines += [f"- stayed apart: {', '.join(f'`{name}`' for name in names)}" for names in report.not_merged]
    lines += ["", "## Every kernel", ""]
    rows = (
        (k.op, " + ".join(report.nodes[i].name for i in k.nodes) or "–", k.kind, k.evidence, number(k.milliseconds))
        for k in report.kernels
    )
    lines += markdown_table(("kernel", "source nodes", "kind", "evidence", "ms"), rows)
    return "\n".join(lines) + "\n"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(heads), line(["---"] * len(heads)), *(line(row) for row in rows)]


# -- SVG ---------------------------------------------------------------------------------------------------------------


def tag(name: str, content: str = "", **attributes: object) -> str:
    pairs = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{pairs}>{content}</{name}>"


def _text(x: float, y: float, content: str, **attributes: object) -> str:
    return tag("text", escape(content), x=round(x, 1), y=round(y, 1), **attributes)


@dataclass
class _Box:
    x: float
    y: float
    width: float
    label: str
    kind: str
    hint: str
    side: str = ""


_ROW, _HEIGHT, _GAP, _LANE = 24, 17, 14, 12


def graph_svg(report: Report) -> str:
    """Source nodes on the left, kernels on the right, each kernel at the height of its nodes."""
    shown = [i for i, node in enumerate(report.nodes) if node.op != "Constant"]
    place = _layout(shown, [(a, b) for a, b in report.edges if a in set(shown)])
    if not place:
        return ""
    width = 108
    before = {
        i: _Box(
            column * (width + _GAP),
            row * _ROW,
            width,
            report.nodes[i].op.replace("BatchNormalization", "BatchNorm"),
            report.kernels[report.nodes[i].kernels[0]].kind if report.nodes[i].kernels else report.nodes[i].fate,
            f"{report.nodes[i].name}: {FATES[report.nodes[i].fate]}",
        )
        for i, (column, row) in place.items()
    }
    after = _kernel_boxes(report, before)
    makers = {name: k for k, kernel in enumerate(report.kernels) for name in kernel.outputs}
    links = [(makers[name], k) for k, kernel in enumerate(report.kernels) for name in kernel.inputs if name in makers]
    left, left_width = _panel(before, [(a, b) for a, b in report.edges if a in before and b in before])
    right, right_width = _panel(after, links)
    groups = []
    for kernel in report.kernels:
        boxes = [before[i] for i in kernel.nodes if i in before]
        if kernel.kind in ("vertical", "pointwise", "horizontal") and boxes:
            x, y = min(box.x for box in boxes) - 4, min(box.y for box in boxes) - 3
            groups.append(
                tag(
                    "rect",
                    x=x,
                    y=y,
                    width=max(box.x + box.width for box in boxes) + 4 - x,
                    height=max(box.y for box in boxes) + _HEIGHT + 3 - y,
                    rx=6,
                    class_=f"group {kernel.kind}",
                )
            )
    height = max(box.y for box in [*before.values(), *after.values()]) + _ROW + 40
    shift = left_width + 56
    body = _text(0, 14, f"before: {report.computing_nodes()} nodes", class_="head")
    body += _text(shift, 14, f"after: {len(report.kernels)} kernels", class_="head")
    body += tag("g", "".join(groups) + left, transform="translate(6 30)")
    body += tag("g", right, transform=f"translate({shift + 6} 30)")
    total = shift + right_width + 12
    label = "The graph before and after fusion"
    return tag("svg", body, viewBox=f"0 0 {total} {height}", width=total, height=height, role="img", aria_label=label)


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


def _kernel_boxes(report: Report, before: Mapping[int, _Box]) -> dict[int, _Box]:
    """One box for every kernel: as high as the middle of its nodes, in their column."""
    width, found = 158, {}
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
        label = kernel.pattern.replace("BatchNormalization", "BN") if kernel.kind != "expansion" else kernel.op
        label = label or kernel.op
        text = label if len(label) <= 22 else label[:21] + "…"
        hint = (
            f"{title(report, kernel)}\n{kernel.name} ({kernel.op})\n{KINDS[kernel.kind]}; evidence: {kernel.evidence}"
        )
        time = "" if kernel.milliseconds is None else f"{number(kernel.milliseconds, 2)} ms"
        found[k] = _Box(column * (width + _GAP), y, width, text, kernel.kind, hint, time)
    return found


def _panel(boxes: Mapping[int, _Box], edges: Sequence[tuple[int, int]]) -> tuple[str, float]:
    """Boxes and edges; an edge that would cross other boxes goes down a lane on the right. Returns SVG and width."""
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
        elif end.y > start.y and end.x > start.x and not any(start.y < y < end.y for y in rows[end.x]):
            x, y = start.x + start.width, start.y + _HEIGHT / 2
            middle = end.x + end.width / 2
            # Between two rows the line is above whatever stands in its own row further right.
            lines.append(f"M{x} {y}h{_GAP / 2}V{end.y - 4}H{middle}v4" if end.y - y < 2 * _ROW else "")
            if not lines[-1]:
                lines.pop()
                long.setdefault(b, []).append(a)
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
    drawn = "".join(tag("path", d=line, class_="edge") for line in lines)
    for box in boxes.values():
        inside = tag("title", escape(box.hint))
        inside += tag("rect", x=box.x, y=box.y, width=box.width, height=_HEIGHT, rx=4, class_=f"box {box.kind}")
        inside += _text(box.x + 6, box.y + 12.5, box.label)
        if box.side:
            inside += _text(box.x + box.width - 6, box.y + 12.5, box.side, text_anchor="end", class_="side")
        drawn += tag("g", inside)
    return drawn, right + _GAP + len(busy) * _LANE


def roofline_svg(report: Report) -> str:
    """Reached operations per second over operations per byte, under this machine's ceilings; area is share of time."""
    limits = report.ceilings
    points = [k for k in report.kernels if k.intensity and k.operations and k.milliseconds]
    if limits is None or not points:
        return ""
    width, height, left, top = 1050, 460, 64, 18
    reached = {id(k): (k.operations or 0) / (k.milliseconds or 1) * 1e3 for k in points}
    low_x = min(k.intensity or 1 for k in points) / 1.6
    high_x = max(max(k.intensity or 1 for k in points) * 1.6, limits.operations / limits.bandwidth[-1][1] * 4)
    peak = max(limits.operations, limits.int8 or 0)
    low_y, high_y = min(reached.values()) / 1.8, max(peak, *reached.values()) * 1.6
    plot_width, plot_height = width - left - 16, height - top - 46

    def x(value: float) -> float:
        return left + plot_width * math.log(value / low_x) / math.log(high_x / low_x)

    def y(value: float) -> float:
        return top + plot_height * (1 - math.log(value / low_y) / math.log(high_y / low_y))

    body = tag("clipPath", tag("rect", x=left, y=top, width=plot_width, height=plot_height), id="plot")
    for power in range(math.ceil(math.log10(low_x)), math.floor(math.log10(high_x)) + 1):
        body += tag("path", d=f"M{x(10.0**power):.1f} {top}V{top + plot_height}", class_="grid")
        body += _text(x(10.0**power), top + plot_height + 16, f"{10.0**power:g}", text_anchor="middle", class_="axis")
    for power in range(math.ceil(math.log10(low_y)), math.floor(math.log10(high_y)) + 1):
        body += tag("path", d=f"M{left} {y(10.0**power):.1f}H{left + plot_width}", class_="grid")
        body += _text(left - 8, y(10.0**power) + 4, f"{10.0 ** (power - 9):g}", text_anchor="end", class_="axis")
    middle = left + plot_width / 2
    body += _text(middle, height - 8, "FLOP per byte moved", text_anchor="middle", class_="axis")
    turn = f"rotate(-90 14 {top + plot_height / 2})"
    body += _text(14, top + plot_height / 2, "GFLOP/s reached", text_anchor="middle", class_="axis", transform=turn)
    roofs = ""
    ends = {limits.bandwidth[0], limits.bandwidth[-1]}
    for size, speed in limits.bandwidth:
        knee = min(high_x, limits.operations / speed)
        start = max(low_x, low_y / speed)
        line = f"M{x(start):.1f} {y(start * speed):.1f}L{x(knee):.1f} {y(knee * speed):.1f}"
        roofs += tag("path", d=line, class_="roof" if (size, speed) in ends else "roof faint")
    first_knee = limits.operations / limits.bandwidth[0][1]
    roofs += tag(
        "path", d=f"M{x(max(low_x, first_knee)):.1f} {y(limits.operations):.1f}H{left + plot_width}", class_="roof"
    )
    right = left + plot_width - 6
    roofs += _text(
        right,
        y(limits.operations) - 6,
        f"{report.precision.upper()}: {limits.operations / 1e9:.0f} GFLOP/s",
        text_anchor="end",
        class_="roofname",
    )
    if limits.int8:
        roofs += tag(
            "path", d=f"M{x(max(low_x, first_knee)):.1f} {y(limits.int8):.1f}H{left + plot_width}", class_="roof int8"
        )
        roofs += _text(
            right, y(limits.int8) - 6, f"INT8: {limits.int8 / 1e9:.0f} GOP/s", text_anchor="end", class_="roofname"
        )
    slope = math.degrees(math.atan2(plot_height / math.log(high_y / low_y), plot_width / math.log(high_x / low_x)))
    for (size, speed), offset in zip(sorted(ends), (-7, 15), strict=False):
        at = max(low_x * 1.15, low_y * 1.6 / speed)
        turn = f"rotate({-slope:.1f} {x(at):.1f} {y(at * speed):.1f})"
        name = f"{speed / 1e9:.0f} GB/s ({size / 2**20:g} MiB)"
        roofs += _text(x(at), y(at * speed) + offset, name, transform=turn, class_="roofname")
    dots = names = ""
    named: list[tuple[float, float]] = []
    for rank, kernel in enumerate(sorted(points, key=lambda k: -(k.share or 0))):
        spot_at = (x(kernel.intensity or 1), y(reached[id(kernel)]))
        radius = 3 + 34 * math.sqrt(kernel.share or 0) / 1.6
        hint = f"{title(report, kernel)}: {number(kernel.milliseconds)} ms, {reached[id(kernel)] / 1e9:.1f} GFLOP/s"
        spot = tag(
            "circle",
            tag("title", escape(hint)),
            cx=round(spot_at[0], 1),
            cy=round(spot_at[1], 1),
            r=round(radius, 1),
            class_=f"dot {kernel.bound}",
        )
        dots += spot  # small ones in front
        here, below = spot_at
        free = not any(abs(here - a) < 150 and abs(below - b) < 14 for a, b in named)
        if rank < 8 and free and here < right - 160:
            named.append(spot_at)
            names += _text(here + radius + 4, below + 4, title(report, kernel).split(" + ")[0], class_="dotname")
    body += tag("g", roofs + dots + names, clip_path="url(#plot)")
    body += tag("rect", x=left, y=top, width=plot_width, height=plot_height, class_="frame")
    label = "Roofline: reached operations per second over operations per byte"
    return tag("svg", body, viewBox=f"0 0 {width} {height}", width=width, height=height, role="img", aria_label=label)


# -- HTML --------------------------------------------------------------------------------------------------------------

LOOK = """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2128;--dim:#646c78;--line:#e0e2e6;--grid:#eceef1;
--vertical:#2f6fde;--pointwise:#0f8f83;--horizontal:#8a4bd0;--expansion:#5b8c1f;--added:#c07a00;--unmapped:#d23b3b;
--single:#8a92a0;--folded:#b4bac4}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--card:#1b1e24;--ink:#e4e7ec;--dim:#98a1ae;--line:#2d323b;
--grid:#262a32;--vertical:#6ca0ff;--pointwise:#3fc3b4;--horizontal:#b98bf0;--expansion:#9bc95a;--added:#e3a63a;
--unmapped:#ff7575;--single:#8d96a5;--folded:#565e6b}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:25px;margin:0 0 4px}h2{font-size:18px;margin:38px 0 10px}h3{font-size:15px;margin:18px 0 6px}
p{margin:6px 0}.dim,.axis,.roofname{color:var(--dim)}
.facts{display:flex;flex-wrap:wrap;gap:10px;margin:20px 0}
.facts div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 16px}
.facts b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.facts span{color:var(--dim);font-size:13px}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px}
.graph{max-height:760px;overflow:auto}
table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:5px 9px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--dim);font-weight:600}tr:last-child td{border-bottom:0}
th:first-child,td:first-child,.words{text-align:left}
td.wrap{white-space:normal;overflow-wrap:anywhere}
code{font:12px ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
ol{margin:4px 0;padding-left:30px}li{margin:2px 0}
.key{display:flex;flex-wrap:wrap;gap:6px 18px;margin:8px 0 12px;font-size:13px;color:var(--dim)}
.key i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
svg{display:block;font:11px system-ui,-apple-system,"Segoe UI",sans-serif}svg text{fill:var(--ink)}
svg .head{font-size:13px;font-weight:600}svg .side,svg .axis,svg .roofname{fill:var(--dim)}
.edge{fill:none;stroke:var(--dim);opacity:.55}
.box{fill:var(--card);stroke:var(--single)}
.group{fill:none;stroke-width:1;stroke-dasharray:3 2;opacity:.75}
.grid{stroke:var(--grid)}.frame{fill:none;stroke:var(--line)}
.roof{fill:none;stroke:var(--ink);stroke-width:1.6}.roof.faint{stroke-width:.8;opacity:.35}
.roof.int8{stroke-dasharray:6 4}
.dotname,.roofname{paint-order:stroke;stroke:var(--card);stroke-width:3px}
.dot{stroke:var(--card);fill-opacity:.75}.dot.compute{fill:var(--vertical)}.dot.memory{fill:var(--added)}
.dot{fill:var(--single)}
""" + "".join(
    f".box.{kind}{{stroke:var(--{kind});fill:color-mix(in srgb,var(--{kind}) 16%,var(--card))}}"
    f".group.{kind}{{stroke:var(--{kind})}}i.{kind}{{background:var(--{kind})}}"
    for kind in ("vertical", "pointwise", "horizontal", "expansion", "added", "unmapped", "single", "folded")
)


def html(report: Report) -> str:
    """The whole report as one file."""
    facts = "".join(
        tag("div", f"<b>{escape(value)}</b><span>{escape(name)}</span>") for name, value in _summary(report)
    )
    parts = [
        f"<h1>{escape(report.model)}: what fusion made of it</h1>",
        tag("p", escape(f"{report.runtime} {report.version} · {report.precision} · {report.machine}"), class_="dim"),
        tag("div", facts, class_="facts"),
        *(tag("p", f"<b>Note.</b> {escape(note)}") for note in report.notes),
        "<h2>The ten kernels that take longest</h2>",
        tag("div", table_html(_HEADS, [_row(report, k) for k in report.top()]), class_="scroll"),
        tag("p", escape(_int8_text(report)), class_="dim"),
    ]
    roofline = roofline_svg(report)
    if roofline:
        parts += [
            "<h2>What bounds them</h2>",
            tag("div", tag("div", roofline, class_="scroll")),
            '<div class="key"><span><i style="background:var(--vertical)"></i>bound by compute</span>'
            '<span><i style="background:var(--added)"></i>bound by memory</span>'
            "<span>area: share of the time</span><span>above a line: its data stayed in a nearer cache</span></div>",
        ]
    kinds = {kernel.kind for kernel in report.kernels}
    key = "".join(tag("span", f'<i class="{kind}"></i>{text}') for kind, text in KINDS.items() if kind in kinds)
    parts += [
        "<h2>The graph before and after</h2>",
        tag("div", key, class_="key"),
        tag("div", graph_svg(report), class_="scroll graph"),
        "<h2>Which nodes became one kernel</h2>",
    ]
    for pattern, groups in _fusions(report):
        rows = "".join(tag("li", " + ".join(tag("code", escape(node.name)) for node in group)) for group in groups)
        parts += [f"<h3>{escape(pattern)}: {len(groups)}</h3>", tag("ol", rows)]
    found = [escape(text) for text in _findings(report)]
    found += ["Stayed apart: " + ", ".join(tag("code", escape(n)) for n in names) for names in report.not_merged]
    parts += ["<h2>What else happened</h2>", tag("ul", "".join(tag("li", text) for text in found))]
    rows_of_all = [
        (
            kernel.op,
            " + ".join(report.nodes[i].name for i in kernel.nodes) or "–",
            kernel.kind,
            kernel.evidence,
            number(kernel.milliseconds),
        )
        for kernel in report.kernels
    ]
    heads = ("kernel", "source nodes", "kind", "evidence", "ms")
    parts += [
        "<h2>Every kernel</h2>",
        tag("div", table_html(heads, rows_of_all, words=4), class_="scroll"),
        "<h2>How this was measured</h2>",
        tag("p", escape(report.how) + "."),
    ]
    if report.ceilings:
        parts.append(tag("p", "Ceilings: " + escape(_ceiling_text(report.ceilings))))
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Fusion report: {escape(report.model)}</title><style>{LOOK}</style>"
    )
    body = tag("main", "\n".join(parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def table_html(heads: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table whose first columns are words."""

    def line(cells: Sequence[str], kind: str) -> str:
        first = "words wrap" if kind == "td" else "words"
        return tag("tr", "".join(tag(kind, escape(cell), class_=first * (i < words)) for i, cell in enumerate(cells)))

    return tag("table", line(heads, "th") + "".join(line(row, "td") for row in rows))
