"""A fusion report as one HTML file that needs nothing else: tables, the graph before and after, and a roofline plot.

The pictures are inline SVG in colours that follow the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from build.reports import fusion_text
from build.reports.fusion_model import Report
from build.reports.fusion_text import FATES, FUSED, KINDS, title
from build.reports.html import Html, number, page, scroll, tag

_STYLE = """
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:20px 0}
.facts div{padding:10px 16px}
.facts b{display:block;font-size:20px;font-variant-numeric:tabular-nums}.facts span{color:var(--dim);font-size:13px}
.graph{max-height:760px;overflow:auto}
code{font:12px ui-monospace,Menlo,Consolas,monospace}ol{margin:4px 0;padding-left:30px}li{margin:2px 0}
.key{display:flex;flex-wrap:wrap;gap:6px 18px;margin:8px 0 12px;font-size:13px;color:var(--dim)}
.key i{width:11px;height:11px;border-radius:3px;display:inline-block;margin-right:6px;vertical-align:-1px}
svg{font:11px system-ui,-apple-system,"Segoe UI",sans-serif}svg text{fill:var(--ink)}
svg .head{font-size:13px;font-weight:600}svg .side,svg .axis,svg .roofname{fill:var(--dim)}
.edge{fill:none;stroke:var(--dim);opacity:.55}.box{fill:var(--card);stroke:var(--single)}
.group{fill:none;stroke:var(--kind);stroke-dasharray:3 2;opacity:.75}.key i{background:var(--kind)}
.grid{stroke:var(--grid)}.frame{fill:none;stroke:var(--line)}
.roof{fill:none;stroke:var(--ink);stroke-width:1.6}.roof.faint{stroke-width:.8;opacity:.35}
.roof.int8{stroke-dasharray:6 4}.dotname,.roofname{paint-order:stroke;stroke:var(--card);stroke-width:3px}
.dot{fill:var(--kind,var(--single));fill-opacity:.75;stroke:var(--card)}
.compute{--kind:var(--vertical)}.memory{--kind:var(--added)}
""" + "".join(
    f".{kind}{{--kind:var(--{kind})}}"
    f".box.{kind}{{stroke:var(--kind);fill:color-mix(in srgb,var(--kind) 16%,var(--card))}}"
    for kind in (*KINDS, "folded")
)
_BOUNDS = {"compute": "bound by compute", "memory": "bound by memory"}


def html(report: Report) -> str:
    """The whole report as one file."""
    kinds = {kernel.kind for kernel in report.kernels}
    meanings = {kind: meaning for kind, meaning in KINDS.items() if kind in kinds}
    summary, roofline = fusion_text.summary(report), roofline_svg(report)
    facts = (tag("div", tag("b", value), tag("span", name), class_="card") for name, value in summary)
    parts = [
        tag("h1", f"{report.model}: what fusion made of it"),
        tag("p", f"{report.runtime} {report.version} · {report.precision} · {report.machine}", class_="dim"),
        tag("div", *facts, class_="facts"),
        *(tag("p", tag("b", "Note."), f" {note}") for note in report.notes),
        tag("h2", "The ten kernels that take longest"),
        fusion_text.longest(report).html("the ten kernels that take longest"),
        tag("p", fusion_text.int8_estimate(report), class_="dim"),
    ]
    if roofline:
        parts += [
            tag("h2", "What bounds them"),
            scroll(roofline, "roofline"),
            _key(_BOUNDS, "area: share of the time", "above a line: its data stayed in a nearer cache"),
        ]
    parts += [
        tag("h2", "The graph before and after"),
        _key(meanings),
        scroll(graph_svg(report), "the graph before and after", "scroll graph"),
        tag("h2", "Which nodes became one kernel"),
    ]
    for pattern, groups in fusion_text.fusions(report):
        rows = (tag("li", _codes([node.name for node in group], " + ")) for group in groups)
        parts += [tag("h3", f"{pattern}: {len(groups)}"), tag("ol", *rows)]
    apart = (tag("li", "Stayed apart: ", _codes(names, ", ")) for names in report.not_merged)
    parts += [
        tag("h2", "What else happened"),
        tag("ul", *(tag("li", sentence) for sentence in fusion_text.findings(report)), *apart),
        tag("h2", "Every kernel"),
        fusion_text.every_kernel(report).html("every kernel"),
        tag("h2", "How this was measured"),
        tag("p", f"{report.how}."),
    ]
    if report.ceilings:
        parts.append(tag("p", f"Ceilings: {fusion_text.ceilings(report.ceilings)}"))
    return page(f"Fusion report: {report.model}", _STYLE, parts)


def _key(colours: Mapping[str, str], *more: str) -> Html:
    """What the colours of a picture mean."""
    spans = [tag("span", tag("i", class_=kind), meaning) for kind, meaning in colours.items()]
    return tag("div", *spans, *(tag("span", text) for text in more), class_="key")


def _codes(names: Sequence[str], between: str) -> Html:
    return Html(between.join(tag("code", name) for name in names))


# -- the graph ---------------------------------------------------------------------------------------------------------

_ROW, _HEIGHT, _GAP, _LANE = 24, 17, 14, 12
_NODE_WIDTH, _KERNEL_WIDTH = 108, 158


@dataclass
class _Box:
    x: float
    y: float
    width: float
    kind: str
    label: str
    hint: str
    side: str = ""


def _text(x: float, y: float, content: str, **attributes: object) -> Html:
    return tag("text", content, x=round(x, 1), y=round(y, 1), **attributes)


def _svg(width: float, height: float, label: str, *content: str) -> Html:
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    return tag("svg", *content, **size, role="img", aria_label=label)


def graph_svg(report: Report) -> Html:
    """Source nodes on the left, kernels on the right, each kernel at the height of its nodes."""
    shown = [i for i, node in enumerate(report.nodes) if node.op != "Constant"]
    place = _layout(shown, [(a, b) for a, b in report.edges if a in set(shown)])
    if not place:
        return Html()
    before: dict[int, _Box] = {}
    for i, (column, row) in place.items():
        node = report.nodes[i]
        kind = report.kernels[node.kernels[0]].kind if node.kernels else node.fate
        label = node.op.replace("BatchNormalization", "BatchNorm")
        hint = f"{node.name}: {FATES[node.fate]}"
        before[i] = _Box(column * (_NODE_WIDTH + _GAP), row * _ROW, _NODE_WIDTH, kind, label, hint)
    after = _kernel_boxes(report, before)
    makers = {name: k for k, kernel in enumerate(report.kernels) for name in kernel.outputs}
    links = [(makers[name], k) for k, kernel in enumerate(report.kernels) for name in kernel.inputs if name in makers]
    left, left_width = _panel(before, [(a, b) for a, b in report.edges if a in before and b in before])
    right, right_width = _panel(after, links)
    groups = []
    for kernel in report.kernels:
        boxes = [before[i] for i in kernel.nodes if i in before]
        if kernel.kind in FUSED and boxes:
            x, y = min(box.x for box in boxes) - 4, min(box.y for box in boxes) - 3
            right_x, bottom_y = max(box.x for box in boxes) + _NODE_WIDTH + 4, max(box.y for box in boxes) + _HEIGHT + 3
            size = {"width": right_x - x, "height": bottom_y - y}
            groups.append(tag("rect", x=x, y=y, **size, rx=6, class_=f"group {kernel.kind}"))
    shift = left_width + 56
    return _svg(
        shift + right_width + 12,
        max(box.y for box in [*before.values(), *after.values()]) + _ROW + 40,
        "The graph before and after fusion",
        _text(0, 14, f"before: {report.computing_nodes()} nodes", class_="head"),
        _text(shift, 14, f"after: {len(report.kernels)} kernels", class_="head"),
        tag("g", *groups, left, transform="translate(6 30)"),
        tag("g", right, transform=f"translate({shift + 6} 30)"),
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


def _kernel_boxes(report: Report, before: Mapping[int, _Box]) -> dict[int, _Box]:
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
        after[k] = _Box(column * (_KERNEL_WIDTH + _GAP), y, _KERNEL_WIDTH, kernel.kind, label, hint, time)
    return after


def _panel(boxes: Mapping[int, _Box], edges: Sequence[tuple[int, int]]) -> tuple[Html, float]:
    """Boxes and edges, and their width; an edge that would cross other boxes goes down a lane on the right."""
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
    drawn = [tag("path", d=line, class_="edge") for line in lines]
    for box in boxes.values():
        rect = tag("rect", x=box.x, y=box.y, width=box.width, height=_HEIGHT, rx=4, class_=f"box {box.kind}")
        label = _text(box.x + 6, box.y + 12.5, box.label)
        side = _text(box.x + box.width - 6, box.y + 12.5, box.side, text_anchor="end", class_="side")
        drawn.append(tag("g", tag("title", box.hint), rect, label, *([side] if box.side else [])))
    return Html("".join(drawn)), right + _GAP + len(busy) * _LANE


# -- the roofline ------------------------------------------------------------------------------------------------------


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A logarithmic axis: where in the picture a value stands."""
    scale = (end - start) / math.log(high / low)
    return lambda value: round(start + scale * math.log(value / low), 1)


def _powers(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def roofline_svg(report: Report) -> Html:
    """Reached operations per second over operations per byte, under this machine's ceilings; area is share of time."""
    limits = report.ceilings
    points = [
        (kernel, kernel.intensity, kernel.operations / kernel.milliseconds * 1e3)
        for kernel in report.kernels
        if kernel.intensity and kernel.operations and kernel.milliseconds
    ]
    if limits is None or not points:
        return Html()
    points.sort(key=lambda point: -(point[0].share or 0))  # small ones in front
    peaks = [(limits.operations, f"{report.precision.upper()}: {limits.operations / 1e9:.0f} GFLOP/s", "roof")]
    if limits.int8:
        peaks.append((limits.int8, f"INT8: {limits.int8 / 1e9:.0f} GOP/s", "roof int8"))
    intensities, speeds = [point[1] for point in points], [point[2] for point in points]
    low_x, low_y = min(intensities) / 1.6, min(speeds) / 1.8
    high_x = max(max(intensities) * 1.6, limits.operations / limits.bandwidth[-1][1] * 4)
    high_y = max(*speeds, *(peak for peak, _, _ in peaks)) * 1.6
    left, right, top, bottom = 64, 1034, 18, 414
    x, y = _axis(low_x, high_x, left, right), _axis(low_y, high_y, bottom, top)
    area = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    body = [tag("clipPath", tag("rect", **area), id="plot")]
    for value in _powers(low_x, high_x):
        body.append(tag("path", d=f"M{x(value)} {top}V{bottom}", class_="grid"))
        body.append(_text(x(value), bottom + 16, f"{value:g}", text_anchor="middle", class_="axis"))
    for value in _powers(low_y, high_y):
        body.append(tag("path", d=f"M{left} {y(value)}H{right}", class_="grid"))
        body.append(_text(left - 8, y(value) + 4, f"{value / 1e9:g}", text_anchor="end", class_="axis"))
    middle, axis = (top + bottom) / 2, {"text_anchor": "middle", "class_": "axis"}
    body.append(_text((left + right) / 2, 452, "FLOP per byte moved", **axis))
    body.append(_text(14, middle, "GFLOP/s reached", **axis, transform=f"rotate(-90 14 {middle})"))
    drawn = []
    ends = sorted({limits.bandwidth[0], limits.bandwidth[-1]})
    for size, speed in limits.bandwidth:
        start, knee = max(low_x, low_y / speed), min(high_x, limits.operations / speed)
        line = f"M{x(start)} {y(start * speed)}L{x(knee)} {y(knee * speed)}"
        drawn.append(tag("path", d=line, class_="roof" if (size, speed) in ends else "roof faint"))
    begin = x(max(low_x, limits.operations / limits.bandwidth[0][1]))
    for peak, name, kind in peaks:
        drawn.append(tag("path", d=f"M{begin} {y(peak)}H{right}", class_=kind))
        drawn.append(_text(begin + 6, y(peak) - 6, name, class_="roofname"))
    slope = math.degrees(math.atan2(y(10 * low_y) - y(low_y), x(10 * low_x) - x(low_x)))
    for (size, speed), offset in zip(ends, (-7, 15), strict=False):
        start = max(low_x * 1.15, low_y * 1.6 / speed)
        across, down = x(start), y(start * speed)
        name, turn = f"{speed / 1e9:.0f} GB/s ({size / 2**20:g} MiB)", f"rotate({slope:.1f} {across} {down})"
        drawn.append(_text(across, down + offset, name, transform=turn, class_="roofname"))
    dots = [(x(intensity), y(speed), 3 + 21 * math.sqrt(kernel.share or 0)) for kernel, intensity, speed in points]
    for (kernel, _, speed), (across, down, radius) in zip(points, dots, strict=True):
        hint = f"{title(report, kernel)}: {number(kernel.milliseconds)} ms, {speed / 1e9:.1f} GFLOP/s"
        spot = {"cx": across, "cy": down, "r": round(radius, 1), "class_": f"dot {kernel.bound}"}
        drawn.append(tag("circle", tag("title", hint), **spot))
    large = [title(report, kernel).split(" + ")[0] for kernel, _, _ in points if (kernel.share or 0) > 0.01]
    drawn += _names(large, dots, left, right)
    body += [tag("g", *drawn, clip_path="url(#plot)"), tag("rect", **area, class_="frame")]
    return _svg(1050, 460, "Roofline: reached operations per second over operations per byte", *body)


def _names(names: Sequence[str], dots: Sequence[tuple[float, float, float]], left: float, right: float) -> list[Html]:
    """Up to eight names of the first dots (x, y, radius), where there is room: beside a dot, above or below it."""
    placed: list[tuple[float, float, float, str]] = []
    for name, (x, y, radius) in zip(names, dots, strict=False):
        half, away = 3.15 * len(name), radius + 4  # half of the width, about
        for cx, cy in ((x + away + half, y), (x - away - half, y), (x, y - away - 4), (x, y + away + 4)):
            on_dot = any(abs(cx - a) < half + r and abs(cy - b) < 5 + r for a, b, r in dots)
            on_name = any(abs(cx - a) < half + h and abs(cy - b) < 13 for a, b, h, _ in placed)
            if left < cx - half and cx + half < right and not on_dot and not on_name:
                placed.append((cx, cy, half, name))
                break
    return [_text(cx, cy + 4, name, text_anchor="middle", class_="dotname") for cx, cy, _, name in placed[:8]]
