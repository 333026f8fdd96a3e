"""NVIDIA's perf_analyzer as the load generator: one point of load on a running server, as a dataclass.

    point = run(server.grpc_url, "shapes", data, concurrency=4, shared_memory="system")
    point.throughput, point.latency_ms["p99"]

The program is the one on PATH (NVIDIA's SDK container), else the one that the wheel tritonclient 2.51.0 brought.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from build.errors import SSDError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Columns of its csv → names here. The parts add up to the average latency.
_PERCENTILES = {f"p{n} latency": f"p{n}" for n in (50, 90, 95, 99)}
_PARTS = {
    "Client Send": "client_send",
    "Network+Server Send/Recv": "network",
    "Server Queue": "server_queue",
    "Server Compute Input": "server_input",
    "Server Compute Infer": "server_infer",
    "Server Compute Output": "server_output",
    "Client Recv": "client_receive",
}
_WINDOWS = 3
_TOO_SHORT = "No valid requests recorded"
_UNSTABLE = "Failed to obtain stable measurement"  # with the limits given below: a window in which no request ended
# The plain names that the program asks for → how the server's wheel calls the same libraries.
_LIBRARIES = {
    "libb64.so.0d": "libb64-*.so.0d",
    "libcudart.so.12": "libcudart-*.so.12*",
    "libssl.so.3": "libssl-*.so.3",
    "libcrypto.so.3": "libcrypto-*.so.3",
}


class PerfError(SSDError):
    """perf_analyzer is missing or could not measure."""


@dataclass(frozen=True)
class Point:
    """What one run of perf_analyzer measured.

    Attributes:
        concurrency: requests on the way at once, each from a client of its own.
        batch_size: images per request.
        protocol: grpc or http.
        shared_memory: system, or None where tensors travel in the request.
        requests: how many were measured.
        throughput: images per second.
        latency_ms: p50, p90, p95, p99 of a request as its client sees it.
        parts_ms: the average request by where its time went, from client_send to client_receive.
    """

    concurrency: int
    batch_size: int
    protocol: str
    shared_memory: str | None
    requests: int
    throughput: float
    latency_ms: dict[str, float]
    parts_ms: dict[str, float]


def find_perf_analyzer() -> Path:
    """perf_analyzer on PATH, else the one that was installed beside this Python.

    Raises:
        PerfError: there is none.
    """
    beside = Path(sys.prefix) / "perf_analyzer" / "bin" / "perf_analyzer"
    found = shutil.which("perf_analyzer") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise PerfError(
            f"no perf_analyzer on PATH, and none in {beside.parent}",
            why="the environment was not made by ./invoke",
            fix="run through ./invoke, or inside the container nvcr.io/nvidia/tritonserver with the suffix -py3-sdk",
        )
    return Path(found)


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
    *,
    concurrency: int = 1,
    protocol: Literal["grpc", "http"] = "grpc",
    shared_memory: Literal["system"] | None = None,
    batch_size: int = 1,
    seconds: float = 3.0,
    memory_gib: float | None = None,
) -> Point:
    """Puts load on `model` for `seconds` and measures.

    Every run gives figures, however much they swing: whether they hold is for the caller to see, by repeating them.

    Args:
        url: `host:port` of the endpoint that belongs to `protocol`.
        model: name on the server.
        data: what `write_input` wrote.
        concurrency: clients that each have one request on the way.
        protocol: grpc or http.
        shared_memory: system = pictures are handed over in shared memory; the server must be on this machine.
        batch_size: images per request.
        seconds: of measurement; longer where not one request ends within a third of it.
        memory_gib: perf_analyzer keeps the bytes of every request without shared memory; it is ended when it holds
            more than this. None = a quarter of the machine's memory.

    Raises:
        PerfError: naming what is missing or wrong.
    """
    program = find_perf_analyzer()
    with tempfile.TemporaryDirectory(prefix="ssd-perf-") as name:
        folder = Path(name)
        report = folder / "report.csv"
        environment = _environment(folder)
        command = [str(program), "-m", model, "-u", url, "-i", protocol, "-b", str(batch_size), "-f", str(report)]
        command += ["--input-data", str(data), "--concurrency-range", str(concurrency)]
        command += ["--shared-memory", shared_memory or "none"]
        for _ in range(3):
            # Three windows that may differ by any amount: an unsteady run would otherwise end without figures.
            windows = ["-p", str(max(1, round(1000 * seconds / _WINDOWS))), "-s", "999", "-r", str(_WINDOWS)]
            output, code = _execute(command + windows, environment, seconds, memory_gib)
            if _TOO_SHORT not in output and _UNSTABLE not in output:
                break
            seconds *= 4  # a model that is slower than one window, or a machine that stood still for one
        if code != 0 or not report.is_file():
            raise _failure(output, code, url, model)
        row = _only_row(report)
    requests = re.search(r"Request count: (\d+)", output)
    return Point(
        concurrency=concurrency,
        batch_size=batch_size,
        protocol=protocol,
        shared_memory=shared_memory,
        requests=int(requests[1]) if requests else 0,
        throughput=float(row["Inferences/Second"]),
        latency_ms={name: float(row[column]) / 1000 for column, name in _PERCENTILES.items()},
        parts_ms={name: float(row[column]) / 1000 for column, name in _PARTS.items()},
    )


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
    deadline = time.monotonic() + 60 + 4 * seconds
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise PerfError(
                f"{command[0]} cannot run: {error}", fix="install it again: remove .venv, run ./invoke"
            ) from None
        try:
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    used = psutil.Process(process.pid).memory_info().rss / 2**30
                    if used > limit:
                        raise PerfError(
                            f"perf_analyzer took {used:.2f} GiB of memory, more than the {limit:.2f} GiB it may have",
                            why="without shared memory it keeps the bytes of every request",
                            fix="use shared memory, a shorter run or smaller batches, or allow it more",
                        )
                if time.monotonic() > deadline:
                    raise PerfError(f"perf_analyzer did not end {60 + 3 * seconds:.0f} s after it should have")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        return log.read(), process.returncode


def _only_row(report: Path) -> dict[str, str]:
    with report.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"Inferences/Second", *_PERCENTILES, *_PARTS} - set(rows[0] if rows else {})
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
        r"(onnect(?:ion)? (?:refused|to remote host)|failed to connect|[Cc]ould ?n.t connect)",
        "no server answers there",
        "start one: invoke serve",
    ),
    (
        r"unknown model: '([^\n]*) is not found",
        "the server does not serve '{0}",
        "publish it first: invoke build-engines",
    ),
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
        r"(shared memory)[^\n]*(?:disabled|not (?:allowed|supported|permitted))",
        "the server refuses clients' {0}",
        "start it with --allow-client-shm=true (invoke serve does)",
    ),
    (
        f"({_TOO_SHORT}|{_UNSTABLE})",
        "no request ended in time: the server is too busy, or hangs",
        "see what else runs there",
    ),
)


def _failure(output: str, code: int, url: str, model: str) -> PerfError:
    lines = [line for line in output.splitlines() if line.strip()]
    what = f"perf_analyzer gave no figures for model {model} at {url} (exit code {code})"
    shown = "\n".join(f"  {line.strip()}" for line in lines[-5:])
    for pattern, why, fix in _CAUSES:
        match = re.search(pattern, output)
        if match:
            return PerfError(f"{what}\n{shown}", why=why.format(match[1]), fix=fix)
    return PerfError(f"{what}\n{shown}")
