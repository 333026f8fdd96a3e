"""The task: its files, its options, and where a plan's layers come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from build.errors import SSDError
from build.reports import fusion
from build.reports.roofline import FusionError
from tests.build.reports.networks import CBR, FIXTURES


class FakePlan:
    """A plan that says what the fixtures say."""

    def __init__(self, path: Path, engine: Any, *, plugin: Path) -> None:
        assert path.name == "model.plan"

    def __enter__(self) -> FakePlan:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def layers(self) -> Any:
        return json.loads((FIXTURES / "written_after_schema_tensorrt_10.json").read_text())

    def layer_times(self, feeds: Any, runs: int) -> Any:
        assert feeds["images"].shape == (1, 300, 300, 3)
        return json.loads((FIXTURES / "written_after_schema_profile.json").read_text())


def test_a_published_plan_is_asked_and_its_answer_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("build.tensorrt.plan.Plan", FakePlan)
    monkeypatch.setattr("build.publish.repository.served_version", lambda *_: 1)
    folder = tmp_path / "repository" / "shapes" / "1"
    folder.mkdir(parents=True)
    (folder / "model.plan").write_bytes(b"plan")
    (folder / "manifest.json").write_text('{"precision": "fp32", "engine": {}}')
    options: dict[str, Any] = {"artifacts": tmp_path / "artifacts", "published": tmp_path / "repository"}
    written = fusion.fusion_report("tensorrt", **options)
    assert json.loads((written / "report.json").read_text())["runtime"] == "tensorrt"
    assert (tmp_path / "artifacts" / "shapes" / "fp32" / "layers.json").is_file()
    (folder / "manifest.json").write_text('{"precision": "fp16", "engine": {}}')
    fusion.fusion_report("tensorrt", **options)  # from what was kept
    (tmp_path / "artifacts" / "shapes" / "fp32" / "layers.json").unlink()
    with pytest.raises(FusionError, match="is fp16, not fp32"):
        fusion.fusion_report("tensorrt", **options)


def test_the_task_writes_three_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ceilings.json").write_text(
        json.dumps({"operations": 1e11, "int8": None, "bandwidth": [[1e9, 1e10]], "method": "given"})
    )
    folder = fusion.fusion_report(ceilings=tmp_path / "ceilings.json", threads=1, runs=2, artifacts=tmp_path)
    assert {path.name for path in folder.iterdir()} == {"report.md", "report.json", "report.html"}
    data = json.loads((folder / "report.json").read_text())
    assert data["after"] == len(data["kernels"]) < data["before"]
    assert sum(kernel["pattern"] == CBR for kernel in data["kernels"]) == 18
    assert "18 Conv+BatchNormalization+Relu became one kernel each" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "cuda"}, "runtime is 'cuda'"),
        ({"runtime": "tensorrt"}, "no plan of shapes is published"),
        ({"runtime": "tensorrt", "layers": Path("nowhere.json")}, "cannot be read"),
        ({"precision": "fp7"}, "model.onnx is not there"),
        ({"runs": 0}, "runs is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"model": "nothing"}, "cannot be read"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SSDError, match=message):
        fusion.fusion_report(**options, artifacts=tmp_path, published=tmp_path)
