"""Which TensorRT this machine's server has, and what goes with it: headers, packages and CUDA's tools."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from build.errors import RuntimeUnavailableError
from build.releases import RELEASES, numbers

Run = Callable[[Sequence[str]], tuple[int, str]]


def run(command: Sequence[str]) -> tuple[int, str]:
    """Runs a command; its status and its output, or -1 and the reason where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return done.returncode, (done.stdout + done.stderr).strip()


def system_tensorrt(run: Run = run) -> str:
    """The version in the name of the system's libnvinfer, which a server here loads; empty where there is none."""
    _, listed = run(["ldconfig", "-p"])
    for library in re.findall(r"=> (\S*/libnvinfer\.so\.\S+)", listed):
        match = re.search(r"\.so\.([\d.]+)$", str(Path(library).resolve()))
        if match:
            return match[1]
    return ""


def cuda_of(tensorrt: str) -> str:
    """The CUDA that a TensorRT came with: that of the newest release of Triton that has no later TensorRT.

    Versions before the table's first have the first one's.
    """
    older = [release for release in RELEASES if numbers(release.tensorrt) <= numbers(tensorrt)]
    return (older or RELEASES[:1])[-1].cuda


def packages(tensorrt: str) -> list[str]:
    """What pip is asked for, to build plans for a server with this TensorRT.

    Args:
        tensorrt: its version, such as "10.13.2"; the package's fourth number is the newest there is.

    Raises:
        RuntimeUnavailableError: no version is known.
    """
    if not tensorrt:
        raise RuntimeUnavailableError(
            "there is no libnvinfer among this machine's libraries (ldconfig -p), so its version is not known",
            why="this is not the machine, or the container, of the server that will load the plans",
            fix="run this inside nvcr.io/nvidia/tritonserver, or name a version: --tensorrt 10.13.2",
        )
    cuda = cuda_of(tensorrt).split(".")[0]
    name = "tensorrt" if numbers(tensorrt) < (10,) else f"tensorrt-cu{cuda}"
    version = tensorrt if tensorrt.count(".") > 2 else f"{tensorrt}.*"
    return [f"{name}=={version}", f"cuda-python=={cuda}.*"]


def tag_of(tensorrt: str, tags: Sequence[str]) -> str:
    """The release of NVIDIA's public headers for a TensorRT: its own, else the nearest of the same major and minor.

    TensorRT keeps its interfaces within a minor version. Version 8 did not: there only its own will do.

    Args:
        tensorrt: "10.16.1".
        tags: such as "v10.16" and "v10.13.2".

    Returns:
        Empty where there is none.
    """
    wanted = (*numbers(tensorrt), 0, 0)[:3]
    known = {(*numbers(tag), 0, 0)[:3]: tag for tag in tags if re.fullmatch(r"v\d+(\.\d+)+", tag)}
    if wanted in known or wanted[0] < 10:
        return known.get(wanted, "")
    near = [version for version in known if version[:2] == wanted[:2]]
    older = [version for version in near if version < wanted]
    return known[max(older)] if older else known[min(near)] if near else ""
