"""The figures of README and docs: tables between markers, made from perf/results/cpu.json.

    <!-- figures: loadgen -->
    (the table, written by `./invoke perf --publish-figures`)
    <!-- end of figures -->

`publish` takes the newest complete runs from artifacts/, keeps of their summaries what the tables show, and writes the
tables. tests/perf/test_figures.py fails where a table and its JSON differ.
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
from perf.report import TRANSPORTS, figure, loadgen_results, loadgen_table, served_table

DOCUMENTS = (files.ROOT / "README.md", files.ROOT / "docs" / "perf.md")
RESULTS = files.ROOT / "perf" / "results" / "cpu.json"
_BLOCK = re.compile(
    r"(?<=<!-- figures: )(?P<name>[\w-]+)(?P<middle> -->\n)(?P<text>.*?)(?=<!-- end of figures -->)", re.S
)
_VERSIONS = ("python", "tritonserver", "onnxruntime", "perf_analyzer", "mlcommons-loadgen")
Summary = Mapping[str, Any]


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
    for name, (pattern, *fields) in RUNS.items():
        needed = ("run", "environment", *fields)
        for path in sorted(artifacts.glob(pattern), reverse=True):
            summary = json.loads(path.read_text())
            valid = all(result["valid"] for _, result in loadgen_results(summary)) or name != "loadgen"
            whole = all(field in summary for field in needed) and summary.get("complete", True)  # of this version
            if whole and valid and not summary.get("quick"):
                kept[name] = {field: summary[field] for field in needed}
                taken.append(f"{name}: {files.relative(path.parent)}")
                break
    if not taken:
        raise DataError(f"{artifacts} holds no complete run", fix="make one: invoke mlperf, invoke perf, invoke demo")
    files.write_json(results, kept)
    for path in documents:
        files.write(path, written(path.read_text(), kept))
    return taken


def written(text: str, kept: Summary) -> str:
    """A document with the tables that `kept` has figures for; other blocks are empty."""

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        return f"{name}{match['middle']}{table(name, kept) if BLOCKS[name][0] in kept else ''}"

    return _BLOCK.sub(block, text)


def table(name: str, kept: Summary) -> str:
    """One block: its table, and where its figures come from."""
    run, lines = BLOCKS[name]
    environment = kept[run]["environment"]
    versions, commit, load = environment["versions"], environment["commit"], environment["load_average"]
    facts = [environment["cpu"], f"{environment['cores_allowed']} cores"]
    facts.append(", ".join(gpu["name"] for gpu in environment["gpus"]) or "no GPU")
    facts += [f"{name} {versions[name]}" for name in _VERSIONS if name in versions]
    facts += [f"commit {commit['sha'][:7]}"] if commit else []
    facts += [kept[run]["run"][:10], *([f"load average {load[0]:g} when it began"] if load else ())]
    return "\n".join([*lines(kept[run]), "", f"({', '.join(facts)}.)"]) + "\n"


def _logs(kept: Summary) -> list[str]:
    lines = ["```text"]
    for precision, result in loadgen_results(kept):
        lines += [f"# {precision}", *result["log"], ""]
    return [*lines, "```"]


def demo_rows(summary: Summary) -> list[tuple[str, str]]:
    """What the demo measured, in words and figures."""
    accuracy, load = summary["accuracy"], summary["load"]
    rates = ", ".join(map(figure, load["throughput_ips"].values()))
    percentiles = ", ".join(f"{load['latency_ms'][name]:.1f} ms {name}" for name in ("p50", "p90", "p99"))
    direct = f"the same file in process, without a server ({load['direct_threads']} sessions × threads)"
    ratios = ", ".join(f"{load['served_ratio'][name]:.2f} {title}" for name, title in TRANSPORTS.items())
    scenes = f"mAP@0.5, mAP@[.5:.95] through the server, {accuracy['images']} scenes"
    return [
        (scenes, f"{accuracy['map50']:.3f}, {accuracy['map']:.3f}"),
        ("one client, pictures in shared memory", percentiles),
        (f"{', '.join(load['throughput_ips'])} clients, shared memory", f"{rates} images/s"),
        (direct, f"{figure(load['direct_ips'])} images/s"),
        ("served / in process, 4 clients", ratios),
    ]


# What is kept → the summaries of its runs in artifacts, and the fields of one that are kept.
RUNS = {
    "loadgen": ("mlperf/*/summary.json", "mlperf", "peak"),
    "served": ("perf/*/summary.json", "precisions"),
    "demo": ("demo/summary.json", "accuracy", "load"),
}
# Block → what is kept for it, and its lines.
BLOCKS: dict[str, tuple[str, Callable[[Summary], list[str]]]] = {
    "logs": ("loadgen", _logs),
    "loadgen": ("loadgen", lambda kept: loadgen_table(kept).markdown()),
    "served": ("served", lambda kept: served_table(kept).markdown()),
    "demo": ("demo", lambda kept: Table(("", ""), demo_rows(kept), words=2).markdown()),
}
