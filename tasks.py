"""The tasks of `./invoke`: each is thin and calls one function of build/, client/ or perf/.

Imports of those live inside the tasks, so that `./invoke --list` answers at once.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from invoke.context import Context
from invoke.exceptions import Exit
from invoke.tasks import task

ROOT = Path(__file__).parent
REPOSITORY = ROOT / "model_repository"
ARTIFACTS = ROOT / "artifacts"

Function = TypeVar("Function", bound=Callable[..., Any])


def _explained(function: Function) -> Function:
    """Prints the project's own errors as text and exits with 1; anything else is a bug and keeps its traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        from build.errors import SSDError

        try:
            return function(*args, **kwargs)
        except SSDError as error:
            raise Exit(f"error: {error}", code=1) from None
        except KeyboardInterrupt:
            raise Exit("interrupted", code=130) from None

    return run  # type: ignore[return-value]


def _need(c: Context, module: str, group: str) -> None:
    """Installs a group of pyproject.toml from its lock when its tools are not there yet."""
    if importlib.util.find_spec(module) is None:
        print(f"installing the '{group}' group ...", flush=True)
        c.run(f"{sys.executable} -m pip install --quiet --no-deps --require-hashes -r requirements/{group}.lock")


@task
@_explained
def demo(c: Context, quick: bool = False) -> None:
    """The whole way: build, serve on a real Triton server, detect, evaluate, load; writes artifacts/demo/.

    --quick: fewer scenes and a shorter load, for a look in a few seconds; its figures are rough.
    """
    from perf.demo import demo as run

    run(REPOSITORY, ARTIFACTS, quick=quick)


@task(
    help={
        "model": "one model of models/ (default: all of them)",
        "runtime": "auto, onnxruntime or tensorrt",
        "precision": "fp32",
        "force": "rebuild even where nothing changed",
        "rollback": "serve the version before the current one again (needs --model)",
    }
)
@_explained
def build_engines(
    c: Context,
    model: str = "",
    runtime: str = "auto",
    precision: str = "fp32",
    force: bool = False,
    rollback: bool = False,
) -> None:
    """models/*/ → model_repository/: attach the pixel front and SSDNMS, check, publish atomically."""
    from build import pipeline

    if rollback:
        pipeline.rollback(model, repository=REPOSITORY)
    else:
        pipeline.build_engines([model] if model else None, runtime, precision, force=force, repository=REPOSITORY)


@task(
    help={
        "host": "address to bind; 0.0.0.0 opens it to the network",
        "http_port": "HTTP port (0 = any free one)",
        "grpc_port": "gRPC port (0 = any free one)",
        "metrics_port": "metrics port (0 = any free one)",
    }
)
@_explained
def serve(
    c: Context, host: str = "127.0.0.1", http_port: int = 8000, grpc_port: int = 8001, metrics_port: int = 8002
) -> None:
    """Serve model_repository/ on a real tritonserver until Ctrl-C."""
    from build.serve import serve as run

    run(REPOSITORY, host=host, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)


@task(
    help={
        "path": "file or folder under tests/",
        "keyword": "pytest's -k",
        "marker": "pytest's -m, for example 'not slow'",
    }
)
def test(c: Context, path: str = "tests", keyword: str = "", marker: str = "") -> None:
    """All tests, those on a real Triton server included; what cannot run here is skipped with its reason."""
    options = (f" -k '{keyword}'" if keyword else "") + (f" -m '{marker}'" if marker else "")
    done = c.run(f"{sys.executable} -m pytest {path}{options}", warn=True)
    if done.exited:
        raise Exit("tests failed (see above)", code=done.exited)


@task
def lint(c: Context) -> None:
    """ruff (lint and format) and mypy --strict."""
    _need(c, "ruff", "dev")
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        c.run(f"{sys.executable} -m {command}")


@task
def lock(c: Context) -> None:
    """Resolve the groups of pyproject.toml into the hashed files under requirements/ (needs uv)."""
    for group in ("runtime", "dev"):
        c.run(
            f"uv pip compile pyproject.toml --group {group} --universal --generate-hashes --python-version 3.10 "
            f"--no-header --no-annotate --quiet -o requirements/{group}.lock"
        )
