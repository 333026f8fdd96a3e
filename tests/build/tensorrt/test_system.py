"""Which TensorRT the server here has, and which headers, packages and CUDA go with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.errors import RuntimeUnavailableError
from build.releases import RELEASES
from build.tensorrt import system

# Of NVIDIA's public repository, which does not tag every release.
TAGS = (
    "v8.6.0",
    "v8.6.1",
    "v10.0.0",
    "v10.5.0",
    "v10.11",
    "v10.13.0",
    "v10.13.2",
    "v10.13.3",
    "v10.16",
    "v11.1",
    "latest",
)


def test_the_version_is_in_the_name_of_the_librarys_file(tmp_path: Path) -> None:
    """As in the containers: a link with the SONAME, to a file with three numbers."""
    (tmp_path / "libnvinfer.so.10.13.2").touch()
    (tmp_path / "libnvinfer.so.10").symlink_to("libnvinfer.so.10.13.2")
    lines = (
        "libnvinfer_plugin.so.10 => /x/libnvinfer_plugin.so.10",
        f"libnvinfer.so.10 => {tmp_path}/libnvinfer.so.10",
    )
    listed = "\n".join(f"\t{line}" for line in lines)
    assert system.system_tensorrt(lambda command: (0, listed)) == "10.13.2"
    assert system.system_tensorrt(lambda command: (-1, "not there")) == ""


@pytest.mark.parametrize(
    ("tensorrt", "cuda"),
    [("8.6.0", "12.6"), ("10.5", "12.6"), ("10.11.0", "12.9"), ("10.13.0", "12.9"), ("10.13.2", "13.0"),
     ("10.13.3.9", "13.0"), ("10.16.1", "13.2"), ("11.1.0", "13.3"), ("12.0", "13.4")],
)  # fmt: skip
def test_cuda_goes_with_tensorrt(tensorrt: str, cuda: str) -> None:
    assert system.cuda_of(tensorrt) == cuda


def test_every_release_of_the_table_has_its_own_cuda() -> None:
    assert {release.tensorrt: system.cuda_of(release.tensorrt) for release in RELEASES} == {
        release.tensorrt: release.cuda for release in RELEASES
    }


@pytest.mark.parametrize(
    ("tensorrt", "packages"),
    [
        ("10.13.2", ["tensorrt-cu13==10.13.2.*", "cuda-python==13.*"]),
        ("10.11.0", ["tensorrt-cu12==10.11.0.*", "cuda-python==12.*"]),
        ("10.13.2.6", ["tensorrt-cu13==10.13.2.6", "cuda-python==13.*"]),
        ("8.6.0", ["tensorrt==8.6.0.*", "cuda-python==12.*"]),
    ],
)
def test_packages_are_those_of_the_server(tensorrt: str, packages: list[str]) -> None:
    assert system.packages(tensorrt) == packages


def test_without_a_server_it_says_where_to_run_it() -> None:
    with pytest.raises(RuntimeUnavailableError, match="name a version: --tensorrt"):
        system.packages("")


@pytest.mark.parametrize(
    ("tensorrt", "tag"),
    [("10.13.2", "v10.13.2"), ("10.13.1", "v10.13.0"), ("10.16.1", "v10.16"), ("10.11.0", "v10.11"), ("12.0", ""),
     ("11.1.0.106", "v11.1"), ("10.13.9", "v10.13.3"), ("8.6.1", "v8.6.1"), ("8.6.2", ""), ("10.7.0", "")],
)  # fmt: skip
def test_headers_are_its_own_or_the_nearest_of_the_same_minor_version(tensorrt: str, tag: str) -> None:
    assert system.tag_of(tensorrt, TAGS) == tag
