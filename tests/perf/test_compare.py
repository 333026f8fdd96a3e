"""Two runs against each other."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from build.errors import OptionError
from perf import compare
from perf.compare import CompareError
from tests.perf import example_run
from tests.perf.test_report import Page

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a summary (or any text) as the run of that name."""

    def write(name: str, summary: dict[str, Any] | str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        text = summary if isinstance(summary, str) else json.dumps({**summary, "run": name})
        (folder / "summary.json").write_text(text)
        return folder

    return write


def scaled(summary: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same run with all throughputs so much higher and all latencies so much lower."""
    for series in summary["series"].values():
        for row in series:
            row["throughput"]["values"] = [value * factor for value in row["throughput"]["values"]]
            for name, values in row["latency_values"].items():
                row["latency_values"][name] = [value / factor for value in values]
    return summary


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["what"]: row for row in result["rows"]}


def test_runs_of_the_same_differ_in_nearly_nothing(save: Save) -> None:
    judged = no_difference = 0
    first = save("first", example_run.summary(0))
    for seed in range(1, 9):
        rows = compare.compare(first, save(f"run-{seed}", example_run.summary(seed)))["rows"]
        verdicts = [row["verdict"] for row in rows if row["verdict"] != "too few repeats"]
        no_difference += verdicts.count("no difference shown")
        judged += len(verdicts)
    assert judged > 500
    assert no_difference >= 0.95 * judged


def test_what_is_faster_is_told_from_what_is_slower(save: Save) -> None:
    a, b = save("a", example_run.summary(0)), save("b", scaled(example_run.summary(1), 1.3))
    rows = by_name(compare.compare(a, b))
    clients = "fp32: 4 clients, batch 1, HTTP, system shared memory"
    assert rows[clients]["verdict"] == "faster"
    assert 1.15 < rows[clients]["low"] < 1.3 < rows[clients]["high"] < 1.45
    assert rows[f"{clients}, p99"]["verdict"] == "faster"  # lower is better there
    assert rows[f"{clients}, p99"]["ratio"] < 0.8
    # The rate that was asked for is no result.
    arriving = "fp32: 80 requests/s (Poisson), batch 1, HTTP, system shared memory"
    assert arriving not in rows
    assert rows[f"{arriving}, p50"]["verdict"] == "faster"
    # What was measured once has no verdict; what did not change has none either.
    assert rows["fp32: in-process"]["verdict"] == "too few repeats"
    back = by_name(compare.compare(b, a))
    assert back[clients]["verdict"] == back[f"{clients}, p99"]["verdict"] == "slower"


def test_ratio_rounds_are_compared(save: Save) -> None:
    worse = example_run.summary(1)
    rounds = worse["precisions"]["fp32"]["ratio_rounds"]
    rounds["shm"] = [0.8 * value for value in rounds["shm"]]
    rounds["http"] = rounds["http"][:2]
    rows = by_name(compare.compare(save("a", example_run.summary(0)), save("b", worse)))
    assert rows["fp32: served / in-process, shared memory"]["verdict"] == "slower"
    assert rows["fp32: served / in-process, HTTP"]["verdict"] == "too few repeats"
    assert rows["fp32: served / in-process, HTTP"]["b"] == rounds["http"]


def test_what_differs_comes_first_and_what_always_does_is_left_out(save: Save) -> None:
    a, b = example_run.summary(0), example_run.summary(0)
    a["environment"] |= {"other_load": 0.01, "load_average": [0.1, 0.1, 0.1]}
    b["environment"] |= {"other_load": 0.02, "load_average": [0.3, 0.1, 0.1], "commit": {"sha": "0", "dirty": False}}
    b["environment"]["versions"] = {**b["environment"]["versions"], "onnxruntime": "1.24.0"}
    b["settings"]["seconds"] = 1.0
    result = compare.compare(save("a", a), save("b", b))
    assert [name for name, _, _ in result["differences"]] == ["commit.sha", "versions.onnxruntime", "settings.seconds"]
    text = compare.report(result).markdown()
    assert text.index("1.24.0") < text.index("## Measured by both")
    assert "The runs differ in commit.sha, versions.onnxruntime, settings.seconds" in text
    assert compare.compare(save("c", a), save("d", a))["differences"] == []


def test_what_one_run_alone_measured_is_named(save: Save) -> None:
    less = example_run.summary(0)
    del less["precisions"]["int8"], less["series"]["batch"]
    result = compare.compare(save("a", example_run.summary(0)), save("b", less))
    assert {run for run, _ in result["alone"]} == {"A"}
    assert ("A", "int8: in-process") in result["alone"]
    assert "int8: in-process" in compare.report(result).markdown()


def test_it_is_written_for_people(save: Save, tmp_path: Path) -> None:
    a, b = save("a", example_run.summary(0)), save("b", scaled(example_run.summary(1), 0.7))
    console = Console(file=io.StringIO(), width=200)
    compare.compare_runs([str(a), str(b)], tmp_path, console)
    text = (b / "compare.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads == []
    assert text.count(">slower<") > 20
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "slower: fp32: 4 clients" in said
    assert (b / "compare.md").is_file()
    assert "B is slower in" in said
    assert "cannot be judged: too few repeats" in said


def test_folders_that_hold_no_whole_run_are_explained(save: Save, tmp_path: Path) -> None:
    good = save("good", example_run.summary())
    (tmp_path / "empty").mkdir()
    (tmp_path / "off").mkdir()
    (tmp_path / "off" / "points.jsonl").write_text("{}\n")
    old = example_run.summary()
    del old["series"]
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "summary.json").write_bytes(b"\xff\xfe\x00")
    cases = {
        tmp_path / "nowhere": "no run of invoke perf",
        tmp_path / "empty": "no run of invoke perf",
        tmp_path / "off": f"no summary.json\nwhat to do: finish it: invoke perf --resume {tmp_path / 'off'}",
        tmp_path / "binary": "cannot be read",
        save("torn", '{"run": "torn", '): "cannot be read",
        save("list", "[1, 2]"): "another version of the harness wrote it",
        save("old", old): "has no series",
        save("partial", example_run.partial()): "partial: tritonserver ended in the middle of 8 clients",
    }
    for folder, message in cases.items():
        for pair in ((good, folder), (folder, good)):
            with pytest.raises(CompareError) as caught:
                compare.compare(*pair)
            assert message in str(caught.value)


def test_runs_with_nothing_in_common_are_refused(save: Save) -> None:
    a, b = example_run.summary(), example_run.summary()
    a |= {"series": {}, "precisions": {"fp32": a["precisions"]["fp32"]}}
    b |= {"series": {}, "precisions": {"int8": b["precisions"]["int8"]}}
    with pytest.raises(CompareError, match="nothing that is the same"):
        compare.compare(save("a", a), save("b", b))


def test_two_runs_are_needed_for_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="name two"):
        compare.compare_runs(["one"], tmp_path)
