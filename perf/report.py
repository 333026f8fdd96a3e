"""What a run of `invoke perf` found, for people: `report.md` and `report.html` out of its summary.

Both are made of the same sections. What a run did not measure has no section.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from build import files
from perf import report_html as plots
from perf.report_html import Line, Section
from perf.sections import (
    ANSWERS,
    OVERHEAD_MS,
    TARGETS,
    TRANSPORTS,
    Summary,
    all_rows,
    figure,
    loadgen_results,
    precisions,
    sections,
    tail,
)

BUSY = 0.15  # of the cores taken by other programs: above it figures say little


def write(folder: Path, summary: Summary) -> list[Path]:
    """Writes `report.md` and `report.html` into a run's folder, each whole or not at all.

    Args:
        folder: of the run; it is there.
        summary: as in its summary.json.

    Returns:
        The two files.
    """
    return write_both(folder, "report", markdown(summary), html(summary))


def write_both(folder: Path, stem: str, text: str, page: str) -> list[Path]:
    """`<stem>.md` and `<stem>.html`, each whole or not at all."""
    paths = [folder / f"{stem}.md", folder / f"{stem}.html"]
    for path, content in zip(paths, (text, page), strict=True):
        files.write(path, content)
    return paths


def markdown(summary: Summary) -> str:
    """The report for a terminal, a pull request or a diff: without the plots."""
    return as_markdown(_title(summary), _subtitle(summary), verdict(summary), sections(summary))


def html(summary: Summary) -> str:
    """The report as one file that loads nothing."""
    return plots.page(_title(summary), _subtitle(summary), verdict(summary), sections(summary))


def as_markdown(title: str, subtitle: str, lines: Sequence[Line], parts: Sequence[Section]) -> str:
    """Verdict and sections as Markdown."""
    marks = {True: "✓", False: "✗", None: "–"}
    out = [f"# {title}", "", subtitle, "", *(f"- {marks[line.good]} {line.text}" for line in lines)]
    for part in parts:
        out += ["", f"## {part.title}"]
        for text in part.text:
            out += ["", text]
        for table in part.tables:
            out += ["", *table.markdown()]
    return "\n".join(out) + "\n"


def _title(summary: Summary) -> str:
    return f"{summary['model']}: how fast it is served"


def _subtitle(summary: Summary) -> str:
    environment = summary.get("environment") or {}
    versions = environment.get("versions") or {}
    said = [f"run {summary['run']}", "quick" if summary.get("quick") else "", environment.get("cpu") or ""]
    said += [f"{environment['cores_allowed']} cores" if environment.get("cores_allowed") else ""]
    said += [f"commit {(environment.get('commit') or {}).get('sha', '')[:7]}" if environment.get("commit") else ""]
    said += [f"{name} {versions[name]}" for name in ("tritonserver", "onnxruntime") if versions.get(name)]
    return " · ".join(filter(None, said))


# -- the verdict -------------------------------------------------------------------------------------------------------


def verdict(summary: Summary) -> list[Line]:
    """LoadGen's figures, served against in-process, overhead, answers, the slowest request, whether the run is whole;
    one more on a busy machine. Where the run was for LoadGen or a search alone: what that found, and the last line.
    """
    tune = summary.get("tune")
    if tune and not summary.get("precisions"):
        return [Line(None, f"{tune['why'][:1].upper()}{tune['why'][1:]}."), _complete_line(summary)]
    loadgen = _loadgen_lines(summary)
    if loadgen and not summary.get("series"):
        return [*loadgen, _complete_line(summary)]
    lines = [
        *loadgen,
        _ratio_line(summary),
        _overhead_line(summary),
        _answers_line(summary),
        _tail_line(summary),
        _complete_line(summary),
    ]
    return lines + _busy_line(summary)


def _loadgen_lines(summary: Summary) -> list[Line]:
    results = loadgen_results(summary)
    said = []
    for precision, result in results:
        name, unit = result["scenario"], "samples/s" if result["scenario"] == "offline" else "ms"
        rate = f"{figure(result['figures']['rate'])} queries/s with p99 " if name == "server" else ""
        valid = "" if result["valid"] else ", NOT VALID"
        said.append(f"{precision} {name} {rate}{figure(result['value'])} {unit}{valid}")
    good = all(result["valid"] for _, result in results)
    return [Line(good, f"LoadGen (unofficial): {'; '.join(said)}.")] if said else []


def _ratio_line(summary: Summary) -> Line:
    said, met = [], []
    for precision, results in precisions(summary).items():
        parts = []
        for transport, value in (results.get("served_ratio") or {}).items():
            target = TARGETS.get(precision, {}).get(transport)
            missed = target is not None and value < target
            wanted = f" (target {target:.2f}{', MISSED' * missed})" if target else ""
            parts.append(f"{TRANSPORTS.get(transport, transport)} {figure(value)}{wanted}")
            met += [not missed] if target else []
        said += [f"{precision} {', '.join(parts)}"] if parts else []
    if not said:
        return Line(None, "Served against in-process: not measured.")
    return Line(all(met) if met else None, f"Served / in-process throughput, 4 clients: {'; '.join(said)}.")


def _overhead_line(summary: Summary) -> Line:
    overheads = {
        precision: results["single_stream"]["overhead_ms"]
        for precision, results in precisions(summary).items()
        if (results.get("single_stream") or {}).get("overhead_ms") is not None
    }
    if not overheads:
        return Line(None, "Overhead of a single stream: not measured.")
    said = ", ".join(f"{precision} {figure(value, 2)} ms" for precision, value in overheads.items())
    return Line(
        max(overheads.values()) <= OVERHEAD_MS,
        f"What serving adds to a single stream's p50: {said} (at most {OVERHEAD_MS:g} ms).",
    )


def _answers_line(summary: Summary) -> Line:
    answers = summary.get("answers")
    if not answers or not answers.get("checked"):
        return Line(None, "Answers: none were checked.")
    bad = sum(answers.get(name) or 0 for name in ANSWERS[1:])
    counts = ", ".join(f"{answers.get(name) or 0:,} {name}" for name in ANSWERS[1:])
    return Line(bad == 0, f"Answers under load: {answers['checked']:,} checked: {counts}.")


def _tail_line(summary: Summary) -> Line:
    tails = [(value, row) for row in all_rows(summary) if (value := tail(row)) is not None]
    if not tails:
        return Line(None, "Slowest requests: not measured.")
    value, row = max(tails, key=lambda pair: pair[0])
    return Line(None, f"Slowest request: {figure(value)} times the median, at {row['precision']}, {row['label']}.")


def _busy_line(summary: Summary) -> list[Line]:
    used = [row["resources"]["other_cores"] for row in all_rows(summary) if row.get("resources")]
    cores = (summary.get("environment") or {}).get("cores_allowed") or 0
    if not used or not cores or statistics.median(used) <= BUSY * cores:
        return []
    return [
        Line(
            None,
            f"Other programs kept {statistics.median(used):.1f} of {cores} cores busy meanwhile: measure again on an "
            "idle machine before you believe a figure.",
        )
    ]


def _complete_line(summary: Summary) -> Line:
    problems = "; ".join(summary.get("problems") or ())
    if not summary.get("complete"):
        return Line(False, f"PARTIAL: {problems or 'the run was ended before all was measured'}. Go on with --resume.")
    return Line(
        not problems, f"Complete, but: {problems}." if problems else "Complete: all that was asked for is measured."
    )
