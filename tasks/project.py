"""Tasks for this project itself: its plugin, tests, locks and what they need."""

from __future__ import annotations

import os
import shlex
import shutil

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

from .common import PYTHON, explained, given_or_name, need


@task(
    help={
        "tensorrt_source": "URL or path of a git repository with TensorRT's headers under include/",
        "tensorrt_ref": "its tag, for example v10.16; without it the headers of TENSORRT_ROOT, of the system, or those "
        "that go with the system's libnvinfer",
        "architectures": "such as 90 or 80,90-virtual (default: all from 7.5 to 12.1 that nvcc knows, and PTX)",
        "stage": "reference, core or plugin, if it must be that one (default: the furthest that is possible)",
    }
)
@explained
def build_plugins(
    c: Context, tensorrt_source: str = "", tensorrt_ref: str = "", architectures: str = "", stage: str = ""
) -> None:
    """Build the NMS plugin as far as TensorRT's headers are at hand; brings CMake and nvcc; says what is missing."""
    from build.tensorrt.plugins import build_plugins as run

    source = given_or_name(tensorrt_source)
    built = run(tensorrt_source=source, tensorrt_ref=tensorrt_ref, architectures=architectures, stage=stage, bring=True)
    print(built)
    if built.stage == "plugin":
        print("the plugin is ready; next, where there is a GPU: ./invoke install-tensorrt, then ./invoke gpu-check")


@task(
    help={"tensorrt": "a version, such as 10.13.2 (default: that of this machine's libnvinfer, which its server loads)"}
)
@explained
def install_tensorrt(c: Context, tensorrt: str = "") -> None:
    """Install the Python packages tensorrt and cuda-python that go with the server here; they are large."""
    from build.tensorrt.system import packages, system_tensorrt

    wanted = packages(tensorrt or system_tensorrt())
    print(f"installing {' '.join(wanted)} ...", flush=True)
    c.run(f"{PYTHON} -m pip install --quiet {shlex.join(wanted)}")
    print("installed; next: ./invoke gpu-check")


@task(
    help={
        "path": "file or folder, relative to your folder or to the project's (default: tests)",
        "keyword": "pytest's -k",
        "marker": "pytest's -m, for example 'not slow and not long'; 'long' runs the tests that take minutes",
    }
)
def test(c: Context, path: str = "", keyword: str = "", marker: str = "") -> None:
    """All tests, those on a real Triton server included; what cannot run here is skipped with its reason."""
    options = [*(("-k", keyword) if keyword else ()), *(("-m", marker) if marker else ())]
    if not (path or keyword or marker):  # tests of one file share servers and models, so a worker takes whole files
        options += ["-n", str(min(os.cpu_count() or 1, 4)), "--dist", "loadfile", "--no-loadscope-reorder"]
    arguments = shlex.join(["--durations=30", *options, "--", given_or_name(path) or "tests"])
    done = c.run(f"{PYTHON} -m pytest {arguments}", warn=True)
    if done.exited:
        raise Exit("tests failed (see above)", code=done.exited)
    print("tests passed; the reason of every skipped one is above")


@task
@explained
def deploy_check(c: Context) -> None:
    """Check deploy/ with helm, promtool, Envoy and others (1 GB, into .cache/deploy), live tests included."""
    from build.publish import s3
    from deploy import tools

    tools.install()
    s3.program()
    tests = "tests/deploy tests/build/publish/test_s3.py"
    done = c.run(f"{PYTHON} -m pytest --durations=20 -m '' {tests}", warn=True)
    if done.exited:
        raise Exit("deploy/ is not right, or a tool failed (see above)", code=done.exited)
    print("deploy/ passed; docs/fleet.md says how to use it")


@task
def lint(c: Context) -> None:
    """ruff (lint and format) and mypy --strict."""
    need(c, "ruff", "dev")
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        c.run(f"{PYTHON} -m {command}")
    print("lint passed; next: ./invoke test")


@task
def lock(c: Context) -> None:
    """Resolve the groups of pyproject.toml into the hashed files under requirements/ (needs uv)."""
    if shutil.which("uv") is None:
        raise Exit("error: uv is not on PATH\nwhat to do: pipx install uv", code=1)
    beside_runtime = ("video", "batch", "openvino")  # they run with what .venv holds, NumPy first of all
    programs = ("deploy_tools", "s3", "modelopt")  # of these packages only a program, or a few files, is used
    apart = ("runtime", "dev", "train", "convert_tensorflow", "plugin_tools", "clients", "deploy")
    for group in (*apart, *beside_runtime, "gateway", *programs):
        how = "--constraints requirements/runtime.lock --no-emit-package numpy" if group in beside_runtime else ""
        how = "--constraints requirements/runtime.lock" if group == "gateway" else how
        how = "--no-deps" if group in programs else how
        python = "3.11" if group.startswith("deploy") else "3.10"  # Grafana's package asks for Python 3.11
        c.run(
            f"uv pip compile pyproject.toml --group {group} {how} --universal --generate-hashes "
            f"--python-version {python} --no-header --no-annotate --quiet -o requirements/{group}.lock"
        )
    print("requirements/ is locked; next: ./invoke test (.venv is made again where what it holds has changed)")
