"""Optional groups of packages, each in a folder of its own beside the environment's."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def optional(group: str) -> Path:
    """The folder of an optional group's packages, installed from its lock on first use."""
    lock, folder = ROOT / "requirements" / f"{group}.lock", Path(sys.prefix) / group
    stamp = hashlib.sha256(lock.read_bytes()).hexdigest()
    with (folder.parent / f".{group}.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        mark = folder / ".lock-sha256"
        if mark.is_file() and mark.read_text() == stamp:
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        arguments = ["--quiet", "--no-deps", "--require-hashes", "--target", str(folder), "-r", str(lock)]
        try:
            command = [sys.executable, "-m", "pip", "install", *arguments]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
        except (OSError, subprocess.SubprocessError) as error:
            reason = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1]
            pytest.skip(f"needs the packages of {lock.name}, which could not be installed: {reason}")
        mark.write_text(stamp)
    return folder
