"""Publishing where disks lack something, and what it makes of files that somebody deleted or damaged."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from build import files
from build.errors import PublishError
from build.publish import repository
from tests.build.publish.conftest import Publish
from tests.build.publish.test_repository import check_whole


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_network_disk_without_locks(
    root: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    held = root / ".tiny.lock.held"
    with repository._locked(root, "tiny"):
        assert held.read_text().split()[1] == str(os.getpid())
        with pytest.raises(PublishError, match=r"by another process(?s:.*)tiny\.lock\.held"):
            publish()
    assert publish() == 1
    assert not held.exists()
    gone = subprocess.Popen(["true"])
    gone.wait()
    held.write_text(f"{files.socket.gethostname()} {gone.pid}")  # it was killed
    assert publish() == 2
    held.write_text("another-machine 1")
    with pytest.raises(PublishError, match="if that is gone, remove the file"):
        publish()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_disk_that_cannot_flush(root: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert [publish(), publish()] == [1, 2]
    check_whole(root, [1, 2], 2)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["the served version", "all versions", "the model"])
def test_a_number_is_never_used_twice(root: Path, publish: Publish, gone: str) -> None:
    for _ in range(3):
        publish()
    for name in {"the served version": ["3"], "all versions": ["2", "3"], "the model": [""]}[gone]:
        shutil.rmtree(root / "tiny" / name)
    assert publish() == 4


CONFIG_DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "half": lambda config: os.truncate(config, config.stat().st_size // 2),
    "empty": lambda config: config.write_text(""),
    "no text": lambda config: config.write_bytes(b"\xff\xfe\x00"),
    "of another version": lambda config: config.write_bytes((config.parent / "1" / "config.pbtxt").read_bytes() + b"#"),
}


@pytest.mark.parametrize("what", CONFIG_DAMAGES)
def test_a_damaged_config_is_a_fault_that_a_publish_mends(root: Path, publish: Publish, what: str) -> None:
    publish()
    publish()
    assert repository.fault(root / "tiny") == ""
    CONFIG_DAMAGES[what](root / "tiny" / "config.pbtxt")
    assert "config.pbtxt" in repository.fault(root / "tiny")
    if what in ("half", "empty", "no text"):
        with pytest.raises(PublishError, match=r"damaged(?s:.*)or serve version 2: cp .*/2/config\.pbtxt"):
            repository.rollback(root, "tiny")
    elif what == "gone":
        with pytest.raises(PublishError, match=r"lost its config\.pbtxt"):
            repository.rollback(root, "tiny")
    assert publish() == 3
    assert repository.fault(root / "tiny") == ""
    assert repository.served_version(root, "tiny") == 3
