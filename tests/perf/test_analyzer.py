"""The real perf_analyzer on the real server: figures that fit together, and errors that say what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from build.serve import TritonServer
from perf import analyzer
from perf.analyzer import run, write_input
from perf.load import Load, PerfError

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


# A load in words

LOADS = {
    "1 client, batch 1, gRPC": Load(),
    "4 clients, batch 1, HTTP, system shared memory": Load(4, protocol="http", shared_memory="system"),
    "2 clients, batch 8, gRPC stream, CUDA shared memory": Load(
        2, batch_size=8, protocol="stream", shared_memory="cuda"
    ),
    "0.5 requests/s (Poisson), batch 1, gRPC": Load(rate=0.5),
}


def test_a_load_in_words_and_as_json() -> None:
    for text, load in LOADS.items():
        assert str(load) == text
        assert Load(**json.loads(json.dumps(dataclasses.asdict(load)))) == load


# On the real server

KINDS = [
    Load(2, protocol="http", shared_memory="system"),
    Load(2, protocol="stream"),
    Load(batch_size=4, shared_memory="system"),
    Load(rate=25, protocol="http", shared_memory="system"),
]


@pytest.mark.triton
@pytest.mark.parametrize("load", KINDS, ids=str)
def test_figures_that_fit_together(triton_server: TritonServer, data: Path, load: Load) -> None:
    before = triton_server.requests("shapes")
    url = triton_server.http_url if load.protocol == "http" else triton_server.grpc_url
    point = run(url, "shapes", data, load, seconds=0.8)
    assert 0 < point.requests <= triton_server.requests("shapes") - before
    latency = point.latency_ms
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p95"] <= latency["p99"] <= latency.get("max", 1e9)
    assert point.parts_ms["server_infer"] > 0
    assert sum(point.parts_ms.values()) == pytest.approx(latency["avg"], rel=0.3)
    if load.rate:
        assert point.throughput == pytest.approx(load.rate, rel=0.4)
    else:  # Little's law: what is on the way = rate of requests × time of each
        in_flight = point.throughput / load.batch_size * latency["avg"] / 1000
        # Short windows on a busy machine are rough; units or a batch mixed up would be a factor of 2 at least.
        assert load.concurrency / 1.8 < in_flight < load.concurrency * 1.8


@pytest.mark.triton
def test_memory_guard(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match=r"(?s)took 0\.\d\d GiB .*more than the 0\.01 GiB.*shared memory"):
        run(triton_server.grpc_url, "shapes", data, Load(4), seconds=2, memory_gib=0.01)


def test_server_down(data: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(PerfError, match=r"(?s)gave no figures for model shapes at .*Connection refused"):
        run(f"127.0.0.1:{port}", "shapes", data, Load())


# With a program that stands in for perf_analyzer

REPORT = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency,"
    "Avg latency,request/response,response wait\n"
    "2,400,10,300,20,30,4600,30,10,4900,5100,5200,5600,5000,20,4980\n"
)


def export(latencies_ms: list[float]) -> str:
    """What --profile-export-file has in it; trimmed."""
    requests = [{"timestamp": 10**9, "response_timestamps": [10**9 + int(ms * 1e6)]} for ms in latencies_ms]
    return json.dumps({"experiments": [{"requests": requests, "window_boundaries": [0, 1]}]})


class Program:
    """Stands in for perf_analyzer: each call does the next of `says` (the last one again and again)."""

    def __init__(self, folder: Path) -> None:
        self.path, self.calls = folder / "perf_analyzer", folder / "calls"
        self.calls.mkdir()

    def says(self, *bodies: str) -> None:
        """Python code for each call; `options` is its command line as a dict, `write` takes an option and a text."""
        script = self.path.with_suffix(".py")
        # Not a shebang of Python's: that cannot have a space in it.
        self.path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
        script.write_text(
            "import os, pathlib, sys, time\n"
            "arguments = sys.argv[1:]\n"
            "options = dict(zip(arguments, arguments[1:]))\n"
            f"calls = pathlib.Path({str(self.calls)!r})\n"
            "number = len(list(calls.iterdir()))\n"
            "(calls / str(number)).write_text(chr(10).join(arguments))\n"
            "def write(option, text):\n"
            "    if option in options:\n"
            "        pathlib.Path(options[option]).write_text(text)\n"
            f"exec({list(bodies)!r}[min(number, {len(bodies) - 1})])\n"
        )
        self.path.chmod(0o755)

    def arguments(self, call: int) -> list[str]:
        return (self.calls / str(call)).read_text().split("\n")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Program(tmp_path)


def figures(exported: str = export([5.0, 9.5, 4.0])) -> str:
    return f"write('-f', {REPORT!r}); write('--profile-export-file', {exported!r}); print('    Request count: 240')"


SHM = Load(2, shared_memory="system")


def test_figures_are_those_of_the_report(program: Program, data: Path) -> None:
    program.says(figures())
    point = run("127.0.0.1:1", "shapes", data, SHM, seconds=0.6)
    assert (point.requests, point.throughput) == (240, 400)
    assert point.seconds == pytest.approx(0.6, rel=0.01)
    assert point.latency_ms == {"avg": 5.0, "p50": 4.9, "p90": 5.1, "p95": 5.2, "p99": 5.6, "max": 9.5}
    assert point.parts_ms["server_infer"] == 4.6
    assert sum(point.parts_ms.values()) == pytest.approx(5.0)
    # Without shared memory it would write out every picture.
    assert "max" not in run("127.0.0.1:1", "shapes", data, Load(2)).latency_ms
    assert ["--profile-export-file" in program.arguments(call) for call in (0, 1)] == [True, False]


@pytest.mark.parametrize("exported", ["{}", '{"experiments": [{"requests": [{"images": ', '{"experiments": [{}]}'])
def test_an_export_that_cannot_be_read_costs_only_the_slowest_request(
    program: Program, data: Path, exported: str
) -> None:
    program.says(figures(exported))
    assert "max" not in run("127.0.0.1:1", "shapes", data, SHM).latency_ms


def test_windows_without_an_answer_are_made_longer(program: Program, data: Path) -> None:
    program.says("print('No valid requests recorded within time interval.'); sys.exit(3)", figures())
    assert run("127.0.0.1:1", "shapes", data, SHM, seconds=0.6).requests == 240
    windows = [program.arguments(call)[program.arguments(call).index("-p") + 1] for call in (0, 1)]
    assert int(windows[1]) == pytest.approx(4 * int(windows[0]), abs=4)
    program.says("print('No valid requests recorded within time interval.'); sys.exit(3)")
    with pytest.raises(PerfError, match="no request ended in time"):
        run("127.0.0.1:1", "shapes", data, SHM)


OPTIONS = {
    "--concurrency-range 3 ": Load(3),
    "-i grpc --shared-memory none ": Load(),
    "-i http --shared-memory system ": Load(protocol="http", shared_memory="system"),
    "-i grpc --shared-memory cuda --streaming ": Load(protocol="stream", shared_memory="cuda"),
    "--async --request-intervals ": Load(rate=12.5),
    "-b 8 ": Load(batch_size=8),
}


def test_what_it_is_told(program: Program, data: Path) -> None:
    program.says(figures())
    for call, (expected, load) in enumerate(OPTIONS.items()):
        run("127.0.0.1:1", "shapes", data, load)
        assert expected.strip() in " ".join(program.arguments(call))


def test_poisson_arrivals() -> None:
    intervals = np.array(analyzer._poisson(1000, 5))
    assert len(intervals) == 5000
    assert intervals.sum() == 5_000_000  # the rate is exact, whatever chance does
    assert intervals.min() >= 0
    assert intervals.std() == pytest.approx(1000, rel=0.1)  # as far apart as they vary: exponential
    assert float((intervals > 1000).mean()) == pytest.approx(1 / math.e, abs=0.04)
    assert analyzer._poisson(1000, 5) != list(intervals)
    assert sum(analyzer._poisson(0.5, 1)) == 20_000_000  # at least ten


def test_a_report_of_another_format(tmp_path: Path) -> None:
    report = tmp_path / "report.csv"
    report.write_text("Concurrency,Requests/Second\n1,2\n")
    with pytest.raises(PerfError, match=r"1 rows and lacks .*Inferences/Second"):
        analyzer._only_row(report)


REGION = "ssd-test-perf-region"
HOLDING = f"""
import mmap
with open('/dev/shm/{REGION}', 'wb+') as file:
    file.truncate(4096)
    region = mmap.mmap(file.fileno(), 4096)
(calls / 'pid').write_text(str(os.getpid()))
"""


def test_memory_guard_leaves_nothing(program: Program, data: Path) -> None:
    program.says(HOLDING + "time.sleep(0.3); filled = bytearray(b'1') * (64 << 20)\ntime.sleep(60)")
    with pytest.raises(PerfError, match=r"took 0\.\d\d GiB"):
        run("127.0.0.1:1", "shapes", data, SHM, memory_gib=0.05)
    assert not Path(f"/dev/shm/{REGION}").exists()
    assert not psutil.pid_exists(int((program.calls / "pid").read_text()))


def test_ctrl_c_leaves_nothing(program: Program, data: Path) -> None:
    program.says(HOLDING + "time.sleep(60)")
    # Also where SIGINT came down ignored, as a shell hands it to what it starts in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.6, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run("127.0.0.1:1", "shapes", data, SHM)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not Path(f"/dev/shm/{REGION}").exists()
    assert not psutil.pid_exists(int((program.calls / "pid").read_text()))


def test_a_program_that_does_not_end(program: Program, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyzer, "_PATIENCE", 0.2)
    program.says("time.sleep(60)")
    with pytest.raises(PerfError, match=r"(?s)did not end within 0\.6 s.*server hangs"):
        run("127.0.0.1:1", "shapes", data, SHM, seconds=0.1)


# The right program for the machine


def test_which_program_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'path'}")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(PerfError, match=r"no perf_analyzer on PATH.*\n.*\n.*\./invoke"):
        analyzer.find_perf_analyzer()
    # The first is the script of the package perf-analyzer, which loses exit codes.
    for folder in ("bin", "perf_analyzer/bin", "path"):
        path = tmp_path / folder / "perf_analyzer"
        path.parent.mkdir(parents=True)
        path.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert analyzer.find_perf_analyzer() == tmp_path / "perf_analyzer" / "bin" / "perf_analyzer"
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert analyzer.find_perf_analyzer() == tmp_path / "path" / "perf_analyzer"


# What it says where there are no figures

HEAD = (
    "*** Measurement Settings ***\nRequest concurrency: 2\n"
    "  Pass [1] throughput: 52.9 infer/sec. Avg latency: 36747 usec (std 26627 usec).\n"
)
STARTED = "Failed to maintain requested inference load. Worker thread(s) failed to generate concurrent requests.\n"
# What versions 2.51 (tritonserver 2.51 to 2.72 behind it) printed, its exit code, the cause that is named.
CAUSES = {
    "memory": (HEAD + "terminate called after throwing an instance of 'std::bad_alloc'", -6, "no more memory"),
    "killed": (HEAD, -9, "no more memory"),
    "full /dev/shm": (" Successfully read data for 1 stream/streams with 16 step/steps.", -7, "/dev/shm is full"),
    "an error": (HEAD + STARTED + "Thread [0] had error: out of beans", 99, "request failed: out of beans"),
    "no report": ("all is well", 0, "exit code 0"),
    "another cause": ("all is lost", 99, "all is lost"),
}


def test_why_there_are_no_figures(program: Program, data: Path) -> None:
    for call, (printed, code, expected) in enumerate(CAUSES.values()):
        end = f"sys.exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
        program.says(f"print({printed!r}, flush=True); {end}")
        with pytest.raises(PerfError) as raised:
            run("127.0.0.1:1", "shapes", data, Load())
        assert expected in str(raised.value)
        assert len(list(program.calls.iterdir())) == call + 1


def test_a_program_that_waits_for_a_server_that_went_away(
    program: Program, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyzer, "_GRACE", 0.1)
    gone = "  Pass [2] cb::Error: failed to connect to all addresses; last error: Connection refused"
    program.says(f"print({HEAD + gone!r}, flush=True); time.sleep(60)")
    with pytest.raises(PerfError, match="Connection refused"):
        run("127.0.0.1:1", "shapes", data, Load(2, protocol="stream"))


def test_one_at_a_time_with_shared_memory(program: Program, data: Path) -> None:
    program.says(
        "log = open(calls / 'log', 'a'); print('on', file=log, flush=True); time.sleep(0.3); print('off', file=log)"
    )
    runs = [threading.Thread(target=pytest.raises, args=(PerfError, run, "", "", data, SHM)) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert (program.calls / "log").read_text().split() == ["on", "off", "on", "off"]


def test_a_program_that_is_none(program: Program, data: Path) -> None:
    program.path.write_bytes(b"\x7fELF of another machine")
    program.path.chmod(0o755)
    with pytest.raises(PerfError, match=r"(?s)perf_analyzer cannot run: .*Exec format error.*\./invoke"):
        run("127.0.0.1:1", "shapes", data, Load())
