"""The kernels on a GPU, by plugins/bench/bench.py: bits of the reference, repeats, rows, CUDA graphs, the sanitizer."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from build.tensorrt.plugins import PLUGINS, find_nvcc

BENCH = PLUGINS / "bench" / "bench.py"


def need_a_gpu() -> None:
    """Skips where the benchmark cannot run."""
    if shutil.which("nvidia-smi") is None:
        pytest.skip("needs an NVIDIA GPU (nvidia-smi is not on PATH)")
    if find_nvcc() is None:
        pytest.skip("needs nvcc")
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("needs cuda-python")


def bench(part: str, folder: Path) -> dict[str, Any]:
    need_a_gpu()
    result = folder / "result.json"
    command = [sys.executable, BENCH, "--only", part, "--out", result]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.is_file(), done.stderr
    told: dict[str, Any] = json.loads(result.read_text())
    return told


@pytest.mark.gpu
@pytest.mark.slow
def test_the_kernels_give_the_bits_of_the_reference(tmp_path: Path) -> None:
    told = bench("check", tmp_path)["check"]
    assert told["failures"] == []
    assert min(told["compared"].values()) > 0, told
    assert told["compared"]["cases"] == 400
    assert told["detections in cases"] > 10_000


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compute_sanitizer_finds_nothing(tmp_path: Path) -> None:
    told = bench("sanitize", tmp_path)["sanitize"]
    if "not run" in told:
        pytest.skip(f"needs compute-sanitizer: {told['not run']}")
    exits = {tool: told[tool].split(":")[0] for tool in ("memcheck", "racecheck", "synccheck")}
    assert exits == dict.fromkeys(exits, "exit 0")
