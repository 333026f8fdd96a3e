"""Folders of packages: whole or not there, and of the lock that is there now; pip is a stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest

from build import optional
from build.errors import SSDError


class CheckError(SSDError):
    """What a caller finds wrong."""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "group.lock"
    path.write_text("package==1\n")
    return path


def pip(folder: Path, lock: Path) -> str:
    folder.mkdir()
    (folder / "package.py").write_text(lock.read_text())
    return ""


def test_a_folder_is_of_its_lock(tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "_pip", pip)
    folder = tmp_path / "env" / "group"
    optional.install(folder, lock, "it", fix="")
    assert optional.installed(folder, lock)
    (folder / ".stamp").unlink()  # as after an installation that was killed: that the files exist says nothing
    assert not optional.installed(folder, lock)
    optional.install(folder, lock, "it", fix="")
    lock.write_text("package==2\n")
    assert not optional.installed(folder, lock)
    optional.install(folder, lock, "it", fix="")
    assert (folder / "package.py").read_text() == "package==2\n"


def test_what_was_there_stays_where_the_new_one_fails(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "_pip", pip)
    folder = tmp_path / "group"
    optional.install(folder, lock, "it", fix="")
    lock.write_text("package==2\n")

    def check(new: Path) -> None:
        raise CheckError("it has no program")

    with pytest.raises(CheckError, match="no program"):
        optional.install(folder, lock, "it", fix="", check=check)
    monkeypatch.setattr(optional, "_pip", lambda folder, lock: "no network")
    with pytest.raises(CheckError, match="it cannot be installed from PyPI") as told:
        optional.install(folder, lock, "it", fix="try again", error=CheckError)
    assert (told.value.why, told.value.fix) == ("no network", "try again")
    assert (folder / "package.py").read_text() == "package==1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".group.lock", "group", "group.lock"]


def test_a_folder_that_cannot_be_written_is_the_callers_error(tmp_path: Path, lock: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckError, match="cannot be written"):
        optional.install(tmp_path / "file" / "group", lock, "it", fix="", error=CheckError)
