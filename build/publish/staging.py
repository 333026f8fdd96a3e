"""Where a version is prepared before a server may see it: on the repository's own file system."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

NAME = ".publishing"


def place(folder: Path) -> Path:
    """A path, not there yet, from which a version can be renamed into a model's folder, or be renamed to that folder.

    Before the model's folder exists, that is beside the repository, where no server looks. A rename from there fails
    where the repository is a mount point (a volume of a container), or where what lies around it is somebody else's.
    Then the model's folder is made, and the place is in it: a server that polls may say meanwhile that it lacks a
    config.pbtxt.

    Args:
        folder: of the model, in its repository, which exists; the caller holds the model's lock.

    Raises:
        OSError: nothing can be written.
    """
    if not folder.exists() and not _reaches(folder):
        folder.mkdir()
    return folder / NAME if folder.exists() else _beside(folder)


def clear(folder: Path) -> None:
    """Removes what `place` and an interrupted publish left; the caller holds the model's lock."""
    beside = _beside(folder)
    for left in (folder / NAME, beside):
        shutil.rmtree(left, ignore_errors=True)
    for empty in (folder, beside.parent):  # another model's first publish may be there
        with suppress(OSError):
            empty.rmdir()


def remove(folder: Path) -> None:
    """Removes a model's folder: all at once where a rename leads out of the repository, else what tells its owner last.

    Raises:
        OSError: it cannot be removed.
    """
    beside = _beside(folder)
    try:
        beside.parent.mkdir(exist_ok=True)
        folder.rename(beside)
    except OSError:
        for version in [path for path in folder.iterdir() if path.is_dir()]:
            shutil.rmtree(version)
        shutil.rmtree(folder)
    clear(folder)


def _beside(folder: Path) -> Path:
    repository = folder.parent.resolve()
    return repository.parent / f".{repository.name}{NAME}" / folder.name


def _reaches(folder: Path) -> bool:
    """Whether a rename leads from beside the repository into it. Nothing else tells that of a bind mount."""
    beside = _beside(folder)
    there, here = beside / ".probe", folder.parent / f".{folder.name}.probe"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        there.touch()
        there.rename(here)
    except OSError:
        return False
    finally:
        here.unlink(missing_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
    return True
