"""What a run of `invoke perf` found, for people: a verdict, then tables and plots of each part of its summary.

What a run did not measure has no section.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from build.reports.html import Table, number
from perf import plots
from perf.mlperf.measure import said
from perf.page import Line, Plot, Report, Section
from perf.statistics import curves, saturation

# What is aimed at, on 2 cores with the model `shapes`: served / in-process throughput of 4 clients by precision and by
# the way that pictures travel; what serving adds to a single stream's p50.
TARGETS = {"fp32": {"shm": 0.95, "grpc": 0.90, "http": 0.85}, "int8": {"shm": 0.90, "grpc": 0.80, "http": 0.75}}
OVERHEAD_MS = 1.0
BUSY = 0.15  # of the cores taken by other programs: above it figures say little
TRANSPORTS = {"shm": "shared memory", "grpc": "gRPC", "http": "HTTP"}
PARTS = {
    "client_send": "client sends",
    "network": "network",
    "server_queue": "queue",
    "server_input": "compute input",
    "server_infer": "compute infer",
    "server_output": "compute output",
    "client_receive": "client receives",
}
# Series → its title, the field of its loads that grows, and what that is.
_SWEEPS = {
    "concurrency": ("More clients", "concurrency", "clients"),
    "batch": ("Larger batches", "batch_size", "images per request"),
    "rate": ("Requests at a given rate", "rate", "requests/s asked for"),
}
# Of tritonserver with the model's own processes (the python backend has some).
_USAGE = {"cores": "cores", "images_per_core": "images/core", "rss_mib": "MiB"}
_PERCENTILES = ("p50", "p90", "p99")

Summary = Mapping[str, Any]
Row = dict[str, Any]


def all_rows(summary: Summary) -> list[Row]:
    """The rows of all series; a load that is in several of them once."""
    rows = [row for series in (summary.get("series") or {}).values() for row in series or ()]
    return list({(row["precision"], str(row["load"])): row for row in rows}.values())


def loadgen_results(summary: Summary) -> list[tuple[str, dict[str, Any]]]:
    """LoadGen's results with their precisions."""
    whole = summary.get("mlperf") or {}
    return [(precision, result) for precision, results in whole.items() for result in results.values()]


def checked_answers(summary: Summary) -> dict[str, int]:
    """How many of LoadGen's requests were `checked`, and how many were `wrong` or `missing`."""
    results = [result for _, result in loadgen_results(summary)]
    counts = {"checked": "answered", "wrong": "wrong", "missing": "failed"}
    return {name: sum(result[field] for result in results) for name, field in counts.items()}


def report(summary: Summary) -> Report:
    """The report of a run; it begins with LoadGen's figures, which are what others can compare."""
    environment = summary.get("environment") or {}
    versions, commit = environment.get("versions") or {}, (environment.get("commit") or {}).get("sha", "")
    cores = environment.get("cores_allowed")
    told = [f"run {summary['run']}", "quick" if summary.get("quick") else "", environment.get("cpu")]
    told += [cores and f"{cores} cores", commit and f"commit {commit[:7]}"]
    told += [f"{name} {versions[name]}" for name in ("tritonserver", "onnxruntime") if versions.get(name)]
    title = f"{summary['model']}: how fast it is served"
    return Report(title, " · ".join(filter(None, told)), verdict(summary), sections(summary))


def verdict(summary: Summary) -> list[Line]:
    """LoadGen's figures, served against in-process, overhead, answers, a busy machine, and whether
    the run is whole; of a run for LoadGen alone the first and the last."""
    lines = _loadgen_line(summary)
    if not (summary.get("settings") or {}).get("scenarios"):
        lines += [*_served_lines(summary), _answers_line(summary)]
    busy = (summary.get("environment") or {}).get("other_load") or 0
    if busy > BUSY:
        told = (
            f"Other programs took {busy:.0%} of the cores when it began: measure again on an idle machine before you "
        )
        lines.append(Line(None, told + "believe a figure."))
    problems = "; ".join(summary.get("problems") or ())
    if summary.get("complete"):
        lines.append(Line(True, "Complete: all that was asked for is measured."))
    else:
        why = problems or "the run was ended before all was measured"
        lines.append(Line(False, f"PARTIAL: {why}. Go on with --resume."))
    return lines


def _loadgen_line(summary: Summary) -> list[Line]:
    results = loadgen_results(summary)
    told = "; ".join(f"{precision} {said(result)}" for precision, result in results)
    return [Line(all(result["valid"] for _, result in results), f"LoadGen (unofficial): {told}.")] if results else []


def _served_lines(summary: Summary) -> list[Line]:
    told, met, overheads = [], [], {}
    for precision, results in (summary.get("precisions") or {}).items():
        parts = []
        for transport, value in (results.get("served_ratio") or {}).items():
            goal = TARGETS.get(precision, {}).get(transport)
            met += [value >= goal] if goal else []
            wanted = f" (goal {goal:.2f}{', MISSED' * (value < goal)})" if goal else ""
            parts.append(f"{TRANSPORTS[transport]} {figure(value)}{wanted}")
        told += [f"{precision} {', '.join(parts)}"] if parts else []
        if single := results.get("single_stream"):
            overheads[precision] = single["overhead_ms"]
    ratio = f"Served / in-process throughput, 4 clients: {'; '.join(told) or 'not measured'}."
    added = ", ".join(f"{precision} {figure(value, 2)} ms" for precision, value in overheads.items())
    overhead = f"What serving adds to a single stream's p50: {added or 'not measured'} (at most {OVERHEAD_MS:g} ms)."
    within = max(overheads.values()) <= OVERHEAD_MS if overheads else None
    return [Line(all(met) if met else None, ratio), Line(within, overhead)]


def _answers_line(summary: Summary) -> Line:
    answers = summary.get("answers") or {}
    if not answers.get("checked"):
        return Line(None, "Answers: none were checked.")
    told = f"{answers['checked']:,} checked: {answers['wrong']:,} wrong, {answers['missing']:,} missing"
    return Line(not (answers["wrong"] or answers["missing"]), f"Answers under LoadGen: {told}.")


def sections(summary: Summary) -> list[Section]:
    """All that the summary has something for, in the order to read it."""
    protocols = (summary.get("series") or {}).get("protocol")
    parts = [
        _loadgen(summary),
        _served(summary),
        _split(summary),
        *(_sweep(summary, series) for series in _SWEEPS),
        Section("Protocols and shared memory", tables=[_brief(protocols)]) if protocols else None,
        *(_facts(name.title(), summary.get(name)) for name in ("environment", "settings")),
    ]
    return [part for part in parts if part is not None]


def loadgen_table(summary: Summary) -> Table:
    """LoadGen's figures with what stands beside them."""
    rows = []
    for precision, result in loadgen_results(summary):
        beside, figures = result["beside"], result["figures"]
        what = f"{result['metric']}, {'samples/s' if result['scenario'] == 'offline' else 'ms'}"
        what = f"p99 at {figure(figures['rate'])} queries/s, ms" if result["scenario"] == "server" else what
        own, accuracy = result["null"].get("p50_ms"), result.get("accuracy")
        values = [figure(value) for value in (*beside.values(), _tail(figures, "_ms"))]
        values += [figure(own and own * 1000, 2), f"{accuracy['map']:.4f}" if accuracy else "–"]
        valid = "VALID" if result["valid"] else "NOT VALID"
        rows.append((precision, result["scenario"], valid, what, figure(result["value"]), *values))
    heads = [*("precision", "scenario", "verdict", "figure", "LoadGen", "perf_analyzer", "in process", "ratio")]
    return Table([*heads, "max / p50", "own cost, µs", "mAP"], rows, words=4)


def served_table(summary: Summary) -> Table:
    """Served over in-process throughput by transport, and what serving adds to a single stream."""
    rows = []
    for precision, results in (summary.get("precisions") or {}).items():
        overhead = (results.get("single_stream") or {}).get("overhead_ms")
        for measured in (results, results.get("batches") or {}):
            ratio, cells = measured.get("served_ratio"), []
            if not ratio:
                continue
            batch = measured.get("batch_size") or 1
            goals = TARGETS.get(precision, {}) if batch == 1 else {}
            for name in TRANSPORTS:
                goal = f" (goal {goals[name]:.2f})" if name in goals else ""
                cells.append(f"{figure(ratio.get(name))}{goal}")
            added = f"{figure(overhead, 2)} ms (goal {OVERHEAD_MS:g})" if batch == 1 and overhead is not None else ""
            what = precision if batch == 1 else f"{precision}, {batch} pictures a request"
            direct = f"{figure(measured['direct_ips'])} images/s" if measured.get("direct_ips") else ""
            rows.append((what, *cells, direct, added))
    heads = ("served / in process", *TRANSPORTS.values(), "in process", "one client, p50, added by serving")
    return Table(heads, rows)


def _loadgen(summary: Summary) -> Section | None:
    results = loadgen_results(summary)
    if not results:
        return None
    text = (
        "Unofficial: MLPerf's load generator, in runs shorter than its rules ask for; not submitted to MLCommons. In "
        "process is what the same file does here without a server: for the server scenario its p99 without any "
        "waiting. The ratio is LoadGen's figure over it. The own cost is the median latency of a system that answers "
        "at once. mAP is that of accuracy mode."
    )
    problems = [
        f"{name}, {result['scenario']}: {problem}." for name, result in results for problem in result["problems"]
    ]
    peaks = [
        (precision, f"{search['bound_ms']:g} ms", figure(search["rate"]), search["note"], str(len(search["probes"])))
        for precision, searches in (summary.get("peak") or {}).items()
        for search in searches
    ]
    heads = ("precision", "p99 within", "highest rate, queries/s", "", "probes")
    tables = [loadgen_table(summary), *([Table(heads, peaks)] if peaks else [])]
    return Section("LoadGen", [text, *problems], (), tables)


def _served(summary: Summary) -> Section | None:
    precisions, ratios = summary.get("precisions") or {}, served_table(summary)
    singles = [
        (precision, side, *(figure(single[key].get(p)) for p in _PERCENTILES))
        for precision, results in precisions.items()
        if (single := results.get("single_stream"))
        for side, key in (("served", "served_ms"), ("in process", "direct_ms"))
    ]
    if not ratios.rows and not singles:
        return None
    facts = [
        f"{precision}: {results['direct_threads']}; served by the backend {results.get('backend')}"
        for precision, results in precisions.items()
        if results.get("direct_threads")
    ]
    text = (
        "Bars are medians, dots the rounds, red lines the goals. Both sides were measured in turn, 4 clients each with "
        "one request on the way; in process is the same model in one process with as many threads (sessions x "
        f"threads; {'; '.join(facts) or 'not known'}), no network and no copies."
    )
    rounds = {name: results["ratio_rounds"] for name, results in precisions.items() if results.get("ratio_rounds")}
    alt = "Served over in-process throughput by precision and transport, with each round and the goals"
    drawn = [Plot("served", alt, partial(plots.served, rounds, TARGETS, TRANSPORTS))] if rounds else []
    tables = [ratios] if ratios.rows else []
    tables += [Table(("one client", "", *(f"{p}, ms" for p in _PERCENTILES)), singles, words=2)] if singles else []
    return Section("Served against in-process", [text], drawn, tables)


def _split(summary: Summary) -> Section | None:
    rows = [(_name(row), row["parts_ms"]) for row in all_rows(summary) if any(row["parts_ms"].values())]
    if not rows:
        return None
    text = "The average request of every load, split by where its time went; its whole time stands at the right."
    alt = "Share of each part in the average request, for every load"
    return Section("Where the time goes", [text], [Plot("split", alt, partial(plots.split, rows, PARTS))])


def _sweep(summary: Summary, series: str) -> Section | None:
    rows = (summary.get("series") or {}).get(series)
    if not rows:
        return None
    title, axis, label = _SWEEPS[series]
    text, floor = [], {}
    for name, points in curves(rows, axis).items():
        if series != "rate" and (knee := saturation(points)):
            more = " It is the largest load that was tried: more might give more." if knee["ends"] else ""
            text.append(
                f"{name} saturates at {knee['label']}: {figure(knee['throughput']['median'])} images/s, "
                f"{knee['share']:.0%} of its best, p99 {figure(knee['latency_ms'].get('p99'))} ms.{more}"
            )
    if series == "concurrency":
        measured = (summary.get("precisions") or {}).items()
        floor = {f"{name} in-process": each["direct_ips"] for name, each in measured if each.get("direct_ips")}
    text.append(
        "The ring is the smallest load with 95 % of the best throughput; the band reaches over the repeats"
        + ("; dotted: in-process." if floor else ".")
    )
    alt = f"Throughput and latency percentiles over {label}, with the saturation point"
    return Section(title, text, [Plot(series, alt, partial(plots.sweep, rows, axis, label, floor))], [_brief(rows)])


def _brief(rows: Iterable[Row]) -> Table:
    cells = []
    for row in rows:
        values = [
            row["throughput"]["median"],
            *(row["latency_ms"].get(p) for p in _PERCENTILES),
            _tail(row["latency_ms"]),
        ]
        values += [row["resources"].get(name) for name in _USAGE]
        cells.append((_name(row), *map(figure, values)))
    return Table(("load", "images/s", *(f"{p}, ms" for p in _PERCENTILES), "max / p50", *_USAGE.values()), cells)


def _tail(latency: Mapping[str, Any], unit: str = "") -> float | None:
    """The slowest request over the median one; None where not every request's time is known."""
    longest, median = latency.get(f"max{unit}"), latency.get(f"p50{unit}")
    return longest / median if longest and median else None


def _facts(title: str, facts: Mapping[str, Any] | None) -> Section | None:
    rows = [(name, words(value)) for name, value in flat(facts or {}).items()]
    return Section(title, (), (), [Table(("what", "value"), rows, words=2)]) if rows else None


def _name(row: Row) -> str:
    return f"{row['precision']}, {row['label']}"


def figure(value: Any, digits: int = 3) -> str:
    """A figure with so many digits; a dash where there is none."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return ("-" if value < 0 else "") + number(abs(value), digits)
    return "–"


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Facts within facts as one level, such as `versions.python`."""
    by_name: dict[str, Any] = {}
    for name, value in facts.items():
        by_name |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return by_name


def words(value: Any) -> str:
    """A fact as people write it."""
    if isinstance(value, (list, tuple)) and value:
        return ", ".join(map(str, value))
    return "–" if value in (None, "", [], ()) else str(value)
