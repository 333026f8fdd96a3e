"""Where figures come from: machine, load, versions and commit. Neither paths nor host names."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from build.files import ROOT
from build.machine import PACKAGES, Machine, find_gpu, package_version, tensorrt_version
from build.tensorrt.system import run
from perf.load import PerfError

_MORE = ("onnxscript", "pillow", "pycocotools", "mlcommons-loadgen", "onnxruntime-gpu", "torch")


def capture() -> dict[str, Any]:
    """All of it, in half a second.

    Returns:
        cpu, cores, cores_allowed (that this process may use), memory_gib, system, load_average (1, 5, 15 minutes),
        other_load (share of all cores, 0..1, in use while this process waits), gpus, versions, commit.
    """
    import psutil

    from build.publish.config import cores

    gpu = find_gpu(Machine())
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": psutil.cpu_count(logical=True),
        "cores_allowed": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "other_load": psutil.cpu_percent(interval=0.5) / 100,
        "gpus": [{"name": gpu.name, "memory_mib": gpu.memory_mib, "driver": gpu.driver}] if gpu else [],
        "versions": versions(),
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on, as far as it is installed."""
    known = {"python": platform.python_version()}
    known |= {name: package_version(name) for name in (*PACKAGES, *_MORE)}
    known |= {"tensorrt": tensorrt_version(), "perf_analyzer": perf_analyzer()}
    return {name: version for name, version in known.items() if version}


def perf_analyzer() -> str:
    """The version of the program that makes the load; empty where there is none."""
    from perf import analyzer

    try:
        with tempfile.TemporaryDirectory(prefix="ssd-perf-") as folder:
            environment = analyzer.program_environment(Path(folder))
            command = [str(analyzer.find_perf_analyzer()), "--version"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    except (PerfError, OSError, subprocess.SubprocessError):
        return ""
    version = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return version[0] if version else ""


def commit(folder: Path = ROOT) -> dict[str, Any] | None:
    """The commit that is checked out, and whether tracked files differ from it; None outside of a git checkout."""
    git = ["git", "--no-optional-locks", "-C", str(folder)]  # looking must not hinder who works
    status, sha = run([*git, "rev-parse", "HEAD"])
    if status:
        return None
    return {"sha": sha, "dirty": bool(run([*git, "status", "--porcelain", "--untracked-files=no", "--", "."])[1])}
