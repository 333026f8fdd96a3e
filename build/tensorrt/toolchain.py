"""CMake, Ninja and nvcc from PyPI, for machines without them: an environment of its own, from a hashed lock.

It is a folder of packages, not a virtual environment: nothing in it is imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from build import optional
from build.errors import SSDError

GROUP = "plugin_tools"
LOCK, FOLDER = optional.lock_of(GROUP), optional.folder_of(GROUP)
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
    if not optional.installed(folder, lock):
        return None
    return _programs(folder)


def bring(folder: Path = FOLDER, lock: Path = LOCK) -> Tools:
    """The programs, installed on first use and again when the lock changes (130 MB to download).

    Raises:
        ToolchainError: they cannot be installed.
    """
    fix = "check the network and pip's index, or install the system's packages (CUDA_HOME names nvcc's folder)"
    names = "cmake, ninja and nvcc"
    optional.install(folder, lock, names, fix=fix, size="130 MB", error=ToolchainError, check=_programs)
    return _programs(folder)


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
