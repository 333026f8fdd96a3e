"""`invoke perf` from end to end on a real server: whole, resumed, lied to, killed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from build.errors import DataError, OptionError
from build.serve import TritonServer
from perf import bench, direct, environment, run, settings
from perf.load import Load, PerfError, Point
from perf.mlperf import child, measure, runs
from perf.report import PARTS
from perf.settings import Settings, Size
from tests.perf import faulty

TINY = Size(1, 0.3, 0.3, 1, (1, 4), (4,), (0.5,), False, (), 0.5)
QUICK = Settings(quick=True)
machine = functools.cache(environment.capture)


def serve_copy(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the published model that the run serves; nothing is built."""
    copy = tmp_path / "model_repository"
    shutil.copytree(repository, copy)
    monkeypatch.setattr(run, "publish", lambda *_: copy)
    monkeypatch.setattr(settings, "QUICK", TINY)
    return copy


@pytest.fixture
def published(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return serve_copy(repository, tmp_path, monkeypatch)


@pytest.fixture
def published_python(python_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return serve_copy(python_repository, tmp_path, monkeypatch)


def spoil(published: Path, fault: str) -> None:
    faulty.spoil(published / "shapes", fault)
    for config in published.rglob("config.pbtxt"):  # one instance: every request counts
        config.write_text(config.read_text().replace("count: 2", "count: 1"))


def only_run(artifacts: Path) -> Path:
    (folder,) = (path for path in (artifacts / "perf").iterdir() if (path / "settings.json").is_file())
    return folder


def quiet() -> Console:
    return Console(quiet=True)


def instant(url: str, model: str, data: Path, load: Load, *, seconds: float, **options: Any) -> Point:
    """What perf_analyzer would say, at once."""
    latency = dict.fromkeys(("avg", "p50", "p90", "p95", "p99"), 10.0)
    parts = dict.fromkeys(PARTS, 1.0)
    return Point(100, load.rate or 100.0, latency, parts, seconds)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, one look at the machine, sleep in place of the model in process: test_a_run has the real ones."""
    monkeypatch.setattr(child, "IN_MEMORY", 16)
    monkeypatch.setattr(bench, "IN_MEMORY", 16)
    monkeypatch.setattr("perf.environment.capture", lambda: copy.deepcopy(machine()))
    monkeypatch.setattr("perf.page.svg", lambda plot: "<svg/>")
    monkeypatch.setattr(bench, "PICTURES", 8)

    def sleeping(path: Path, requests: Sequence[Any], *_: object, **__: object) -> direct.Direct:
        return direct.Direct([lambda feed: time.sleep(0.005)], requests)

    monkeypatch.setattr(direct, "fastest", sleeping)
    floor = {"p50_ms": 5.0, "p90_ms": 5.0, "p99_ms": 5.0, "samples_per_second": 200.0}
    monkeypatch.setattr(measure, "measured_floor", lambda bench: floor)
    monkeypatch.setattr(direct, "FEWEST", 2)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch, triton_server: TritonServer) -> None:
    """Runs use the server that is up already."""
    monkeypatch.setattr("build.serve.TritonServer", lambda _: contextlib.nullcontext(triton_server))
    monkeypatch.setattr(bench, "run", instant)


@pytest.mark.triton
@pytest.mark.slow
def test_a_run(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one with everything real, and faults planted in it: a load that fails costs no other."""
    monkeypatch.setattr(direct, "REQUESTS", 4)  # the split may be any
    monkeypatch.setattr(direct, "TRIAL_S", 0.1)
    monkeypatch.setattr(bench, "IN_MEMORY", 16)
    monkeypatch.setattr(settings, "QUICK", dataclasses.replace(TINY, scenarios=("offline",)))
    measure_point = bench.run

    def fail_at_batches(url: str, model: str, data: Path, load: Load, **options: Any) -> Point:
        if load.batch_size > 1 and options["seconds"] == TINY.seconds and load.concurrency == 2:
            raise PerfError("perf_analyzer gave no figures", why="a test says so")
        return measure_point(url, model, data, load, **options)

    monkeypatch.setattr(bench, "run", fail_at_batches)
    artifacts = tmp_path / "artifacts"
    with pytest.raises(PerfError, match="not everything was measured: batch, 2 clients, batch 4, HTTP"):
        run.perf(QUICK, artifacts=artifacts, console=quiet())
    folder = only_run(artifacts)
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["problems"]) == 1
    assert set(summary["served_ratio"]) == {"shm", "grpc", "http"}
    assert all(0.05 < ratio < 5 for ratio in summary["served_ratio"].values())
    single = summary["precisions"]["fp32"]["single_stream"]
    assert 0 < single["direct_ms"]["p50"] <= single["direct_ms"]["p99"]
    assert single["overhead_ms"] == single["overhead_rounds"][0]
    assert summary["answers"]["checked"] >= 8
    assert summary["answers"]["wrong"] == summary["answers"]["missing"] == 0
    assert {name: len(rows) for name, rows in summary["series"].items()} == {"concurrency": 2, "batch": 0, "rate": 1}
    usage = summary["series"]["concurrency"][1]["resources"]
    assert 0.1 < usage["cores"] <= (os.cpu_count() or 1)
    assert usage["rss_mib"] > 50
    assert usage["images_per_core"] > 1
    assert summary["environment"]["versions"]["tritonserver"]
    page = (folder / "report.html").read_text()
    assert "shapes" in page
    assert "<svg" in page
    assert "Served / in-process throughput" in (folder / "report.md").read_text()


@pytest.mark.triton
@pytest.mark.usefixtures("cheap", "running")
def test_a_resumed_run(published: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    summary = run.perf(QUICK, artifacts=artifacts, console=quiet())
    folder = only_run(artifacts)
    # As if it had been killed after its first five measurements.
    points = folder / "points.jsonl"
    lines = points.read_text().splitlines(keepends=True)
    points.write_text("".join(lines[:5]))
    again = run.perf(Settings(model="ignored"), resume=folder, artifacts=artifacts, console=quiet())
    resumed = points.read_text().splitlines(keepends=True)
    assert resumed[:5] == lines[:5]
    assert [json.loads(line)["key"] for line in resumed] == [json.loads(line)["key"] for line in lines]
    assert again["precisions"]["fp32"]["ratio_rounds"]["shm"] == summary["precisions"]["fp32"]["ratio_rounds"]["shm"]


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_wrong_answers_fail_the_run(published_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(published_python, faulty.SWAP)
    monkeypatch.setattr(bench, "run", instant)
    size = dataclasses.replace(TINY, concurrency=(), batch=(), rates=(), scenarios=("offline",), scenario_seconds=0.3)
    monkeypatch.setattr(settings, "QUICK", size)
    with pytest.raises(PerfError, match=r"(?s)fp32, offline: .*answers were wrong: picture .*rows were swapped"):
        run.perf(QUICK, artifacts=tmp_path, console=quiet())
    summary = json.loads((only_run(tmp_path) / "summary.json").read_text())
    assert 0 < summary["answers"]["wrong"] < summary["answers"]["checked"]
    assert summary["served_ratio"]
    assert "rows were swapped" in (only_run(tmp_path) / "report.md").read_text()


@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_a_killed_server_leaves_a_partial_report(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton_server: TritonServer
) -> None:
    servers: list[TritonServer] = []
    start, measure = TritonServer.start, bench.run

    def started(server: TritonServer) -> None:
        start(server)
        servers.append(server)

    def kill_meanwhile(*what: Any, **options: Any) -> Point:
        killer = threading.Timer(0.5, os.kill, (servers[0].pid, signal.SIGKILL))
        killer.start()
        try:
            return measure(*what, **options)
        finally:
            killer.join()

    monkeypatch.setattr(TritonServer, "start", started)
    monkeypatch.setattr(bench, "run", kill_meanwhile)
    choose = bench.run
    # perf_analyzer runs at the loads of the sweeps, and not at all for the ratios.
    monkeypatch.setattr(settings, "QUICK", dataclasses.replace(TINY, seconds=1.5))
    monkeypatch.setattr(
        bench, "run", lambda *a, seconds, **o: (choose if seconds == 1.5 else instant)(*a, seconds=seconds, **o)
    )
    with pytest.raises(PerfError, match=r"(?s)not everything was measured: .*tritonserver is gone.*--resume"):
        run.perf(QUICK, artifacts=tmp_path, console=quiet())
    folder = only_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert not summary["complete"]
    assert summary["served_ratio"], summary["problems"]
    assert "PARTIAL" in (folder / "report.md").read_text()
    assert "PARTIAL" in (folder / "report.html").read_text()

    monkeypatch.setattr("build.serve.TritonServer", lambda _: contextlib.nullcontext(triton_server))
    monkeypatch.setattr(bench, "run", instant)
    whole: dict[str, Any] = run.perf(QUICK, resume=folder, artifacts=tmp_path, console=quiet())
    assert whole["complete"]
    assert whole["precisions"]["fp32"]["ratio_rounds"] == summary["precisions"]["fp32"]["ratio_rounds"]


@pytest.mark.triton
@pytest.mark.usefixtures("cheap", "running")
def test_a_run_of_loadgen_alone(published: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    asked = Settings(scenarios=("single-stream",), seconds=1.2)
    summary = run.perf(asked, artifacts=tmp_path, console=console)
    (folder,) = (tmp_path / "mlperf").iterdir()
    result = summary["mlperf"]["fp32"]["single-stream"]
    assert result["valid"]
    assert (result["wrong"], result["failed"]) == (0, 0)
    assert result["answered"] >= 64
    assert result["beside"]["perf_analyzer"] == 10.0  # of the stand-in
    assert 0 < result["null"]["p50_ms"] < result["figures"]["p50_ms"]
    assert "Result is : VALID" in result["log"]
    logs = folder / "loadgen" / "fp32" / "single-stream" / "performance"
    assert len(list(logs.glob("mlperf_log_*"))) == 4
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(p90 latency): VALID; " in printed
    text = (folder / "report.md").read_text()
    assert text.index("LoadGen (unofficial): fp32 single-stream") < text.index("## LoadGen")
    assert set(summary["series"]) == set()


@pytest.mark.triton
@pytest.mark.usefixtures("cheap", "running")
def test_an_invalid_run_of_loadgen_is_measured_again(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runs.SCENARIOS, "server", dataclasses.replace(runs.SCENARIOS["server"], queries=20))
    drive, bounds = runs.run, [0.001, 1e4, 1e4, 1e4]  # nobody holds the first; each run has one of the null system

    def bounded(*what: Any, **how: Any) -> dict[str, Any]:
        result = drive(*what, **{**how, "bound_ms": bounds.pop(0)})
        few = ["LoadGen calls it INVALID: too few queries for its percentile"]  # enough for this test
        return {**result, "problems": [] if result["problems"] == few else result["problems"]}

    monkeypatch.setattr(runs, "run", bounded)
    asked = Settings(scenarios=("server",), seconds=0.4)
    with pytest.raises(PerfError, match=r"(?s)not every run of LoadGen is valid: fp32, server: .*INVALID: .*beyond"):
        run.perf(asked, artifacts=tmp_path, console=quiet())
    (folder,) = (tmp_path / "mlperf").iterdir()
    whole = run.perf(Settings(), resume=Path(folder.name), artifacts=tmp_path, console=quiet())
    assert whole["mlperf"]["fp32"]["server"]["valid"]
    assert bounds == []
    keys = [json.loads(line)["key"]["series"] for line in (folder / "points.jsonl").read_text().splitlines()]
    assert keys == ["LoadGen, server", "LoadGen, server"]


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        (Settings(model="nope"), r"no model 'nope'\n.*shapes"),
        (Settings(precisions=("fp32", "int3")), r"int3'\n.*choose from"),
        (Settings(slo_ms=-1), "-1 ms"),
        (Settings(scenarios=("bridge",)), r"scenario is 'bridge'\n.*single-stream"),
        (Settings(transport="pigeon"), r"transport is 'pigeon'\n.*shm, grpc, http"),
        (Settings(seconds=0), "seconds is 0"),
        (Settings(accuracy=True, images="somewhere"), "needs labelled pictures"),
    ],
)
def test_settings_that_make_no_sense(asked: Settings, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=complaint):
        run.perf(asked, artifacts=tmp_path, console=quiet())
    assert not list(tmp_path.iterdir())


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no pictures"):
        run.perf(Settings(images=str(tmp_path / "none")), artifacts=tmp_path / "artifacts", console=quiet())
    assert not (tmp_path / "artifacts").exists()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match=r"no run that could be resumed"):
        run.perf(QUICK, resume=tmp_path, artifacts=tmp_path, console=quiet())
