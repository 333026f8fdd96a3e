"""Draws what the dashboard's panels show, from a running Prometheus; for docs and tests where no Grafana runs."""

from __future__ import annotations

import json
import math
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Grafana's unit → how an axis shows it: a factor and a name. Grafana itself chooses milli, giga and so on.
_UNITS = {
    "bytes": (1e-9, "GB"),
    "ms": (1, "ms"),
    "percentunit": (100, "%"),
    "reqps": (1, "requests/s"),
    "s": (1000, "ms"),
    "short": (1, ""),
    "µs": (1e-3, "ms"),
}


def _series(url: str, expression: str, start: float, end: float, step: float) -> list[Any]:
    query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": step})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/api/v1/query_range?{query}", timeout=30) as answer:
        result: list[Any] = json.loads(answer.read())["data"]["result"]
    return result


def draw(
    url: str, board: dict[str, Any], start: float, end: float, path: Path, marks: Mapping[str, float] | None = None
) -> None:
    """Draws every panel.

    Args:
        url: of Prometheus.
        board: the dashboard, as dashboard.json has it; its variables are taken as "All".
        start, end: seconds since 1970.
        path: the picture to write.
        marks: what happened, and when (seconds since 1970): numbered lines in every panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    events = dict(marks or {})

    panels = board["panels"]
    columns, step = 3, max(1.0, (end - start) / 300)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(15, 2.6 * rows), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        factor, unit = _UNITS[panel["fieldConfig"]["defaults"]["unit"]]
        for target in panel["targets"]:
            expression = re.sub(r"\$\w+", ".*", target["expr"])
            for series in _series(url, expression, start, end, step):
                times: list[float] = []
                values: list[float] = []
                for moment, value in series["values"]:
                    if times and float(moment) - start - times[-1] > 1.5 * step:  # no data: a gap, not a line
                        times.append(times[-1])
                        values.append(math.nan)
                    times.append(float(moment) - start)
                    values.append(factor * float(value))
                labels = series["metric"]
                legend = target["legendFormat"]
                for name in re.findall(r"{{(\w+)}}", legend):
                    legend = legend.replace(f"{{{{{name}}}}}", labels.get(name, ""))
                axes.plot(times, values, label=legend, linewidth=1.4, clip_on=False, alpha=0.85)
        for place, moment in enumerate(events.values(), 1):
            axes.axvline(moment - start, color="0.4", linewidth=0.8, linestyle="--")
            axes.text(moment - start, 1.01, str(place), fontsize=7, ha="center", transform=axes.get_xaxis_transform())
        axes.set_title(f"{panel['title']}{f', {unit}' if unit else ''}", fontsize=10, loc="left", pad=12)
        axes.set_ylim(0, max([1.0 if unit in ("", "%") else 0.0, 1.05 * axes.get_ylim()[1]]))
        if not unit:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.set_xlim(0, end - start)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, loc="best")
    lines = "; ".join(f"{place}: {event}" for place, event in enumerate(events, 1))
    figure.supxlabel(f"seconds{f'        {lines}' if lines else ''}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
