"""What a run of `invoke perf` found, for people: `report.md` and `report.html` out of its summary.

What a run did not measure has no section.
"""

from __future__ import annotations

from perf.mlperf.measure import said
from perf.page import Line, Report
from perf.sections import OVERHEAD_MS, TARGETS, TRANSPORTS, Summary, figure, loadgen_results, sections

BUSY = 0.15  # of the cores taken by other programs: above it figures say little


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
    lines = _loadgen(summary)
    if not lines or summary.get("series"):
        lines += [*_served(summary), _answers(summary)]
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


def _loadgen(summary: Summary) -> list[Line]:
    results = loadgen_results(summary)
    told = "; ".join(f"{precision} {said(result)}" for precision, result in results)
    return [Line(all(result["valid"] for _, result in results), f"LoadGen (unofficial): {told}.")] if results else []


def _served(summary: Summary) -> list[Line]:
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


def _answers(summary: Summary) -> Line:
    answers = summary.get("answers") or {}
    if not answers.get("checked"):
        return Line(None, "Answers: none were checked.")
    told = f"{answers['checked']:,} checked: {answers['wrong']:,} wrong, {answers['missing']:,} missing"
    return Line(not (answers["wrong"] or answers["missing"]), f"Answers under LoadGen: {told}.")
