"""The choice of the engine on a CPU; what needs OpenVINO itself runs where it is installed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from build import files, pipeline
from build import spec as specs
from build.contract import Target
from build.errors import RuntimeUnavailableError
from build.gate import verify
from build.graph.attach import attach, before_nms
from build.publish import backend, config, openvino
from build.publish import repository as store
from build.session import runner
from build.spec import Spec

FILES = {"onnxruntime": Path("a.onnx"), "openvino": Path("b.onnx")}
needs_openvino = pytest.mark.skipif(
    not openvino.installed(), reason='needs OpenVINO: build once with [serving] engine = "openvino"'
)


def answering(monkeypatch: pytest.MonkeyPatch, stdout: str = "", stderr: str = "", status: int = 0) -> None:
    done = SimpleNamespace(stdout=stdout, stderr=stderr, returncode=status)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)


@pytest.mark.parametrize(
    ("ms", "engine"),
    [
        ({"onnxruntime": 20.0, "openvino": 5.0}, "openvino"),
        ({"onnxruntime": 20.0, "openvino": 40.0}, "onnxruntime"),
        ({"onnxruntime": 20.0, "openvino": 19.5}, "onnxruntime"),  # less than the python backend costs
    ],
)
def test_the_faster_engine_is_chosen_and_both_figures_told(
    monkeypatch: pytest.MonkeyPatch, ms: dict[str, float], engine: str
) -> None:
    answering(monkeypatch, f"a warning\n{json.dumps(ms)}\n")
    choice = openvino.choose(FILES, {}, 1)
    assert choice.engine == engine
    assert choice.as_dict()["ms"] == ms
    assert all(f"{name} {value:.1f} ms" in choice.why for name, value in ms.items())


def test_an_engine_that_crashes_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, status=-11)
    assert openvino.choose(FILES, {}, 1).engine == "onnxruntime"
    assert "ended with status -11" in openvino.choose(FILES, {}, 1).why
    answering(monkeypatch, stderr="Traceback\nRuntimeError: no such operator", status=1)
    assert "RuntimeError: no such operator" in openvino.choose(FILES, {}, 1).why


def test_a_published_version_says_its_engine(spec: Spec) -> None:
    served_by = backend.of({"serving": {"backend": "python", "engine": "openvino"}})
    assert served_by is not None
    assert set(served_by.files) == {"model.py", "openvino_session.py"}
    written = config.config(spec, 1, Target("onnxruntime"), "", served_by)
    assert written.backend == "python"
    assert written.parameters["engine"].string_value == "openvino"
    assert written.parameters["engine_packages"].string_value == str(openvino.PACKAGES)
    plain = config.config(spec, 1, Target("onnxruntime"), "", backend.of({"serving": {"backend": "python"}}))
    assert "engine" not in plain.parameters


def build(spec: Spec, folder: Path) -> str:
    with (folder / "said.txt").open("w") as file:
        show = Console(file=file, width=1000)
        pipeline.build_engines(
            ["tiny"],
            "onnxruntime",
            repository=folder / "repository",
            sources=spec.path.parent.parent,
            artifacts=folder / "artifacts",
            console=show,
        )
    return (folder / "said.txt").read_text()


def asking(spec: Spec, engine: str) -> Spec:
    specs.edit(spec.path, {"serving.engine": engine, "serving.backend": "python"})
    return specs.load(spec.path)


def test_without_openvino_auto_says_so_and_publishes(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeUnavailableError("OpenVINO cannot be installed: no network")

    monkeypatch.setattr(openvino, "install", fails)
    monkeypatch.setattr(openvino, "installed", lambda: True)
    said = build(asking(spec, "auto"), tmp_path)
    assert "published version 1" in said
    manifest = store.served(tmp_path / "repository", "tiny")[1]
    assert manifest["engine_choice"] == {
        "engine": "onnxruntime",
        "why": "OpenVINO cannot be installed: no network",
        "ms": {},
    }
    with pytest.raises(RuntimeUnavailableError, match="no network"):
        build(asking(spec, "openvino"), tmp_path)
    assert store.served_version(tmp_path / "repository", "tiny") == 1


def test_another_cpu_is_another_choice(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where the spec leaves no choice."""
    recipes = []
    for engine in ("auto", "onnxruntime"):
        asked = asking(spec, engine)
        for cpu in ("EPYC", "Xeon"):
            monkeypatch.setattr(store, "cpu_name", lambda cpu=cpu: cpu)
            recipes.append(store.recipe(asked, Target("onnxruntime"), backend.prepare("python")))
    assert store.changed(recipes[0], recipes[1]) == ["cpu"]
    assert not store.changed(recipes[2], recipes[3])


@needs_openvino
def test_openvino_answers_as_onnx_runtime_does(spec: Spec, tmp_path: Path) -> None:
    model = attach(spec)
    path = tmp_path / "openvino.onnx"
    files.write(path, openvino.readable(model).SerializeToString())
    within = verify.tolerance(Target("onnxruntime"))
    report = verify.gate(
        spec,
        "tiny on OpenVINO",
        openvino.runner(path),
        reference=runner(model, optimised=False),
        heads=runner(before_nms(model), optimised=False),
        within=within,
        cache=tmp_path,
    )
    assert report.passed, str(report)


@needs_openvino
def test_a_model_is_published_with_openvino_and_stays_fresh(spec: Spec, tmp_path: Path) -> None:
    asked = asking(spec, "openvino")
    assert "with openvino: asked for" in build(asked, tmp_path)
    folder, manifest = store.served(tmp_path / "repository", "tiny")
    assert {path.name for path in folder.iterdir()} >= {"model.onnx", "model.py", "openvino_session.py"}
    assert set(manifest["engine_choice"]["ms"]) == {"onnxruntime", "openvino"}
    assert "nothing changed" in build(asked, tmp_path)
    (report,) = pipeline.verify_published(
        ["tiny"], tmp_path / "repository", sources=spec.path.parent.parent, artifacts=tmp_path / "artifacts"
    )
    assert report.passed


@needs_openvino
def test_a_file_that_openvino_cannot_run_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeUnavailableError, match=r"OpenVINO cannot run .*bad\.onnx"):
        openvino.runner(tmp_path / "bad.onnx")


@needs_openvino
@pytest.mark.triton
@pytest.mark.long
def test_served_answers_are_those_of_the_same_engine_in_process(spec: Spec, tmp_path: Path) -> None:
    from ssd_client import SSDClient

    from build.serve import TritonServer

    build(asking(spec, "openvino"), tmp_path)
    folder, _ = store.served(tmp_path / "repository", "tiny")
    run = openvino.runner(folder / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    wanted: Any = run(spec.nms.feeds(pixels))
    with TritonServer(tmp_path / "repository") as server, SSDClient(server.grpc_url, model="tiny") as client:
        detections = client.detect(pixels[0])
    count = int(wanted["num_detections"][0, 0])
    assert len(detections.scores) == count
    assert np.array_equal(detections.scores, wanted["detection_scores"][0, :count])
