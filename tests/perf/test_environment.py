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
from types import SimpleNamespace

import pytest

from perf import environment


def test_capture_says_what_and_not_whose() -> None:
    facts = environment.capture(tritonserver="2.60.0")
    assert {"cpu", "cores", "cores_allowed", "memory_gib", "system"} <= facts.keys()
    assert {"governor", "load_average", "other_load", "container", "gpus", "versions", "commit"} <= facts.keys()
    assert facts["versions"]["tritonserver"] == "2.60.0"
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
    assert environment.versions(perf_analyzer="", mine="1").keys() >= {"python", "mine"}
    assert "perf_analyzer" not in environment.versions(perf_analyzer="")


@pytest.mark.parametrize(
    ("marker", "name"),
    [
        ("run/.containerenv", "podman"),
        (".dockerenv", "docker"),
        ("var/run/secrets/kubernetes.io", "kubernetes"),
        ("etc", ""),
    ],
)
def test_container(marker: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.delenv("container", raising=False)
    (tmp_path / marker).mkdir(parents=True)
    assert environment.container(tmp_path) == name


def test_gpus_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in: the API's shape, no GPU."""
    ended = []
    nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: ended.append(True),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: [b"NVIDIA L4", "NVIDIA H100"][handle],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=24 << 30),
        nvmlSystemGetDriverVersion=lambda: "570.86",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert [gpu["name"] for gpu in environment.gpus()] == ["NVIDIA L4", "NVIDIA H100"]
    assert environment.gpus()[0] == {"name": "NVIDIA L4", "memory_mib": 24576, "driver": "570.86"}
    assert len(ended) == 2

    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    nvml.nvmlInit = no_driver
    assert environment.gpus() == []


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
