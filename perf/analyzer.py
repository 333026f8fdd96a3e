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
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from build.errors import SSDError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrivals = Literal["constant", "poisson"]
Protocol = Literal["http", "grpc", "stream"]
SharedMemory = Literal["system", "cuda"]

_PROTOCOLS = {"http": "HTTP", "grpc": "gRPC", "stream": "gRPC stream"}
_CHOICES = {
    "arrivals": ("constant", "poisson"),
    "protocol": tuple(_PROTOCOLS),
    "shared_memory": (None, "system", "cuda"),
}
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
_STEADY = 0.1  # the windows' throughput may differ by this share of it
_TOO_SHORT = "No valid requests recorded"
_UNSTABLE = "Failed to obtain stable measurement"  # with the limits given below: a window in which no request ended
_NEW_GLIBC = (2, 38)  # what the package perf-analyzer needs
# The plain names that the program asks for → how the server's wheel calls the same libraries.
_LIBRARIES = {
    "libb64.so.0d": "libb64-*.so.0d",
    "libcudart.so.12": "libcudart-*.so.12*",
    "libssl.so.3": "libssl-*.so.3",
    "libcrypto.so.3": "libcrypto-*.so.3",
}


class PerfError(SSDError):
    """perf_analyzer is missing or could not measure."""


class _NothingEndedError(PerfError):
    """Not one request ended in a window."""


@dataclass(frozen=True)
class Load:
    """What is put on the server: so many clients, or so many requests per second.

    Attributes:
        concurrency: closed loop: clients that each have one request on the way. 1 where no rate is given.
        rate: open loop: requests per second, sent whether or not earlier ones were answered.
        arrivals: of a rate: evenly spaced, or a Poisson process (the same one in every run).
        batch_size: images per request.
        protocol: stream is gRPC with one bidirectional stream per client.
        shared_memory: how pictures and detections are handed over, on one machine; None = inside the requests.

    Raises:
        PerfError: a value that cannot be.
    """

    concurrency: int | None = None
    rate: float | None = None
    arrivals: Arrivals = "constant"
    batch_size: int = 1
    protocol: Protocol = "grpc"
    shared_memory: SharedMemory | None = None

    def __post_init__(self) -> None:
        if self.concurrency is None and self.rate is None:
            object.__setattr__(self, "concurrency", 1)
        if self.concurrency is not None and self.rate is not None:
            raise PerfError(
                f"a load of {self.concurrency} clients and of {self.rate:g} requests/s", fix="give one of the two"
            )
        if self.concurrency is not None and self.concurrency < 1:
            raise PerfError(f"a load of {self.concurrency} clients", fix="give at least 1")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise PerfError(f"a load of {self.rate:g} requests/s", fix="give a rate above 0")
        if self.batch_size < 1:
            raise PerfError(f"a batch of {self.batch_size} images", fix="give at least 1")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise PerfError(f"{name} {getattr(self, name)!r} is not known", fix=f"choose from {known}")
        if self.arrivals == "poisson" and self.rate is None:
            raise PerfError("Poisson arrivals from a number of clients", fix="give a rate instead of concurrency")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Load:
        return cls(**values)

    def __str__(self) -> str:
        if self.rate is None:
            amount = f"{self.concurrency} client{'s' if self.concurrency != 1 else ''}"
        else:
            amount = f"{self.rate:g} requests/s" + (" (Poisson)" if self.arrivals == "poisson" else "")
        parts = [amount, f"batch {self.batch_size}", _PROTOCOLS[self.protocol]]
        if self.shared_memory:
            parts.append(f"{self.shared_memory.replace('cuda', 'CUDA')} shared memory")
        return ", ".join(parts)


@dataclass(frozen=True)
class Point:
    """What one run of perf_analyzer measured.

    Attributes:
        load: what it put on the server.
        requests: how many were measured: those that ended in its windows, the warm-up's not counted.
        errors: how many requests failed. perf_analyzer 2.51 to 2.60 ends at the first, so this is 0: a server that
            answers with errors is a PerfError.
        throughput: images per second.
        latency_ms: avg, p50, p90, p95, p99 of a request as its client sees it; p99.9 and max only where every request
            is known.
        parts_ms: the average request by where its time went, from client_send to client_receive; 0 where a server
            without statistics does not say.
        latencies_ms: every measured request, in order of sending. Empty without shared memory: perf_analyzer would
            write out every request's bytes beside its times, as decimal numbers.
        sent_s: when each was sent, in seconds from the first; same length.
        seconds: measured time.
        stable: the windows' throughput was the same within 10 % (and what chance alone does to so few requests).
    """

    load: Load
    requests: int
    errors: int
    throughput: float
    latency_ms: dict[str, float]
    parts_ms: dict[str, float]
    latencies_ms: list[float]
    sent_s: list[float]
    seconds: float
    stable: bool

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        return cls(**{**values, "load": Load.from_dict(values["load"])})


def find_perf_analyzer() -> Path:
    """The perf_analyzer for this machine.

    Raises:
        PerfError: there is none.
    """
    found = shutil.which("perf_analyzer")
    # The package's own script in this Python's bin loses the exit code and leaves the program running when it is ended.
    if found and Path(found).parent != Path(sys.prefix) / "bin":
        return Path(found)
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
        except _NothingEndedError:  # a model that is slower than one window, or a machine that stood still for one
            if attempt == 2 and point is None:
                raise
            seconds *= 4
        else:
            if point.stable or attempt >= retries:
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
        command += ["-f", str(report), "--verbose-csv", *_options(load)]
        # It writes the bytes of inputs and outputs beside the times, as decimal numbers: 1 MB and 13 MB of memory for
        # every 300×300 picture, but none where they are in shared memory.
        if load.shared_memory:
            command += ["--profile-export-file", str(export)]
        # Windows that may differ by any amount: an unsteady run would otherwise end without figures.
        window = max(1, round(1000 * seconds / (1 - _WARM_UP) / _WINDOWS / _LONGER))
        command += ["-p", str(window), "-s", "1000000", "-r", str(_MOST_WINDOWS)]
        output, code = _execute(command, _environment(folder), seconds, memory_gib)
        if code != 0 or not report.is_file():
            raise _failure(output, code, url, model, load)
        row = _only_row(report)
        parts = {name: float(row.get(column) or 0) / 1000 for column, name in _PARTS.items()}
        if export.is_file():
            return _exact_point(load, parts, *_read_export(export))
    requests = re.search(r"Request count: (\d+)", output)
    passes = [float(text) for text in re.findall(r"Pass \[\d+\] throughput: ([\d.e+]+)", output)[-_WINDOWS:]]
    window_s = window * _LONGER / 1000
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


def _options(load: Load) -> list[str]:
    options = ["-i", "http" if load.protocol == "http" else "grpc", "--shared-memory", load.shared_memory or "none"]
    if load.protocol == "stream":
        options.append("--streaming")
    if load.rate is None:
        return [*options, "--concurrency-range", str(load.concurrency)]
    # Asynchronous: its threads would otherwise wait for each answer, and the rate would bend to the server.
    return [
        *options,
        "--async",
        "--request-rate-range",
        f"{load.rate:.6f}",
        "--request-distribution",
        load.arrivals,
    ]


def _read_export(path: Path) -> tuple[list[tuple[int, int]], list[int]]:
    """What --profile-export-file wrote.

    It holds only requests that were answered within a measured window, the windows one after the other, and where they
    begin and end (2.51's inference_profiler.cc: ValidLatencyMeasurement, CollectData).

    Returns:
        when each request was sent and answered, in order of sending; the windows' boundaries. All in nanoseconds.
    """
    try:
        experiment = json.loads(path.read_text())["experiments"][0]
        requests = sorted((one["timestamp"], one["response_timestamps"][-1]) for one in experiment["requests"])
        return requests, sorted(set(experiment["window_boundaries"]))
    except (ValueError, LookupError, TypeError) as error:
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
        raise _NothingEndedError("perf_analyzer measured no request", why=_TOO_SHORT)
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


def _environment(folder: Path) -> dict[str, str]:
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
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=0.1)
                return output, process.returncode
            except subprocess.TimeoutExpired:
                pass
            with contextlib.suppress(psutil.Error, OSError):
                regions |= _regions(process.pid)
                used = psutil.Process(process.pid).memory_info().rss / 2**30
                if used > limit:
                    raise PerfError(
                        f"perf_analyzer took {used:.2f} GiB of memory, more than the {limit:.2f} GiB it may have",
                        why="without shared memory it keeps the bytes of every request",
                        fix="use shared memory, a shorter run or smaller batches, or allow it more",
                    )
            if time.monotonic() > deadline:
                raise PerfError(
                    f"perf_analyzer did not end within {patience:g} s, although it was to measure for {seconds:g} s",
                    why="the server hangs, or answers far more slowly than requests are sent",
                    fix="look at the server's log; ask for a lower rate",
                )
    finally:
        if process.poll() != 0:
            process.kill()
            process.wait()
            for region in regions:  # what it made and would have removed itself
                with contextlib.suppress(OSError):
                    if region.stat().st_ctime >= started:
                        region.unlink()


def _regions(pid: int) -> set[Path]:
    """The files of shared memory that a process has mapped."""
    found = re.findall(r"\s(/dev/shm/.*)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
    return {Path(name) for name in found if not name.endswith(" (deleted)")}


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


# First match wins: what perf_analyzer prints, why it is so, what to do about it. {0} is what the group caught.
_CAUSES = (
    (
        r"error while loading shared libraries: (\S+?):",
        "{0} is not on this machine",
        "install nvidia-pytriton, which carries it: run through ./invoke",
    ),
    (
        r"version `(GLIBC\S*)' not found",
        "it needs {0}, newer than this machine's C library",
        "use the perf_analyzer of requirements/perf_analyzer.lock, or NVIDIA's SDK container",
    ),
    (
        r"unrecognized option '?([\w-]+)",
        "this version of perf_analyzer does not know {0}",
        "use the one of requirements/perf_analyzer.lock",
    ),
    (
        r"(std::bad_alloc|[Cc]annot allocate memory)",
        "there is no more memory for it: without shared memory it keeps the bytes of every request",
        "use shared memory, a shorter run or smaller batches",
    ),
    (
        r"unknown model: '([^\n]*) is not found",
        "the server does not serve '{0}",
        "publish it first: invoke build-engines",
    ),
    (
        r"([Ss]hared memory) is disabled",
        "the server refuses clients' {0}",
        "start it with --allow-client-shm=true (invoke serve does)",
    ),
    (
        r"(?:Unable to open shared memory region|unable to get shared memory descriptor)[^\n]*'(\S+)'",
        "the server does not see this memory: it runs on another machine, or in a container of its own",
        "measure on the server's machine (docker: --ipc=host), or without shared memory",
    ),
    (
        r"(cuda|CUDA)",
        "CUDA shared memory needs an NVIDIA GPU, its driver, and a server that runs on the same GPU",
        "use system shared memory",
    ),
)


def _failure(output: str, code: int, url: str, model: str, load: Load) -> PerfError:
    lines = [line for line in output.splitlines() if line.strip()]
    what = f"perf_analyzer gave no figures for model {model} at {url} (exit code {code})"
    shown = "\n".join(f"  {line.strip()}" for line in lines[-5:])
    for pattern, why, fix in _CAUSES:
        match = re.search(pattern, output)
        if match:
            return PerfError(f"{what}\n{shown}", why=why.format(match[1]), fix=fix)
    if _TOO_SHORT in output or _UNSTABLE in output:
        return _NothingEndedError(
            f"{what}\n{shown}",
            why="no request ended in time: the server is too busy, or hangs",
            fix="see what else runs there",
        )
    return PerfError(f"{what}\n{shown}")
