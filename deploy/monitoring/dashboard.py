"""Makes the Grafana dashboard, in the environment of deploy/tools.py.

    .cache/deploy/bin/python deploy/monitoring/dashboard.py > deploy/helm/ssd-on-triton/files/dashboard.json

tests/deploy/test_monitoring.py holds the file against this, and asks a real Prometheus for every expression.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh, VariableSort

_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
_OURS = '{job=~"$job",model=~"$model"}'
_SUMMARY = 'nv_inference_request_summary_us{job=~"$job",model=~"$model"'
_SERVERS = '{job=~"$job"}'


@dataclass(frozen=True)
class Panel:
    """One graph.

    Attributes:
        title: with what is counted.
        unit: Grafana's name for it.
        about: what to see in it.
        queries: (expression, legend).
    """

    title: str
    unit: str
    about: str
    queries: tuple[tuple[str, str], ...]


PANELS = (
    Panel(
        "Requests answered",
        "reqps",
        "By model, all servers together.",
        ((f"ssd:requests:rate1m{_OURS}", "{{model}}"),),
    ),
    Panel(
        "Pictures",
        "short",
        "Pictures per second; more than requests where a request holds several.",
        ((f"ssd:images:rate1m{_OURS}", "{{model}}"),),
    ),
    Panel(
        "Where a request's time goes (mean)",
        "ms",
        "Queue: waiting for an instance. If it grows, add servers.",
        (
            (f"ssd:request_ms:mean1m{_OURS}", "{{model}} whole"),
            (f"ssd:queue_ms:mean1m{_OURS}", "{{model}} queue"),
            (f"ssd:infer_ms:mean1m{_OURS}", "{{model}} inference"),
        ),
    ),
    Panel(
        "Latency inside the server",
        "µs",
        "Quantiles of each server; they cannot be summed over servers.",
        (
            (f"{_SUMMARY},quantile='0.5'}}", "{{instance}} p50"),
            (f"{_SUMMARY},quantile='0.99'}}", "{{instance}} p99"),
        ),
    ),
    Panel(
        "Execution, all servers",
        "s",
        "Time in an instance, without the queue; from the backend's histogram, so it sums over servers.",
        ((f"ssd:execution_seconds:quantile1m{_OURS}", "{{model}} {{quantile}}"),),
    ),
    Panel(
        "Detections per picture (mean)",
        "short",
        "A fall to zero: the clients' pictures are black or cut, the thresholds too high, or the model is wrong.",
        ((f"ssd:detections_per_image:mean5m{_OURS}", "{{model}}"),),
    ),
    Panel(
        "Pictures without a detection",
        "percentunit",
        "Share of all pictures.",
        ((f"ssd:empty_images:ratio5m{_OURS}", "{{model}}"),),
    ),
    Panel(
        "Failures per second",
        "reqps",
        "server: the model failed. client: it gave up. overload: a full queue refused it. invalid: a wrong request.",
        ((f"ssd:failures:rate1m{_OURS}", "{{model}} {{kind}}"),),
    ),
    Panel(
        "Share of requests that fail in the server",
        "percentunit",
        "Alert above 1 %.",
        ((f"ssd:error_share:ratio5m{_OURS}", "{{model}}"),),
    ),
    Panel(
        "Requests that wait",
        "short",
        "For a free instance.",
        ((f"ssd:pending:sum{_OURS}", "{{model}}"),),
    ),
    Panel(
        "Servers",
        "short",
        "up: tritonserver answers. serving: it has the model.",
        ((f"ssd:servers:up{_SERVERS}", "up"), (f"ssd:servers:serving{_OURS}", "{{model}} serving")),
    ),
    Panel(
        "Versions served",
        "short",
        "Servers by version; two lines of one model after a rollout: some lack the new one.",
        ((f"count by (job, model, version) (nv_inference_count{_OURS})", "{{model}} version {{version}}"),),
    ),
    Panel(
        "Queue of each server (mean)",
        "ms",
        "What the autoscaler sees. One high line: the balancer does not spread requests.",
        ((f"ssd:server_queue_ms:mean1m{_SERVERS}", "{{instance}}"),),
    ),
    Panel(
        "CPU of each server's machine",
        "percentunit",
        "As tritonserver reports it.",
        ((f"nv_cpu_utilization{_SERVERS}", "{{instance}}"),),
    ),
    Panel(
        "Memory of each server's machine",
        "bytes",
        "As tritonserver reports it.",
        ((f"nv_cpu_memory_used_bytes{_SERVERS}", "{{instance}}"),),
    ),
)


def _variable(name: str, query: str) -> boards.QueryVariable:
    return (
        boards.QueryVariable(name)
        .label(name)
        .query(query)
        .datasource(_SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
    )


def build() -> str:
    """The dashboard as Grafana's JSON."""
    board = (
        boards.Dashboard("SSD on Triton")
        .uid("ssd-on-triton")
        .tags(["triton", "ssd"])
        .description("Requests, queue, failures and versions of all servers")
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .with_variable(boards.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(_variable("job", "label_values(nv_inference_count, job)"))
        .with_variable(_variable("model", 'label_values(nv_inference_count{job=~"$job"}, model)'))
    )
    for panel in PANELS:
        graph = (
            timeseries.Panel()
            .title(panel.title)
            .description(panel.about)
            .unit(panel.unit)
            .min(0)
            .datasource(_SOURCE)
            .height(8)
            .span(12)
        )
        for letter, (expression, legend) in zip("ABC", panel.queries, strict=False):
            query = prometheus.Dataquery().ref_id(letter).expr(expression).legend_format(legend)
            graph.with_target(query.datasource(_SOURCE))
        board.with_panel(graph)
    return str(JSONEncoder(sort_keys=True, indent=2).encode(board.build()))


if __name__ == "__main__":
    json.loads(text := build())
    sys.stdout.write(text + "\n")
