"""A tiny model, built, and where it is published; libraries of a few bytes in place of ONNX Runtime's 29 MB."""

from __future__ import annotations

from pathlib import Path

import pytest

from build.graph.attach import attach
from build.publish import backend
from build.publish.backend import Backend
from build.spec import Spec, load
from tests.build import tiny_model

LIBRARIES = ("libtriton_ssd_onnxruntime.so", "libonnxruntime.so.1")


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
def stand_in(tmp_path: Path) -> Backend:
    """Our backend's name and sources, with files that are no libraries: for what is published and never served."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    for name in LIBRARIES:
        (folder / name).write_bytes(name.encode() * 100)
    published = backend.of({"serving": {"backend": backend.NATIVE}})
    assert published is not None
    return Backend(published.name, "a stand-in", {name: folder / name for name in LIBRARIES}, published.sources)
