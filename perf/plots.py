"""The plots of a run's report, in the stand-in colours of perf/page.py."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from build.reports.html import number
from perf.page import BAD, CARD, COLORS, DIM, INK
from perf.statistics import curves, saturation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 10.4  # inches
_PARTS = tuple(COLORS[i] for i in (3, 1, 2, 5, 0, 4, 6))
_PERCENTILES = (("p50", "-"), ("p90", "--"), ("p99", ":"))


def _figure(height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure over the whole width, of so many inches in height, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


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
        for (transport, values), color in zip(rounds.items(), COLORS, strict=False):
            middle, title = median(values), transports[transport]
            axes.bar(place, middle, 0.78, color=color)
            spots = [place + 0.09 * (i - (len(values) - 1) / 2) for i in range(len(values))]
            axes.plot(spots, values, "o", color=INK, markersize=3.2, markeredgecolor=CARD, markeredgewidth=0.6)
            target = targets.get(precision, {}).get(transport)
            if target is not None:
                axes.plot([place - 0.44, place + 0.44], [target] * 2, color=BAD, linewidth=1.6)
            axes.text(place, 0.03, f"{middle:.3f}", ha="center", va="bottom", color=CARD, weight="bold", size=11)
            names.append((place, title))
            place += 1
        above = axes.get_xaxis_transform()
        axes.text((start + place - 1) / 2, 1.01, precision, ha="center", transform=above, weight="bold", size=10)
        place += 0.7
    axes.axhline(1, color=DIM, linewidth=1, linestyle="--")
    axes.set_xticks([x for x, _ in names], [name for _, name in names])
    axes.set_xlim(-0.7, place - 1)
    highest = max(value for rounds in ratios.values() for values in rounds.values() for value in values)
    axes.set(ylim=(0, max(1.08, 1.05 * highest)), ylabel="served / in-process")
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", labelcolor=INK, length=0)
    return figure


def split(rows: Sequence[tuple[str, Mapping[str, float]]], names: Mapping[str, str]) -> Figure:
    """Where the time of a request goes: for each load a bar of all parts' shares, with their sum beside it.

    Args:
        rows: label of a bar and its parts in ms.
        names: {part: its name}, in order.
    """
    figure, (axes,) = _figure(0.75 + 0.235 * len(rows))
    totals = [sum(parts[name] for name in names) or 1.0 for _, parts in rows]
    left = [0.0] * len(rows)
    for (name, title), color in zip(names.items(), _PARTS, strict=True):
        shares = [parts[name] / total for (_, parts), total in zip(rows, totals, strict=True)]
        bars = axes.barh(range(len(rows)), shares, 0.72, left, color=color, label=title)
        words = [f"{share:.0%}" if share > 0.09 else "" for share in shares]
        axes.bar_label(bars, words, label_type="center", color=CARD, fontsize=8)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for place, total in enumerate(totals):
        axes.text(1.01, place, f"{number(total)} ms", va="center", size=8.5)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.1))
    axes.set_xticks([i / 5 for i in range(6)], [f"{i * 20} %" for i in range(6)])
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=len(names), handlelength=1, handleheight=1, columnspacing=1.2)
    return figure


def sweep(rows: Sequence[dict[str, Any]], axis: str, label: str, floor: Mapping[str, float]) -> Figure:
    """Throughput of every curve in one picture, its saturation point ringed, and a picture of each one's latency.

    Args:
        rows: of one series.
        axis: the field of the loads that goes to the right.
        label: of that axis.
        floor: {name: images/s} to draw as lines.
    """
    lines = curves(rows, axis)
    columns = min(3, 1 + len(lines))
    depth = -(-(1 + len(lines)) // columns)
    figure, (first, *rest) = _figure(3.1 * depth, columns, depth)
    for (name, points), color, marker in zip(lines.items(), itertools.cycle(COLORS), itertools.cycle("osD^vP*")):
        x, y = [point["load"][axis] for point in points], [point["throughput"] for point in points]
        low, high = [each["low"] for each in y], [each["high"] for each in y]
        first.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        first.plot(x, [each["median"] for each in y], marker=marker, color=color, label=name)
        if knee := saturation(points):
            first.scatter(knee["load"][axis], knee["throughput"]["median"], 170, "none", edgecolors=color)
    for value, color in zip(floor.values(), COLORS, strict=False):
        first.axhline(value, color=color, linestyle=(0, (1, 2)), linewidth=1.2)
    first.set_ylim(0, 1.1 * max([*floor.values(), *(row["throughput"]["high"] for row in rows)]))
    first.margins(x=0.08)
    first.set(title="images per second", xlabel=label)
    _ticks(first, [row["load"][axis] for row in rows])
    if len(lines) > 1:
        first.legend(loc="lower right")
    for axes, (name, points), color in zip(rest, lines.items(), itertools.cycle(COLORS)):
        x = [point["load"][axis] for point in points]
        for percentile, style in _PERCENTILES:
            latency = [point["latency_ms"].get(percentile, float("nan")) for point in points]
            axes.plot(x, latency, linestyle=style, color=color, marker="o", markersize=3.5, label=percentile)
        axes.set(title=f"latency, ms: {name}" if len(lines) > 1 else "latency, ms", xlabel=label)
        axes.set_ylim(0)
        axes.legend(loc="upper left")
        _ticks(axes, x)
    for axes in rest[len(lines) :]:
        axes.set_visible(False)
    return figure


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with exactly these values on it."""
    if len(set(values)) > 1 and min(values) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
    axes.minorticks_off()
