"""Where a version is prepared: beside the repository, or in the model's folder where no rename leads from there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from build.publish import staging


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model_repository"
    root.mkdir()
    return root / "tiny"


@pytest.fixture(params=["a mount point", "in somebody else's folder"])
def refused(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rename leads into the repository or out of it."""
    if request.param == "a mount point":
        rename = os.rename

        def at_mount(source: Any, target: Any) -> None:
            if (folder.parent in Path(source).parents) != (folder.parent in Path(target).parents):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            rename(source, target)

        monkeypatch.setattr(os, "rename", at_mount)
    else:
        mkdir = os.mkdir

        def elsewhere(path: Any, *args: Any, **options: Any) -> None:
            if folder.parent not in Path(path).parents:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            mkdir(path, *args, **options)

        monkeypatch.setattr(os, "mkdir", elsewhere)


def traces(folder: Path) -> list[str]:
    return [str(path) for path in (*folder.parent.parent.rglob("*"),) if path not in (folder.parent, folder)]


def test_the_first_version_lies_where_no_server_looks(folder: Path) -> None:
    place = staging.place(folder)
    assert folder.parent not in place.parents
    (place / "1").mkdir(parents=True)
    place.rename(folder)
    assert staging.place(folder) == folder / staging.NAME
    staging.clear(folder)
    assert traces(folder) == [str(folder / "1")]
    staging.remove(folder)
    assert not folder.exists()
    assert traces(folder) == []


@pytest.mark.usefixtures("refused")
def test_where_no_rename_leads_in_it_is_the_models_folder(folder: Path) -> None:
    place = staging.place(folder)
    assert place == folder / staging.NAME
    (place / "1").mkdir(parents=True)
    staging.clear(folder)
    assert not folder.exists(), "nothing is left of a publish that failed"
    place = staging.place(folder)
    (place / "1").mkdir(parents=True)
    (place / "1").rename(folder / "1")
    staging.clear(folder)
    assert traces(folder) == [str(folder / "1")]
    staging.remove(folder)
    assert not folder.exists()
    assert traces(folder) == []
