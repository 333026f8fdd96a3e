"""A tiny model, built, and where it is published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from build.contract import Target
from build.graph.attach import attach
from build.publish import backend, repository
from build.publish.backend import Backend
from build.spec import Spec, load
from tests.build import tiny_model

LIBRARIES = ("libtriton_ssd_onnxruntime.so", "libonnxruntime.so.1")

Publish = Callable[[], int]


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return load(tiny_model.write(tmp_path / "models" / "tiny"))


@pytest.fixture
def built(spec: Spec, tmp_path: Path) -> Path:
    path = tmp_path / "built.onnx"
    path.write_bytes(attach(spec).SerializeToString())
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The model repository; not there yet."""
    return tmp_path / "model_repository"


@pytest.fixture
def stand_in() -> Backend:
    """Our backend's name and sources, with digests of no libraries: for what is published and never served."""
    published = backend.of({"serving": {"backend": backend.NATIVE}})
    assert published is not None
    return Backend(published.name, "a stand-in", {}, published.sources, dict.fromkeys(LIBRARIES, "ab" * 32))


@pytest.fixture
def publish(spec: Spec, built: Path, root: Path, stand_in: Backend) -> Publish:
    """Publishes the tiny model once more; returns the version."""
    return lambda: repository.publish(spec, built, root, Target("onnxruntime"), served_by=stand_in)
