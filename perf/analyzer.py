"""NVIDIA's perf_analyzer as the load generator: one point of load on a running server, as a dataclass.

    point = run(server.http_url, "shapes", data, Load(concurrency=4, protocol="http", shared_memory="system"))
    point.throughput, point.latency_ms["p99"]

The program is the one on PATH (NVIDIA's SDK container), else the package perf-analyzer where the C library is new
enough for it, else the one that the wheel tritonclient 2.51.0 brought. It runs under a guard of memory and time.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import fcntl
import importlib.util
import json
import math
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.failures import NothingEndedError, failure
from perf.load import Load, PerfError, Point

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PERCENTILES = (50, 90, 95, 99, 99.9)
# Columns of its csv → names here. The parts add up to the average latency.
_LATENCIES = {"Avg latency": "avg", **{f"p{n} latency": f"p{n}" for n in (50, 90, 95, 99)}}
_PARTS = {
    "Client Send": "client_send",
    "Network+Server Send/Recv": "network",
    "Server Queue": "server_queue",
    "Server Compute Input": "server_input",
    "Server Compute Infer": "server_infer",
    "Server Compute Output": "server_output",
    "Client Recv": "client_receive",
}
_WINDOWS = 3  # the fewest that it takes before it gives figures
_MOST_WINDOWS = 6  # a window in which no request ended does not count
_LONGER = 1.2  # it measures windows this much longer than it is told to
_WARM_UP = 0.05  # share of the time that is not measured: connections are made then
_PATIENCE = 60  # seconds that it may take beside the measurement
_GRACE = 2.0  # seconds that it may go on after a failure
_STEADY = 0.1  # the windows' throughput may differ by this share of it
# After these it only waits for requests on the way, in vain where nobody will answer them.
_FAILED = re.compile(
    r"^Failed to |^No valid requests|cb::Error: (?!No valid requests|failed to find the requested)", re.MULTILINE
)
_NEW_GLIBC = (2, 38)  # what the package perf-analyzer needs
# The plain names that the program asks for → how the server's wheel calls the same libraries.
_LIBRARIES = {
    "libb64.so.0d": "libb64-*.so.0d",
    "libcudart.so.12": "libcudart-*.so.12*",
    "libssl.so.3": "libssl-*.so.3",
    "libcrypto.so.3": "libcrypto-*.so.3",
}


def find_perf_analyzer() -> Path:
    """The perf_analyzer for this machine.

    Raises:
        PerfError: there is none.
    """
    on_path = shutil.which("perf_analyzer")
    # The package's own script in this Python's bin loses the exit code and leaves the program running when it is ended.
    if on_path and Path(on_path).parent != Path(sys.prefix) / "bin":
        return Path(on_path)
    new = _glibc() >= _NEW_GLIBC
    package = importlib.util.find_spec("perf_analyzer")
    inside = Path(package.origin).parent / "bin" / "perf_analyzer" if package and package.origin else None
    if new and inside and inside.is_file():
        return inside
    beside = Path(sys.prefix) / "perf_analyzer" / "bin" / "perf_analyzer"
    if beside.is_file():
        return beside
    container = "run inside the container nvcr.io/nvidia/tritonserver with the suffix -py3-sdk"
    version = ".".join(map(str, _glibc())) or "unknown"
    if new:
        why, fix = "the environment was not made by ./invoke", f"{sys.executable} -m pip install perf-analyzer"
    elif package:
        why = f"the package perf-analyzer needs glibc 2.38, this machine has {version}"
        fix = "run through ./invoke, which installs the one of requirements/perf_analyzer.lock"
    else:
        why, fix = "the environment was not made by ./invoke", "run through ./invoke"
    raise PerfError(
        f"no perf_analyzer on PATH, none in {beside.parent}, no package perf-analyzer that runs on glibc {version}",
        why=why,
        fix=f"{fix}, or {container}",
    )


def _glibc() -> tuple[int, ...]:
    """(2, 36); empty where the C library is another one."""
    name, version = platform.libc_ver()
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) if name == "glibc" else ()


def write_input(path: Path, images: Iterable[NDArray[Any]], thresholds: Mapping[str, float] | None = None) -> Path:
    """Writes real pictures as perf_analyzer's input data; it sends them in turn.

    Args:
        path: the JSON file to write.
        images: UINT8 [H,W,3] each, as the model's input `images` takes them.
        thresholds: the model's threshold inputs, sent with every picture; None where it has none.

    Returns:
        `path`.
    """
    rows = []
    for image in images:
        row: dict[str, Any] = {
            "images": {"content": {"b64": base64.b64encode(image.tobytes()).decode()}, "shape": list(image.shape)}
        }
        for name, value in (thresholds or {}).items():
            row[name] = {"content": [value], "shape": [1]}
        rows.append(row)
    if not rows:
        raise PerfError("no picture to make load with", fix="give at least one")
    path.write_text(json.dumps({"data": rows}))
    return path


def run(
    url: str,
    model: str,
    data: Path,
    load: Load,
    *,
    seconds: float = 3.0,
    retries: int = 2,
    memory_gib: float | None = None,
) -> Point:
    """Puts `load` on `model` and measures.

    A run with shared memory takes away the shared memory that other clients registered with the server: perf_analyzer
    unregisters all of it when it starts and when it ends.

    Args:
        url: `host:port` of the endpoint that belongs to the load's protocol.
        model: name on the server.
        data: what `write_input` wrote.
        load: what to put on the server.
        seconds: of measurement; longer where not one request ends within a third of it.
        retries: how often a point that swings is measured again, each time twice as long. The last one counts, steady
            or not.
        memory_gib: perf_analyzer keeps the bytes of every request without shared memory; it is ended when it holds
            more than this. None = a quarter of the machine's memory.

    Raises:
        PerfError: naming what is missing or wrong.
    """
    point = None
    for attempt in range(3):
        try:
            point = _measure(url, model, data, load, seconds, memory_gib)
        except NothingEndedError:  # a model that is slower than one window, or a machine that stood still for one
            if attempt == 2 and point is None:
                raise
            seconds *= 4
        else:
            whole = point.stable and (point.latencies_ms or not load.shared_memory)
            if whole or attempt >= retries:
                break
            seconds *= 2
    assert point is not None
    return point


def _measure(url: str, model: str, data: Path, load: Load, seconds: float, memory_gib: float | None) -> Point:
    program = find_perf_analyzer()
    with tempfile.TemporaryDirectory(prefix="ssd-perf-") as name:
        folder = Path(name)
        report, export = folder / "report.csv", folder / "export.json"
        command = [str(program), "-m", model, "-u", url, "-b", str(load.batch_size), "--input-data", str(data), "-v"]
        command += ["-f", str(report), "--verbose-csv"]
        # It writes the bytes of inputs and outputs beside the times, as decimal numbers: 1 MB, and 16 bytes of memory
        # for each, for every 300×300 picture; 340 bytes for a request whose tensors are in shared memory.
        if load.shared_memory:
            command += ["--profile-export-file", str(export)]
        # Windows that may differ by any amount: an unsteady run would otherwise end without figures.
        window = max(1, round(1000 * seconds / (1 - _WARM_UP) / _WINDOWS / _LONGER))
        window_s = window * _LONGER / 1000
        command += ["-p", str(window), "-s", "1000000", "-r", str(_MOST_WINDOWS)]
        command += _options(load, _WINDOWS * window_s, folder)
        with _region_names(load):
            output, code = _execute(command, program_environment(folder), seconds, memory_gib)
        if code != 0 or not report.is_file():
            raise failure(output, code, url, model, load)
        row = _only_row(report)
        parts = {name: float(row.get(column) or 0) / 1000 for column, name in _PARTS.items()}
        exact = _read_export(export) if export.is_file() else None
        if exact:
            return _exact_point(load, parts, *exact)
    requests = re.search(r"Request count: (\d+)", output)
    passes = [float(text) for text in re.findall(r"Pass \[\d+\] throughput: ([\d.e+]+)", output)[-_WINDOWS:]]
    return Point(
        load=load,
        requests=int(requests[1]) if requests else 0,
        errors=0,
        throughput=float(row["Inferences/Second"]),
        latency_ms={name: float(row[column]) / 1000 for column, name in _LATENCIES.items()},
        parts_ms=parts,
        latencies_ms=[],
        sent_s=[],
        seconds=window_s * _WINDOWS,
        stable=_steady([rate / load.batch_size * window_s for rate in passes], [window_s] * len(passes), load),
    )


def _options(load: Load, seconds: float, folder: Path) -> list[str]:
    options = ["-i", "http" if load.protocol == "http" else "grpc", "--shared-memory", load.shared_memory or "none"]
    if load.protocol == "stream":
        options.append("--streaming")
    if load.rate is None:
        return [*options, "--concurrency-range", str(load.concurrency)]
    options.append("--async")  # its threads would otherwise wait for each answer, and the rate would bend to the server
    if load.arrivals == "constant":
        return [*options, "--request-rate-range", f"{load.rate:.6f}"]
    # Its own Poisson process is the same one every time, and begins slowly: 79 of the first 100 requests, 9 of 20.
    intervals = folder / "intervals.txt"
    intervals.write_text("".join(f"{interval}\n" for interval in _poisson(load.rate, seconds)))
    return [*options, "--request-intervals", str(intervals)]


def _poisson(rate: float, seconds: float) -> list[int]:
    """Microseconds between the arrivals of a Poisson process, of which as many fall into the time as `rate` says.

    Arrivals that are known to be n in a time are spread over it evenly, each on its own.
    """
    seconds = max(seconds, 10 / rate)
    arrivals = sorted(round(random.uniform(0, seconds) * 1e6) for _ in range(round(rate * seconds)))
    return [after - before for before, after in pairwise([0, *arrivals[:-1], round(seconds * 1e6)])]


def _read_export(path: Path) -> tuple[list[tuple[int, int]], list[int]] | None:
    """What --profile-export-file wrote.

    It holds only requests that were answered within a measured window, the windows one after the other, and where they
    begin and end (2.51's inference_profiler.cc: ValidLatencyMeasurement, CollectData).

    Returns:
        when each request was sent and answered, in order of sending; the windows' boundaries. All in nanoseconds. None
        where the file is cut off: 2.51 writes a few stray bytes for a tensor in shared memory, and stops at NaN.
    """
    try:
        experiment = json.loads(path.read_text())["experiments"][0]
        requests = sorted(
            (request["timestamp"], request["response_timestamps"][-1]) for request in experiment["requests"]
        )
        return requests, sorted(set(experiment["window_boundaries"]))
    except json.JSONDecodeError:
        return None
    except (LookupError, TypeError) as error:
        raise PerfError(
            f"perf_analyzer's --profile-export-file cannot be read: {type(error).__name__}: {error}",
            why="this version of perf_analyzer writes another format",
            fix="use the one of requirements/perf_analyzer.lock",
        ) from error


def _exact_point(
    load: Load, parts_ms: dict[str, float], requests: Sequence[tuple[int, int]], boundaries: Sequence[int]
) -> Point:
    start = boundaries[0] + round(_WARM_UP * (boundaries[-1] - boundaries[0]))
    edges = [start, *(edge for edge in boundaries if edge > start)]
    kept = [(sent, answered) for sent, answered in requests if answered > start]
    if not kept:
        raise NothingEndedError("perf_analyzer measured no request", why="its windows are too short")
    counts = [0] * (len(edges) - 1)
    for _, answered in kept:
        counts[min(bisect_right(edges, answered), len(counts)) - 1] += 1
    latencies = [(answered - sent) / 1e6 for sent, answered in kept]
    ascending, seconds = sorted(latencies), (edges[-1] - start) / 1e9
    return Point(
        load=load,
        requests=len(kept),
        errors=0,
        throughput=len(kept) * load.batch_size / seconds,
        latency_ms={
            "avg": sum(latencies) / len(latencies),
            **{f"p{p:g}": ascending[int(p / 100 * (len(ascending) - 1) + 0.5)] for p in _PERCENTILES},
            "max": ascending[-1],
        },
        parts_ms=parts_ms,
        latencies_ms=latencies,
        sent_s=[(sent - kept[0][0]) / 1e9 for sent, _ in kept],
        seconds=seconds,
        stable=_steady(counts, [(end - begin) / 1e9 for begin, end in pairwise(edges)], load),
    )


def _steady(counts: Sequence[float], seconds: Sequence[float], load: Load) -> bool:
    """Whether the windows' requests per second are the same, but for a tenth and for what chance does.

    A window cuts through a request at each end; of a Poisson process with n arrivals to a window, three windows lie up
    to 4 √n apart (99 %).
    """
    if not counts:
        return False
    rates = [count / length for count, length in zip(counts, seconds, strict=True)]
    count, length = sum(counts) / len(counts), min(seconds)
    chance = 4 * math.sqrt(count) if load.arrivals == "poisson" else 2
    return max(rates) - min(rates) <= _STEADY * sum(rates) / len(rates) + chance / length


def program_environment(folder: Path) -> dict[str, str]:
    """The wheel's program does not bring its libraries; the server's wheel has them, under other names."""
    environment = dict(os.environ)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return environment
    held = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
    links = folder / "lib"
    links.mkdir()
    for plain, pattern in _LIBRARIES.items():
        for library in sorted(held.glob(pattern))[:1]:
            (links / plain).symlink_to(library)
    environment["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(links), environment.get("LD_LIBRARY_PATH")]))
    return environment


def _execute(
    command: list[str], environment: dict[str, str], seconds: float, memory_gib: float | None
) -> tuple[str, int]:
    """What it printed and its exit code; it is ended when it takes too much memory or does not come to an end."""
    import psutil

    limit = memory_gib or psutil.virtual_memory().total / 2**30 / 4
    patience = _PATIENCE + 4 * seconds
    started, deadline = time.time(), time.monotonic() + patience
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise PerfError(
            f"{command[0]} cannot run: {error}", fix="install it again: remove .venv, run ./invoke"
        ) from None
    regions: set[Path] = set()
    failing = False
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=0.1)
                return output, process.returncode
            except subprocess.TimeoutExpired as expired:
                printed = (expired.output or b"").decode(errors="replace")
            with contextlib.suppress(psutil.Error, OSError):
                regions |= _regions(process.pid)
                used = psutil.Process(process.pid).memory_info().rss / 2**30
                if used > limit:
                    raise PerfError(
                        f"perf_analyzer took {used:.2f} GiB of memory, more than the {limit:.2f} GiB it may have",
                        why="without shared memory it keeps the bytes of every request",
                        fix="use shared memory, a shorter run or smaller batches, or allow it more",
                    )
            if not failing and _FAILED.search(printed):
                failing, deadline = True, min(deadline, time.monotonic() + _GRACE)
            if time.monotonic() > deadline:
                if failing:
                    process.terminate()
                    return process.communicate()[0], process.returncode
                raise PerfError(
                    f"perf_analyzer did not end within {patience:g} s, although it was to measure for {seconds:g} s",
                    why="the server hangs, or answers far more slowly than requests are sent",
                    fix="look at the server's log; ask for a lower rate",
                )
    finally:
        if process.poll() != 0:
            process.kill()
            process.communicate()
            for region in regions:  # what it made and would have removed itself
                with contextlib.suppress(OSError):
                    if region.stat().st_ctime >= started:
                        region.unlink()


@contextlib.contextmanager
def _region_names(load: Load) -> Iterator[None]:
    """Waits for every other one that uses shared memory: all of them call it by the names of the model's tensors."""
    if load.shared_memory != "system":
        yield
        return
    folder = os.open("/dev/shm", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _regions(pid: int) -> set[Path]:
    """The files of shared memory that a process has mapped."""
    mapped = re.findall(r"\s(/dev/shm/.*)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
    return {Path(name) for name in mapped if not name.endswith(" (deleted)")}


def _only_row(report: Path) -> dict[str, str]:
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"Inferences/Second", *_LATENCIES} - set(rows[0] if rows else {})
    if len(rows) != 1 or missing:
        raise PerfError(
            f"perf_analyzer's report has {len(rows)} rows and lacks {sorted(missing) or 'nothing'}",
            why="this version of perf_analyzer writes another format",
            fix="use the one of requirements/perf_analyzer.lock",
        )
    return rows[0]
