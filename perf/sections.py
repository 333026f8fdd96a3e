"""The sections of a run's report: tables and plots of one part of the summary each; None for what it does not have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from build.reports.html import Table, number
from perf import report_html as plots
from perf.report_html import Plot, Row, Section
from perf.statistics import curves, saturation

# What is aimed at, on 2 cores with the model `shapes`: served / in-process throughput of 4 clients by precision and by
# the way that pictures travel; what serving adds to a single stream's p50; and SSDNMS for 8732 x 21.
TARGETS = {
    "fp32": {"shm": 0.95, "grpc": 0.90, "http": 0.85},
    "int8": {"shm": 0.90, "grpc": 0.80, "http": 0.75},
}
OVERHEAD_MS, SSD_NMS_MS = 1.0, 2.0
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
CORES = {
    "server_cores": "server",
    "model_cores": "model's own processes",
    "analyzer_cores": "perf_analyzer",
    "other_cores": "others",
}
ANSWERS = ("checked", "wrong", "dropped", "late")
_AXES = {"concurrency": ("concurrency", "clients"), "batch": ("batch_size", "images per request")}
_PERCENTILES = ("p50", "p90", "p99")

Summary = Mapping[str, Any]


def precisions(summary: Summary) -> dict[str, dict[str, Any]]:
    """What was measured of each precision."""
    return summary.get("precisions") or {}


def all_rows(summary: Summary) -> list[Row]:
    """The rows of all series; a load that is in several of them once."""
    rows = [row for series in (summary.get("series") or {}).values() for row in series or ()]
    return list({(row["precision"], str(row["load"])): row for row in rows}.values())


def sections(summary: Summary) -> list[Section]:
    """All that the summary has something for, in the order to read it."""
    parts = [
        _loadgen(summary),
        _served(summary),
        _single_stream(summary),
        _split(summary),
        *(_sweep(summary, series) for series in _AXES),
        _rate(summary),
        _protocols(summary),
        _tune(summary),
        _resources(summary),
        _wrong(summary),
        _unsteady(summary),
        _facts("Environment", summary.get("environment")),
        _facts("Settings", summary.get("settings")),
    ]
    return [part for part in parts if part is not None]


def loadgen_results(summary: Summary) -> list[tuple[str, dict[str, Any]]]:
    """LoadGen's results with their precisions."""
    whole = summary.get("mlperf") or {}
    return [(precision, result) for precision, results in whole.items() for result in results.values()]


def _loadgen(summary: Summary) -> Section | None:
    rows, accuracy, problems, peaks = [], [], [], []
    for precision, result in loadgen_results(summary):
        beside, figures = result["beside"], result["figures"]
        what = f"{result['metric']}, {'samples/s' if result['scenario'] == 'offline' else 'ms'}"
        if result["scenario"] == "server":
            what = f"p99 at {figures['rate']:g} queries/s, ms"
        longest = figures["max_ms"] / figures["p50_ms"] if "max_ms" in figures and figures.get("p50_ms") else None
        own = result["null"].get("p50_ms")
        cells = (result["value"], beside["perf_analyzer"], beside["in_process"], beside["ratio"], longest)
        cost = figure(own and own * 1000)
        verdict = "VALID" if result["valid"] else "NOT VALID"
        rows.append((precision, result["scenario"], verdict, what, *map(figure, cells), cost, str(result["queries"])))
        problems += [f"{precision}, {result['scenario']}: {problem}." for problem in result["problems"]]
        if judged := result.get("accuracy"):
            values = (f"{judged['map']:.4f}", f"{judged['map50']:.4f}", str(judged["images"]))
            same = (str(judged["compared"]), str(len(judged["different"])))
            accuracy.append((precision, result["scenario"], *values, *same))
    for precision, searches in (summary.get("peak") or {}).items():
        for search in searches:
            rate = figure(search["rate"]) + (f" ({search['note']})" if search["note"] else "")
            peaks.append((precision, f"{search['bound_ms']:g} ms", rate, str(len(search["probes"]))))
    if not rows:
        return None
    text = (
        "Unofficial: MLPerf's load generator, in runs shorter than its rules ask for; not submitted to MLCommons. In "
        "process is what the same file does here without a server: for the server scenario its p99 without any "
        "waiting. The ratio is LoadGen's figure over it. The own cost is the median latency of a system that answers "
        "at once."
    )
    heads = [*("precision", "scenario", "LoadGen says", "figure", "LoadGen", "perf_analyzer", "in process")]
    heads += ["ratio", "max / median", "own cost, µs", "queries"]
    tables = [Table(heads, rows, words=4)]
    if accuracy:
        more = ("precision", "scenario", "mAP@[.5:.95]", "mAP@0.5", "pictures", "answers in both", "different")
        tables.append(Table(more, accuracy, words=2))
    if peaks:
        tables.append(Table(("precision", "p99 within", "highest rate, queries/s", "probes"), peaks))
    return Section("LoadGen", [text, *problems], (), tables)


def _served(summary: Summary) -> Section | None:
    rounds: dict[str, dict[str, list[float]]] = {}
    rows = []
    for precision, results in precisions(summary).items():
        if results.get("served_ratio"):
            single = {name: [value] for name, value in results["served_ratio"].items()}
            rounds[precision] = results.get("ratio_rounds") or single
        batches = results.get("batches") or {}
        for size, measured in ((1, results), (batches.get("batch_size"), batches)):
            for transport, value in (measured.get("served_ratio") or {}).items():
                target = TARGETS.get(precision, {}).get(transport) if size == 1 else None
                each = (measured.get("ratio_rounds") or {}).get(transport) or [value]
                figures = [(measured.get("served_ips") or {}).get(transport), measured.get("direct_ips"), value, target]
                cells = [figure(known) if known else "" for known in figures]
                name = TRANSPORTS.get(transport, transport)
                rows.append((precision, name, str(size), *cells, " ".join(figure(ratio) for ratio in each)))
    if not rows:
        return None
    threads, backends = (
        [f"{precision}: {results[key]}" for precision, results in precisions(summary).items() if results.get(key)]
        for key in ("direct_threads", "backend")
    )
    text = (
        "Bars are medians, dots the rounds, red lines the targets. "
        + (f"Served by Triton's backend {', '.join(sorted(backends))}. " if backends else "")
        + "Both sides were measured in turn, 4 clients each "
        "with one picture on the way; in-process is the same model in one process with as many threads"
        + (f" (sessions x threads, {', '.join(sorted(threads))})" if threads else "")
        + ", no network and no copies."
    )
    heads = ("precision", "transport", "batch", "served, images/s", "in-process, images/s", "ratio", "target", "rounds")
    alt = "Served over in-process throughput by precision and transport, with each round and the targets"
    return Section(
        "Served against in-process",
        [text],
        [Plot("served", alt, partial(plots.served, rounds, TARGETS, TRANSPORTS))] if rounds else [],
        [Table(heads, rows, words=2)],
    )


def _single_stream(summary: Summary) -> Section | None:
    rows = []
    for precision, results in precisions(summary).items():
        single = results.get("single_stream") or {}
        for name, key in (("served", "served_ms"), ("in-process", "direct_ms")):
            if single.get(key):
                rows.append((precision, name, *(figure(single[key].get(p)) for p in _PERCENTILES)))
    text, nms = [], summary.get("ssd_nms")
    if nms:
        met = nms["median_ms"] <= SSD_NMS_MS
        text.append(
            f"SSDNMS alone, {nms['anchors']} anchors x {nms['classes']} classes on one thread, score threshold "
            f"{nms['score_threshold']:g}: {figure(nms['median_ms'])} ms, median of {nms['runs']} runs "
            f"({figure(nms['low_ms'])} to {figure(nms['high_ms'])}); the target of {SSD_NMS_MS:g} ms is "
            f"{'met' if met else 'MISSED'}."
        )
        low = nms.get("low_threshold")
        if low:
            text.append(
                f"With a score threshold of {low['score_threshold']:g}, where far more candidates compete: "
                f"{figure(low['median_ms'])} ms."
            )
    if not rows and not text:
        return None
    tables = [Table(("precision", "", *(f"{p}, ms" for p in _PERCENTILES)), rows, words=2)] if rows else []
    return Section("One picture at a time", text, (), tables)


def _split(summary: Summary) -> Section | None:
    rows = [(_name(row), row["parts_ms"]) for row in all_rows(summary) if any((row.get("parts_ms") or {}).values())]
    if not rows:
        return None
    alt = "Share of each part in the average request, for every load"
    text = "The average request of every load, split by where its time went; its whole time stands at the right."
    return Section(
        "Where the time goes",
        [text],
        [Plot("split", alt, partial(plots.stacked, rows, PARTS, "ms", shares=True))],
    )


def _sweep(summary: Summary, series: str) -> Section | None:
    rows = (summary.get("series") or {}).get(series)
    if not rows:
        return None
    axis, label = _AXES[series]
    text = []
    for name, points in curves(rows, axis).items():
        knee = saturation(points)
        if knee:
            more = " It is the largest load that was tried: more might give more." if knee["ends"] else ""
            text.append(
                f"{name} saturates at {knee['label']}: {figure(knee['throughput'])} images/s, {knee['share']:.0%} "
                f"of its best, p99 {figure(knee['p99_ms'])} ms.{more}"
            )
    floor = {}
    if series == "concurrency":
        shown = {row["precision"] for row in rows}
        floor = {
            f"{precision} in-process": results["direct_ips"]
            for precision, results in precisions(summary).items()
            if precision in shown and results.get("direct_ips")
        }
    title = {"concurrency": "More clients", "batch": "Larger batches"}[series]
    alt = f"Throughput and latency percentiles over {label}, with the saturation point"
    hint = "The ring is the smallest load with 95 % of the best throughput; the band reaches over the repeats" + (
        "; dotted: in-process." if floor else "."
    )
    drawn = Plot(series, alt, partial(plots.sweep, rows, axis, label, floor))
    return Section(title, [*text, hint], [drawn], [_brief(rows)])


def _rate(summary: Summary) -> Section | None:
    rows, slo = (summary.get("series") or {}).get("rate") or [], summary.get("slo")
    if not rows and not slo:
        return None
    text, tables = [], []
    if slo:
        percentile = slo.get("percentile", "p99")
        probes = [
            (
                f"{figure(probe['rate'])} requests/s",
                "held" if probe["held"] else f"not held{': ' + probe['why'] if probe.get('why') else ''}",
                figure(probe.get(f"{percentile}_ms")),
                figure(probe.get("throughput")),
            )
            for probe in slo.get("probes") or ()
        ]
        text.append(
            f"{figure(slo['rate'])} requests/s (Poisson) is the highest rate found with {percentile} within "
            f"{slo['bound_ms']:g} ms."
        )
        tables.append(Table(("probe", f"{slo['bound_ms']:g} ms", f"{percentile}, ms", "images/s"), probes, words=2))
    if rows:
        tables.insert(0, _brief(rows))
    alt = "Throughput and latency percentiles over the rate of requests that was asked for"
    drawn = [Plot("rate", alt, partial(plots.sweep, rows, "rate", "requests/s asked for", {}))] if rows else []
    return Section("Requests at a given rate", text, drawn, tables)


def _protocols(summary: Summary) -> Section | None:
    rows = (summary.get("series") or {}).get("protocol")
    return Section("Protocols and shared memory", tables=[_brief(rows)]) if rows else None


def _brief(rows: Iterable[Row]) -> Table:
    heads = ("load", "images/s", *(f"{p}, ms" for p in _PERCENTILES), "max / median")
    cells = []
    for row in rows:
        shown = (row["throughput"]["median"], *(row["latency_ms"].get(p) for p in _PERCENTILES), tail(row))
        cells.append((_name(row), *map(figure, shown)))
    return Table(heads, cells)


def tail(row: Row) -> float | None:
    """The slowest request over the median one; None where not every request's time is known."""
    latency = row["latency_ms"]
    return latency["max"] / latency["p50"] if latency.get("max") and latency.get("p50") else None


def _tune(summary: Summary) -> Section | None:
    tune = summary.get("tune")
    if not tune or not tune.get("candidates"):
        return None
    rows = []
    for place, setting in enumerate(tune["candidates"]):
        name = f"{setting['instances']} x {setting['threads']}"
        name += f", batching, delay {setting['queue_delay_us']} us" if setting["dynamic_batching"] else ""
        marks = [
            ("before", place == 0),
            ("winner", setting == tune["winner"]),
            ("beyond the bound", not setting["held"]),
        ]
        said = "failed: " + setting["failed"].splitlines()[0] if setting["failed"] else ""
        notes = said or ", ".join(mark for mark, is_so in marks if is_so)
        rows.append((name, notes, figure(setting["throughput"]), figure(setting["p99_ms"]), str(setting["rung"])))
    written = "It is written to spec.toml." if tune.get("written") else "spec.toml stays as it was."
    heads = ("instances x threads", "", "images/s", "p99, ms", "rung")
    text = [f"{tune['why'][:1].upper()}{tune['why'][1:]}. {written}"]
    return Section("Tuning", text, (), [Table(heads, rows, words=2)])


def _resources(summary: Summary) -> Section | None:
    rows = [row for row in all_rows(summary) if row.get("resources")]
    if not rows:
        return None
    used = [row["resources"] for row in rows]
    heads = ["load", *(f"{name}, cores" for name in CORES.values()), "images per core"]
    heads += ["server, MiB", "model's own processes, MiB", "perf_analyzer, MiB"]
    memory = ("server_rss_mib", "model_rss_mib", "analyzer_rss_mib")
    on_gpu = {"utilisation": "GPU, %", "memory_mib": "GPU, MiB", "watts": "W", "images_per_watt": "images per W"}
    with_gpu = any(usage.get("gpu") for usage in used)
    heads += on_gpu.values() if with_gpu else ()
    cells = [
        (
            _name(row),
            *(figure(usage.get(name), 2) for name in (*CORES, "images_per_core")),
            *(figure(usage.get(name)) for name in memory),
            *(figure((usage.get("gpu") or {}).get(name)) for name in (on_gpu if with_gpu else ())),
        )
        for row, usage in zip(rows, used, strict=True)
    ]
    alt = "Cores in use by the server, the model, perf_analyzer and others, for every load"
    bars = [(_name(row), row["resources"]) for row in rows]
    text = (
        "Cores that were busy on average, by whom; images per core count the server and the model. A model runs inside "
        "the server, unless its backend has processes of its own, as the python backend does."
    )
    return Section(
        "Cores and memory",
        [text],
        [Plot("cores", alt, partial(plots.stacked, bars, CORES, "cores", shares=False))],
        [Table(heads, cells)],
    )


def _wrong(summary: Summary) -> Section | None:
    rows = []
    for row in all_rows(summary):
        answers = row.get("answers") or {}
        if any(answers.get(name) for name in ANSWERS[1:]):
            said = "; ".join(answers.get("examples") or ())
            rows.append((_name(row), said, *(str(answers.get(name, "")) for name in ANSWERS)))
    heads = ("load", "what", *ANSWERS)
    return Section("Wrong answers", (), (), [Table(heads, rows, words=2)]) if rows else None


def _facts(title: str, facts: Mapping[str, Any] | None) -> Section | None:
    rows = [(name, words(value)) for name, value in flat(facts or {}).items()]
    return Section(title, (), (), [Table(("what", "value"), rows, words=2)]) if rows else None


def _unsteady(summary: Summary) -> Section | None:
    names = [_name(row) for row in all_rows(summary) if not row.get("stable", True)]
    text = "Throughput within these measurements differed by more than 10 %: " + "; ".join(names) + "."
    return Section("Not steady", [text]) if names else None


# -- words -------------------------------------------------------------------------------------------------------------


def _name(row: Row) -> str:
    return f"{row['precision']}, {row['label']}"


def figure(value: Any, digits: int = 3) -> str:
    """A figure with so many digits; a dash where there is none."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return ("-" if value < 0 else "") + number(abs(value), digits)
    return "–"


def flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Facts within facts as one level, such as `versions.python`."""
    facts_by_name: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            facts_by_name |= flat(value, f"{prefix}{name}.")
        else:
            facts_by_name[prefix + name] = value
    return facts_by_name


def words(value: Any) -> str:
    if value is None or value == "" or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(words(item) for item in value)
    return str(value)
