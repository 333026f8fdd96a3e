"""Where figures come from: complete, true of this machine, and silent about whose it is."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from build.tensorrt.cuda import Gpu
from perf import environment


def test_capture_says_what_and_not_whose() -> None:
    facts = environment.capture()
    assert {"cpu", "cores", "cores_allowed", "memory_gib", "system"} <= facts.keys()
    assert {"load_average", "other_load", "gpus", "versions", "commit"} <= facts.keys()
    assert re.fullmatch(r"\d+\.\d+\.\d+", facts["versions"]["perf_analyzer"])
    assert {"python", "onnx", "onnxruntime", "onnxscript", "numpy", "pillow", "tritonclient"} <= set(facts["versions"])
    assert 0 <= facts["other_load"] <= 1
    assert 1 <= facts["cores_allowed"] <= facts["cores"]
    text = json.dumps(facts)
    assert str(environment.ROOT) not in text
    assert str(Path.home()) + "/" not in text
    assert f'"{getpass.getuser()}"' not in text
    assert socket.gethostname() not in re.findall(r"[\w.-]+", text)


def test_what_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert environment.perf_analyzer() == ""
    assert "perf_analyzer" not in environment.versions()


def test_gpus_are_those_that_doctor_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("NVIDIA L4", "8.9", 24576, "570.86", "12.8", "")
    monkeypatch.setattr(environment, "find_gpu", lambda machine: gpu)
    assert environment.capture()["gpus"] == [{"name": "NVIDIA L4", "memory_mib": 24576, "driver": "570.86"}]


def test_commit(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) is None

    def git(*words: str) -> str:
        names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a"}
        return subprocess.run(
            ["git", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/dev/null", *words],
            cwd=tmp_path,
            env={**os.environ, **names},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    assert environment.commit(tmp_path) == {"sha": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == {"sha": git("rev-parse", "HEAD"), "dirty": True}
