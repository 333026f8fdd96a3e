"""A proof runs the file's own post-processing: it passes where both agree, and names the symptom where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from build import spec
from build.errors import ImportModelError
from build.gate.scoring import Detected
from build.sources import prove as prove_module
from build.sources.foreign import Foreign, write
from build.sources.import_model import _toml
from build.sources.prove import prove
from tests.build.sources.checks import imported
from tests.build.sources.layouts import Layout
from tests.build.sources.layouts_tensorflow import tensorflow
from tests.build.sources.layouts_with_nms import end_to_end, nms_inside, plugin
from tests.build.sources.layouts_without_nms import yolo


def put(layout: Layout, folder: Path) -> tuple[Foreign, spec.Spec]:
    """The layout imported into a folder."""
    foreign = imported(layout, folder)
    target = folder / "model"
    target.mkdir(exist_ok=True)
    tables = write(target, foreign)
    tables["model"]["name"] = "tiny"
    (target / "labels.txt").write_text("".join(f"label{i}\n" for i in range(layout.labels)))
    (target / "spec.toml").write_text(_toml("tiny", tables))
    return foreign, spec.load(target)


def noise(count: int = 2) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (70, 90, 3), np.uint8)) for _ in range(count)]


@pytest.mark.parametrize(
    ("build", "how"),
    [
        (tensorflow, "its own post-processing in ONNX Runtime"),
        (lambda: tensorflow(names="identity", raw=True), "its own post-processing in ONNX Runtime"),
        (lambda: tensorflow(background="kept"), "its own post-processing in ONNX Runtime"),
        (lambda: tensorflow(opset=12, nested=True), "its own post-processing in ONNX Runtime"),
        (nms_inside, "its own NonMaxSuppression in ONNX Runtime"),
        (lambda: nms_inside(centred=True), "its own NonMaxSuppression in ONNX Runtime"),
        (lambda: nms_inside(sliced=False), "its own NonMaxSuppression in ONNX Runtime"),
        (lambda: nms_inside(opset=11), "its own NonMaxSuppression in ONNX Runtime"),
        (lambda: nms_inside(pixels=True, tail="nd"), "its own NonMaxSuppression in ONNX Runtime"),
        (end_to_end, "its own TopK in ONNX Runtime"),
    ],
)
def test_both_sides_agree(build: Callable[[], Layout], how: str, tmp_path: Path) -> None:
    proof = prove(*put(build(), tmp_path), noise(), tmp_path / "sides.png")
    assert (proof.proven, proof.how, proof.pictures) == (True, how, 2)
    assert proof.detections > 10
    assert proof.boxes < 1e-5
    assert proof.scores < 1e-5
    assert (tmp_path / "sides.png").is_file()
    assert "each with its partner" in str(proof)


@pytest.mark.parametrize("build", [yolo, plugin])
def test_without_an_original_that_runs_nothing_is_proven(build: Callable[[], Layout], tmp_path: Path) -> None:
    proof = prove(*put(build(), tmp_path), noise())
    assert not proof.proven
    assert str(proof).startswith("NOT PROVEN against the original: the file has no post-processing of its own")


def test_nothing_above_the_threshold_is_compared_without_one(tmp_path: Path) -> None:
    layout = nms_inside()
    constants = {item.name: item for item in layout.model.graph.initializer}
    node = next(node for node in layout.model.graph.node if node.op_type == "NonMaxSuppression")
    constants[node.input[4]].raw_data = np.float32([0.9999]).tobytes()
    layout.nms = {}
    proof = prove(*put(layout, tmp_path), noise())
    assert proof.proven
    assert "with its score threshold at 0" in proof.how


@pytest.mark.parametrize(
    ("change", "symptom"),
    [
        ({"score_activation": "none"}, "an activation is applied twice or not at all"),
        ({"box_scales": (1.0, 1.0, 1.0, 1.0)}, "decoded twice or with other anchors"),
    ],
)
def test_a_difference_is_refused_with_its_symptom(change: dict[str, object], symptom: str, tmp_path: Path) -> None:
    foreign, good = put(nms_inside(activation="Sigmoid"), tmp_path)
    wrong = dataclasses.replace(good, nms=dataclasses.replace(good.nms, **change))  # type: ignore[arg-type]
    with pytest.raises(ImportModelError, match="does not detect what the original does") as raised:
        prove(foreign, wrong, noise())
    assert symptom in raised.value.why
    assert str(tmp_path / "detector.onnx") in raised.value.what


def test_symptoms_of_order_and_unit(tmp_path: Path) -> None:
    _, checked = put(nms_inside(), tmp_path)
    boxes = np.float32([[0.1, 0.2, 0.3, 0.8], [0.5, 0.1, 0.9, 0.3]])
    theirs = Detected(boxes, np.float32([0.9, 0.8]), np.int32([0, 1]))
    turned = Detected(boxes[:, [1, 0, 3, 2]], theirs.scores, theirs.classes)
    pixels = Detected(boxes * 64, theirs.scores, theirs.classes)
    nothing = Detected(boxes[:0], theirs.scores[:0], theirs.classes[:0])
    assert "--box-order yxyx" in prove_module._symptom(checked, theirs, turned)
    assert "detects nothing at all" in prove_module._symptom(checked, theirs, nothing)
    assert "in pixels" in prove_module._symptom(checked, theirs, pixels)
