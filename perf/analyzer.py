"""NVIDIA's perf_analyzer as the load generator: one point of load on a running server, as a dataclass.

    point = run(server.http_url, "shapes", data, Load(concurrency=4, protocol="http", shared_memory="system"))
    point.throughput, point.latency_ms["p99"]

The program is the one on PATH (NVIDIA's SDK container), else the one that ./invoke installed. It runs under a guard of
memory and time.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import fcntl
import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.load import Load, PerfError, Point

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
_PATIENCE = 60  # seconds that it may take beside the measurement
_GRACE = 2.0  # seconds that it may go on after a failure
# After these it only waits for requests on the way, in vain where nobody will answer them.
_FAILED = re.compile(
    r"^Failed to |^No valid requests|cb::Error: (?!No valid requests|failed to find the requested)", re.MULTILINE
)
# The plain names that the program asks for → how the server's wheel calls the same libraries.
_LIBRARIES = {
    "libb64.so.0d": "libb64-*.so.0d",
    "libcudart.so.12": "libcudart-*.so.12*",
    "libssl.so.3": "libssl-*.so.3",
    "libcrypto.so.3": "libcrypto-*.so.3",
}


# Why it gave no figures, where it does not say so itself: what it prints, why it is so, what to do. First match wins.
_CAUSES = (
    (
        r"std::bad_alloc|std::system_error|Cannot allocate memory|ended by signal 9",
        "there was no more memory for it: without shared memory it keeps the bytes of every request",
        "use shared memory, a shorter run or smaller batches",
    ),
    (
        r"ended by signal 7",  # SIGBUS: a file in /dev/shm takes its space only when it is written
        "/dev/shm is full: it holds every picture once for each place in a batch",
        "make /dev/shm larger (docker: --shm-size=1g), or use fewer pictures or smaller batches",
    ),
    (r"Thread \[\d+\] had error: ([^\n]*)", "a request failed: {0}", "see the server's log"),
)
_NOTHING_ENDED = "No valid requests recorded|Failed to obtain stable|failed to find the requested model version"


class NothingEndedError(PerfError):
    """Not one request ended in a window."""


def find_perf_analyzer() -> Path:
    """The perf_analyzer for this machine.

    Raises:
        PerfError: there is none.
    """
    on_path = shutil.which("perf_analyzer")
    # The script that the package perf-analyzer puts into this Python's bin loses exit codes, and leaves the program
    # running when it is ended.
    if on_path and Path(on_path).parent != Path(sys.prefix) / "bin":
        return Path(on_path)
    beside = Path(sys.prefix) / "perf_analyzer" / "bin" / "perf_analyzer"
    if beside.is_file():
        return beside
    raise PerfError(
        f"no perf_analyzer on PATH, none in {beside.parent}",
        why="the environment was not made by ./invoke",
        fix="run through ./invoke, which installs one; or use NVIDIA's container with the suffix -py3-sdk",
    )


def write_input(path: Path, images: Iterable[NDArray[Any]], thresholds: Mapping[str, float] | None = None) -> Path:
    """Writes real pictures as perf_analyzer's input data; it sends them in turn.

    Args:
        path: the JSON file to write.
        images: UINT8 [H,W,3] each, as the model's input `images` takes them.
        thresholds: the model's threshold inputs, sent with every picture; None where it has none.

    Returns:
        `path`.
    """
    extra = {name: {"content": [value], "shape": [1]} for name, value in (thresholds or {}).items()}
    rows = []
    for image in images:
        content = {"b64": base64.b64encode(image.tobytes()).decode()}
        rows.append({"images": {"content": content, "shape": list(image.shape)}, **extra})
    if not rows:
        raise PerfError("no picture to make load with", fix="give at least one")
    path.write_text(json.dumps({"data": rows}))
    return path


def run(
    url: str, model: str, data: Path, load: Load, *, seconds: float = 3.0, memory_gib: float | None = None
) -> Point:
    """Puts `load` on `model` and measures.

    A run with shared memory takes away the shared memory that other clients registered with the server: perf_analyzer
    unregisters all of it when it starts and when it ends.

    Args:
        url: `host:port` of the endpoint that belongs to the load's protocol.
        model: name on the server.
        data: what `write_input` wrote.
        load: what to put on the server.
        seconds: of measurement; up to 16 times longer where not one request ends within a third of it.
        memory_gib: perf_analyzer keeps the bytes of every request without shared memory; it is ended when it holds
            more than this. None = a quarter of the machine's memory.

    Raises:
        PerfError: naming what is missing or wrong.
    """
    for longer in (1, 4):  # a model that is slower than one window, or a machine that stood still for one
        with contextlib.suppress(NothingEndedError):
            return _measure(url, model, data, load, longer * seconds, memory_gib)
    return _measure(url, model, data, load, 16 * seconds, memory_gib)


def _measure(url: str, model: str, data: Path, load: Load, seconds: float, memory_gib: float | None) -> Point:
    window = max(1, round(1000 * seconds / _WINDOWS / _LONGER))
    window_s = window * _LONGER / 1000
    with tempfile.TemporaryDirectory(prefix="ssd-perf-") as name:
        folder = Path(name)
        report, export = folder / "report.csv", folder / "export.json"
        command = [str(find_perf_analyzer()), "-m", model, "-u", url, "-b", str(load.batch_size)]
        command += ["--input-data", str(data), "-v", "-f", str(report), "--verbose-csv", "-p", str(window)]
        # Windows that may differ by any amount: an unsteady run would otherwise end without figures.
        command += ["-s", "1000000", "-r", str(_MOST_WINDOWS)]
        # Without shared memory it would write the bytes of every request beside its times, as decimal numbers.
        command += ["--profile-export-file", str(export)] if load.shared_memory else []
        command += _options(load, _WINDOWS * window_s, folder)
        with _region_names(load):
            output, code = _execute(command, program_environment(folder), seconds, memory_gib)
        if code != 0 or not report.is_file():
            raise _failure(output, code, f"model {model} at {url}")
        row, longest = _only_row(report), _longest_ms(export)
    requests = re.search(r"Request count: (\d+)", output)
    return Point(
        requests=int(requests[1]) if requests else 0,
        throughput=float(row["Inferences/Second"]),
        latency_ms={name: float(row[column]) / 1000 for column, name in _LATENCIES.items()} | longest,
        parts_ms={name: float(row.get(column) or 0) / 1000 for column, name in _PARTS.items()},
        seconds=window_s * _WINDOWS,
    )


def _options(load: Load, seconds: float, folder: Path) -> list[str]:
    options = ["-i", "http" if load.protocol == "http" else "grpc", "--shared-memory", load.shared_memory or "none"]
    if load.protocol == "stream":
        options.append("--streaming")
    if load.rate is None:
        return [*options, "--concurrency-range", str(load.concurrency)]
    options.append("--async")  # its threads would otherwise wait for each answer, and the rate would bend to the server
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


def _longest_ms(export: Path) -> dict[str, float]:
    """{max: the slowest request's latency} by --profile-export-file.

    Empty where there is no such file, or none that can be read: 2.51 writes stray bytes for tensors in shared memory.
    """
    try:
        requests = json.loads(export.read_text(errors="replace"))["experiments"][0]["requests"]
        return {"max": max(each["response_timestamps"][-1] - each["timestamp"] for each in requests) / 1e6}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


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
    deadline = time.monotonic() + patience
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(command, env=environment, text=True, errors="replace", **pipes)
    except OSError as error:
        fix = "install it again: remove .venv, run ./invoke"
        raise PerfError(f"{command[0]} cannot run: {error}", fix=fix) from None
    failing = False
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=0.1)
                return output, process.returncode
            except subprocess.TimeoutExpired as expired:
                printed = (expired.output or b"").decode(errors="replace")
            with contextlib.suppress(psutil.Error, OSError):
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
        if process.poll() is None:
            regions = _regions(process.pid)
            process.kill()
            process.communicate()
            for region in regions:  # what it made and would have removed itself
                region.unlink(missing_ok=True)


def _failure(output: str, code: int, of: str) -> PerfError:
    """The error of a run that gave no figures, by what it printed and its exit code (a signal's is negative)."""
    ended = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
    printed = output.split("Usage: ")[0].splitlines()
    lines = [line.strip() for line in printed if not re.match(r"\s*$|Unable to un", line)]
    what = "\n  ".join([f"perf_analyzer gave no figures for {of} ({ended})", *lines[-5:]])
    for pattern, why, fix in _CAUSES:
        if match := re.search(pattern, f"{output}\n{ended}"):
            return PerfError(what, why=why.format(*match.groups()), fix=fix)
    if re.search(_NOTHING_ENDED, output):
        why = "no request ended in time: the server is too busy, or hangs"
        return NothingEndedError(what, why=why, fix="see what else runs there")
    return PerfError(what)


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
    with contextlib.suppress(OSError):
        mapped = re.findall(r"\s(/dev/shm/.*)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
        return {Path(name) for name in mapped if not name.endswith(" (deleted)")}
    return set()


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
