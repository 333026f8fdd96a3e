"""Where things are, what is in them, and writing them whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from build.errors import SSDError, WriteError

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"
REPOSITORY = ROOT / "model_repository"
ARTIFACTS = ROOT / "artifacts"
IMPORT_FILE = "import.json"  # in models/<name>/: what an import recognised, and its proof

# What file systems that lack a function answer to it: network disks without a lock service, FUSE without fsync.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_CAUSES = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("your disk quota is used up", "free some space"),
    errno.EROFS: ("it is mounted read-only", "write on the machine that owns it, or mount it for writing"),
    errno.EACCES: ("it belongs to another user", "change its owner, or work as that user"),
    errno.EPERM: ("it belongs to another user", "change its owner, or work as that user"),
    errno.EXDEV: (
        "it is to lie in a file system of its own, which is mounted there",
        "make that very folder first (mkdir), and try again",
    ),
}


def relative(path: Path) -> Path:
    """A path below the project's root as people know it; any other path as it is."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flush(descriptor: int) -> None:
    """Flushes a file or folder to disk, where the file system can do that.

    Raises:
        OSError: it can, and it failed.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a lock file, made where it is missing, until the end of the block or of the process.

    Where the file system has no locks, a second file beside it, `<name>.held`, says who holds it; a holder on this
    machine that is gone counts as gone.

    Args:
        path: the lock file.
        wait: whether to wait for another process that holds it.

    Raises:
        BlockingIOError: another process holds it, and `wait` is False.
        OSError: it cannot be opened.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            with _held(path.with_name(f"{path.name}.held"), wait):
                yield
        else:
            yield


@contextmanager
def _held(path: Path, wait: bool) -> Iterator[None]:
    us = f"{socket.gethostname()} {os.getpid()}"
    while True:
        try:
            with path.open("x") as held:
                held.write(us)
            break
        except FileExistsError:
            if _gone(path):
                path.unlink(missing_ok=True)
            elif wait:
                time.sleep(0.1)
            else:
                why = "its process holds it; if that is gone, remove the file"
                raise BlockingIOError(errno.EAGAIN, why, str(path)) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _gone(path: Path) -> bool:
    """Whether the holder named in the file was a process of this machine, and has ended."""
    with suppress(OSError, ValueError):
        host, process = path.read_text(encoding="utf-8-sig").split()
        return host == socket.gethostname() and not Path(f"/proc/{int(process)}").exists()
    return False


@contextmanager
def explained(
    path: Path, what: str = "cannot be written, and is as it was", error: type[SSDError] = WriteError
) -> Iterator[None]:
    """Turns what the operating system refuses inside the block into an error that says why and what to do.

    Args:
        path: the file or folder that the block writes.
        what: what that means for it.
        error: the type of the error.
    """
    try:
        yield
    except OSError as refused:
        why, fix = _CAUSES.get(refused.errno or 0, ("", "check the folder and try again"))
        named = f": {refused.filename}" if refused.filename and str(refused.filename) != str(path) else ""
        raise error(f"{path}: {what}: {refused.strerror or refused}{named}", why=why, fix=fix) from refused


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it replaces `path` when the block ends, and goes if the block raises.

    Raises:
        WriteError: the operating system refuses.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def write(path: Path, content: bytes | str) -> None:
    """Writes a file, whole or not at all; a text as UTF-8.

    Raises:
        WriteError: the operating system refuses.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file for people and machines, whole or not at all.

    Raises:
        WriteError: the operating system refuses.
    """
    write(path, json.dumps(value, indent=2) + "\n")
