"""Where figures come from: machine, load, container, versions and commit. Neither paths nor host names."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from build.files import ROOT
from perf.direct import other_load
from perf.load import PerfError

_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "numpy", "pillow", "tritonclient", "pycocotools", "mlcommons-loadgen")
_OPTIONAL = ("onnxruntime-gpu", "torch", "tensorrt")


def capture(**given: str) -> dict[str, Any]:
    """All of it, in half a second.

    Args:
        given: versions that the caller knows, such as the tritonserver's.

    Returns:
        `machine()`, and governor, load_average (1, 5, 15 minutes), other_load (share of all cores in use right now),
        container, gpus, versions and commit; None or "" where there is nothing to tell.
    """
    return {
        **machine(),
        "governor": governor(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "other_load": other_load(),
        "container": container(),
        "gpus": gpus(),
        "versions": versions(**{"perf_analyzer": perf_analyzer(), **given}),
        "commit": commit(),
    }


def versions(**given: str) -> dict[str, str]:
    """Versions of what the figures depend on, as far as it is installed, and those that the caller knows."""
    known = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_OPTIONAL):
        with contextlib.suppress(metadata.PackageNotFoundError):
            known[name] = metadata.version(name)
    return {**known, **{name: version for name, version in given.items() if version}}


def perf_analyzer() -> str:
    """The version of the program that makes the load; empty where there is none."""
    from perf import analyzer

    try:
        with tempfile.TemporaryDirectory(prefix="ssd-perf-") as folder:
            done = subprocess.run(
                [analyzer.find_perf_analyzer(), "--version"],
                env=analyzer.program_environment(Path(folder)),
                capture_output=True,
                text=True,
                timeout=20,
            )
    except (PerfError, OSError, subprocess.SubprocessError):
        return ""
    version = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return version[0] if version else ""


def machine() -> dict[str, Any]:
    """CPU, its cores, those that this process may use, memory and operating system."""
    import psutil

    from build.publish.config import cores

    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=True),
        "cores_allowed": cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


def governor() -> str:
    """The CPU's frequency governors, as Linux names them; empty where it shows none, as in most virtual machines."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({line for path in files for line in _lines(path)}))


def container(root: Path = Path("/")) -> str:
    """kubernetes, docker, podman or another name of what this runs in; empty outside of any."""
    if "KUBERNETES_SERVICE_HOST" in os.environ or (root / "var/run/secrets/kubernetes.io").exists():
        return "kubernetes"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists():
        return "docker"
    return os.environ.get("container", "")  # noqa: SIM112 (systemd spells it so)


def gpus() -> list[dict[str, Any]]:
    """Name, memory and driver of every NVIDIA GPU, through nvidia-ml-py or else nvidia-smi (of the first)."""
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from build.machine import Machine, find_gpu

        gpu = find_gpu(Machine())
        return [{"name": gpu.name, "memory_mib": gpu.memory_mib, "driver": gpu.driver}] if gpu else []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [
            {
                "name": _text(pynvml.nvmlDeviceGetName(handle)),
                "memory_mib": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) >> 20,
                "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            }
            for handle in handles
        ]
    finally:
        pynvml.nvmlShutdown()


def commit(folder: Path = ROOT) -> dict[str, Any] | None:
    """The commit that is checked out, and whether tracked files differ from it; None outside of a git checkout."""

    def git(*words: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # looking must not hinder who works
        return subprocess.run(
            ["git", *words], cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {
            "sha": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _lines(path: Path | str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
