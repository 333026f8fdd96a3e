"""The figures of README and docs: tables between markers, made from perf/results/<kind>.json.

    <!-- figures: loadgen -->
    (the table, written by `./invoke perf --publish-figures`)
    <!-- end of figures -->

`publish` takes the newest complete runs from artifacts/, keeps of them what the tables show, and writes the tables.
tests/perf/test_figures.py fails where a table and its JSON differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from build import files
from build.errors import DataError
from build.reports.html import Table
from perf.sections import OVERHEAD_MS, TARGETS, TRANSPORTS, figure, loadgen_results

DOCUMENTS = (files.ROOT / "README.md", files.ROOT / "docs" / "perf.md")
RESULTS = files.ROOT / "perf" / "results" / "cpu.json"
_BLOCK = re.compile(
    r"(?<=<!-- figures: )(?P<name>[\w-]+)(?P<middle> -->\n)(?P<text>.*?)(?=<!-- end of figures -->)", re.S
)
Keep = Callable[[Mapping[str, Any]], dict[str, Any]]
_FACTS = ("cpu", "cores_allowed", "memory_gib", "gpus", "load_average", "other_load")
_VERSIONS = ("python", "tritonserver", "onnxruntime", "perf_analyzer", "mlcommons-loadgen")


def publish(
    artifacts: Path = files.ARTIFACTS, results: Path = RESULTS, documents: Sequence[Path] = DOCUMENTS
) -> list[str]:
    """Takes the newest runs into `results` and writes their tables into `documents`.

    Returns:
        What was taken from which run, a sentence each.

    Raises:
        DataError: there is no complete and valid run of anything.
    """
    kept: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    taken = []
    for name, (pattern, keep, _) in KINDS.items():
        for path in sorted(artifacts.glob(pattern), reverse=True):
            summary = json.loads(path.read_text())
            valid = all(result["valid"] for _, result in loadgen_results(summary)) or "mlperf" not in pattern
            if summary.get("complete", True) and valid and not summary.get("quick"):
                kept[name] = {**_facts(summary, path), **keep(summary)}
                taken.append(f"{name}: {files.relative(path.parent)}")
                break
    if not taken:
        raise DataError(f"{artifacts} holds no complete run", fix="make one: invoke mlperf, invoke perf, invoke demo")
    files.write_json(results, kept)
    for path in documents:
        files.write(path, written(path.read_text(), kept))
    return taken


def written(text: str, kept: Mapping[str, Any]) -> str:
    """A document with the tables that `kept` has figures for; other blocks are empty."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{name}{match['middle']}{table(name, kept[name]) if name in kept else ''}"

    return _BLOCK.sub(block, text)


def names(text: str) -> list[str]:
    """The blocks of a document."""
    return [match["name"] for match in _BLOCK.finditer(text)]


def table(name: str, kept: Mapping[str, Any]) -> str:
    """One block: its table, and where its figures come from."""
    load = kept["environment"]["load_average"]
    facts = [kept["environment"]["cpu"], f"{kept['environment']['cores_allowed']} cores", "no GPU"]
    if kept["environment"]["gpus"]:
        facts[2] = ", ".join(gpu["name"] for gpu in kept["environment"]["gpus"])
    facts += [f"{name} {version}" for name, version in kept["versions"].items()]
    facts += [f"commit {kept['commit']}" if kept["commit"] else "", kept["date"]]
    facts += [f"load average {load[0]:g} when it began" if load else ""]
    lines = [*KINDS[name][2](kept), "", f"({', '.join(filter(None, facts))}.)"]
    return "\n".join(lines) + "\n"


def _facts(summary: Mapping[str, Any], path: Path) -> dict[str, Any]:
    environment = summary.get("environment") or summary.get("machine") or {}
    versions = {**(environment.get("versions") or {}), **(summary.get("versions") or {})}
    if summary.get("server_version"):
        versions["tritonserver"] = summary["server_version"]
    return {
        "date": summary.get("run", "")[:10] or summary.get("date", ""),
        "commit": ((environment.get("commit") or {}).get("sha") or "")[:7],
        "environment": {name: environment.get(name) for name in _FACTS},
        "versions": {name: versions[name] for name in _VERSIONS if name in versions},
    }


def _keep_loadgen(summary: Mapping[str, Any]) -> dict[str, Any]:
    names = ("metric", "value", "figures", "beside", "null", "valid", "queries", "answered", "wrong")
    scenarios = {
        precision: {
            name: {**{key: result[key] for key in names}, "map": (result.get("accuracy") or {}).get("map")}
            for name, result in results.items()
        }
        for precision, results in summary["mlperf"].items()
    }
    peak = {
        precision: [{key: search[key] for key in ("bound_ms", "rate")} for search in searches]
        for precision, searches in (summary.get("peak") or {}).items()
    }
    return {"mlperf": scenarios, "peak": peak}


def _keep_logs(summary: Mapping[str, Any]) -> dict[str, Any]:
    whole = summary["mlperf"].items()
    return {"logs": [[precision, *result["log"]] for precision, results in whole for result in results.values()]}


def _logs(kept: Mapping[str, Any]) -> list[str]:
    return ["```text", *("\n".join([f"# {precision}", *lines, ""]) for precision, *lines in kept["logs"]), "```"]


def _loadgen(kept: Mapping[str, Any]) -> list[str]:
    rows = []
    for precision, results in kept["mlperf"].items():
        for name, result in results.items():
            unit = "samples/s" if name == "offline" else "ms"
            what = result["metric"]
            if name == "server":
                what = f"p99 at {result['figures']['rate']:g} queries/s"
            beside = result["beside"]
            values = (f"**{figure(result['value'])}**", figure(beside["perf_analyzer"]), figure(beside["in_process"]))
            own = result["null"].get("p50_ms")
            cost = "" if own is None else f"{figure(own * 1000, 2)} µs"
            judged = "" if result["map"] is None else f"{result['map']:.4f}"
            says = "VALID" if result["valid"] else "not valid"
            rows.append((precision, name, says, f"{what}, {unit}", *values, cost, judged))
    heads = ("precision", "scenario", "LoadGen", "figure", "by LoadGen", "by perf_analyzer", "in process")
    return Table([*heads, "LoadGen's own cost", "mAP in accuracy mode"], rows, words=4).markdown()


def _keep_served(summary: Mapping[str, Any]) -> dict[str, Any]:
    keep = ("served_ratio", "direct_ips")
    return {
        "precisions": {
            precision: {
                **{name: results.get(name) for name in keep},
                "overhead_ms": (results.get("single_stream") or {}).get("overhead_ms"),
                "batches": (results.get("batches") or {}).get("served_ratio"),
            }
            for precision, results in summary["precisions"].items()
        },
        "answers": {name: summary["answers"][name] for name in ("checked", "wrong", "dropped", "late")},
    }


def _served(kept: Mapping[str, Any]) -> list[str]:
    rows = []
    for precision, results in kept["precisions"].items():
        added = f"{figure(results['overhead_ms'], 2)} ms"
        goals = TARGETS.get(precision, {})
        cells = [
            f"**{figure(results['served_ratio'].get(name))}**" + (f" (goal {goals[name]:.2f})" if name in goals else "")
            for name in TRANSPORTS
        ]
        rows.append((precision, *cells, f"{added} (goal {OVERHEAD_MS:g})"))
        if results["batches"]:
            cells = [figure(results["batches"].get(name)) for name in TRANSPORTS]
            rows.append((f"{precision}, 8 pictures a request", *cells, ""))
    return Table(("served / in process", *TRANSPORTS.values(), "one client, p50, added by serving"), rows).markdown()


def _keep_demo(summary: Mapping[str, Any]) -> dict[str, Any]:
    names = ("map50", "map", "images", "latency_ms", "throughput_ips", "direct_ips", "direct_threads", "served_ratio")
    return {name: summary[name] for name in names}


def _demo(kept: Mapping[str, Any]) -> list[str]:
    latency, ratio = kept["latency_ms"], kept["served_ratio"]
    clients = kept["throughput_ips"]
    rates = ", ".join(figure(rate) for rate in clients.values())
    percentiles = ", ".join(f"{latency[name]:.1f} ms {name}" for name in ("p50", "p90", "p99"))
    scenes = f"mAP@0.5, mAP@[.5:.95] through the server, {kept['images']} scenes"
    direct = f"the same file in process, without a server ({kept['direct_threads']} sessions × threads)"
    rows = [
        (scenes, f"{kept['map50']:.3f}, {kept['map']:.3f}"),
        ("one client, pictures in shared memory", percentiles),
        (f"{', '.join(clients)} clients, shared memory", f"{rates} images/s"),
        (direct, f"{figure(kept['direct_ips'])} images/s"),
        (
            "**served / in process**, 4 clients",
            ", ".join(f"**{ratio[name]:.2f}** {title}" for name, title in TRANSPORTS.items()),
        ),
    ]
    return Table(("", ""), rows, words=2).markdown()


# Block → the runs' summaries in artifacts, what is kept of one, and its lines.
KINDS: dict[
    str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]], Callable[[Mapping[str, Any]], list[str]]]
] = {
    "logs": ("mlperf/*/summary.json", _keep_logs, _logs),
    "loadgen": ("mlperf/*/summary.json", _keep_loadgen, _loadgen),
    "served": ("perf/*/summary.json", _keep_served, _served),
    "demo": ("demo/summary.json", _keep_demo, _demo),
}
