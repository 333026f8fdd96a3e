"""Finding compilers and headers for the plugin, what is said when one is missing, and what a built file says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from build.tensorrt import plugins
from build.tensorrt.plugins import PluginBuild, PluginBuildError, build_plugins, find_nvcc, find_tensorrt, plugin_info


def fake_tensorrt(root: Path, version: str = "10") -> Path:
    """A folder that looks like TensorRT's headers of a version."""
    include = root / "include"
    include.mkdir(parents=True)
    (include / "NvInfer.h").write_text("// nothing\n")
    parts = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=False)
    lines = [f"#define NV_TENSORRT_{part} {number} //!< {part.lower()}\n" for part, number in parts]
    (include / "NvInferVersion.h").write_text("".join(lines))
    return root


def executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with nothing of NVIDIA's, and a cache of its own."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plugins, "_SYSTEM_INCLUDES", (str(tmp_path / "usr"),))
    monkeypatch.setattr(plugins, "_SYSTEM_CUDA", tmp_path / "usr" / "cuda")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "site-packages"))
    real = shutil.which
    monkeypatch.setattr("shutil.which", lambda name: None if name == "nvcc" else real(name))
    return tmp_path


def test_nvcc_is_found_in_its_four_places_in_order(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_nvcc() is None
    package = executable(bare / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc")
    assert find_nvcc() == package
    system = executable(bare / "usr" / "cuda" / "bin" / "nvcc")
    assert find_nvcc() == system
    home = executable(bare / "home" / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(bare / "home"))
    assert find_nvcc() == home
    monkeypatch.setattr("shutil.which", lambda name: f"/somewhere/{name}")
    assert find_nvcc() == Path("/somewhere/nvcc")


def test_headers_come_from_the_root_else_the_system(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tensorrt() is None
    (bare / "usr").mkdir()
    (bare / "usr" / "NvInfer.h").touch()
    assert find_tensorrt() == Path("/usr")
    root = fake_tensorrt(bare / "TensorRT-10")
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    assert find_tensorrt() == root
    monkeypatch.setenv("TENSORRT_ROOT", str(bare / "nowhere"))
    with pytest.raises(PluginBuildError, match=r"there is no include/NvInfer\.h in it"):
        find_tensorrt()


def test_headers_are_fetched_once_and_kept(bare: Path) -> None:
    source = fake_tensorrt(bare / "public repository")
    (source / "large.bin").write_bytes(b"not wanted")
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "release"], ["tag", "v10.0"]):
        subprocess.run(["git", "-C", source, *command], check=True)
    root = find_tensorrt(str(source), "v10.0")
    assert root is not None
    assert (root / "include" / "NvInfer.h").read_text() == "// nothing\n"
    assert [path.name for path in root.iterdir()] == ["include"]
    assert root.is_relative_to(bare / "cache")
    shutil.rmtree(source)
    assert find_tensorrt(str(source), "v10.0") == root  # from the cache
    with pytest.raises(PluginBuildError, match="git clone"):
        find_tensorrt(str(source), "v99")
    assert [path.name for path in root.parent.iterdir()] == [root.name]  # nothing half-made is left


def test_a_source_needs_a_ref_and_a_repository_needs_headers(bare: Path) -> None:
    with pytest.raises(PluginBuildError, match="needs a tag or branch"):
        find_tensorrt("somewhere")
    source = bare / "other"
    source.mkdir()
    (source / "README").touch()
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", source, *command], check=True)
    with pytest.raises(PluginBuildError, match=r"has no include/NvInfer\.h at main"):
        find_tensorrt(str(source), "main")


def test_without_nvcc_the_reference_is_built_and_the_rest_named(bare: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    build = build_plugins(output=bare / "lib", work=bare / "out")
    assert build.stage == "reference"
    assert build.libraries == (bare / "lib" / "libssd_nms_reference.so",)
    assert [reason.split(":")[0] for reason in build.missing] == ["the CUDA core", "the TensorRT plugin"]
    text = str(build)
    assert "built" in text
    assert "not built: the CUDA core: nvcc is not on PATH" in text
    assert "--tensorrt-ref v10.16" in text
    with pytest.raises(PluginBuildError, match="the stage plugin cannot be built here"):
        build_plugins(stage="plugin", output=bare / "lib", work=bare / "out")


def test_a_failing_compiler_is_quoted(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(PluginBuildError, match=r"--preset reference .*ended with 1"):
        build_plugins(stage="reference", output=bare / "lib", work=bare / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"stage": "all"}, "there is no stage 'all'"), ({"architectures": "sm_90"}, "architectures is 'sm_90'")],
)
def test_nonsense_is_refused(bare: Path, arguments: dict[str, str], words: str) -> None:
    with pytest.raises(PluginBuildError, match=words):
        build_plugins(**arguments, output=bare / "lib", work=bare / "out")  # type: ignore[arg-type]


@pytest.mark.parametrize("architectures", ["90", "80,90", "90-real;120-virtual", "90a", "native", ""])
def test_architectures_may_be_written_in_these_ways(bare: Path, architectures: str) -> None:
    with pytest.raises(PluginBuildError, match="the stage core cannot be built here"):
        build_plugins(stage="core", architectures=architectures, output=bare / "lib", work=bare / "out")


def test_plugin_info_is_read_without_loading(tmp_path: Path) -> None:
    library = tmp_path / "libssd_nms.so"
    with pytest.raises(PluginBuildError, match="cannot be read"):
        plugin_info(library)
    library.write_bytes(b"\x7fELF nothing")
    with pytest.raises(PluginBuildError, match="is not the SSDNMS plugin"):
        plugin_info(library)
    library.write_bytes(b'\x7fELF\0SSD_NMS_PLUGIN_INFO:{"plugin": "SSDNMS", "tensorrt": "10.16.1"}\0 more')
    assert plugin_info(library) == {"plugin": "SSDNMS", "tensorrt": "10.16.1"}
    assert "tensorrt: 10.16.1" in str(PluginBuild("plugin", (library,), ()))
