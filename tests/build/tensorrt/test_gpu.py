"""A plan for real: built, gated, timed and published. Never run so far: it needs an NVIDIA GPU with TensorRT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from build import pipeline
from build.errors import EngineError, RuntimeUnavailableError
from build.publish import repository as store
from build.spec import load
from build.tensorrt import engine
from build.tensorrt.plan import Plan
from build.tensorrt.plugins import PLUGIN
from tests.build import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.tensorrt]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models/, artifacts/ and a repository that holds version 1 of the tiny model as a plan."""
    try:
        pipeline.choose_runtime("tensorrt")
    except RuntimeUnavailableError as error:
        pytest.skip(error.what)
    folder = tmp_path_factory.mktemp("plans")
    tiny_model.write(folder / "models" / "tiny")
    pipeline.build_engines(
        ["tiny"], "tensorrt", repository=folder / "served", sources=folder / "models", artifacts=folder / "artifacts"
    )
    return folder


def test_the_manifest_describes_this_machine(published: Path) -> None:
    _, manifest = store.served(published / "served", "tiny")
    assert manifest["target"] == engine.built_for()
    assert manifest["verified"]["passed"] is True
    assert manifest["engine"]["device_memory_bytes"] > 0
    assert list((published / "artifacts").rglob("model.plan"))


def test_it_passes_its_gate_again(published: Path) -> None:
    reports = pipeline.verify_published(
        ["tiny"], published / "served", sources=published / "models", artifacts=published / "artifacts"
    )
    assert all(report.passed for report in reports)


@pytest.mark.parametrize("graphs", [False, True])
def test_timing_profile_and_layers(published: Path, graphs: bool) -> None:
    folder, manifest = store.served(published / "served", "tiny")
    spec = load(published / "models" / "tiny")
    feeds = spec.nms.feeds(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8))
    with Plan(folder / "model.plan", manifest["engine"], plugin=PLUGIN, cuda_graphs=graphs) as plan:
        timing = plan.benchmark(feeds, seconds=0.5)
        assert timing.cuda_graph is graphs
        assert 0 < timing.compute.min <= timing.compute.median <= timing.latency.max
        layers = [layer["Name"] for layer in plan.layers()["Layers"]]
        assert any("ssd/nms" in name for name in layers)
        assert {row["name"] for row in plan.layer_times(feeds, runs=5)[1:]} <= set(layers)
        again = plan(feeds)  # still whole after the profile
        assert (again["num_detections"] >= 0).all()


def test_a_truncated_plan_without_a_manifest(published: Path, tmp_path: Path) -> None:
    folder, _ = store.served(published / "served", "tiny")
    (tmp_path / "model.plan").write_bytes((folder / "model.plan").read_bytes()[:5000])
    with pytest.raises(EngineError, match="cannot read the plan"):
        Plan(tmp_path / "model.plan", plugin=PLUGIN)


def test_the_config_is_of_a_plan(published: Path) -> None:
    folder, _ = store.served(published / "served", "tiny")
    assert 'platform: "tensorrt_plan"' in (folder / "config.pbtxt").read_text()
    assert json.loads((folder / "manifest.json").read_text())["runtime"] == "tensorrt"
