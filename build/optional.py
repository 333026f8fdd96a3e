"""Packages of a hashed lock in a folder of their own: installed once, whole or not at all, again when the lock changes.

Such a folder is no virtual environment: a program in it is run, or the folder is put on a Python's path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from build.errors import SSDError
from build.files import ROOT, explained, locked, relative, sha256

_STAMP = ".stamp"
_PATIENCE = 600  # seconds


def lock_of(group: str) -> Path:
    """The lock of a group of pyproject.toml."""
    return ROOT / "requirements" / f"{group}.lock"


def folder_of(group: str) -> Path:
    """Where a group's packages lie: in .venv; a Python that is no environment's belongs to the system."""
    return (Path(sys.prefix) if sys.prefix != sys.base_prefix else ROOT / ".cache") / group


def installed(folder: Path, lock: Path) -> bool:
    """Whether the folder was installed whole, from this lock, by this Python."""
    try:
        return (folder / _STAMP).read_text() == _stamp(lock)
    except OSError:
        return False


def install(
    folder: Path,
    lock: Path,
    names: str,
    *,
    fix: str,
    size: str = "",
    error: type[SSDError] = SSDError,
    check: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Installs what the lock names, if it is not there yet; waits for another process that does so.

    Args:
        folder, lock: where, and what.
        names: what it is, in words.
        fix: what to do where that fails.
        size: of the download, in words.
        error: raised where that fails.
        check: called with the new folder before it is taken; may raise.

    Raises:
        error: pip failed, or the folder cannot be written. What was there before stays.
    """
    with explained(folder, error=error), locked(folder.with_name(f".{folder.name}.lock")):
        if installed(folder, lock):
            return
        told = f" ({size} to download)" if size else ""
        print(f"installing {names} into {relative(folder)}{told} ...", file=sys.stderr, flush=True)
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        try:
            reason = _pip(new, lock)
            if reason:
                raise error(f"{names} cannot be installed from PyPI", why=reason, fix=fix)
            check(new)
            (new / _STAMP).write_text(_stamp(lock))
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _stamp(lock: Path) -> str:
    return f"{sha256(lock)} {sys.version}"


def _pip(folder: Path, lock: Path) -> str:
    """Why it failed, in pip's own last words; empty if it did not."""
    pip = [sys.executable, "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    if subprocess.run([*pip[:3], "--version"], capture_output=True, check=False).returncode:
        pip = ["uv", "pip", "install", "--python", sys.executable]
    options = ["--quiet", "--require-hashes", "--no-deps", "--target", str(folder), "-r", str(lock)]
    try:
        done = subprocess.run(
            [*pip, *options], capture_output=True, text=True, errors="replace", timeout=_PATIENCE, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        return str(error)
    if not done.returncode:
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("WARNING")]
    return "\n".join(lines[-8:]) or f"pip ended with {done.returncode}"
