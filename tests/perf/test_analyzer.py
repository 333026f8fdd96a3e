"""The real perf_analyzer on the real server: figures that fit together, and errors that say what is wrong."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from build.serve import TritonServer
from perf import analyzer
from perf.analyzer import PerfError, Point, run, write_input

THRESHOLDS = {"score_threshold": 0.25, "iou_threshold": 0.45}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (4, 300, 300, 3), dtype=np.uint8)
    return write_input(tmp_path_factory.mktemp("load") / "input.json", images, THRESHOLDS)


def test_input_data_is_what_the_model_takes(data: Path) -> None:
    rows = json.loads(data.read_text())["data"]
    assert len(rows) == 4
    assert rows[0]["images"]["shape"] == [300, 300, 3]
    assert rows[0]["score_threshold"] == {"content": [0.25], "shape": [1]}


def test_no_picture(tmp_path: Path) -> None:
    with pytest.raises(PerfError, match="no picture"):
        write_input(tmp_path / "input.json", [])


def check(point: Point) -> None:
    latency = point.latency_ms
    assert point.requests > 0
    assert point.throughput > 0
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p95"] <= latency["p99"]
    assert point.parts_ms["server_infer"] > 0
    average = sum(point.parts_ms.values())
    # Little's law: what is on the way = rate of requests × time of each.
    in_flight = point.throughput / point.batch_size * average / 1000
    assert in_flight == pytest.approx(point.concurrency, rel=0.35)


@pytest.mark.triton
@pytest.mark.parametrize("shared_memory", [None, "system"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_point_of_load(triton_server: TritonServer, data: Path, protocol: str, shared_memory: str | None) -> None:
    before = triton_server.requests("shapes")
    url = triton_server.grpc_url if protocol == "grpc" else triton_server.http_url
    point = run(url, "shapes", data, protocol=protocol, shared_memory=shared_memory, concurrency=2, seconds=3)  # type: ignore[arg-type]
    check(point)
    assert (point.protocol, point.shared_memory, point.concurrency) == (protocol, shared_memory, 2)
    assert triton_server.requests("shapes") - before >= point.requests


@pytest.mark.triton
def test_a_batch_counts_its_images(triton_server: TritonServer, data: Path) -> None:
    point = run(triton_server.grpc_url, "shapes", data, batch_size=4, shared_memory="system", seconds=3)
    check(point)


@pytest.mark.triton
def test_unknown_model(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match=r"(?s)model nope .*does not serve 'nope'.*build-engines"):
        run(triton_server.grpc_url, "nope", data)


@pytest.mark.triton
def test_batch_above_the_maximum(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match="batch-size must be <= 32"):
        run(triton_server.grpc_url, "shapes", data, batch_size=33, seconds=0.5)


@pytest.mark.triton
def test_memory_guard(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match=r"(?s)took 0\.\d\d GiB .*more than the 0\.01 GiB.*shared memory"):
        run(triton_server.grpc_url, "shapes", data, concurrency=4, seconds=2, memory_gib=0.01)


def test_server_down(data: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(PerfError, match=r"(?s)no server answers there.*invoke serve"):
        run(f"127.0.0.1:{port}", "shapes", data)


def test_program_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(analyzer.sys, "prefix", str(tmp_path))
    with pytest.raises(PerfError, match=r"no perf_analyzer on PATH.*\n.*\n.*\./invoke"):
        analyzer.find_perf_analyzer()


CAUSES = {
    "library": (
        "perf_analyzer: error while loading shared libraries: libfoo.so.1: cannot open",
        127,
        "libfoo.so.1 is not",
    ),
    "glibc": ("perf_analyzer: /lib/libc.so.6: version `GLIBC_2.99' not found", 1, "needs GLIBC_2.99"),
    "unstable": ("Failed to obtain stable measurement.", 2, "Failed to obtain stable measurement"),
    "no report": ("all is well", 0, "exit code 0"),
}


@pytest.mark.parametrize("what", CAUSES)
def test_why_there_are_no_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path, what: str) -> None:
    printed, code, expected = CAUSES[what]
    program = tmp_path / "perf_analyzer"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}\nEND\nexit {code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(PerfError, match=expected):
        run("127.0.0.1:1", "shapes", data)


def test_a_report_of_another_format(tmp_path: Path) -> None:
    report = tmp_path / "report.csv"
    report.write_text("Concurrency,Requests/Second\n1,2\n")
    with pytest.raises(PerfError, match=r"1 rows and lacks .*Inferences/Second"):
        analyzer._only_row(report)
