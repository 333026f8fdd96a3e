"""System shared memory: pictures are written where the server reads them, instead of being sent.

A region's name leaves /dev/shm as soon as the server has mapped it. The memory lives on in the two mappings and goes
with them, so nothing is left in /dev/shm however this process ends. A killed process cannot tell the server to let go
of its mapping; the region's name tells whose it was, and the next client tells the server instead.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import threading
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .exceptions import SharedMemoryError

_FOLDER = Path("/dev/shm")
_NAME = re.compile(r"ssd_client_(\d+)_(\d+)_(\d+)_[0-9a-f]{16}")


def is_abandoned(name: str) -> bool:
    """Whether the process that made the region of this name has ended.

    Of a process in another container (another process namespace) nothing is known: its regions count as in use.
    """
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) != _namespace():
        return False
    process, started = int(match[2]), int(match[3])
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # it is another user's
        pass
    return _started(process) not in (None, started)


def _namespace() -> int:
    """Number of the namespace in which this process's number means something; 0 if the system does not tell."""
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _started(process: int) -> int | None:
    """When a process started, in the kernel's ticks since boot; None if the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The name of the program comes second, in parentheses, and may hold anything.
        return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    return None


class Region:
    """A piece of shared memory of this process's own.

    Args:
        byte_size: its size.

    Attributes:
        name: unique; what the server knows it by.
        key: what the server opens it by.
        byte_size: its size.

    Raises:
        SharedMemoryError: this machine has no /dev/shm, or not that much room in it.
    """

    def __init__(self, byte_size: int) -> None:
        process = os.getpid()
        self.name = f"ssd_client_{_namespace()}_{process}_{_started(process) or 0}_{uuid.uuid4().hex[:16]}"
        self.key = f"/{self.name}"
        self.byte_size = byte_size
        try:
            file = os.open(_FOLDER / self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                os.posix_fallocate(file, 0, byte_size)  # no room is an error now, not a crash at the first write
                self._memory = mmap.mmap(file, byte_size)
            except BaseException:
                self.hide()
                raise
            finally:
                os.close(file)
        except (OSError, AttributeError) as error:
            raise SharedMemoryError(
                f"cannot make {byte_size / 1e6:.1f} MB of shared memory in {_FOLDER}: {error}",
                why="it is full or too small (containers get 64 MB), or this system has none",
                fix="enlarge it (docker run --shm-size=1g), use smaller batches, or shared_memory=None",
            ) from None

    def images(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The region's first bytes as a UINT8 array of this shape; whoever holds it keeps the memory mapped."""
        return np.frombuffer(self._memory, np.uint8, count=int(np.prod(shape))).reshape(shape)

    def hide(self) -> None:
        """Take the name away; mappings stay."""
        (_FOLDER / self.name).unlink(missing_ok=True)


class RegionPool:
    """The regions that the server knows or may know. Safe from several threads."""

    def __init__(self) -> None:
        self._known: dict[str, Region] = {}
        self._free: list[Region] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many regions the server knows or may know."""
        return len(self._known)

    def add(self, region: Region) -> None:
        """Note a region that the server is told of. The caller uses it first."""
        with self._lock:
            self._known[region.name] = region

    def forget(self, region: Region) -> None:
        """Let go of a region that was taken."""
        with self._lock:
            self._known.pop(region.name, None)

    def take(self) -> Region | None:
        """The region that was given back last, or None."""
        with self._lock:
            return self._free.pop() if self._free else None

    def give_back(self, region: Region) -> None:
        """Offer a region that was taken or added to the next `take`."""
        with self._lock:
            if region.name in self._known:
                self._free.append(region)

    def clear(self) -> list[Region]:
        """Let go of all regions and return those that the server knows or may know."""
        with self._lock:
            regions = list(self._known.values())
            self._known.clear()
            self._free.clear()
            return regions
