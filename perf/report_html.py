"""The report's page and its plots: one HTML file that loads nothing and follows the reader's light or dark setting.

Matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables: the same picture fits both.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from statistics import median
from typing import TYPE_CHECKING, Any

from build.reports import html
from build.reports.html import Html, Table, scroll, tag
from perf.statistics import curves, saturation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of the verdict: good, bad, or neither where it has no target."""

    good: bool | None
    text: str


@dataclass(frozen=True)
class Plot:
    """A picture, what it shows in words, and how it is drawn."""

    name: str
    alt: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    title: str
    text: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = field(default_factory=list)


# -- the page ----------------------------------------------------------------------------------------------------------

_STYLE = """
.verdict{list-style:none;margin:18px 0;padding:6px 18px}
.verdict li{display:flex;gap:12px;padding:7px 0;border-bottom:1px solid var(--line)}.verdict li:last-child{border:0}
.verdict b{flex:none;width:20px;height:20px;margin-top:1px;border-radius:50%;color:var(--card);background:var(--single);
font-size:13px;line-height:20px;text-align:center}
.verdict .good{background:var(--expansion)}.verdict .bad{background:var(--unmapped)}
/* darker than the look's own: words stand on them in white */
@media(prefers-color-scheme:light){:root{--added:#9a5f00;--pointwise:#0b7a70;--expansion:#477812;--single:#69717e}}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px}a{color:var(--vertical)}
figure{margin:0 0 12px}.scroll+.scroll,figure+.scroll{margin-top:12px}
figure svg{width:100%;min-width:700px;height:auto}figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",sans-serif}
"""
_MARKS = {True: ("good", "✓", "good"), False: ("bad", "✗", "bad"), None: ("", "–", "no target")}


def page(title: str, subtitle: str, lines: Sequence[Line], sections: Sequence[Section]) -> str:
    """The whole page; without matplotlib it has its tables and says what is missing."""
    verdict = []
    for line in lines:
        kind, mark, meaning = _MARKS[line.good]
        badge = tag("b", mark, class_=kind, role="img", aria_label=meaning)
        verdict.append(tag("li", badge, tag("span", line.text)))
    links = (tag("a", section.title, href=f"#{_anchor(section.title)}") for section in sections)
    parts = [
        tag("h1", title),
        tag("p", subtitle, class_="dim"),
        tag("ul", *verdict, class_="card verdict", aria_label="verdict"),
        tag("nav", *links, aria_label="sections"),
    ]
    for section in sections:
        parts.append(tag("h2", section.title, id=_anchor(section.title)))
        parts += [_picture(plot) for plot in section.plots]
        parts += [tag("p", text) for text in section.text]
        parts += [table.html(section.title) for table in section.tables]
    return html.page(title, _STYLE, parts, '<link rel="icon" href="data:,">')


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _picture(plot: Plot) -> Html:
    try:
        return tag("figure", scroll(Html(svg(plot)), plot.alt))
    except ImportError:
        return tag("p", f"{plot.alt}: drawing it needs the package matplotlib.", class_="dim")


# -- matplotlib --------------------------------------------------------------------------------------------------------

_INK, _DIM, _GRID, _CARD, _GOOD, _BAD = (f"#00000{i}" for i in range(1, 7))
_COLORS = tuple(f"#00001{i}" for i in range(7))
_VARIABLES = dict(
    zip((_INK, _DIM, _GRID, _CARD, _GOOD, _BAD), ("ink", "dim", "line", "card", "expansion", "unmapped"), strict=True)
)
_VARIABLES |= dict(
    zip(_COLORS, ("vertical", "added", "horizontal", "pointwise", "unmapped", "expansion", "single"), strict=True)
)
_PARTS = tuple(_COLORS[i] for i in (3, 1, 2, 5, 0, 4, 6))
_MARKERS = "osD^vP*"
_WIDTH = 10.4  # inches


@contextmanager
def _settings(name: str) -> Iterator[None]:
    import matplotlib

    look: Any = {  # newer matplotlib types its settings by name
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name,  # the same ids in every run
        "text.parse_math": False,  # a dollar in a name is a dollar
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.fontsize": 8.5,
        "legend.handlelength": 3,
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        **dict.fromkeys(("axes.titlecolor", "text.color"), _INK),
        **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), _DIM),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), _GRID),
        **dict.fromkeys(("axes.grid", "axes.axisbelow", "figure.constrained_layout.use"), True),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("xtick.minor.size", "ytick.minor.size"), 0),
    }
    with matplotlib.rc_context(look):
        yield


def svg(plot: Plot) -> str:
    """A plot as SVG to stand in HTML: text as text, colours by CSS variables, ids of its own.

    Raises:
        ImportError: matplotlib is missing.
    """
    with _settings(plot.name):
        stream = StringIO()
        plot.draw().savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    view = re.search(r'viewBox="[^"]+"', text)
    opening = f'<svg {view[0] if view else ""} role="img" aria-label="{escape(plot.alt)}">'
    text = re.sub(r"<svg[^>]*>", lambda _: opening, text, count=1).replace("xlink:href", "href")
    # Matplotlib before 3.11 writes one `font`, later ones `font-size` and `font-family`: the page has its own family.
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    text = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", text)
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda match: _shorter(match[0]), text)
    text = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{plot.name}-", text)
    text = re.sub(r'<g id="[^"]*hint: ([^"]*)">', r"<g><title>\1</title>", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    return text.strip()


def _shorter(attribute: str) -> str:
    """Coordinates to a hundredth, in one line."""
    return " " + " ".join(re.sub(r"(\.\d\d)\d+", r"\1", attribute).split())


def _figure(height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure over the whole width, of so many inches in height, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def _hint(text: str) -> str:
    """A gid that `svg` turns into what is shown where the pointer rests."""
    return "hint: " + text.replace('"', "'")


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with exactly these values on it."""
    if len(set(values)) > 1 and min(values) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axes.minorticks_off()


def served(
    ratios: Mapping[str, Mapping[str, Sequence[float]]],
    targets: Mapping[str, Mapping[str, float]],
    transports: Mapping[str, str],
) -> Figure:
    """Served / in-process: a bar for each precision and transport, a dot for each round, a line for each target.

    Args:
        ratios: {precision: {transport: its rounds}}.
        targets: likewise, one figure each.
        transports: {transport: its name}.
    """
    figure, (axes,) = _figure(3.4)
    place, names = 0.0, []
    for precision, rounds in ratios.items():
        start = place
        for transport, values in rounds.items():
            color = _COLORS[list(transports).index(transport)]
            middle = median(values)
            axes.bar(place, middle, 0.78, color=color, gid=_hint(f"{precision} {transports[transport]}: {middle:.3f}"))
            spots = [place + 0.09 * (i - (len(values) - 1) / 2) for i in range(len(values))]
            axes.plot(spots, values, "o", color=_INK, markersize=3.2, markeredgecolor=_CARD, markeredgewidth=0.6)
            target = targets.get(precision, {}).get(transport)
            if target is not None:
                axes.plot([place - 0.44, place + 0.44], [target] * 2, color=_BAD, linewidth=1.6)
            axes.text(place, 0.03, f"{middle:.3f}", ha="center", va="bottom", color=_CARD, weight="bold", size=11)
            names.append((place, transports[transport]))
            place += 1
        axes.text((start + place - 1) / 2, 1.01, precision, ha="center", transform=axes.get_xaxis_transform(),
                  weight="bold", size=10)  # fmt: skip
        place += 0.7
    axes.axhline(1, color=_DIM, linewidth=1, linestyle="--")
    axes.set_xticks([x for x, _ in names], [name for _, name in names])
    axes.set_xlim(-0.7, place - 1)
    highest = max(value for rounds in ratios.values() for values in rounds.values() for value in values)
    axes.set_ylim(0, max(1.08, 1.05 * highest))
    axes.set_ylabel("served / in-process")
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", labelcolor=_INK, length=0)
    return figure


def stacked(
    rows: Sequence[tuple[str, Mapping[str, float]]], names: Mapping[str, str], unit: str, *, shares: bool
) -> Figure:
    """Horizontal bars of parts.

    Args:
        rows: label of a bar and its parts.
        names: {part: its name}, in order.
        unit: of the parts.
        shares: every bar is as long as the others, with its sum beside it.
    """
    figure, (axes,) = _figure(0.75 + 0.235 * len(rows))
    totals = [sum(parts.get(name) or 0 for name in names) for _, parts in rows]
    longest = 1.0 if shares else max(totals) or 1.0
    left = [0.0] * len(rows)
    for (name, title), color in zip(names.items(), _PARTS, strict=False):
        widths = [
            (parts.get(name) or 0) / (total if shares and total else 1)
            for (_, parts), total in zip(rows, totals, strict=True)
        ]
        bars = axes.barh(range(len(rows)), widths, 0.72, left, color=color, label=title)
        for bar, (label, parts), width, start in zip(bars, rows, widths, left, strict=True):
            value = parts.get(name) or 0
            bar.set_gid(_hint(f"{label}: {title} {value:.3g} {unit}"))
            if width > 0.09 * longest and shares:
                axes.text(start + width / 2, bar.get_y() + 0.36, f"{width:.0%}", ha="center", va="center",
                          color=_CARD, size=8)  # fmt: skip
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (end, total) in enumerate(zip(left, totals, strict=True)):
        axes.text(end + 0.01 * longest, place, f"{total:.3g} {unit}", va="center", size=8.5)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.invert_yaxis()
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.1 * longest)
    if shares:
        axes.set_xticks([i / 5 for i in range(6)], [f"{i * 20} %" for i in range(6)])
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(names), handlelength=1, handleheight=1, columnspacing=1.2)
    return figure


_PERCENTILES = (("p50", "-"), ("p90", "--"), ("p99", ":"))


def sweep(rows: Sequence[Row], axis: str, label: str, floor: Mapping[str, float]) -> Figure:
    """Throughput of every curve in one picture, its saturation point ringed, and a picture of each one's latency.

    Args:
        rows: of one series.
        axis: the field of the loads that goes to the right.
        label: of that axis.
        floor: {name: images/s} to draw as lines.
    """
    lines = curves(list(rows), axis)
    columns = min(3, 1 + len(lines))
    depth = -(-(1 + len(lines)) // columns)
    figure, panels = _figure(3.1 * depth, columns, depth)
    first, rest = panels[0], panels[1:]
    for (name, points), color, marker in zip(lines.items(), itertools.cycle(_COLORS), itertools.cycle(_MARKERS)):
        x = [point["load"][axis] for point in points]
        y = [point["throughput"] for point in points]
        first.fill_between(
            x, [each["low"] for each in y], [each["high"] for each in y], color=color, alpha=0.2, linewidth=0
        )
        first.plot(x, [each["median"] for each in y], marker=marker, color=color, label=name)
        saturated = saturation(points)
        if saturated:
            at = (saturated["load"][axis], saturated["throughput"])
            first.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor=color,
                       gid=_hint(f"{name}: saturates at {saturated['label']}"))  # fmt: skip
    for (name, value), color in zip(floor.items(), _COLORS, strict=False):
        first.axhline(value, color=color, linestyle=(0, (1, 2)), linewidth=1.2, gid=_hint(f"{name}: {value:.4g}/s"))
    first.set_ylim(0, 1.1 * max([*floor.values(), *(row["throughput"]["high"] for row in rows)]))
    first.margins(x=0.08)
    first.set(title="images per second", xlabel=label)
    _ticks(first, [row["load"][axis] for row in rows])
    if len(lines) > 1:
        first.legend(loc="lower right")
    for axes, (name, points), color in zip(rest, lines.items(), itertools.cycle(_COLORS)):
        _latencies(axes, points, axis, color)
        axes.set(title=f"latency, ms: {name}" if len(lines) > 1 else "latency, ms", xlabel=label)
        _ticks(axes, [point["load"][axis] for point in points])
    for axes in rest[len(lines) :]:
        axes.set_visible(False)
    return figure


def _latencies(axes: Axes, points: Sequence[Row], axis: str, color: str) -> None:
    x = [point["load"][axis] for point in points]
    for percentile, style in _PERCENTILES:
        y = [point["latency_ms"].get(percentile, float("nan")) for point in points]
        axes.plot(x, y, linestyle=style, color=color, marker="o", markersize=3.5, label=percentile)
    middle = [point["latency_ms"].get("p50") or float("nan") for point in points]
    if max(middle) > 20 * min(middle):
        axes.set_yscale("log")
        _plain(axes.yaxis)
    elif axes.get_yscale() != "log":  # which another precision on these axes may have asked for
        axes.set_ylim(0)
    axes.legend(loc="upper left")


def _plain(axis: Any) -> None:
    """A logarithmic axis with figures as people write them."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(LogLocator(subs=()))
