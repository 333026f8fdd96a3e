"""Optional groups of packages, each in a folder of its own beside the environment's."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.errors import SSDError
from build.optional import folder_of, install, lock_of


def optional(group: str) -> Path:
    """The folder of an optional group's packages, installed from its lock on first use."""
    folder, lock = folder_of(group), lock_of(group)
    try:
        install(folder, lock, lock.name, fix="")
    except SSDError as error:
        pytest.skip(f"needs the packages of {lock.name}: {error.what}: {error.why.splitlines()[-1]}")
    return folder
