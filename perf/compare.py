"""Two runs of `invoke perf` against each other: what became faster or slower, as far as their repeats can show it.

result = compare(Path("artifacts/perf/a"), Path("artifacts/perf/b"))
result["rows"][0]["verdict"]      of B against A
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import OptionError, SSDError
from build.files import ARTIFACTS
from build.reports.html import Table
from perf.page import Line, Report, Section
from perf.report import TRANSPORTS, all_rows, figure, flat, words
from perf.settings import run_folder
from perf.statistics import verdict

if TYPE_CHECKING:
    from rich.console import Console

_PASSING = ("load_average", "other_load")  # facts that are never the same twice
_ORDER = ("slower", "faster", "no difference shown", "too few repeats")  # what matters most comes first
_NEEDED = ("run", "model", "precisions", "series", "settings", "environment")
_Measured = tuple[Sequence[float], str, bool]  # repeats, their unit, and whether higher is better


class CompareError(SSDError):
    """A folder that holds no whole run of this version of the harness, or runs that have nothing in common."""


def compare_runs(runs: Sequence[str], artifacts: Path = ARTIFACTS, console: Console | None = None) -> None:
    """Says whether the second run is faster than the first; writes compare.md and .html into the second's folder.

    Args:
        runs: two of them, each its folder or the folder's name.
        artifacts: where runs are.
        console: where to say it; None = standard output.

    Raises:
        OptionError: not two runs.
        CompareError: they cannot be compared.
    """
    from rich.console import Console

    console = console or Console(highlight=False, soft_wrap=True)
    if len(runs) != 2:
        raise OptionError(f"{len(runs)} runs to compare", fix="name two: invoke perf --compare RUN_A,RUN_B")
    folders = [run_folder(Path(run), artifacts) for run in runs]
    result = compare(*folders)
    told = report(result)
    said = [line.text for line in told.verdict]
    said += [
        f"{row['verdict']}: {row['what']}: {row['ratio']:.3f}" for row in result["rows"] if row["verdict"] in _ORDER[:2]
    ]
    console.print("\n".join([*said, *map(str, told.write(folders[1], "compare"))]), markup=False)


def compare(run_a: Path, run_b: Path) -> dict[str, Any]:
    """B against A, for everything that both measured.

    Args:
        run_a, run_b: folders of runs.

    Returns:
        `a` and `b`, the runs' names; `differences` [(what, in A, in B)] of model, environment and settings; `rows`, the
        slower ones first [{what, unit, a and b (repeats), and what `perf.statistics.verdict` says}]; `alone` [(A or B,
        what it alone has)].

    Raises:
        CompareError: a folder cannot be read, or holds no whole run; or the runs have nothing in common.
    """
    a, b = (_load(run) for run in (run_a, run_b))
    of_a, of_b = (dict(_measured(run)) for run in (a, b))
    rows = []
    for what in (name for name in of_a if name in of_b):
        (values, unit, higher), others = of_a[what], of_b[what][0]
        judged = verdict(values, others, higher_is_better=higher)
        rows.append({"what": what, "unit": unit, "a": values, "b": others, **judged})
    if not rows:
        raise CompareError(
            f"{a['run']} and {b['run']} measured nothing that is the same",
            why="they were asked for other precisions and loads",
            fix="run both with the same settings",
        )
    facts = [
        {"model": run["model"], **flat(run["environment"]), **flat(run["settings"], "settings.")} for run in (a, b)
    ]
    names = [name for name in dict.fromkeys([*facts[0], *facts[1]]) if name.split(".")[-1] not in _PASSING]
    both = [(name, facts[0].get(name), facts[1].get(name)) for name in names]
    return {
        "a": a["run"],
        "b": b["run"],
        "differences": [each for each in both if each[1] != each[2]],
        "rows": sorted(rows, key=lambda row: _ORDER.index(row["verdict"])),
        "alone": [("A", what) for what in of_a if what not in of_b]
        + [("B", what) for what in of_b if what not in of_a],
    }


def _load(run: Path) -> dict[str, Any]:
    path, resume = run / "summary.json", f"finish it: invoke perf --resume {run}"
    if not path.is_file():
        begun = (run / "points.jsonl").exists()
        what = f"{run} {'was broken off' if begun else 'is no run of invoke perf'}: it has no summary.json"
        raise CompareError(what, fix=resume if begun else "give folders of artifacts/perf/")
    try:
        summary: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:  # neither UTF-8 nor JSON
        raise CompareError(f"{path} cannot be read: {error}", fix=resume) from None
    missing = [name for name in _NEEDED if name not in summary] if isinstance(summary, dict) else list(_NEEDED)
    if missing:
        why = "another version of the harness wrote it"
        raise CompareError(f"{path} has no {', '.join(missing)}", why=why, fix="measure again with this version")
    if not summary["complete"]:
        raise CompareError(f"the run {summary['run']} is partial: {'; '.join(summary['problems'])}", fix=resume)
    return dict(summary)


def _measured(summary: Mapping[str, Any]) -> Iterator[tuple[str, _Measured]]:
    for precision, results in summary["precisions"].items():
        batches = results.get("batches") or {}
        for measured, more in ((results, ""), (batches, f", batch {batches.get('batch_size')}")):
            for transport, rounds in (measured.get("ratio_rounds") or {}).items():
                yield f"{precision}: served / in-process, {TRANSPORTS[transport]}{more}", (rounds, "", True)
        yield f"{precision}: in-process", (results.get("direct_rounds") or [], "images/s", True)
        overhead = (results.get("single_stream") or {}).get("overhead_rounds") or []
        yield f"{precision}: overhead of a single stream", (overhead, "ms", False)
    for row in all_rows(summary):
        name = f"{row['precision']}: {row['label']}"
        if row["load"]["rate"] is None:  # else it is what was asked for
            yield name, (row["throughput"]["values"], "images/s", True)
        for percentile, values in row["latency_values"].items():
            yield f"{name}, {percentile}", (values, "ms", False)


def report(result: Mapping[str, Any]) -> Report:
    """The comparison for people."""
    counts = Counter(row["verdict"] for row in result["rows"])
    few, slower = counts["too few repeats"], counts["slower"]
    judged = counts.total() - few
    told = f"B is slower in {slower} and faster in {counts['faster']} of {judged} comparisons."
    lines, parts = [Line(not slower if judged else None, told)], []
    if result["differences"]:
        names = ", ".join(name for name, _, _ in result["differences"])
        lines.append(Line(None, f"The runs differ in {names}: what is slower or faster may come from that."))
        facts = [(name, words(a), words(b)) for name, a, b in result["differences"]]
        parts.append(Section("Where they differ", (), (), [Table(("what", "A", "B"), facts, words=3)]))
    if few:
        lines.append(Line(None, f"{few} more cannot be judged: too few repeats, three a side are the least."))
    text = (
        "Ratio of the geometric means with a 98 % interval by Student's t. A verdict asks for an interval "
        "without 1 and a difference of 1 % or more. Of a hundred equal things about two may still look "
        "different, and repeats within a run do not show how much the machine changes between runs: two runs of one "
        "commit do."
    )
    rows = []
    for row in result["rows"]:
        interval = "" if row["low"] is None else f"{row['low']:.3f} .. {row['high']:.3f}"
        medians = [f"{figure(statistics.median(row[side]))} {row['unit']}" if row[side] else "–" for side in "ab"]
        repeats = f"{len(row['a'])}, {len(row['b'])}"
        rows.append((row["what"], row["verdict"], *medians, figure(row["ratio"]), interval, repeats))
    heads = ("measured", "verdict of B", "A", "B", "B / A", "98 % interval", "repeats")
    parts.append(Section("Measured by both", [text], (), [Table(heads, rows, words=2)]))
    if result["alone"]:
        parts.append(Section("Measured by one alone", (), (), [Table(("run", "what"), result["alone"], words=2)]))
    return Report("Run B against run A", f"A: {result['a']} · B: {result['b']}", lines, parts)
