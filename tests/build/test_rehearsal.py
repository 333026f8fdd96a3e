"""The gate's last step: what a real server does with the very files that would be published."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest

from build import rehearsal, session, tritonserver
from build.contract import Target
from build.errors import ServeError, VerifyError
from build.graph.attach import attach, before_nms
from build.publish import backend, picture, repository
from build.publish.backend import Backend
from build.spec import Spec, edit, load
from tests.build import tiny_model

ONNX = Target("onnxruntime")


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return load(tiny_model.write(tmp_path / "models" / "tiny"))


def publish(spec: Spec, root: Path, served_by: Backend, backends: Path = backend.BACKENDS, spoil: bool = False) -> str:
    """Publishes the tiny model with a rehearsal; returns what this says."""
    built = root.parent / "built.onnx"
    built.write_bytes(attach(spec).SerializeToString())
    said = []
    other = onnx.load(built)
    if spoil:  # the gate saw another file
        for tensor in other.graph.initializer:
            if tensor.name.endswith("w_class"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    heads = session.runner(before_nms(other), optimised=False)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)

    def rehearse(content: Path) -> None:
        said.append(rehearsal.rehearse(spec, ONNX, content, session.runner(other), heads, images, backends))

    repository.publish(spec, built, root, ONNX, served_by=served_by, rehearse=rehearse)
    return said[0]


@pytest.mark.triton
@pytest.mark.parametrize("kind", [backend.NATIVE, backend.PYTHON])
def test_both_backends_answer_with_equal_bits(
    request: pytest.FixtureRequest, spec: Spec, tmp_path: Path, kind: str
) -> None:
    if kind == backend.NATIVE:
        request.getfixturevalue("native")
    said = publish(spec, tmp_path / "model_repository", backend.prepare(kind))
    assert said.endswith("equal bits on 2 pictures, alone and together")


@pytest.mark.triton
def test_a_backend_that_crashes_is_not_published(native: None, spec: Spec, tmp_path: Path) -> None:
    """As a damaged library would, whose digest was taken after the damage."""
    backends = Path(shutil.copytree(backend.BACKENDS, tmp_path / "backends"))
    library = backends / backend.NATIVE / backend.LIBRARY
    code = tmp_path / "crash.cpp"
    code.write_text('extern "C" __attribute__((constructor)) void start() { __builtin_trap(); }')
    subprocess.run(["g++", "-shared", "-fPIC", "-o", str(library), str(code)], check=True)
    facts = json.loads((library.parent / backend.INSTALLED).read_bytes())
    facts["files"][library.name] = hashlib.sha256(library.read_bytes()).hexdigest()
    (library.parent / backend.INSTALLED).write_text(json.dumps(facts))
    root = tmp_path / "model_repository"
    with pytest.raises(
        VerifyError, match=r"tiny: tritonserver does not serve what would be published: .*ended with code"
    ):
        publish(spec, root, backend.prepare(backend.NATIVE), backends)
    assert repository.served_version(root, "tiny") is None
    assert not (root / "tiny").exists()


@pytest.mark.triton
def test_other_answers_than_the_gate_saw_are_not_published(spec: Spec, tmp_path: Path) -> None:
    root = tmp_path / "model_repository"
    with pytest.raises(VerifyError, match=r"answers otherwise than what passed the gate"):
        publish(spec, root, backend.prepare(), spoil=True)
    assert not (root / "tiny").exists()


@pytest.mark.triton
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_picture_input_is_rehearsed_too(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: bool
) -> None:
    edit(spec.path, {"serving.picture_input": True, "input.resize": "letterbox", "input.color_order": "BGR"})
    if spoilt:
        code = picture._STEP.read_text()
        (tmp_path / "model.py").write_text(
            code.replace("        place = [", "        pixels = 255 - pixels\n        place = [")
        )
        monkeypatch.setattr(picture, "_STEP", tmp_path / "model.py")
    outcome = (
        pytest.raises(VerifyError, match="as a picture's file it gets another detection_") if spoilt else nullcontext()
    )
    with outcome:
        said = publish(load(spec.path), tmp_path / "model_repository", backend.prepare())
        assert said.endswith("; the same from a picture's file")


@pytest.mark.triton
def test_what_is_published_for_nvidias_backend_is_a_config_that_triton_takes(
    native: None, spec: Spec, tmp_path: Path
) -> None:
    """No server here has that backend: ours takes its name, so that Triton reads the configuration and the layout."""
    assert "has no backend onnxruntime" in rehearsal.unavailable("onnxruntime")
    folder = tmp_path / "backends" / "onnxruntime"
    shutil.copytree(backend.BACKENDS / backend.NATIVE, folder)
    (folder / backend.LIBRARY).rename(folder / "libtriton_onnxruntime.so")
    said = publish(spec, tmp_path / "model_repository", backend.prepare("onnxruntime"), tmp_path / "backends")
    assert said.endswith("equal bits on 2 pictures, alone and together")
    written = {path.name for path in (tmp_path / "model_repository" / "tiny" / "1").iterdir()}
    assert written == {"config.pbtxt", "labels.txt", "manifest.json", "model.onnx"}


def test_a_machine_without_a_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise ServeError("no tritonserver on PATH")

    monkeypatch.setattr(tritonserver, "find", none)
    assert rehearsal.unavailable(backend.NATIVE) == "no tritonserver on PATH"
