"""Draws what the dashboard's panels show, from a running Prometheus; for docs and tests where no Grafana runs."""

from __future__ import annotations

import json
import math
import re
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any


def _series(url: str, expression: str, start: float, end: float, step: float) -> list[Any]:
    query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": step})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/api/v1/query_range?{query}", timeout=30) as answer:
        result: list[Any] = json.loads(answer.read())["data"]["result"]
    return result


def draw(url: str, board: dict[str, Any], start: float, end: float, path: Path) -> None:
    """Draws every panel.

    Args:
        url: of Prometheus.
        board: the dashboard, as dashboard.json has it; its variables are taken as "All".
        start, end: seconds since 1970.
        path: the picture to write.
    """
    from matplotlib.figure import Figure

    panels = board["panels"]
    columns, step = 3, max(1.0, (end - start) / 300)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(15, 2.6 * rows), layout="constrained")
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
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
                    values.append(float(value))
                labels = series["metric"]
                legend = target["legendFormat"]
                for name in re.findall(r"{{(\w+)}}", legend):
                    legend = legend.replace(f"{{{{{name}}}}}", labels.get(name, ""))
                axes.plot(times, values, label=legend, linewidth=1.2)
        axes.set_title(panel["title"], fontsize=10, loc="left")
        axes.set_ylabel(panel["fieldConfig"]["defaults"]["unit"], fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, end - start)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7, loc="best")
    figure.supxlabel("seconds", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
