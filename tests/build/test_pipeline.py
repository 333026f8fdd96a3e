"""build-engines: builds what changed, leaves what did not, says so, and publishes nothing that does not run."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from rich.console import Console

from build import contract, pipeline, session
from build import spec as specs
from build.contract import Target
from build.doctor import examine
from build.errors import (
    DataError,
    GraphError,
    OptionError,
    PublishError,
    RuntimeUnavailableError,
    SpecError,
    VerifyError,
)
from build.files import ROOT
from build.gate import verify
from build.gate.self_check import self_check
from build.graph.attach import attach
from build.graph.precision import widened
from build.machine import Machine
from build.publish import backend, picture, repository
from build.quantization import qdq
from build.session import runner
from build.spec import Spec, load
from build.tensorrt import compat, timing
from tests.build import pictures, tiny_model
from tests.build.tensorrt.fake_tensorrt import VERSIONS, FakeTensorRT


class Place:
    """A models/ folder, an artifacts/ folder and a repository of their own."""

    def __init__(self, folder: Path) -> None:
        self.sources, self.artifacts, self.repository = (folder / name for name in ("models", "artifacts", "served"))
        tiny_model.write(self.sources / "tiny")

    def build(self, **options: Any) -> tuple[dict[str, int], str]:
        """What was built, and what was said."""
        text = io.StringIO()
        versions = pipeline.build_engines(
            repository=self.repository,
            sources=self.sources,
            artifacts=self.artifacts,
            console=Console(file=text, soft_wrap=True),
            **{"rehearse": False, **options},
        )
        return versions, text.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_builds_once_and_again_when_something_changed(place: Place) -> None:
    versions, said = place.build()
    assert versions == {"tiny": 1}
    assert "published version 1" in said
    assert "tiny: served by Triton's backend " in said
    artifact = place.artifacts / "tiny" / "fp32" / "model.onnx"
    assert artifact.read_bytes() == (place.repository / "tiny" / "1" / "model.onnx").read_bytes()
    assert [path.name for path in artifact.parent.iterdir()] == ["model.onnx"]

    versions, said = place.build()
    assert versions == {"tiny": 1}
    assert "nothing changed, version 1 stays" in said
    assert "published" not in said

    artifact.write_bytes(b"changed by hand")
    assert place.build()[0] == {"tiny": 2}
    spec = place.sources / "tiny" / "spec.toml"
    spec.write_text(spec.read_text().replace("max_detections = 5", "max_detections = 6"))
    assert place.build()[0] == {"tiny": 3}
    assert place.build(force=True)[0] == {"tiny": 4}
    assert place.build(models=["tiny"], runtime="onnxruntime")[0] == {"tiny": 4}


def test_equal_inputs_make_equal_files(place: Place) -> None:
    place.build()
    place.build(force=True)
    first, second = (place.repository / "tiny" / version / "model.onnx" for version in "12")
    assert first.read_bytes() == second.read_bytes()


def test_decoded_boxes_are_published_without_anchors(place: Place) -> None:
    folder = place.sources / "tiny"
    (folder / "anchors.npy").unlink()
    spec = folder / "spec.toml"
    spec.write_text(spec.read_text().replace("[nms]\n", '[nms]\nbox_coding = "decoded"\n'))
    assert place.build()[0] == {"tiny": 1}
    manifest = json.loads((place.repository / "tiny" / "1" / "manifest.json").read_bytes())
    assert "anchors.npy" not in manifest["inputs"]
    assert "nothing changed, version 1 stays" in place.build()[1]


def test_what_is_published_runs(place: Place) -> None:
    place.build()
    path = place.repository / "tiny" / "1" / "model.onnx"
    images = np.zeros((2, 8, 8, 3), np.uint8)
    limits = np.full((2, 1), 0.1, np.float32)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images, "score_threshold": limits, "iou_threshold": limits})
    assert [output.shape for output in outputs] == [(2, 1), (2, 5, 4), (2, 5), (2, 5)]


def test_rollback(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.build()
    place.build(force=True)
    assert pipeline.rollback("tiny", place.repository) == 1
    assert "version 1 is served again" in capsys.readouterr().out
    assert repository.served_version(place.repository, "tiny") == 1
    with pytest.raises(OptionError, match="which model"):
        pipeline.rollback("", place.repository)


def test_the_picture_input_goes_with_its_model(place: Place) -> None:
    spec = place.sources / "tiny" / "spec.toml"
    specs.edit(spec, {"serving.picture_input": True})
    _, said = place.build()
    assert "tiny: tiny_picture takes the files of pictures" in said
    names = {"tiny", *picture.parts("tiny")}

    def served() -> dict[str, int | None]:
        return {path.parent.name: repository.served_version(place.repository, path.parent.name) for path in configs()}

    def configs() -> list[Path]:
        return sorted(place.repository.glob("*/config.pbtxt"))

    assert served() == dict.fromkeys(names, 1)
    shutil.rmtree(place.repository / "tiny_picture")  # as if the first publish had been killed before it
    assert place.build()[0] == {"tiny": 1}
    assert served() == dict.fromkeys(names, 1)
    place.build(force=True)
    pipeline.rollback("tiny", place.repository)
    assert served() == dict.fromkeys(names, 1)
    machine = Machine(models=place.sources, repository=place.repository, ports=())
    published = {finding.name for finding in examine(machine) if finding.area == "Published"}
    assert not [name for name in published if "picture" in name]
    specs.edit(spec, {"serving.picture_input": False})
    place.build()
    assert served() == {"tiny": 3}


def test_auto_says_why(place: Place) -> None:
    assert "runtime onnxruntime: tensorrt would need" in place.build(runtime="auto")[1]


def test_tensorrt_says_all_that_is_missing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(pipeline.Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setattr(pipeline, "PLUGIN", place.sources / "libssd_nms.so")
    with pytest.raises(
        RuntimeUnavailableError, match=r"an NVIDIA GPU.*the Python package tensorrt.*cuda-python.*libssd_nms\.so"
    ):
        pipeline.choose_runtime("tensorrt")
    assert not place.repository.exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runtime": "tensort"}, OptionError, "runtime is 'tensort', but must be one of auto, onnxruntime, tensorrt"),
        (
            {"precision": "fp8"},
            OptionError,
            "precision is 'fp8', but the runtime onnxruntime has fp32, fp16, bf16, int8 only",
        ),
        ({"calibration": "implict"}, OptionError, "calibration is 'implict', but must be one of explicit, implicit"),
        (
            {"calibration": "implicit", "precision": "int8", "runtime": "onnxruntime"},
            OptionError,
            "calibration is 'implicit', but this would build int8 for onnxruntime(?s:.*)leave --calibration",
        ),
        ({"models": ["tinny"]}, SpecError, r"has no model 'tinny'(?s:.*)did you mean tiny"),
    ],
)
def test_wrong_options(place: Place, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        place.build(**options)
    assert not place.repository.exists()


def test_no_models(place: Place) -> None:
    (place.sources / "tiny" / "spec.toml").unlink()
    with pytest.raises(SpecError, match="no model has a spec"):
        place.build()


def test_a_source_that_does_not_run_is_not_published(place: Place) -> None:
    place.build()
    source = tiny_model.source()
    weights = next(item for item in source.graph.initializer if item.name == "w_box")
    weights.CopyFrom(numpy_helper.from_array(np.zeros((8, 5, 1, 1), np.float32), "w_box"))
    onnx.save(source, place.sources / "tiny" / "model.onnx")
    with pytest.raises(GraphError, match="ONNX Runtime cannot run it"):
        place.build()
    assert repository.served_version(place.repository, "tiny") == 1


def test_self_check_finds_another_number_of_anchors(tmp_path: Path) -> None:
    """Where shape inference cannot tell how many rows the heads have, the run does."""
    spec = load(tiny_model.write(tmp_path))
    model = attach(spec)
    self_check(model, spec)
    np.save(spec.anchors_path, np.full((9, 4), 0.5, np.float32))
    with pytest.raises(GraphError, match=r"box_deltas has the shape \[2, 8, 4\], but must have \[2, 9, 4\]"):
        self_check(model, spec)


def test_nothing_heavy_is_imported_with_the_modules() -> None:
    modules = "build.pipeline, build.publish.repository, build.graph.attach, build.graph.ssd_nms, build.spec"
    code = f"import sys, {modules}; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"onnx", "onnxruntime", "onnxscript", "tritonclient", "numpy", "rich", "google.protobuf"} & set(found)


def swapped(run: session.Runner) -> session.Runner:
    """A runner that answers the first two rows of a batch in the other's place."""

    def wrong(feeds: Any) -> dict[str, np.ndarray]:
        outputs = run(feeds)
        return {name: a[[1, 0, *range(2, len(a))]] if len(a) > 1 else a for name, a in outputs.items()}

    return wrong


def test_the_gate_is_in_the_manifest(place: Place) -> None:
    said = place.build()[1]
    assert "ok   parity" in said
    manifest = json.loads((place.repository / "tiny" / "1" / "manifest.json").read_text())
    assert manifest["verified"]["passed"] is True
    assert set(manifest["verified"]["checks"]) == {"contract", "repeatability", "rows", "parity"}


def test_what_fails_its_gate_is_not_published(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.build()
    monkeypatch.setattr(
        pipeline.checks,
        "runner",
        lambda model, optimised=True: swapped(runner(model)) if optimised else runner(model, optimised=False),
    )
    with pytest.raises(VerifyError, match=r"tiny \(fp32, onnxruntime\) failed its gate \(rows[\s\S]*another: look at"):
        place.build(force=True)
    assert repository.served_version(place.repository, "tiny") == 1
    assert sorted(path.name for path in (place.repository / "tiny").iterdir()) == ["1", "config.pbtxt"]


def checked(place: Place, **options: Any) -> list[verify.Report]:
    return pipeline.verify_published(
        repository=place.repository,
        sources=place.sources,
        artifacts=place.artifacts,
        console=Console(quiet=True),
        **options,
    )


def test_only_a_plan_can_be_timed(place: Place) -> None:
    place.build()
    with pytest.raises(OptionError, match="published for onnxruntime"):
        pipeline.benchmark_published("tiny", place.repository, sources=place.sources, artifacts=place.artifacts)


def test_a_damaged_backend_fails_verify(
    place: Place, monkeypatch: pytest.MonkeyPatch, native: None, tmp_path: Path
) -> None:
    place.build()
    folder = tmp_path / "backends"
    damage = functools.partial(backend.damage, folder)
    monkeypatch.setattr(backend, "damage", lambda: damage())
    with pytest.raises(PublishError, match=r"its backend is damaged: .*holds no whole(?s:.*)build-engines"):
        checked(place)


def test_what_is_published_can_be_verified_again(place: Place) -> None:
    with pytest.raises(PublishError, match="no model 'tiny' is published"):
        checked(place)
    place.build()
    assert [report.passed for report in checked(place)] == [True]

    source = onnx.load(place.sources / "tiny" / "model.onnx")  # trained on since
    weights = next(item for item in source.graph.initializer if item.name == "w_box")
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(1.1), "w_box"))
    onnx.save(source, place.sources / "tiny" / "model.onnx")
    (report,) = checked(place)
    assert [check.name for check in report.checks if not check.passed] == ["parity"]

    published = place.repository / "tiny" / "1" / "model.onnx"
    published.write_bytes(published.read_bytes()[:-1])
    with pytest.raises(PublishError, match=r"version 1 is damaged: model\.onnx has changed"):
        checked(place)


class StandInPlan:
    """A plan that is the ONNX file itself, run by ONNX Runtime: in FP32 where it has no kernels for the types."""

    max_batch = 4
    wrong = False

    def __init__(self, path: Path, facts: Any, plugin: Path, cuda_graphs: bool = False) -> None:
        model = onnx.load(path)
        kinds = {node.op_type for node in model.graph.node}
        run = runner(widened(model), literal="QuantizeLinear" in kinds)
        self.run = swapped(run) if self.wrong else run
        self.cuda_graphs = cuda_graphs

    def benchmark(self, inputs: Any, *, seconds: float) -> timing.Timing:
        rows = len(self.run(inputs)["num_detections"])
        runs = [timing.Run(compute=2.0, h2d=0.25, d2h=0.25, enqueue=0.5)] * 4
        return timing.Timing.of(runs, rows, seconds, self.cuda_graphs)

    def layer_times(self, inputs: Any) -> list[dict[str, Any]]:
        return timing.profile_rows({"conv": [1.0, 3.0], "ssd/nms": [1.0, 1.0]})

    def layers(self) -> dict[str, Any]:
        return {"Layers": []}

    def __call__(self, feeds: Any) -> Any:
        return self.run(feeds)

    def __enter__(self) -> StandInPlan:
        return self

    def __exit__(self, *_: object) -> None:
        pass


HERE = {"gpu": "NVIDIA H200", "compute_capability": "9.0", "tensorrt": "10.13.2", "plugin_sha256": "ab"}


def in_place_of_tensorrt(
    monkeypatch: pytest.MonkeyPatch, version: str = HERE["tensorrt"]
) -> list[tuple[Target, str, bool]]:
    """Stands in for the GPU and the builder; returns what each build got: target, operators, whether a calibrator."""
    built: list[tuple[Target, str, bool]] = []
    monkeypatch.setattr(qdq, "_FP8_TOO_FEW", 0)  # as if TensorRT had FP8 kernels for so few channels

    def build(
        spec: Spec, model: onnx.ModelProto, target: Target, plan: Path, calibrator: Any, console: Console
    ) -> dict[str, Any]:
        built.append((target, " ".join(sorted({node.op_type for node in model.graph.node})), calibrator is not None))
        data = model.SerializeToString(deterministic=True)
        plan.write_bytes(data)
        return tiny_model.engine_of(spec) | {"onnx_sha256": hashlib.sha256(data).hexdigest(), "build_seconds": 1.0}

    monkeypatch.setattr(pipeline, "choose_runtime", lambda runtime: ("tensorrt", "a stand-in"))
    monkeypatch.setattr(pipeline.engine, "built_for", lambda: HERE | {"tensorrt": version})
    monkeypatch.setattr(pipeline.engine, "build", build)
    monkeypatch.setattr(pipeline.plan, "Plan", StandInPlan)
    monkeypatch.setattr(compat, "load", lambda: FakeTensorRT(version if version in VERSIONS else VERSIONS[-1]))
    return built


def test_a_builder_that_does_not_start_ends_the_build_before_its_long_parts(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_tensorrt(monkeypatch)
    monkeypatch.setattr(compat, "load", lambda: FakeTensorRT(VERSIONS[-1], gpu=False))
    monkeypatch.setattr(pipeline.audit, "approved", lambda *_: pytest.fail("the audit takes minutes"))
    with pytest.raises(RuntimeUnavailableError, match=r"TensorRT .* does not start: .*\n.*library of TensorRT"):
        place.build(runtime="tensorrt", precision="fp16")
    assert not place.repository.exists() or not any(place.repository.iterdir())


def test_the_way_of_a_plan(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages' order and what goes from one to the next; the stages themselves are stand-ins here."""
    built = in_place_of_tensorrt(monkeypatch)
    assert place.build(runtime="tensorrt", precision="tf32")[0] == {"tiny": 1}
    assert "for NVIDIA H200 with TensorRT 10.13.2" in place.build(runtime="tensorrt", force=True)[1]
    folder = place.repository / "tiny" / "2"
    assert {path.name for path in folder.iterdir()} == {"config.pbtxt", "labels.txt", "manifest.json", "model.plan"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["target"], manifest["engine"]["tensorrt"], manifest["verified"]["passed"]) == (
        HERE,
        "10.13.2",
        True,
    )
    assert [(target, calibrated) for target, _, calibrated in built] == [
        (Target("tensorrt", "tf32"), False),
        (Target("tensorrt"), False),
    ]
    assert "nothing changed, version 2 stays" in place.build(runtime="tensorrt")[1]
    assert [report.passed for report in checked(place)] == [True]

    say = Console(width=200, record=True)
    report = pipeline.benchmark_published(
        "tiny",
        place.repository,
        batch=3,
        seconds=2.0,
        cuda_graphs=True,
        dump_profile=True,
        sources=place.sources,
        artifacts=place.artifacts,
        console=say,
    )
    said = say.export_text()
    assert "throughput 2.0 runs/s, 6.0 images/s (batch 3, 4 runs, CUDA graph)" in said
    assert "33.3 %  ssd/nms" in said
    assert json.loads(report.read_text())["latency"]["median"] == 2.5
    assert json.loads(report.with_name("profile.json").read_text())[1]["name"] == "conv"
    assert json.loads(report.with_name("layers.json").read_text()) == {"Layers": []}
    with pytest.raises(OptionError, match="batch is 0"):
        pipeline.benchmark_published(
            "tiny", place.repository, batch=0, sources=place.sources, artifacts=place.artifacts
        )

    in_place_of_tensorrt(monkeypatch, "11.1")  # stale: built again, for what is here now
    assert place.build(runtime="tensorrt")[0] == {"tiny": 3}
    monkeypatch.setattr(StandInPlan, "wrong", True)
    with pytest.raises(VerifyError, match="rows"):
        place.build(runtime="tensorrt", force=True)
    assert repository.served_version(place.repository, "tiny") == 3


def with_pictures(place: Place) -> Path:
    """Pictures to calibrate and to judge on; the spec."""
    folder = place.sources / "tiny"
    for name in ("calibration", "held_out"):
        pictures.write(folder / name, 40, tiny_model.LABELS)
    path = folder / "spec.toml"
    data = 'calibration = "calibration"\nheld_out = "held_out"'
    path.write_text(f"{path.read_text()}\n[data]\n{data}\n\n[quantization]\ngate = 0.5  # of noise\n")
    return path


def test_implicit_and_explicit_plans_are_not_taken_for_each_other(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = in_place_of_tensorrt(monkeypatch, VERSIONS[1])
    path = with_pictures(place)
    looked_at = []

    def judge(truth: Any, detections: Any) -> float:
        looked_at.append(len(truth["images"]))
        return 0.5

    kind = {"runtime": "tensorrt", "precision": "int8", "judge": judge}
    assert place.build(**kind, calibration="implicit")[0] == {"tiny": 1}
    manifest = json.loads((place.repository / "tiny" / "1" / "manifest.json").read_text())
    assert manifest["calibration"] == {"way": "implicit", "method": "entropy"}
    assert "build/quantization/implicit.py" in manifest["inputs"]
    assert {"parity", "mAP"} < set(manifest["verified"]["checks"])
    assert looked_at == [40, 40]  # all that there are, not only the gate's few
    assert built[0][2]
    assert "BatchNormalization" in built[0][1]  # FP32 as it is
    assert "QuantizeLinear" not in built[0][1]
    assert "nothing changed" in place.build(**kind, calibration="implicit")[1]
    assert [report.passed for report in checked(place, judge=judge)] == [True]

    assert repository.fresh_manifest(load(path), place.repository, Target("tensorrt", "int8")) is None
    path.write_text(path.read_text() + 'calibrator = "minmax"\n')
    assert place.build(**kind, calibration="implicit")[0] == {"tiny": 2}
    manifest = json.loads((place.repository / "tiny" / "2" / "manifest.json").read_text())
    assert manifest["calibration"] == {"way": "implicit", "method": "minmax"}

    half = SimpleNamespace(accuracy=SimpleNamespace(map=0.5))
    monkeypatch.setattr(pipeline.audit.Judgement, "of_forms", lambda *_: (half, {}))
    assert place.build(**kind)[0] == {"tiny": 3}
    manifest = json.loads((place.repository / "tiny" / "3" / "manifest.json").read_text())
    assert manifest["calibration"] == {"way": "explicit", "method": "minmax"}
    assert not built[-1][2]
    assert "QuantizeLinear" in built[-1][1]
    assert place.build(**kind, calibration="implicit")[0] == {"tiny": 4}
    artifacts = place.artifacts / "tiny"
    assert (artifacts / "int8" / "model.onnx").read_bytes() != (artifacts / "int8-implicit" / "model.onnx").read_bytes()


def test_an_implicit_plan_that_loses_too_much_is_not_published(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_tensorrt(monkeypatch, VERSIONS[0])
    with_pictures(place)
    maps = iter([0.2, 0.5])  # of the plan, of FP32
    with pytest.raises(VerifyError, match=r"mAP: 0\.2000 against 0\.5000"):
        place.build(runtime="tensorrt", precision="int8", calibration="implicit", judge=lambda *_: next(maps))
    assert repository.served_version(place.repository, "tiny") is None


def test_what_implicit_calibration_needs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    built = in_place_of_tensorrt(monkeypatch, VERSIONS[-1])
    kind: dict[str, Any] = {"runtime": "tensorrt", "precision": "int8", "calibration": "implicit"}
    with pytest.raises(OptionError, match="this would build fp16 for tensorrt"):
        place.build(**kind | {"precision": "fp16"})
    with pytest.raises(RuntimeUnavailableError, match=r"TensorRT 11\.4\.0\.106 has no IInt8[\s\S]*explicit"):
        place.build(**kind)
    monkeypatch.setattr(compat, "load", lambda: FakeTensorRT(VERSIONS[2]))
    with pytest.raises(DataError, match="names no held-out pictures"):
        place.build(**kind)
    with_pictures(place)
    with pytest.raises(VerifyError, match="is judged by mAP"):
        place.build(**kind)
    assert not built
    assert not place.repository.exists()


@pytest.mark.parametrize("precision", contract.precisions_of("tensorrt"))
def test_every_precision_reaches_the_repository_and_a_wrong_plan_does_not(
    place: Place, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Up to the plan's runner, whose stand-in computes the graph's own types; the gate compares with the same graph."""
    in_place_of_tensorrt(monkeypatch)
    with_pictures(place)
    half = SimpleNamespace(accuracy=SimpleNamespace(map=0.5))
    monkeypatch.setattr(pipeline.audit.Judgement, "of_forms", lambda *_: (half, {}))
    kind: dict[str, Any] = {"runtime": "tensorrt", "precision": precision, "judge": lambda *_: 0.5}
    assert place.build(**kind)[0] == {"tiny": 1}
    manifest = json.loads((place.repository / "tiny" / "1" / "manifest.json").read_text())
    assert manifest["verified"]["passed"]
    assert {"parity", "mAP"} < set(manifest["verified"]["checks"])
    assert Target.of(manifest) == Target("tensorrt", precision)
    assert [report.passed for report in checked(place)] == [True]

    monkeypatch.setattr(StandInPlan, "wrong", True)
    (report,) = checked(place)
    assert "rows" in {check.name for check in report.checks if not check.passed}
    with pytest.raises(VerifyError, match=rf"tiny \({precision}, tensorrt\) failed its gate"):
        place.build(**kind, force=True)
    assert repository.served_version(place.repository, "tiny") == 1


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_plan_of_other_numbers_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """A plan whose weights are a tenth off fails parity in the precisions whose reference is not the graph as it is."""
    in_place_of_tensorrt(monkeypatch)
    with_pictures(place)
    half = SimpleNamespace(accuracy=SimpleNamespace(map=0.5))
    monkeypatch.setattr(pipeline.audit.Judgement, "of_forms", lambda *_: (half, {}))
    right = pipeline.engine.build

    def off(spec: Spec, model: onnx.ModelProto, target: Target, plan: Path, **options: Any) -> dict[str, Any]:
        facts: dict[str, Any] = right(spec, model, target, plan, **options)
        other = onnx.load(plan)
        weights = next(item for item in other.graph.initializer if item.name in ("w_box", "w_box/rounded"))
        values = (numpy_helper.to_array(weights).astype(np.float32) * 1.1).astype(numpy_helper.to_array(weights).dtype)
        weights.CopyFrom(numpy_helper.from_array(values, weights.name))
        onnx.save(other, plan)
        return facts

    monkeypatch.setattr(pipeline.engine, "build", off)
    with pytest.raises(VerifyError, match=r"failed its gate \(.*parity"):
        place.build(runtime="tensorrt", precision=precision)
    assert not place.repository.exists()
