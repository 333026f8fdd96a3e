"""The shapes model's data and files: seeded scenes with honest boxes, classic anchors, separate Conv/BN/Relu nodes."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import onnx
import pytest

from models.shapes.anchors import ANCHORS_PER_MAP, anchors
from models.shapes.scenes import LABELS, MAX_OVERLAP, MAX_SIDE, MIN_SIDE, SIZE, _overlap, scene, write_split

HERE = Path("models/shapes")


def test_a_scene_is_the_same_every_time() -> None:
    first, second = scene("held_out", 7), scene("held_out", 7)
    assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert np.array_equal(first.boxes, second.boxes)


def test_splits_differ() -> None:
    assert not np.array_equal(np.asarray(scene("train", 0).image), np.asarray(scene("held_out", 0).image))


def test_unknown_split_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        scene("test", 0)


@pytest.fixture(scope="module")
def many() -> list[tuple[np.ndarray, np.ndarray]]:
    drawn = [scene("validation", i) for i in range(120)]
    return [(one.boxes, one.classes) for one in drawn]


def test_every_class_and_size_occurs(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    classes = np.concatenate([c for _, c in many])
    boxes = np.concatenate([b for b, _ in many])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
    assert set(classes.tolist()) == set(range(len(LABELS)))
    assert sides.min() < 20
    assert sides.max() > 200
    assert sides.min() >= MIN_SIDE - 1
    assert sides.max() <= MAX_SIDE + 1


def test_boxes_lie_inside_and_overlap_at_most_by_half(many: list[tuple[np.ndarray, np.ndarray]]) -> None:
    worst = 0.0
    for boxes, _ in many:
        assert boxes.min() >= 0
        assert boxes.max() <= SIZE
        for i, a in enumerate(boxes.tolist()):
            worst = max([worst, *(_overlap(tuple(a), tuple(b)) for b in boxes[i + 1 :].tolist())])
    assert 0.3 < worst <= MAX_OVERLAP + 1e-6


def test_write_split_resumes_after_a_kill(tmp_path: Path) -> None:
    pictures, truth = write_split(tmp_path, "held_out", 3)
    assert len(truth["images"]) == 3
    pictures[1].unlink()
    (pictures[0].parent / "instances.json").unlink()  # killed before the end
    again, same = write_split(tmp_path, "held_out", 3)
    assert same == truth
    assert all(p.exists() for p in again)


def test_anchors_are_the_classic_8732() -> None:
    rows = anchors()
    assert rows.shape == (8732, 4)
    assert rows.dtype == np.float32
    assert sum(ANCHORS_PER_MAP) == 8732
    assert rows.min() > 0
    assert rows.max() <= 1
    # Cell (0,0) of the first map: stride 8, box size 21.
    np.testing.assert_allclose(rows[0], [4 / 300, 4 / 300, 21 / 300, 21 / 300], rtol=1e-6)


def test_committed_files_belong_together() -> None:
    np.testing.assert_array_equal(np.load(HERE / "anchors.npy"), anchors())
    assert (HERE / "labels.txt").read_text().split() == list(LABELS)
    assert (HERE / "model.onnx").stat().st_size <= 8_000_000


def test_conv_batchnorm_and_relu_are_separate_nodes() -> None:
    model = onnx.load(HERE / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    counts = collections.Counter(node.op_type for node in model.graph.node)
    assert counts["Conv"] == 30
    assert counts["BatchNormalization"] == counts["Relu"] == 18
    assert [o.name for o in model.graph.output] == ["box_deltas", "class_logits"]
    assert [d.dim_value or d.dim_param for d in model.graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        300,
        300,
    ]
