"""`./invoke gpu-check`: verdicts, resuming, what is missing; a rehearsal as far as the first call of CUDA."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from build.contract import precisions_of
from build.errors import OptionError
from build.files import ROOT
from build.machine import Machine
from build.quantization import implicit
from build.tensorrt.cuda import Gpu
from perf.gpu import check
from perf.gpu.needs import Here, look
from perf.gpu.steps import STEPS, Step, Work, targets

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559, "570.86", "12.8", "")
SMI = "NVIDIA H100 80GB HBM3, 9.0, 81559, 570.86"


def no_gpu(command: Any) -> tuple[int, str]:
    return -1, "not there"


def with_gpu(command: Any) -> tuple[int, str]:
    return (0, SMI) if len(command) > 1 else (0, "CUDA Version: 12.8")


def run(
    tmp_path: Path, steps: tuple[Step, ...], run: Callable[[Any], tuple[int, str]] = with_gpu, **options: Any
) -> tuple[int, str]:
    """Status and what was printed."""
    console = Console(width=200, record=True, quiet=False, highlight=False, markup=False, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    here = Here(None, tmp_path / "gpu", Machine(run=run))
    status = check.gpu_check(
        steps=steps, here=here, artifacts=tmp_path, results=tmp_path / "results", console=console, **options
    )
    return status, console.export_text()


def step(name: str, *needs: str) -> Step:
    """One of the real table, with other needs: its process starts it by name."""
    (real,) = (each for each in STEPS if each.name == name)
    return Step(name, real.about, real.run, needs)


def test_here_every_step_says_what_is_missing_and_nothing_fails(tmp_path: Path) -> None:
    status, text = run(tmp_path, STEPS, no_gpu)
    assert status == 0
    assert f"0 passed, 0 failed, {len(STEPS)} need what is not here" in text
    assert "missing  gpu " in text
    assert not (tmp_path / "results").exists()
    for each in STEPS:
        assert f" {each.name} " in text


def test_every_need_is_known_and_says_how_to_get_it(tmp_path: Path) -> None:
    here = Here(None, tmp_path, Machine(run=no_gpu))
    for need in {need for each in STEPS for need in (*each.needs, *each.wants)}:
        found = look(here, need)
        assert found.there or len(found.text) > 10, need
    with pytest.raises(KeyError):
        look(here, "luck")


def test_precisions_that_this_gpu_or_tensorrt_lacks_are_missing(tmp_path: Path) -> None:
    here = Here(None, tmp_path, Machine(run=no_gpu))
    here.gpu, here.tensorrt = Gpu("T4", "7.5", 1, "", "", ""), "8.6.0"
    told = {name: look(here, f"for {name}") for name in ("tf32", "bf16", "int8", "fp8", "implicit")}
    assert {name: found.there for name, found in told.items()} == {
        "tf32": False, "bf16": False, "int8": True, "fp8": False, "implicit": True,
    }  # fmt: skip
    assert told["bf16"].text == "TensorRT 10.0 or later, here is 8.6.0"
    here.gpu, here.tensorrt = GPU, "11.1.0"
    assert look(here, "for fp8").there
    assert "took calibrators away" in look(here, "for implicit").text


def test_a_verdict_is_kept_and_what_passed_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    answers = {"core": {"passed": True, "why": "", "result": {"n": 1}}}

    def child(step: Step, *rest: Any) -> tuple[dict[str, Any], list[str]]:
        ran.append(step.name)
        return answers.get(step.name, {"passed": False, "why": "it broke\nsecond line", "result": {}}), ["a log line"]

    commit = {"sha": "abc", "dirty": False}
    monkeypatch.setattr(check, "_run", child)
    monkeypatch.setattr("perf.environment.commit", lambda: commit)
    monkeypatch.setattr("perf.gpu.needs.tensorrt_version", lambda: "10.13.2")
    steps = (step("core"), step("kernels"))
    status, text = run(tmp_path, steps)
    assert status == 1
    assert "1 passed, 1 failed" in text
    folder = tmp_path / "results" / "nvidia-h100-80gb-hbm3-10.13.2"
    told = json.loads((folder / "core.json").read_text())
    assert (told["verdict"], told["result"], told["log"]) == ("passed", {"n": 1}, ["a log line"])
    assert told["key"] == {"model": "shapes", "commit": commit, "gpu": GPU.as_dict(), "tensorrt": "10.13.2"}
    assert json.loads((folder / "kernels.json").read_text())["why"] == "it broke\nsecond line"
    answers["kernels"] = answers["core"]
    assert run(tmp_path, steps)[0] == 0
    assert ran == ["core", "kernels", "kernels"]  # what failed runs again, what passed does not
    run(tmp_path, steps, force=True, only=("core",))
    commit["sha"] = "def"
    run(tmp_path, steps, only=("core",))
    commit["dirty"] = True
    run(tmp_path, steps, only=("core",))
    run(tmp_path, steps, only=("core",))  # nobody knows what changed
    assert ran[3:] == ["core"] * 4


def test_a_crash_and_a_hang_cost_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {"crash": "import os; os.abort()", "hang": "import time; time.sleep(60)"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c '{body}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "crash"))
    status, text = run(tmp_path, (step("core"),))
    assert status == 1
    assert "its process ended with signal SIGABRT" in text
    monkeypatch.setattr(sys, "executable", str(tmp_path / "hang"))
    real = step("core")
    assert "not finished after 1 s" in run(tmp_path, (Step(real.name, real.about, real.run, (), limit=1),))[1]


@pytest.mark.parametrize(("options", "words"), [({"only": ("all",)}, "no step all"), ({"site": Path("/no")}, "/no")])
def test_nonsense_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        run(tmp_path, STEPS, **options)


def test_targets_are_told_whether_met_or_not() -> None:
    row = {"model": "SSD300-COCO", "type": "float16", "threshold": 0.05, "inputs": "scene"}
    rows = [
        row | {"batch": 1, "us": 11.0, "times the floor": 20.0, "ours / EfficientNMS_TRT": 0.25},
        row | {"batch": 64, "us": 70.0, "times the floor": 2.5},
        row | {"batch": 1, "us": 1.0, "threshold": 0.5, "times the floor": 1.0},
    ]
    assert [(told["value"], told["met"]) for told in targets(rows)] == [(11.0, True), (4.0, True), (2.5, False)]


# -- a rehearsal: real child processes, a checkout of its own, stand-ins of what an NVIDIA machine has -----------------

CUDART = '''
"""cuda-python's runtime without a device: every call fails as the real one does then."""
import enum

class cudaError_t(enum.IntEnum):
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100

def cudaGetErrorString(error):
    return 0, b"no CUDA-capable device is detected"

def __getattr__(name):
    if not name.startswith("cuda"):
        raise AttributeError(name)
    return lambda *arguments: (cudaError_t.cudaErrorNoDevice, None)
'''
TENSORRT = "\n".join(["__version__ = '10.16.1'", *(f"class {name}: pass" for name in implicit.BASES.values()), ""])
INFO = {"plugin": "SSDNMS", "plugin_version": "1", "version": "1", "tensorrt": "10.16.1", "cuda": "13.0"}
# The needs that a step's own stand-ins give it; the rest of the steps waits for a plan, which only a GPU can make.
REHEARSED = ("core", "kernels", *(f"plan-{name}" for name in precisions_of("tensorrt")), "implicit")
# Python runs this first: the device's file is there.
DEVICE = """
import pathlib
real = pathlib.Path.exists
pathlib.Path.exists = lambda self, **options: str(self) == "/dev/dxg" or real(self, **options)
"""


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    """A checkout with built libraries, a site folder, and a PATH with nvidia-smi."""
    root = tmp_path / "checkout"
    for name in ("build", "perf", "client", "models", "plugins"):
        ignore = shutil.ignore_patterns("__pycache__", "lib", "out", "results")
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    lib = root / "plugins" / "lib"
    lib.mkdir()
    (lib / "libssd_nms_core.so").touch()
    (lib / "libssd_nms_reference.so").touch()
    (lib / "libssd_nms.so").write_bytes(b"\x7fELF\0SSD_NMS_PLUGIN_INFO:" + json.dumps(INFO).encode() + b"\0")
    site = tmp_path / "site"
    (site / "cuda" / "bindings").mkdir(parents=True)
    (site / "cuda" / "bindings" / "runtime.py").write_text(CUDART)
    (site / "tensorrt").mkdir()
    (site / "tensorrt" / "__init__.py").write_text(TENSORRT)
    (site / "tensorrt-10.16.1.dist-info").mkdir()
    (site / "tensorrt-10.16.1.dist-info" / "METADATA").write_text("Name: tensorrt\nVersion: 10.16.1\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\necho '{SMI}'\n")
    (programs / "nvidia-smi").chmod(0o755)
    (site / "sitecustomize.py").write_text(DEVICE)
    return tmp_path


def rehearse(nvidia: Path, *steps: str) -> dict[str, dict[str, Any]]:
    """The verdicts of the real command."""
    code = (
        "import sys; sys.path[:0] = ['.', 'client']; from pathlib import Path; from perf.gpu.check import gpu_check; "
    )
    code += f"sys.exit(gpu_check(only={steps!r}, site=Path({str(nvidia / 'site')!r})))"
    variables = {**os.environ, "PATH": f"{nvidia / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=nvidia / "checkout",
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    folder = nvidia / "checkout" / "perf" / "results" / "gpu" / "nvidia-h100-80gb-hbm3-10.16.1"
    return {file.stem: json.loads(file.read_text()) for file in folder.rglob("*.json")}


def expect_the_first_call(told: dict[str, dict[str, Any]], steps: tuple[str, ...]) -> None:
    assert set(told) == set(steps)
    for name, verdict in told.items():
        assert verdict["verdict"] == "failed"
        assert "no NVIDIA GPU can be used: cudaGetDevice: no CUDA-capable device" in str(verdict), name


@pytest.mark.slow
def test_a_rehearsal_stops_at_the_first_call_of_cuda(nvidia: Path) -> None:
    steps = ("core", "plan-fp32")
    expect_the_first_call(rehearse(nvidia, *steps), steps)


@pytest.mark.long
def test_every_step_that_needs_no_plan_stops_there(nvidia: Path) -> None:
    expect_the_first_call(rehearse(nvidia, *REHEARSED), REHEARSED)


@pytest.mark.parametrize("work", [Work("shapes", Path("/nowhere"))])
def test_repositories_are_apart(work: Work) -> None:
    assert work.repository("fp16") == Path("/nowhere/fp16/repository")
