"""CPU and memory of processes that do a known amount of work, a GPU's from a stand-in, and a real server's."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from build.serve import TritonServer
from perf.analyzer import run, write_input
from perf.load import Load
from perf.resources import Sampler

# Works for so many CPU seconds in so many MiB, then waits for the end of its input.
WORK = """
import sys, time
held = bytearray(int(sys.argv[2]) << 20)
while time.process_time() < float(sys.argv[1]):
    pass
sys.stdin.read()
"""
SERVER = f"""
import subprocess, sys
stub = subprocess.Popen([sys.executable, "-c", {WORK!r}, "0.3", "100"], stdin=subprocess.PIPE)
sys.argv[1:] = ["0.15", "20"]
print("ready", flush=True)
exec({WORK!r})
stub.communicate()
"""


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    """A process that works 0.15 s, with a child that works 0.3 s and holds 100 MiB."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    with process:
        yield process
        process.kill()


def analyzer(folder: Path, rounds: int) -> subprocess.Popen[bytes]:
    """A program called perf_analyzer that counts."""
    program = folder / "perf_analyzer"
    program.write_text(f"#!/bin/bash\nfor ((i = 0; i < {rounds}; i++)); do :; done\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return subprocess.Popen([program])


def test_who_used_what(server: subprocess.Popen[str], tmp_path: Path) -> None:
    with Sampler(server.pid, interval=0.05) as sampler:
        before = os.times()
        analyzer(tmp_path, 100_000).wait()
        after = os.times()
        time.sleep(1.0)
    result = sampler.result(images=90)
    counted = after.children_user + after.children_system - before.children_user - before.children_system
    seconds = result["seconds"]
    assert seconds > 1.0
    assert result["analyzer_cores"] * seconds == pytest.approx(counted, abs=0.011)  # the kernel counts in ticks
    assert counted > 0.05
    assert 0.05 < result["server_cores"] * seconds < 0.3
    assert 0.15 < result["model_cores"] * seconds < 0.5
    assert result["images_per_core"] == pytest.approx(90 / seconds / (result["server_cores"] + result["model_cores"]))
    assert result["model_rss_mib"] > 100
    assert 20 < result["server_rss_mib"] < 100
    assert 1 < result["analyzer_rss_mib"] < 20
    assert 0 <= result["other_cores"] < psutil.cpu_count()
    assert result["gpu"] is None or "watts" in result["gpu"]


def test_what_was_used_before_does_not_count(server: subprocess.Popen[str]) -> None:
    stub = psutil.Process(server.pid).children()[0]
    deadline = time.monotonic() + 20
    while sum(stub.cpu_times()[:2]) < 0.29:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    with Sampler(server.pid) as sampler:
        time.sleep(0.2)
    result = sampler.result(images=0)
    assert result["model_cores"] * result["seconds"] <= 0.02
    assert result["model_rss_mib"] > 100


def test_the_server_dies_meanwhile(server: subprocess.Popen[str], tmp_path: Path) -> None:
    with Sampler(server.pid, interval=0.05) as sampler:
        analyzer(tmp_path, 1000).wait()
        time.sleep(0.3)
        server.kill()
        server.wait()
        time.sleep(0.2)
    result = sampler.result(images=1)
    assert result["server_cores"] > 0
    assert result["analyzer_cores"] * result["seconds"] < 0.05  # the server's life is not perf_analyzer's


def test_no_such_server() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with Sampler(process.pid) as sampler:
        pass
    result = sampler.result(images=10)
    assert result["server_cores"] == result["model_cores"] == result["analyzer_cores"] == 0
    assert result["images_per_core"] is None


class NVMLError(Exception):
    """As in pynvml."""


def fake_nvml(**changes: Any) -> SimpleNamespace:
    watts = iter([100_000, *[300_000] * 1000])
    return SimpleNamespace(
        **{
            "NVMLError": NVMLError,
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda number: number,
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=80, memory=20),
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used=3 << 30),
            "nvmlDeviceGetPowerUsage": lambda handle: next(watts),
            **changes,
        }
    )


def refuse(*_: Any) -> None:
    raise NVMLError


def sampled(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Sampler(os.getpid(), interval=0.1) as sampler:
        time.sleep(0.35)
    return sampler.result(images=100)


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    result = sampled(monkeypatch, fake_nvml())
    gpu = result["gpu"]
    assert gpu["utilisation"] == 80
    assert gpu["memory_mib"] == 3 * 1024
    assert 200 <= gpu["watts"] < 300  # the mean of 100 and three or four times 300
    assert gpu["images_per_watt"] == pytest.approx(100 / result["seconds"] / gpu["watts"])


def test_a_gpu_that_does_not_tell_its_power(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = sampled(monkeypatch, fake_nvml(nvmlDeviceGetPowerUsage=refuse))["gpu"]
    assert gpu == {"utilisation": 80, "memory_mib": 3 * 1024, "watts": None, "images_per_watt": None}


@pytest.mark.parametrize("missing", ["package", "driver", "gpu"])
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    nvml = {
        "package": None,  # an import of it fails
        "driver": fake_nvml(nvmlInit=refuse),
        "gpu": fake_nvml(nvmlDeviceGetHandleByIndex=refuse),
    }[missing]
    assert sampled(monkeypatch, nvml)["gpu"] is None


@pytest.mark.triton
@pytest.mark.parametrize("which", ["triton_server", "python_server"])
def test_a_real_server_under_load(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The python backend runs a model in processes of its own, ours runs it inside the server."""
    triton_server: TritonServer = request.getfixturevalue(which)
    inside = triton_server.model_config("shapes")["backend"] != "python"
    images = np.random.default_rng(0).integers(0, 256, (4, 300, 300, 3), dtype=np.uint8)
    data = write_input(tmp_path / "input.json", images, {"score_threshold": 0.25, "iou_threshold": 0.45})
    load = Load(concurrency=2, shared_memory="system")
    before = triton_server.requests("shapes")
    with Sampler(triton_server.pid) as sampler:
        point = run(triton_server.grpc_url, "shapes", data, load, seconds=1, retries=0)
    result = sampler.result(triton_server.requests("shapes") - before)
    assert result["seconds"] >= point.seconds
    if inside:
        assert result["server_cores"] > 0.5
        assert (result["model_cores"], result["model_rss_mib"]) == (0, 0)
    else:
        assert result["model_cores"] > result["server_cores"] > 0
        assert result["model_rss_mib"] > 10
    assert result["analyzer_cores"] > 0
    assert sum(result[f"{who}_cores"] for who in ("server", "model", "analyzer", "other")) <= 1.1 * psutil.cpu_count()
    assert all(result[f"{who}_rss_mib"] > 10 for who in ("server", "analyzer"))
    assert 1 < result["images_per_core"] < 10_000
