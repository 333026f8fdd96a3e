"""OpenVINO as an engine of the CPU: the choice, its files and BF16; what needs it runs where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from build import contract, files, pipeline, throughput
from build import spec as specs
from build.contract import Target
from build.errors import OptionError, RuntimeUnavailableError, VerifyError
from build.gate import verify
from build.graph.attach import attach, before_nms
from build.publish import backend, config, engines, openvino
from build.publish import repository as store
from build.session import runner
from build.spec import Spec
from tests.conftest import NO_OPENVINO

FILES = {"onnxruntime": Path("a.onnx"), "openvino": Path("b.onnx")}
needs_openvino = pytest.mark.skipif(not openvino.installed(), reason=NO_OPENVINO)
needs_bf16 = pytest.mark.skipif(
    openvino.hint("bf16") == "f32", reason="needs a CPU with instructions for BF16 (AVX512-BF16 or AMX)"
)


def answering(monkeypatch: pytest.MonkeyPatch, stdout: str = "", stderr: str = "", status: int = 0) -> None:
    done = SimpleNamespace(stdout=stdout, stderr=stderr, returncode=status)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)


@pytest.mark.parametrize(
    ("ms", "order"),
    [
        ({"onnxruntime": 20.0, "openvino": 19.0}, ("openvino", "onnxruntime")),
        ({"onnxruntime": 20.0, "openvino": 40.0}, ("onnxruntime", "openvino")),
        ({"onnxruntime": 20.0, "openvino": 19.8}, ("onnxruntime", "openvino")),  # no difference
    ],
)
def test_the_faster_engine_is_tried_first_and_both_figures_told(
    monkeypatch: pytest.MonkeyPatch, ms: dict[str, float], order: tuple[str, str]
) -> None:
    answering(monkeypatch, f"a warning\n{json.dumps(ms)}\n")
    choice = engines.compare(FILES, {}, 1)
    assert choice.order == order
    assert choice.as_dict("openvino") == {"engine": "openvino", "why": choice.why, "served_ips": {}, "ms": ms}
    assert all(f"{name} {value:.1f} ms" in choice.why for name, value in ms.items())


def test_an_engine_that_crashes_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, status=-11)
    assert engines.compare(FILES, {}, 1).order == ("onnxruntime",)
    assert "ended with status -11" in engines.compare(FILES, {}, 1).why
    answering(monkeypatch, stderr="Traceback\nRuntimeError: no such operator", status=1)
    assert "RuntimeError: no such operator" in engines.compare(FILES, {}, 1).why


def test_how_fast_they_serve_decides_where_a_server_is(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not the time in this process, which serves where an engine is asked for or no server is here."""
    in_process, served = engines.Choice(("onnxruntime", "openvino"), ""), engines.Choice(("openvino",), "")
    monkeypatch.setattr(openvino, "install", lambda: None)
    monkeypatch.setattr(engines, "compare", lambda *arguments: in_process)
    asked: list[Any] = []

    def serve(paths: Any) -> engines.Choice:
        asked.append(paths)
        return served

    def choice(serve: Any, engine: str = "auto") -> engines.Choice:
        graph = attach(spec)
        picture = np.zeros((1, 8, 8, 3), np.uint8)
        built = tmp_path / "model.onnx"
        return engines.choose(asking(spec, engine), Target("onnxruntime"), graph, built, picture, 1, serve)

    assert choice(serve) is served
    assert asked == [{"onnxruntime": tmp_path / "model.onnx", "openvino": tmp_path / "openvino.onnx"}]
    assert choice(None) is in_process
    cannot = engines.Choice(("onnxruntime",), "openvino does not serve this file")
    with pytest.raises(RuntimeUnavailableError, match="does not serve this file"):
        choice(lambda paths: cannot, "openvino")
    assert choice(serve, "openvino") == engines.Choice(("openvino",), "asked for")
    assert asked[-1] == {"openvino": tmp_path / "openvino.onnx"}


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("int8", "f32"), ("bf16", "bf16"), ("fp16", "f16")])
def test_a_published_version_says_its_engine(
    spec: Spec, monkeypatch: pytest.MonkeyPatch, precision: str, hint: str
) -> None:
    monkeypatch.setattr(openvino.Path, "read_text", lambda path: "flags: amx_bf16 avx512_fp16")
    served_by = backend.of({"serving": {"backend": "ssd_onnxruntime", "engine": "openvino"}})
    assert served_by is not None
    written = config.config(spec, 1, Target("onnxruntime", precision), "", served_by)
    assert written.backend == "ssd_onnxruntime"
    assert written.parameters["engine"].string_value == "openvino"
    assert written.parameters["engine_precision"].string_value == hint
    plain = config.config(spec, 1, Target("onnxruntime"), "", backend.of({"serving": {"backend": "ssd_onnxruntime"}}))
    assert "engine" not in plain.parameters


def test_without_the_instructions_bf16_is_one_error(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "hint", lambda precision: "f32")
    with pytest.raises(RuntimeUnavailableError, match=r"no instructions for BF16(.|\n)*--precision fp32 or int8"):
        build(asking(spec, "auto"), tmp_path, "bf16")
    with pytest.raises(OptionError, match=r"onnxruntime, which does not compute in BF16(.|\n)*engine = .auto."):
        build(asking(spec, "onnxruntime"), tmp_path, "bf16")
    assert not (tmp_path / "repository").exists()


def test_a_backend_that_cannot_run_openvino_is_one_error(spec: Spec) -> None:
    for name in ("python", "onnxruntime"):
        with pytest.raises(RuntimeUnavailableError, match=f'backend = "{name}" does not run OpenVINO'):
            backend.prepare(name, engine="openvino")


def build(spec: Spec, folder: Path, precision: str = contract.BASELINE) -> str:
    with (folder / "said.txt").open("w") as file:
        show = Console(file=file, width=1000)
        pipeline.build_engines(
            ["tiny"],
            "onnxruntime",
            precision,
            repository=folder / "repository",
            sources=spec.path.parent.parent,
            artifacts=folder / "artifacts",
            console=show,
        )
    return (folder / "said.txt").read_text()


def asking(spec: Spec, engine: str) -> Spec:
    specs.edit(spec.path, {"serving.engine": engine})
    return specs.load(spec.path)


def test_without_openvino_auto_says_so_and_publishes(
    native: None, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        "served_ips": {},
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
            recipes.append(store.recipe(asked, Target("onnxruntime"), backend.prepare()))
    assert store.changed(recipes[0], recipes[1]) == ["cpu"]
    assert not store.changed(recipes[2], recipes[3])


@needs_openvino
@pytest.mark.parametrize("runtime_thresholds", [True, False])
def test_openvino_answers_as_onnx_runtime_does(spec: Spec, tmp_path: Path, runtime_thresholds: bool) -> None:
    specs.edit(spec.path, {"nms.runtime_thresholds": runtime_thresholds})
    spec = specs.load(spec.path)
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
def test_a_model_is_published_with_openvino_and_stays_fresh(native: None, spec: Spec, tmp_path: Path) -> None:
    """The rehearsal of the build asks a real server: equal bits with the same engine in process."""
    asked = asking(spec, "openvino")
    said = build(asked, tmp_path)
    assert "equal bits on 2 pictures, alone and together" in said
    assert "by Triton's backend ssd_onnxruntime with openvino" in said
    folder, manifest = store.served(tmp_path / "repository", "tiny")
    assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "labels.txt", "manifest.json", "model.onnx"}
    assert manifest["engine_choice"] == {"engine": "openvino", "why": "asked for", "served_ips": {}, "ms": {}}
    assert set(manifest["libraries"]) == {backend.LIBRARY, *openvino.libraries()}
    assert "nothing changed" in build(asked, tmp_path)
    (report,) = pipeline.verify_published(
        ["tiny"], tmp_path / "repository", sources=spec.path.parent.parent, artifacts=tmp_path / "artifacts"
    )
    assert report.passed


@needs_openvino
@pytest.mark.triton
def test_auto_serves_with_both_engines_and_keeps_both_figures(
    native: None, spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "ROUNDS", 2)
    monkeypatch.setattr(throughput, "SECONDS", 0.05)
    asked = asking(spec, "auto")
    said = build(asked, tmp_path)
    manifest = store.served(tmp_path / "repository", "tiny")[1]
    choice = manifest["engine_choice"]
    assert choice["engine"] == manifest["serving"].get("engine", "onnxruntime")
    assert all(f"{engine} {choice['served_ips'][engine]:.0f}" in said for engine in ("onnxruntime", "openvino"))
    assert not choice["ms"]
    assert "nothing changed" in build(asked, tmp_path)


@needs_openvino
def test_a_file_that_openvino_cannot_run_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(RuntimeUnavailableError, match=r"OpenVINO cannot run .*bad\.onnx"):
        openvino.runner(tmp_path / "bad.onnx")


@needs_openvino
@needs_bf16
def test_bf16_is_published_and_judged_as_it_is_served(native: None, spec: Spec, tmp_path: Path) -> None:
    said = build(asking(spec, "auto"), tmp_path, "bf16")
    assert "ONNX Runtime does not compute in BF16 on a CPU" in said
    folder, manifest = store.served(tmp_path / "repository", "tiny")
    assert (manifest["precision"], manifest["serving"]["engine"]) == ("bf16", "openvino")
    assert 'key: "engine_precision"\n  value {\n    string_value: "bf16"' in (folder / "config.pbtxt").read_text()
    path = tmp_path / "fp32.onnx"
    files.write(path, openvino.readable(attach(spec)).SerializeToString())
    feeds = spec.nms.feeds(np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8))
    scores = [openvino.runner(path, precision=hint)(feeds)["detection_scores"] for hint in ("bf16", "f32")]
    assert not np.array_equal(*scores), "the hint changes nothing"


def test_where_the_faster_engine_fails_the_gate_the_other_serves(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: backend.Backend
) -> None:
    asked: list[str] = []

    def gate(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        report = verify.Report("tiny", "", ())
        if asked[-1] == "openvino":
            raise VerifyError("its boxes are elsewhere")
        return report

    choice = engines.Choice(("openvino", "onnxruntime"), "OpenVINO is 2 times as fast")
    monkeypatch.setattr(pipeline.checks.engines, "choose", lambda *arguments: choice)
    monkeypatch.setattr(pipeline.checks, "gate", gate)
    monkeypatch.setattr(backend, "prepare", lambda *arguments, **options: stand_in)
    monkeypatch.setattr(pipeline.rehearsal, "unavailable", lambda name: "not here")
    said = build(asking(spec, "auto"), tmp_path)
    assert "not served with openvino: its boxes are elsewhere" in said
    assert asked == ["openvino", "onnxruntime"]
    assert store.served(tmp_path / "repository", "tiny")[1]["engine_choice"]["engine"] == "onnxruntime"


def test_where_the_engine_that_was_asked_for_fails_the_gate_the_error_names_the_way_out(
    spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: backend.Backend
) -> None:
    def gate(*arguments: Any) -> Any:
        raise VerifyError("its boxes are elsewhere", fix="look at the heads")

    choice = engines.Choice(("openvino",), "asked for", {})
    monkeypatch.setattr(pipeline.checks.engines, "choose", lambda *arguments: choice)
    monkeypatch.setattr(pipeline.checks, "gate", gate)
    monkeypatch.setattr(pipeline.openvino, "install", lambda: None)
    monkeypatch.setattr(backend, "prepare", lambda *arguments, **options: stand_in)
    with pytest.raises(VerifyError, match=r'look at the heads; or set \[serving\] engine = "auto"'):
        build(asking(spec, "openvino"), tmp_path)


@needs_openvino
def test_openvino_stays_when_the_backend_is_made_anew(native: None, tmp_path: Path) -> None:
    """Also where its package is gone by then."""
    shutil.copytree(backend.BACKENDS / backend.NATIVE, tmp_path / backend.NATIVE)
    whole = backend.prepare(backends=tmp_path, engine="openvino")
    (tmp_path / backend.NATIVE / backend.LIBRARY).write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openvino, "PACKAGES", tmp_path / "nowhere")
        assert backend.prepare(backends=tmp_path).libraries.keys() == {backend.LIBRARY, backend.RUNTIME}
    assert backend.damage(tmp_path) == ""
    assert backend.prepare(backends=tmp_path, engine="openvino") == whole
