"""What the tasks of all areas share: places, paths as their callers mean them, and errors as text."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from invoke.context import Context
from invoke.exceptions import Exit

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = ROOT / "model_repository"
ARTIFACTS = ROOT / "artifacts"
PYTHON = shlex.quote(sys.executable)
# The folder that the wrapper was called in, before it went to ROOT; taken out of the environment, since it holds for
# this process only.
CALLER = Path(os.environ.pop("SSD_CALLER_DIR", "") or Path.cwd())

Function = TypeVar("Function", bound=Callable[..., Any])


def explained(function: Function) -> Function:
    """Prints the project's own errors as text and exits with 1; anything else is a bug and keeps its traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        from build.errors import SSDError

        interrupts: list[int] = []

        def interrupt(number: int, frame: object) -> None:
            interrupts.append(number)
            raise KeyboardInterrupt

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupt)
        try:
            return function(*args, **kwargs)
        except SSDError as error:
            raise Exit(f"error: {error}", code=1) from None
        except KeyboardInterrupt:
            raise Exit("interrupted", code=130) from None
        except Exception:
            if interrupts:  # NumPy makes an ImportError of a KeyboardInterrupt while it is imported
                raise Exit("interrupted", code=130) from None
            raise
        finally:
            if signal.getsignal(signal.SIGINT) is interrupt:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    return run  # type: ignore[return-value]


def given(text: str) -> str:
    """A path that a task was given: a relative one is relative to the caller's folder."""
    return str(CALLER / text) if text else ""


def given_or_name(text: str) -> str:
    """The same for a value that may be a name, a URL or a path below ROOT: it stays as it is if no such path exists."""
    path, separator, test = text.partition("::")  # pytest's path::test
    return given(path) + separator + test if path and Path(given(path)).exists() else text


def path_of(text: str) -> Path | None:
    return Path(given(text)) if text else None


def need(c: Context, module: str, group: str) -> None:
    """Installs a group of pyproject.toml from its lock when its tools are not there yet."""
    if importlib.util.find_spec(module) is None:
        print(f"installing the '{group}' group ...", flush=True)
        c.run(f"{PYTHON} -m pip install --quiet --no-deps --require-hashes -r requirements/{group}.lock")
