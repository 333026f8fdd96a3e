"""Models of other people: torchvision's SSDs to the same detections, ONNX with raw heads, and those without."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from build import spec
from build.errors import SSDError
from build.graph.attach import attach
from build.session import runner
from build.sources import import_model as import_module
from build.sources.foreign import Wishes
from build.sources.import_model import ImportModelError, import_model
from tests.build.sources.layouts_tensorflow import tensorflow

LABELS = ["alpha", "beta", "gamma"]
ANCHORS = np.array([[0.3, 0.3, 0.3, 0.3], [0.6, 0.6, 0.4, 0.3], [0.5, 0.5, 0.9, 0.9]], np.float32)


def heads_model(last: list[onnx.NodeProto], outputs: list[str], extra: dict[str, np.ndarray] | None = None) -> Any:
    """A tiny detector on 8×8 pictures: raw heads `boxes_raw` [B,3,4] and `scores_raw` [B,3,4], then `last`.

    A convolution of 1×1 that changes nothing stands first: a detector has one.
    """
    random = np.random.default_rng(0)
    constants = {
        "w_first": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1),
        "w_box": random.normal(0, 0.05, (192, 12)).astype(np.float32),
        "w_cls": random.normal(0, 0.3, (192, 12)).astype(np.float32),
        "s_box": np.array([-1, 3, 4], np.int64),
        "s_cls": np.array([-1, 3, 4], np.int64),
        **(extra or {}),
    }
    nodes = [
        helper.make_node("Conv", ["pixels", "w_first"], ["first"]),
        helper.make_node("Flatten", ["first"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w_box"], ["b"]),
        helper.make_node("Reshape", ["b", "s_box"], ["boxes_raw"]),
        helper.make_node("MatMul", ["flat", "w_cls"], ["c"]),
        helper.make_node("Reshape", ["c", "s_cls"], ["scores_raw"]),
        *last,
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, 4]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("TRT", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=8)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """labels.txt and anchors.npy for `heads_model`, and how it is read."""
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    np.save(tmp_path / "anchors.npy", ANCHORS)
    return {"labels": tmp_path / "labels.txt", "wishes": named(tmp_path)}


def named(folder: Path, **others: str) -> Wishes:
    """The heads by their names, and the anchors, whose order their values do not tell."""
    given = {"boxes": "boxes_raw", "logits": "scores_raw", "anchors": str(folder / "anchors.npy")}
    return Wishes(**{**given, "box_order": "cxcywh", **others})


def saved(model: onnx.ModelProto, tmp_path: Path) -> str:
    onnx.save(model, tmp_path / "detector.onnx")
    return str(tmp_path / "detector.onnx")


def test_raw_heads_by_other_names(tmp_path: Path, files: dict[str, Any]) -> None:
    source = saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path)
    settings = ["nms.max_detections=7", "input.std=[1.0, 2.0, 3.0]", 'nms.score_activation="softmax"']
    folder = import_model(source, settings=settings, models=tmp_path / "models", **files)
    assert folder == tmp_path / "models" / "detector"
    assert sorted(path.name for path in folder.iterdir()) == [
        "anchors.npy",
        "import.json",
        "labels.txt",
        "model.onnx",
        "spec.toml",
    ]
    checked = spec.load(folder)
    assert (checked.input.width, checked.input.height, checked.nms.max_detections) == (8, 8, 7)
    assert checked.input.std == (1.0, 2.0, 3.0)
    model = attach(checked)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    number, boxes, _, _ = session.run(None, checked.nms.feeds(np.full((2, 8, 8, 3), 200, np.uint8)))
    assert number.shape == (2, 1)
    assert boxes.shape == (2, 7, 4)
    assert not list(tmp_path.glob(".importing-*"))


def test_a_spec_is_taken_over(tmp_path: Path, files: dict[str, Any]) -> None:
    given = tmp_path / "theirs.toml"
    given.write_text(
        "[model]\nname='x'\n[input]\nwidth=8\nheight=8\nmean=[1.0,2.0,3.0]\n"
        "[nms]\nbox_coding='corner'\niou_threshold=0.6\n"
    )
    source = saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path)
    folder = import_model(
        source, "mine", spec_file=given, wishes=named(tmp_path, anchors=""), models=tmp_path / "models"
    )
    checked = spec.load(folder)
    assert (checked.model.name, checked.nms.box_coding, checked.nms.iou_threshold) == ("mine", "corner", 0.6)
    assert checked.input.mean == (1.0, 2.0, 3.0)
    assert checked.labels == tuple(LABELS)


def test_labels_that_do_not_fit_are_found_out_and_nothing_is_written(tmp_path: Path, files: dict[str, Any]) -> None:
    model = heads_model([], ["boxes_raw", "scores_raw"])
    (tmp_path / "labels.txt").write_text("one\ntwo\n")  # with the background three classes, but the model has four
    with pytest.raises(SSDError, match="has 4 classes, but there are 2 labels"):
        import_model(saved(model, tmp_path), models=tmp_path / "models", **files)
    assert not (tmp_path / "models" / "detector").exists()
    assert not list(tmp_path.glob(".importing-*"))


def test_a_model_is_not_replaced_without_force_and_survives_a_failed_import(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    source = saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path)
    options: dict[str, Any] = {"models": tmp_path / "models", **files}
    folder = import_model(source, **options)
    before = (folder / "spec.toml").read_bytes()
    with pytest.raises(ImportModelError, match="exists already"):
        import_model(source, **options)
    with pytest.raises(SSDError, match="max_detections"):
        import_model(source, force=True, settings=["nms.max_detections=0"], **options)
    assert (folder / "spec.toml").read_bytes() == before
    import_model(source, force=True, settings=["nms.max_detections=3"], **options)
    assert spec.load(folder).nms.max_detections == 3


def test_a_folder_is_replaced_in_one_step_or_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = tmp_path / "staging" / "new", tmp_path / "target"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / "file").write_text(text)
    import_module._put(new, target)
    assert ((target / "file").read_text(), (new / "file").read_text()) == ("new", "old")

    class Old:
        """A kernel or a file system without the exchange."""

        def renameat2(self, *_: object) -> int:
            import_module.ctypes.set_errno(import_module.errno.EINVAL)
            return -1

    monkeypatch.setattr(import_module.ctypes, "CDLL", lambda *_, **__: Old())
    import_module._put(new, target)
    assert (target / "file").read_text() == "old"
    import_module.shutil.rmtree(tmp_path / "staging" / ".replaced")
    with pytest.raises(FileNotFoundError):
        import_module._put(new, target)  # there is nothing to put any more
    assert (target / "file").read_text() == "old"


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="needs an environment without torch")
def test_without_torch_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(SSDError, match="torch is not installed"):
        import_model("ssd300_vgg16", weights="none", models=tmp_path / "models")
    assert not list((tmp_path / "models").iterdir())
    assert not list(tmp_path.glob(".importing-*"))


NMS_CONSTANTS = {"k": np.array([10], np.int64), "i": np.array([0.5], np.float32), "s": np.array([0.1], np.float32)}
TRAILING = {
    "NonMaxSuppression": [
        helper.make_node("Softmax", ["scores_raw"], ["p"], axis=2),
        helper.make_node("Transpose", ["p"], ["pt"], perm=[0, 2, 1]),
        helper.make_node("NonMaxSuppression", ["boxes_raw", "pt", "k", "i", "s"], ["selected"], name="nms"),
        helper.make_node("Cast", ["selected"], ["out"], to=TensorProto.FLOAT),
    ],
    "EfficientNMS_TRT": [
        helper.make_node("Sigmoid", ["scores_raw"], ["p"]),
        helper.make_node("EfficientNMS_TRT", ["boxes_raw", "p"], ["out"], domain="TRT", name="nms"),
    ],
    "BatchedNMSDynamic_TRT": [
        helper.make_node("BatchedNMSDynamic_TRT", ["boxes_raw", "scores_raw"], ["out"], domain="TRT", name="nms")
    ],
    "TopK": [
        helper.make_node("ReduceMax", ["scores_raw"], ["m"], axes=[2], keepdims=0),
        helper.make_node("TopK", ["m", "k1"], ["v", "index"], name="nms"),
        helper.make_node("Unsqueeze", ["index", "two"], ["index3"]),
        helper.make_node("GatherND", ["boxes_raw", "index3"], ["out"], batch_dims=1),
    ],
}


@pytest.mark.parametrize("kind", ["NonMaxSuppression", "EfficientNMS_TRT"])
def test_post_processing_inside_is_cut_off(kind: str, tmp_path: Path, files: dict[str, Any]) -> None:
    if kind == "EfficientNMS_TRT":  # whose background_class is -1 unless it is given
        files["labels"].write_text("\n".join([*LABELS, "delta"]))
    source = saved(heads_model(TRAILING[kind], ["out"], NMS_CONSTANTS), tmp_path)
    folder = import_model(source, labels=files["labels"], models=tmp_path / "models", artifacts=tmp_path)
    imported = onnx.load(folder / "model.onnx")
    assert [output.name for output in imported.graph.output] == ["box_deltas", "class_logits"]
    assert not {"NonMaxSuppression", "Softmax", "Sigmoid", kind} & {node.op_type for node in imported.graph.node}
    assert spec.load(folder).nms.score_activation == ("softmax" if kind == "NonMaxSuppression" else "sigmoid")


def test_post_processing_that_is_not_known_is_named(tmp_path: Path, files: dict[str, Any]) -> None:
    extra = {"k1": np.array([2], np.int64), "two": np.array([2], np.int64)}
    source = saved(heads_model(TRAILING["TopK"], ["out"], extra), tmp_path)
    with pytest.raises(ImportModelError, match=r"its own post-processing \(TopK\)") as raised:
        import_model(source, labels=files["labels"], models=tmp_path / "models")
    assert "raw heads" in raised.value.fix
    assert "'nms'" in raised.value.why
    assert "'m'" in raised.value.fix
    assert not (tmp_path / "models" / "detector").exists()


def test_scores_that_no_activation_made_are_not_served(tmp_path: Path, files: dict[str, Any]) -> None:
    """BatchedNMS reads scores as they are; these are logits, which are no scores."""
    source = saved(heads_model(TRAILING["BatchedNMSDynamic_TRT"], ["out"]), tmp_path)
    with pytest.raises(SSDError):
        import_model(source, labels=files["labels"], models=tmp_path / "models")
    assert not (tmp_path / "models" / "detector").exists()


def test_the_proof_and_what_was_recognised_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    layout = tensorflow()
    (tmp_path / "labels.txt").write_bytes("\ufeffperson\r\ncar\r\nbicycle\r\n\r\n\r\n".encode())
    folder = import_model(
        saved(layout.model, tmp_path), labels=tmp_path / "labels.txt", models=tmp_path / "models", artifacts=tmp_path
    )
    about = json.loads((folder / "import.json").read_text())
    assert about["family"] == "tf-object-detection"
    assert about["proof"]["proven"]
    assert about["proof"]["detections"] > 0
    assert ["iou_threshold", "0.6", "NonMaxSuppression 'body/nms'"] in about["facts"]
    assert (tmp_path / "import" / "detector.png").is_file()
    assert spec.load(folder).labels == ("person", "car", "bicycle")
    printed = capfd.readouterr()
    assert "recognised: tf-object-detection" in printed.out
    assert "proven against the original" in printed.out
    assert not printed.err


def test_what_the_user_sets_replaces_what_was_read(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    folder = import_model(
        saved(tensorflow().model, tmp_path),
        labels=tmp_path / "labels.txt",
        settings=["nms.iou_threshold=0.6", 'input.color_order="RGB"'],
        models=tmp_path / "models",
        artifacts=tmp_path,
    )
    facts = json.loads((folder / "import.json").read_text())["facts"]
    assert ["nms.iou_threshold", "0.6", "--set"] in facts
    assert not [fact for fact in facts if fact[0] == "iou_threshold"]
    assert not [fact for fact in facts if fact[0] in ("input.mean", "input.std")]  # the graph normalises


def test_a_dry_run_writes_nothing(tmp_path: Path, files: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    source = saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path)
    import_model(source, dry_run=True, models=tmp_path / "models", **files)
    assert "boxes_raw, scores_raw" in capfd.readouterr().out
    assert not (tmp_path / "models").exists()


def test_errors_name_the_users_files_and_nothing_else_is_printed(
    tmp_path: Path, files: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    source = saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path)
    (tmp_path / "labels.txt").write_text("one\none\ntwo\n")
    with pytest.raises(SSDError) as raised:
        import_model(source, models=tmp_path / "models", **files)
    assert str(tmp_path / "labels.txt") in str(raised.value)
    assert ".importing-" not in str(raised.value)
    (tmp_path / "labels.txt").write_text("one\ntwo\nthree\n")
    fixed = heads_model([], ["boxes_raw", "scores_raw"], {"s_cls": np.array([7, 3, 4], np.int64)})
    source = saved(fixed, tmp_path)
    with pytest.raises(SSDError) as raised:  # a Reshape that fails: ONNX Runtime would log it in red
        import_model(source, models=tmp_path / "models", **files)
    assert str(tmp_path / "detector.onnx") in str(raised.value)
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "yolo"}, "must be ssd300_vgg16"),
        ({"source": "nowhere.onnx"}, "cannot be read"),
        ({"name": "../evil"}, "name is '../evil'"),
        ({"wishes": Wishes(boxes="nothing", logits="scores_raw")}, "has no tensor 'nothing'"),
        ({"wishes": Wishes(boxes="boxes_raw", logits="boxes_raw")}, "both name 'boxes_raw'"),
        ({"wishes": Wishes(family="nothing")}, "family is 'nothing'"),
        ({"wishes": Wishes(anchors="boxes.npz")}, "cannot be read as anchors"),
        ({"labels": None}, "needs its labels"),
        ({"settings": ["nms.iou_threshold"]}, "table.key=value"),
        ({"settings": ["nms.box_coding=corner"]}, "no TOML value"),
        ({"settings": ["nms.iou_treshold=0.5"]}, "iou_treshold is an unknown key"),
        ({"source": "ssd300_vgg16", "wishes": Wishes(boxes="x")}, "brings its own"),
    ],
)
def test_wrong_options_are_named(change: dict[str, Any], message: str, tmp_path: Path, files: dict[str, Any]) -> None:
    source = saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path)
    options: dict[str, Any] = {"source": source, **files, **change}
    with pytest.raises(SSDError, match=message):
        import_model(**options, models=tmp_path / "models")
    assert not list((tmp_path / "models").glob("*")) if (tmp_path / "models").exists() else True


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "truncated or of another kind"),
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "git lfs pull"),
        (b"<html>404</html>", "of another kind"),
    ],
    ids=["truncated", "empty", "a pointer of Git LFS", "a web page"],
)
def test_a_file_that_is_no_model(content: bytes | None, why: str, tmp_path: Path, files: dict[str, Any]) -> None:
    source = Path(saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path))
    source.write_bytes(source.read_bytes()[:500] if content is None else content)
    with pytest.raises(ImportModelError, match=f"(?s)no ONNX model.*{why}"):
        import_model(str(source), models=tmp_path / "models", **files)


@pytest.mark.parametrize("first", ["BACKGROUND", "__background__", "???"])
def test_background_in_the_labels_is_no_label(first: str, tmp_path: Path, files: dict[str, Any]) -> None:
    """pytorch-ssd's own label files begin with it: each picture then had 99 detections BACKGROUND near 0.99."""
    files["labels"].write_text("\n".join([first, *LABELS]) + "\n")
    source = saved(heads_model([], ["boxes_raw", "scores_raw"]), tmp_path)
    checked = spec.load(import_model(source, "tiny", models=tmp_path / "models", **files))
    assert list(checked.labels) == LABELS
    assert checked.nms.background_class == 0
    kept = import_model(source, "own", models=tmp_path / "models", settings=["nms.background_class=-1"], **files)
    assert list(spec.load(kept).labels) == [first, *LABELS]


# -- published detectors -----------------------------------------------------------------------------------------------

FOLDER = os.environ.get("SSD_DETECTORS", "")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER, reason="needs published detectors in the folder $SSD_DETECTORS")
@pytest.mark.parametrize(
    ("name", "threshold", "family"),
    [("pedestrians", 1e-8, "tf-object-detection"), ("faces", 0.01, "caffe-ssd"), ("blazeface", 0.5, "blazeface")],
)
def test_published_detectors_give_their_originals_detections(
    name: str, threshold: float, family: str, tmp_path: Path
) -> None:
    """As exported, with nothing but their labels; on the very pixels of reference.npz."""
    given = Path(FOLDER) / name
    folder = import_model(
        str(given / "as_exported.onnx"),
        name,
        labels=given / "labels.txt",
        settings=["input.mean=[104.0, 177.0, 123.0]"] if name == "faces" else [],  # not the usual 104, 117, 123
        models=tmp_path / "m",
        artifacts=tmp_path,
    )
    assert json.loads((folder / "import.json").read_text())["family"] == family
    checked = spec.load(folder)
    run = runner(attach(checked))
    reference = np.load(given / "reference.npz")
    for key in sorted({entry.rsplit("/", 1)[0] for entry in reference.files}):
        theirs = reference[f"{key}/det"]
        theirs = theirs[theirs[:, 4] > threshold]
        outputs = run(checked.nms.feeds(reference[f"{key}/in"][None]))
        count = int(outputs["num_detections"][0, 0])
        rows = np.column_stack([outputs[f"detection_{part}"][0, :count] for part in ("boxes", "scores", "classes")])
        assert len(rows) == len(theirs), key
        free = [*rows]
        for row in theirs:
            boxes = np.array([other[:4] for other in free]).clip(0, 1)
            apart = np.abs(boxes - row[:4].clip(0, 1)).max(1) + np.abs([other[4] - row[4] for other in free])
            place = int(apart.argmin())
            other = free.pop(place)
            assert np.abs(other[:4].clip(0, 1) - row[:4].clip(0, 1)).max() < 1e-5
            assert abs(other[4] - row[4]) < 1e-4
            assert other[5] == row[5]
