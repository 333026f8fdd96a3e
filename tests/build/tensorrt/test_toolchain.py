"""CMake, Ninja and nvcc from PyPI: on a stand-in of pip; the real packages when asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from build import optional
from build.files import ROOT
from build.tensorrt import plugins, system, toolchain
from build.tensorrt.plugins import build_plugins
from build.tensorrt.toolchain import ToolchainError, bring, tools
from tests.build.tensorrt.test_plugins import bare, executable, fake_tensorrt

__all__ = ["bare"]  # a fixture
NAMES = ("cmake/data/bin/cmake", "bin/ninja", "nvidia/cu13/bin/nvcc")


class Pip:
    """Installs files of these names; counts how often."""

    def __init__(self, *names: str, status: int = 0) -> None:
        self.names, self.status, self.calls = names, status, 0

    def __call__(self, folder: Path, lock: Path) -> str:
        self.calls += 1
        for name in self.names:
            executable(folder / name).chmod(0o644)
        return "no network" if self.status else ""


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "tools.lock"
    path.write_text("cmake==3\n")
    return path


def test_they_are_brought_once_and_again_when_the_lock_changes(
    tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip, folder = Pip(*NAMES), tmp_path / "env" / "tools"
    monkeypatch.setattr(optional, "_pip", pip)
    assert tools(folder, lock) is None
    programs = bring(folder, lock)
    assert [str(path.relative_to(folder)) for path in (programs.cmake, programs.ninja, programs.nvcc)] == list(NAMES)
    assert all(path.stat().st_mode & 0o100 for path in (programs.cmake, programs.ninja, programs.nvcc))
    assert bring(folder, lock) == tools(folder, lock) == programs
    assert pip.calls == 1
    lock.write_text("cmake==4\n")
    assert tools(folder, lock) is None
    bring(folder, lock)
    assert pip.calls == 2


@pytest.mark.parametrize("pip", [Pip(*NAMES, status=1), Pip(*NAMES[:2])])
def test_what_fails_leaves_nothing(pip: Pip, tmp_path: Path, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "_pip", pip)
    with pytest.raises(ToolchainError):
        bring(tmp_path / "env" / "tools", lock)
    assert [path.name for path in (tmp_path / "env").iterdir()] == [".tools.lock"]


def test_pips_reason_is_told(tmp_path: Path) -> None:
    lock = tmp_path / "wrong.lock"
    lock.write_text("cmake==0 --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(ToolchainError, match="cannot be installed from PyPI") as error:
        bring(tmp_path / "tools", lock)
    assert "cmake" in error.value.why


def test_the_lock_is_of_the_group_and_hashed() -> None:
    group = tomlkit.parse((ROOT / "pyproject.toml").read_text())["dependency-groups"]["plugin_tools"]
    text = toolchain.LOCK.read_text()
    pinned = {line.split("==")[0] for line in text.splitlines() if "==" in line}
    assert pinned == {name.split("<")[0].split("==")[0] for name in group}
    assert text.count("--hash=sha256:") >= len(pinned)
    assert f"nvidia-cuda-nvcc=={toolchain.CUDA_MAJOR}." in text


@pytest.fixture
def brought(bare: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine without nvcc and CMake, tools as if brought, and the commands that a build runs."""
    commands: list[list[str]] = []
    made = toolchain.Tools(*(executable(bare / "tools" / name) for name in ("cmake", "ninja", "nvcc")))
    monkeypatch.setattr(toolchain, "bring", lambda: made)
    monkeypatch.setattr(toolchain, "tools", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: None if name in ("nvcc", "cmake") else f"/usr/bin/{name}")
    monkeypatch.setattr(system, "system_tensorrt", lambda: "")

    def run(command: Any, variables: Any = None) -> str:
        commands.append([str(word) for word in command])
        return "x\trefs/tags/v10.13.2\nx\trefs/tags/v10.16" if "ls-remote" in command else ""

    monkeypatch.setattr(plugins, "_run", run)
    return commands


def test_a_build_takes_what_was_brought(brought: list[list[str]], bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(fake_tensorrt(bare / "TensorRT", "10.16.1")))
    assert build_plugins(output=bare / "lib", work=bare / "out", bring=True).stage == "plugin"
    configure = next(command for command in brought if "--preset" in command)
    assert configure[0] == str(bare / "tools" / "cmake")
    assert {"-GNinja", f"-DCMAKE_MAKE_PROGRAM={bare / 'tools' / 'ninja'}"} <= set(configure)
    assert f"-DCMAKE_CUDA_COMPILER={bare / 'tools' / 'nvcc'}" in configure


def test_nvcc_of_another_cuda_is_not_taken(
    brought: list[list[str]], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(fake_tensorrt(bare / "TensorRT", "10.11.0")))
    built = build_plugins(output=bare / "lib", work=bare / "out", bring=True)
    assert built.stage == "reference"
    assert "TensorRT 10.11.0 is of CUDA 12.9, of which PyPI has no nvcc" in built.missing[0]
    assert "cuda-nvcc-12-9" in built.missing[0]


def test_the_headers_are_those_of_the_servers_library(
    brought: list[list[str]], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "system_tensorrt", lambda: "10.13.2")
    asked = []

    def fetched(source: str, ref: str) -> Path:
        asked.append((source, ref))
        return fake_tensorrt(bare / "fetched", "10.13.2")

    monkeypatch.setattr(plugins, "_fetched", fetched)
    assert build_plugins(output=bare / "lib", work=bare / "out", bring=True).stage == "plugin"
    assert asked == [(plugins.TENSORRT_REPOSITORY, "v10.13.2")]
    monkeypatch.setattr(system, "system_tensorrt", lambda: "10.99.0")
    built = build_plugins(output=bare / "lib", work=bare / "out", bring=True)
    assert "has TensorRT 10.99.0 without its headers, and https://github.com/NVIDIA/TensorRT has none" in str(
        built.missing
    )
    with pytest.raises(plugins.PluginBuildError, match="the stage plugin cannot be built here"):
        build_plugins(stage="plugin", output=bare / "lib", work=bare / "out", bring=True)


def test_headers_that_were_fetched_are_taken_without_a_network(
    brought: list[list[str]], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "system_tensorrt", lambda: "10.16.1")

    def offline(command: Any, variables: Any = None) -> str:
        if "ls-remote" in command:
            raise plugins.PluginBuildError("git ended with 128", why="Could not resolve host\nmore")
        return ""

    monkeypatch.setattr(plugins, "_run", offline)
    built = build_plugins(output=bare / "lib", work=bare / "out", bring=True)
    assert built.stage == "core"
    assert "cannot be fetched: Could not resolve host" in built.missing[-1]
    fake_tensorrt(bare / "cache" / "ssd-on-triton" / "tensorrt" / "v10.13.2-x", "10.13.2")
    fake_tensorrt(bare / "cache" / "ssd-on-triton" / "tensorrt" / "v10.16-x", "10.16.0")
    assert build_plugins(output=bare / "lib", work=bare / "out", bring=True).stage == "plugin"


def test_nothing_is_brought_for_what_is_not_built(
    brought: list[list[str]], bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == "nvcc" else f"/usr/bin/{name}")
    monkeypatch.setattr(toolchain, "bring", lambda: pytest.fail("brought"))
    assert build_plugins(output=bare / "lib", work=bare / "out", bring=True).stage == "reference"


@pytest.mark.long
def test_the_real_packages_build_the_core(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought = bring(tmp_path / "tools")
    monkeypatch.setattr(toolchain, "bring", lambda: brought)
    monkeypatch.setattr(toolchain, "tools", lambda: None)
    monkeypatch.setattr("shutil.which", lambda name: None if name in ("nvcc", "cmake") else f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    built = build_plugins(stage="core", architectures="90", output=tmp_path / "lib", work=tmp_path / "out", bring=True)
    symbols = subprocess.run(["nm", "-D", built.libraries[-1]], capture_output=True, text=True, check=True).stdout
    assert " T ssdNmsLaunch" in symbols
