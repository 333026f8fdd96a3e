"""Two runs of `invoke perf` against each other: what became faster or slower, as far as their repeats can show it.

result = compare(Path("artifacts/perf/a"), Path("artifacts/perf/b"))
result["rows"][0]["verdict"]      of B against A
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from build.errors import SSDError
from build.reports.html import Table
from perf import report, report_html
from perf.report_html import Line, Section
from perf.sections import TRANSPORTS, all_rows, figure, flat, words
from perf.statistics import verdict

# Facts that are never the same twice.
_PASSING = ("load_average", "other_load")
_ORDER = ("slower", "faster", "no difference shown", "too few repeats")  # what matters most comes first
_NEEDED = ("run", "model", "precisions", "series")


class CompareError(SSDError):
    """A folder that holds no whole run of this version of the harness, or runs that have nothing in common."""


def compare(run_a: Path, run_b: Path) -> dict[str, Any]:
    """B against A, for everything that both measured.

    Args:
        run_a, run_b: folders of runs.

    Returns:
        `a` and `b`, the runs' names; `differences` [{what, a, b}] in model, environment and settings; `rows`, the
        slower ones first [{what, unit, better (higher or lower), a {repeats, median}, b {repeats, median}, ratio (of
        the medians, B over A), low and high (its 95 % interval), verdict}]; `counts` {verdict: how many}; `only_a`,
        `only_b`: what one alone has.

    Raises:
        CompareError: a folder cannot be read, or holds no whole run; or the runs have nothing in common.
    """
    a, b = (_load(run) for run in (run_a, run_b))
    of_a, of_b = (dict(_measured(run)) for run in (a, b))
    both = [what for what in of_a if what in of_b]
    if not both:
        raise CompareError(
            f"{a['run']} and {b['run']} measured nothing that is the same",
            why="they were asked for other precisions and loads",
            fix="run both with the same settings",
        )
    rows = [_row(what, *of_a[what], of_b[what][0]) for what in both]
    rows.sort(key=lambda row: _ORDER.index(row["verdict"]))
    return {
        "a": a["run"],
        "b": b["run"],
        "differences": _differences(a, b),
        "rows": rows,
        "counts": dict(Counter(row["verdict"] for row in rows)),
        "only_a": [what for what in of_a if what not in of_b],
        "only_b": [what for what in of_b if what not in of_a],
    }


def _load(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    resume = f"finish it: invoke perf --resume {run}"
    try:
        summary: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        if (run / "points.jsonl").exists():
            raise CompareError(f"{run} has no summary.json", why="that run was broken off", fix=resume) from None
        raise CompareError(
            f"{run} is no run of invoke perf: it has no summary.json", fix="give folders of artifacts/perf/"
        ) from None
    except OSError as error:
        raise CompareError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise CompareError(f"{path} is damaged: {error}", fix=resume) from None
    missing = [name for name in _NEEDED if name not in summary] if isinstance(summary, dict) else list(_NEEDED)
    if missing:
        raise CompareError(
            f"{path} has no {', '.join(missing)}",
            why="another version of the harness wrote it",
            fix="measure again with this version",
        )
    if not summary.get("complete"):
        problems = "; ".join(summary.get("problems") or ()) or "it was ended before all was measured"
        raise CompareError(f"the run {summary['run']} is partial: {problems}", fix=resume)
    return dict(summary)


# What is measured → its repeats, their unit, and whether higher is better.
_Measured = tuple[Sequence[float], str, bool]


def _measured(summary: Mapping[str, Any]) -> Iterator[tuple[str, _Measured]]:
    for precision, measured in summary["precisions"].items():
        for transport, rounds in (measured.get("ratio_rounds") or {}).items():
            yield f"{precision}: served / in-process, {TRANSPORTS.get(transport, transport)}", (rounds, "", True)
        batches = measured.get("batches") or {}
        for transport, rounds in (batches.get("ratio_rounds") or {}).items():
            name = f"{TRANSPORTS.get(transport, transport)}, batch {batches['batch_size']}"
            yield f"{precision}: served / in-process, {name}", (rounds, "", True)
        yield f"{precision}: in-process", (measured.get("direct_rounds") or [], "images/s", True)
        overhead = (measured.get("single_stream") or {}).get("overhead_rounds") or []
        yield f"{precision}: overhead of a single stream", (overhead, "ms", False)
    for row in all_rows(summary):
        name = f"{row['precision']}: {row['label']}"
        if row["load"].get("rate") is None:  # else it is what was asked for
            yield name, (row["throughput"]["values"], "images/s", True)
        for percentile, values in (row.get("latency_values") or {}).items():
            yield f"{name}, {percentile}", (values, "ms", False)


def _row(what: str, a: Sequence[float], unit: str, higher: bool, b: Sequence[float]) -> dict[str, Any]:
    import statistics

    judged = verdict(a, b, higher_is_better=higher)
    sides = {
        name: {"repeats": len(values), "median": statistics.median(values) if values else None}
        for name, values in (("a", a), ("b", b))
    }
    better = "higher" if higher else "lower"
    return {"what": what, "unit": unit, "better": better, **sides, **dataclasses.asdict(judged)}


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    facts = []
    for summary in (a, b):
        named = {"model": summary["model"], "quick": summary.get("quick")}
        settings = flat(summary.get("settings") or {}, "settings.")
        facts.append(named | flat(summary.get("environment") or {}) | settings)
    names = dict.fromkeys([*facts[0], *facts[1]])
    return [
        {"what": name, "a": facts[0].get(name), "b": facts[1].get(name)}
        for name in names
        if name.split(".")[-1] not in _PASSING and facts[0].get(name) != facts[1].get(name)
    ]


# -- for people --------------------------------------------------------------------------------------------------------


def write(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Writes `compare.md` and `compare.html`."""
    return report.write_both(folder, "compare", markdown(result), html(result))


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison for a terminal or a pull request."""
    return report.as_markdown(_TITLE, _subtitle(result), lines(result), _sections(result))


def html(result: Mapping[str, Any]) -> str:
    """The comparison as one file that loads nothing."""
    return report_html.page(_TITLE, _subtitle(result), lines(result), _sections(result))


_TITLE = "Run B against run A"
_HEADS = ("measured", "verdict of B", "A", "B", "B / A", "95 % interval", "repeats")


def _subtitle(result: Mapping[str, Any]) -> str:
    return f"A: {result['a']} · B: {result['b']}"


def lines(result: Mapping[str, Any]) -> list[Line]:
    """How many were slower and faster, and what limits that."""
    counts = result["counts"]
    slower, faster = counts.get("slower", 0), counts.get("faster", 0)
    few = counts.get("too few repeats", 0)
    judged = len(result["rows"]) - few
    told = [
        Line(
            not slower if judged else None, f"B is slower in {slower} and faster in {faster} of {judged} comparisons."
        ),
    ]
    if result["differences"]:
        names = ", ".join(difference["what"] for difference in result["differences"])
        told.append(Line(None, f"The runs differ in {names}: what is slower or faster may come from that."))
    if few:
        told.append(Line(None, f"{few} more cannot be judged: too few repeats, three a side are the least."))
    return told


def _sections(result: Mapping[str, Any]) -> list[Section]:
    sections = []
    if result["differences"]:
        rows = [(row["what"], words(row["a"]), words(row["b"])) for row in result["differences"]]
        sections.append(Section("Where they differ", (), (), [Table(("what", "A", "B"), rows, words=3)]))
    text = (
        "Ratio of the medians with a 95 % bootstrap interval, widened for few repeats. A verdict asks for an interval "
        "without 1 and a difference of 1 % or more. Of a hundred equal things about three may still look "
        "different, and repeats within a run do not show how much the machine changes between runs: two runs of one "
        "commit do."
    )
    both = [_cells(row) for row in result["rows"]]
    sections.append(Section("Measured by both", [text], (), [Table(_HEADS, both, words=2)]))
    alone = [(run.upper(), what) for run in "ab" for what in result[f"only_{run}"]]
    if alone:
        sections.append(Section("Measured by one alone", (), (), [Table(("run", "what"), alone, words=2)]))
    return sections


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    unit = f" {row['unit']}" if row["unit"] else ""
    interval = "" if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}"
    return (
        row["what"],
        row["verdict"],
        *(figure(row[side]["median"]) + unit for side in "ab"),
        "–" if row["ratio"] is None else f"{row['ratio']:.3f}",
        interval,
        f"{row['a']['repeats']}, {row['b']['repeats']}",
    )
