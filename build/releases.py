"""Which TensorRT and CUDA each release of Triton has: a plan runs only in the TensorRT that it was built with."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Release:
    """What one Triton container holds.

    Attributes:
        container: the tag of nvcr.io/nvidia/tritonserver.
        triton, tensorrt, cuda: versions.
        confirmed: False where the version of TensorRT stands in no release note that we read.
    """

    container: str
    triton: str
    tensorrt: str
    cuda: str
    confirmed: bool = True

    @property
    def source(self) -> str:
        """NVIDIA's release note; its table of versions is the Deep Learning Frameworks Support Matrix."""
        base = "https://docs.nvidia.com/deeplearning/triton-inference-server/release-notes"
        return f"{base}/rel-{self.container.replace('.', '-')}.html"


SUPPORT_MATRIX = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/index.html"
RELEASES = (
    Release("24.10", "2.51", "10.5", "12.6", confirmed=False),
    Release("25.06", "2.59", "10.11", "12.9"),
    Release("25.08", "2.60", "10.13.2", "13.0"),
    Release("26.05", "2.69", "10.16.1", "13.2"),
    Release("26.06", "2.70", "11.0", "13.3"),
    Release("26.07", "2.71", "11.1", "13.3"),
    Release("26.08", "2.72", "11.2", "13.4"),
)


def release_of(triton: str) -> Release | None:
    """The container release of a tritonserver version; None where the table has none."""
    return next((release for release in RELEASES if same_minor(triton, release.triton)), None)


def numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def same_minor(left: str, right: str) -> bool:
    """Whether two versions agree in their first two numbers."""
    return numbers(left)[:2] == numbers(right)[:2]
