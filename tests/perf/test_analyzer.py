"""The real perf_analyzer on the real server: figures that fit together, and errors that say what is wrong."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from build.serve import TritonServer
from perf import analyzer
from perf.analyzer import run, write_input
from perf.load import Load, PerfError, Point

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


# Load and Point

LOADS = {
    "1 client, batch 1, gRPC": Load(),
    "4 clients, batch 1, HTTP, system shared memory": Load(4, protocol="http", shared_memory="system"),
    "2 clients, batch 8, gRPC stream, CUDA shared memory": Load(
        2, batch_size=8, protocol="stream", shared_memory="cuda"
    ),
    "120 requests/s, batch 1, gRPC": Load(rate=120),
    "0.5 requests/s (Poisson), batch 1, gRPC": Load(concurrency=None, rate=0.5, arrivals="poisson"),
}


@pytest.mark.parametrize("text", LOADS)
def test_a_load_in_words_and_as_json(text: str) -> None:
    assert str(LOADS[text]) == text
    assert Load.from_dict(json.loads(json.dumps(LOADS[text].as_dict()))) == LOADS[text]


WRONG: dict[str, dict[str, Any]] = {
    "2 clients and of 5 requests/s": {"concurrency": 2, "rate": 5.0},
    "0 clients": {"concurrency": 0},
    "0 requests/s": {"rate": 0.0},
    "-1 requests/s": {"rate": -1.0},
    "inf requests/s": {"rate": math.inf},
    "nan requests/s": {"rate": math.nan},
    "batch of 0": {"batch_size": 0},
    "arrivals 'bursts' is not known": {"rate": 5.0, "arrivals": "bursts"},
    "protocol 'GRPC' is not known": {"protocol": "GRPC"},
    "shared_memory 'none' is not known": {"shared_memory": "none"},
    "Poisson arrivals from a number of clients": {"concurrency": 2, "arrivals": "poisson"},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_load_that_cannot_be(what: str) -> None:
    with pytest.raises(PerfError, match=f"{what}.*\nwhat to do: (give|choose)"):
        Load(**WRONG[what])


# On the real server

KINDS = [
    Load(2, protocol="grpc"),
    Load(2, protocol="grpc", shared_memory="system"),
    Load(2, protocol="http"),
    Load(2, protocol="http", shared_memory="system"),
    Load(2, protocol="stream"),
    Load(2, protocol="stream", shared_memory="system"),
    Load(batch_size=4, shared_memory="system"),
]
RATES = [
    Load(rate=25, shared_memory="system"),
    Load(rate=25, protocol="http", arrivals="poisson", shared_memory="system"),
    Load(rate=25, protocol="stream", arrivals="poisson", shared_memory="system"),
    Load(rate=25, arrivals="poisson"),
]


def measured(server: TritonServer, data: Path, load: Load, seconds: float = 0.8) -> Point:
    before = server.requests("shapes")
    url = server.http_url if load.protocol == "http" else server.grpc_url
    for _ in range(3):  # 2.51 sometimes cuts off its export of single requests (_read_export)
        point = run(url, "shapes", data, load, seconds=seconds, retries=0)
        if point.latencies_ms or not load.shared_memory:
            break
    assert point.load == load
    assert point.errors == 0
    assert 0 < point.requests <= server.requests("shapes") - before
    latency = point.latency_ms
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p95"] <= latency["p99"]
    assert point.parts_ms["server_infer"] > 0
    assert sum(point.parts_ms.values()) == pytest.approx(latency["avg"], rel=0.3)
    assert point.seconds == pytest.approx(seconds, rel=0.15)
    assert len(point.latencies_ms) == len(point.sent_s) == (point.requests if load.shared_memory else 0)
    if load.shared_memory:
        assert point.sent_s[0] == 0
        assert point.sent_s == sorted(point.sent_s)
        assert max(point.latencies_ms) == latency["max"] >= latency["p99.9"] >= latency["p99"]
    assert Point.from_dict(json.loads(json.dumps(point.as_dict()))) == point
    return point


@pytest.mark.triton
@pytest.mark.parametrize("load", KINDS, ids=str)
def test_clients(triton_server: TritonServer, data: Path, load: Load) -> None:
    point = measured(triton_server, data, load)
    # Little's law: what is on the way = rate of requests × time of each.
    in_flight = point.throughput / load.batch_size * point.latency_ms["avg"] / 1000
    assert in_flight == pytest.approx(load.concurrency, rel=0.3)


@pytest.mark.triton
@pytest.mark.parametrize("load", RATES, ids=str)
def test_a_rate_of_requests(triton_server: TritonServer, data: Path, load: Load) -> None:
    point = measured(triton_server, data, load, seconds=1.2)
    assert point.throughput == pytest.approx(load.rate, rel=0.3)
    if not point.sent_s:
        return
    gaps = np.diff(point.sent_s) * 25
    if load.arrivals == "poisson":  # as far apart as they vary
        assert float(gaps.mean()) == pytest.approx(1, rel=0.3)
        assert float(gaps.std() / gaps.mean()) > 0.4
    else:  # even, but for where the machine stood still
        assert float(np.median(gaps)) == pytest.approx(1, rel=0.1)
        assert float(np.mean(np.abs(gaps - 1) < 0.4)) > 0.6


@pytest.mark.triton
def test_unknown_model(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match=r"(?s)model nope .*does not serve 'nope'.*build-engines"):
        run(triton_server.grpc_url, "nope", data, Load())


@pytest.mark.triton
def test_batch_above_the_maximum(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match=r"(?s)batch-size must be <= 32.*at most 32 images.*smaller batches"):
        run(triton_server.grpc_url, "shapes", data, Load(batch_size=33), seconds=0.5)


@pytest.mark.triton
def test_the_port_of_another_protocol(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match="does not speak Triton's gRPC"):
        run(triton_server.http_url, "shapes", data, Load())
    with pytest.raises(PerfError, match="does not speak Triton's HTTP"):
        run(triton_server.grpc_url, "shapes", data, Load(protocol="http"))


@pytest.mark.triton
def test_input_that_the_model_does_not_take(triton_server: TritonServer, tmp_path: Path) -> None:
    small = write_input(tmp_path / "small.json", [np.zeros((200, 300, 3), np.uint8)], THRESHOLDS)
    with pytest.raises(PerfError, match=r"images are \[200,300,3\], the model takes \[300,300,3\]"):
        run(triton_server.grpc_url, "shapes", small, Load())
    bare = write_input(tmp_path / "bare.json", [np.zeros((300, 300, 3), np.uint8)])
    with pytest.raises(PerfError, match="no iou_threshold, which is an input"):
        run(triton_server.grpc_url, "shapes", bare, Load())


@pytest.mark.triton
def test_memory_guard(triton_server: TritonServer, data: Path) -> None:
    with pytest.raises(PerfError, match=r"(?s)took 0\.\d\d GiB .*more than the 0\.01 GiB.*shared memory"):
        run(triton_server.grpc_url, "shapes", data, Load(4), seconds=2, memory_gib=0.01)


def test_server_down(data: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(PerfError, match=r"(?s)no server answers there.*invoke serve"):
        run(f"127.0.0.1:{port}", "shapes", data, Load())


# With a program that stands in for perf_analyzer

REPORT = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency,"
    "Avg latency,request/response,response wait\n"
    "2,400,10,300,20,30,4600,30,10,4900,5100,5200,5600,5000,20,4980\n"
)


def export(windows: list[int], latency_ms: float = 5.0, window_s: float = 0.2) -> str:
    """What --profile-export-file has in it where each window saw so many answers, evenly spaced; trimmed."""
    first, length = 1_700_000_000_000_000_000, int(window_s * 1e9)
    requests = []
    for number, count in enumerate(windows):
        for index in range(count):
            answered = first + number * length + (2 * index + 1) * length // (2 * count)
            requests.append(
                {
                    "timestamp": answered - int(latency_ms * 1e6),
                    "request_inputs": {"images": "", "iou_threshold": ""},
                    "response_timestamps": [answered],
                    "response_outputs": [{"num_detections": ""}],
                }
            )
    requests.reverse()  # it lists them by thread, not by time
    boundaries = [first + number * length for number in range(len(windows) + 1)]
    experiment = {"experiment": {"mode": "concurrency", "value": 2}, "requests": requests}
    return json.dumps(
        {
            "experiments": [{**experiment, "window_boundaries": boundaries}],
            "version": "2.51.0",
            "service_kind": "triton",
        }
    )


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


def figures(windows: list[int], report: str = REPORT) -> str:
    passes = "".join(f"  Pass [{i + 1}] throughput: {count / 0.2} infer/sec.\n" for i, count in enumerate(windows))
    return (
        f"write('-f', {report!r}); write('--profile-export-file', {export(windows)!r})\n"
        f"print({passes!r} + '    Request count: {sum(windows)}')"
    )


SHM = Load(2, shared_memory="system")


def test_figures_of_every_request(program: Program, data: Path) -> None:
    program.says(figures([80, 80, 80]))
    point = run("127.0.0.1:1", "shapes", data, SHM, seconds=0.57)
    assert point.stable
    assert point.requests == 240 - 12  # a twentieth of the 0.6 s is warm-up
    assert point.seconds == pytest.approx(0.57)
    assert point.throughput == pytest.approx(400)
    assert point.latency_ms == pytest.approx(dict.fromkeys(["avg", "p50", "p90", "p95", "p99", "p99.9", "max"], 5.0))
    assert point.sent_s[0] == 0
    assert point.sent_s[-1] == pytest.approx(227 * 0.0025)
    assert point.parts_ms["server_infer"] == 4.6
    assert sum(point.parts_ms.values()) == pytest.approx(5.0)
    assert len(list(program.calls.iterdir())) == 1


def test_figures_of_the_report_where_requests_carry_their_pictures(program: Program, data: Path) -> None:
    program.says(figures([80, 80, 80]))
    point = run("127.0.0.1:1", "shapes", data, Load(2), seconds=0.6)
    assert "--profile-export-file" not in program.arguments(0)
    assert (point.requests, point.throughput, point.stable) == (240, 400, True)
    assert point.latency_ms == {"avg": 5.0, "p50": 4.9, "p90": 5.1, "p95": 5.2, "p99": 5.6}
    assert point.latencies_ms == point.sent_s == []


@pytest.mark.parametrize("load", [SHM, Load(2)], ids=str)
def test_a_point_that_swings_is_measured_again_for_longer(program: Program, data: Path, load: Load) -> None:
    program.says(figures([80, 40, 80]), figures([80, 80, 84]))
    point = run("127.0.0.1:1", "shapes", data, load, seconds=0.6)
    assert point.stable
    windows = [program.arguments(call)[program.arguments(call).index("-p") + 1] for call in (0, 1)]
    assert int(windows[1]) == pytest.approx(2 * int(windows[0]), abs=1)
    assert len(list(program.calls.iterdir())) == 2


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3)])
def test_a_point_that_always_swings_still_has_figures(program: Program, data: Path, retries: int, calls: int) -> None:
    program.says(figures([80, 40, 80]))
    point = run("127.0.0.1:1", "shapes", data, SHM, retries=retries)
    assert not point.stable
    assert point.requests > 0
    assert len(list(program.calls.iterdir())) == calls


def test_windows_without_an_answer_are_made_longer(program: Program, data: Path) -> None:
    program.says("print('No valid requests recorded within time interval.'); sys.exit(3)", figures([80, 80, 80]))
    assert run("127.0.0.1:1", "shapes", data, SHM, seconds=0.6, retries=0).stable
    windows = [program.arguments(call)[program.arguments(call).index("-p") + 1] for call in (0, 1)]
    assert int(windows[1]) == pytest.approx(4 * int(windows[0]), abs=4)


def test_what_chance_does_is_not_a_swing() -> None:
    poisson = Load(rate=100, arrivals="poisson")
    assert analyzer._steady([20, 28, 14], [0.2] * 3, poisson)
    assert not analyzer._steady([2000, 2800, 1400], [20] * 3, poisson)
    assert not analyzer._steady([20, 28, 14], [0.2] * 3, Load(rate=100))
    assert analyzer._steady([5, 7, 6], [0.2] * 3, Load())
    assert not analyzer._steady([50, 70, 60], [0.2] * 3, Load())
    assert not analyzer._steady([], [], Load())


OPTIONS = {
    "--concurrency-range 3 ": Load(3),
    "-i grpc --shared-memory none ": Load(),
    "-i http --shared-memory system ": Load(protocol="http", shared_memory="system"),
    "-i grpc --shared-memory cuda --streaming ": Load(protocol="stream", shared_memory="cuda"),
    "--async --request-rate-range 12.500000 ": Load(rate=12.5),
    "-b 8 ": Load(batch_size=8),
}


@pytest.mark.parametrize("expected", OPTIONS)
def test_what_it_is_told(program: Program, data: Path, expected: str) -> None:
    program.says(figures([80, 80, 80]))
    run("127.0.0.1:1", "shapes", data, OPTIONS[expected], retries=0)
    assert expected in " ".join([*program.arguments(0), ""])


def test_poisson_arrivals() -> None:
    intervals = np.array(analyzer._poisson(1000, 5))
    assert len(intervals) == 5000
    assert intervals.sum() == 5_000_000  # the rate is exact, whatever chance does
    assert intervals.min() >= 0
    assert intervals.std() == pytest.approx(1000, rel=0.1)  # as far apart as they vary: exponential
    assert float((intervals > 1000).mean()) == pytest.approx(1 / math.e, abs=0.04)
    assert analyzer._poisson(1000, 5) != list(intervals)
    assert sum(analyzer._poisson(0.5, 1)) == 20_000_000  # at least ten


def test_an_export_that_is_cut_off(program: Program, data: Path) -> None:
    cut = (
        f'{figures([80, 80, 80])}; write(\'--profile-export-file\', \'{{"experiments": [{{"requests": [{{"images": \')'
    )
    program.says(cut, figures([80, 80, 80]))
    assert run("127.0.0.1:1", "shapes", data, SHM).latencies_ms
    program.says(cut)
    point = run("127.0.0.1:1", "shapes", data, SHM)
    assert (point.requests, point.throughput, point.latencies_ms) == (240, 400, [])


def test_an_export_of_another_format(program: Program, data: Path) -> None:
    program.says(f"write('-f', {REPORT!r}); write('--profile-export-file', '{{}}')")
    with pytest.raises(PerfError, match=r"(?s)profile-export-file cannot be read: KeyError.*another format"):
        run("127.0.0.1:1", "shapes", data, SHM)


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


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any perf_analyzer, with glibc 2.36."""
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(analyzer, "sys", SimpleNamespace(prefix=str(tmp_path), executable="/env/bin/python"))
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    return tmp_path


def program_at(*parts: str | Path) -> Path:
    path = Path(*parts)
    path.parent.mkdir(parents=True)
    path.touch(0o755)
    return path


def install_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = program_at(folder, "packages", "perf_analyzer", "bin", "perf_analyzer")
    (program.parent.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder / "packages")
    return program


def test_program_missing(bare: Path) -> None:
    with pytest.raises(PerfError, match=r"no perf_analyzer on PATH.*glibc 2\.36\n.*\n.*\./invoke"):
        analyzer.find_perf_analyzer()


def test_program_missing_on_a_new_machine(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.39"))
    with pytest.raises(PerfError, match="/env/bin/python -m pip install perf-analyzer"):
        analyzer.find_perf_analyzer()


def test_the_package_needs_a_newer_c_library(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_package(bare, monkeypatch)
    with pytest.raises(PerfError, match=r"needs glibc 2\.38, this machine has 2\.36"):
        analyzer.find_perf_analyzer()
    wheel = program_at(bare, "perf_analyzer", "bin", "perf_analyzer")
    assert analyzer.find_perf_analyzer() == wheel


def test_which_program_comes_first(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.39"))
    wheel = program_at(bare, "perf_analyzer", "bin", "perf_analyzer")
    assert analyzer.find_perf_analyzer() == wheel
    package = install_package(bare, monkeypatch)
    program_at(bare, "bin", "perf_analyzer")  # the package's own script, which loses exit codes
    monkeypatch.setenv("PATH", str(bare / "bin"))
    assert analyzer.find_perf_analyzer() == package
    on_path = program_at(bare, "path", "perf_analyzer")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert analyzer.find_perf_analyzer() == on_path


# What it says where there are no figures

HEAD = (
    "*** Measurement Settings ***\nRequest concurrency: 2\n"
    "  Pass [1] throughput: 52.9 infer/sec. Avg latency: 36747 usec (std 26627 usec).\n"
)
STARTED = "Failed to maintain requested inference load. Worker thread(s) failed to generate concurrent requests.\n"
METADATA = "error: failed to get model metadata: "
SERVER = "error: Unable to init infer data manager: "
# What versions 2.51 (tritonserver 2.51 to 2.72 behind it) printed, its exit code, the cause that is named.
CAUSES = {
    "library": ("perf_analyzer: error while loading shared libraries: libfoo.so.1: cannot open", 127, "libfoo.so.1 is"),
    "glibc": ("perf_analyzer: /lib/libc.so.6: version `GLIBC_2.99' not found", 1, "needs GLIBC_2.99"),
    "option": ("perf_analyzer: unrecognized option '--streaming'\nUsage: x [options]\nnoise", 3, "option --streaming"),
    "memory": (HEAD + "terminate called after throwing an instance of 'std::bad_alloc'", -6, "no more memory"),
    "killed": (HEAD, -9, "no more memory"),
    "full /dev/shm": (" Successfully read data for 1 stream/streams with 16 step/steps.", -7, "/dev/shm is full"),
    "shared memory not allowed": (
        SERVER + "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable.",
        99,
        "--allow-client-shm=true .invoke serve does",
    ),
    "another machine": (SERVER + "Unable to open shared memory region: '/detection_boxes'", 99, "another machine"),
    "no GPU": (
        SERVER + "unable to allocate memory of 1600 bytes on gpu for output: CUDA driver version is insufficient",
        99,
        "needs an NVIDIA GPU",
    ),
    "HTTP port for gRPC": (
        METADATA + "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:1: Socket closed",
        99,
        "does not speak Triton's gRPC",
    ),
    "gRPC port for HTTP": (METADATA + "HTTP client failed: Unsupported protocol", 99, "does not speak Triton's HTTP"),
    "another HTTP server": (METADATA + "failed to parse the request JSON buffer: Invalid value. at 0", 99, "HTTP port"),
    "another host": (
        METADATA + "DNS resolution failed for nosuch:8001: Domain name not found",
        99,
        "no server answers",
    ),
    "gone, HTTP": (
        HEAD + "  Pass [2] cb::Error: HTTP client failed: Couldn't connect to server\n" + STARTED,
        99,
        "the server went away",
    ),
    "gone, gRPC": (HEAD + STARTED + "Thread [0] had error: recvmsg:Connection reset by peer", 99, "went away"),
    "an error": (HEAD + STARTED + "Thread [0] had error: out of beans", 99, "request failed: out of beans"),
    "no report": ("all is well", 0, "exit code 0"),
    "another cause": ("all is lost", 99, "all is lost"),
}


@pytest.mark.parametrize("what", CAUSES)
def test_why_there_are_no_figures(program: Program, data: Path, what: str) -> None:
    printed, code, expected = CAUSES[what]
    end = f"sys.exit({code})" if code >= 0 else f"os.kill(os.getpid(), {-code})"
    program.says(f"print({printed!r}, flush=True); {end}")
    load = Load(protocol="http") if "HTTP" in expected else Load()
    with pytest.raises(PerfError) as raised:
        run("127.0.0.1:1", "shapes", data, load)
    assert expected.replace(".", " ") in str(raised.value).replace("(", " ").replace(".", " ")
    assert "noise" not in str(raised.value)
    assert len(list(program.calls.iterdir())) == 1


def test_a_program_that_waits_for_a_server_that_went_away(
    program: Program, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analyzer, "_GRACE", 0.1)
    gone = "  Pass [2] cb::Error: failed to connect to all addresses; last error: Connection refused"
    program.says(f"print({HEAD + gone!r}, flush=True); time.sleep(60)")
    with pytest.raises(PerfError, match="the server went away"):
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
