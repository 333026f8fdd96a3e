"""CMake, Ninja and nvcc from PyPI, for machines without them: an environment of its own, from a hashed lock.

It is a folder of packages, not a virtual environment: nothing in it is imported.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build.errors import SSDError
from build.files import ROOT, explained, relative, sha256

LOCK = ROOT / "requirements" / "plugin_tools.lock"
# In .venv; a Python that is no environment's belongs to the system.
FOLDER = (Path(sys.prefix) if sys.prefix != sys.base_prefix else ROOT / ".cache") / "plugin_tools"
CUDA_MAJOR = "13"  # of the nvcc in the lock


class ToolchainError(SSDError):
    """The tools could not be installed; nothing was kept."""


@dataclass(frozen=True)
class Tools:
    """The programs."""

    cmake: Path
    ninja: Path
    nvcc: Path


def tools(folder: Path = FOLDER, lock: Path = LOCK) -> Tools | None:
    """The programs, if they have been brought from this lock."""
    stamp = folder / ".stamp"
    if not stamp.is_file() or stamp.read_text() != sha256(lock):
        return None
    return _programs(folder)


def bring(folder: Path = FOLDER, lock: Path = LOCK) -> Tools:
    """The programs, installed on first use and again when the lock changes (130 MB to download).

    Raises:
        ToolchainError: they cannot be installed.
        WriteError: the folder cannot be written.
    """
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f".{folder.name}.lock").open("a") as waiting:
            fcntl.flock(waiting, fcntl.LOCK_EX)  # another build may be bringing them
            found = tools(folder, lock)
            if found is not None:
                return found
            print(f"bringing cmake, ninja and nvcc into {relative(folder)} (130 MB to download) ...", file=sys.stderr)
            new = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(new, ignore_errors=True)
            try:
                _install(new, lock)
                programs = _programs(new)
                (new / ".stamp").write_text(sha256(lock))
                shutil.rmtree(folder, ignore_errors=True)
                new.rename(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    return Tools(*(folder / path.relative_to(new) for path in (programs.cmake, programs.ninja, programs.nvcc)))


def _install(folder: Path, lock: Path) -> None:
    options = ["--quiet", "--require-hashes", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("WARNING")]
        raise ToolchainError(
            "cmake, ninja and nvcc cannot be installed from PyPI",
            why="\n".join(lines[-8:]) or f"pip ended with {done.returncode}",
            fix="check the network and pip's index, or install the system's packages (CUDA_HOME names nvcc's folder)",
        )


def _programs(folder: Path) -> Tools:
    """Where the packages have them.

    Raises:
        ToolchainError: one is not there.
    """
    places = {
        "cmake": (folder / "cmake" / "data" / "bin" / "cmake",),
        "ninja": (folder / "ninja" / "data" / "bin" / "ninja", folder / "bin" / "ninja"),
        "nvcc": (folder / "nvidia" / f"cu{CUDA_MAJOR}" / "bin" / "nvcc",),
    }
    found = {}
    for name, paths in places.items():
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ToolchainError(f"the package of {name} has no {paths[0].relative_to(folder)}")
        if not os.access(path, os.X_OK):
            path.chmod(0o755)
        found[name] = path
    return Tools(**found)
