"""Labels as other tools write them, and what is said about those that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from build.errors import DataError
from build.gate import accuracy, datasets, labels
from build.spec import Spec, load
from tests.build import tiny_model

BOX = [2.0, 4.0, 6.0, 8.0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of 20 x 40 pixels, the last in a sub-folder; the first shows nothing."""
    folder = tmp_path / "pictures"
    for name in ("a.png", "b.png", "more/c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 20, 3), np.uint8)).save(folder / name)
    return folder


def coco() -> dict[str, Any]:
    return {
        "images": [
            {"id": 7, "file_name": "a.png"},
            {"id": 8, "file_name": "b.png"},
            {"id": 9, "file_name": "more/c.png"},
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 8, "category_id": 5, "bbox": BOX, "area": 48, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 3, "bbox": BOX, "area": 48, "iscrowd": 0},
        ],
    }


def read(folder: Path, truth: dict[str, Any] | None = None) -> datasets.Pictures:
    """As the gate reads them."""
    if truth is not None:
        (folder / "instances.json").write_text(json.dumps(truth))
    path = tiny_model.write(folder.parent / "tiny")
    path.write_text(f'{path.read_text()}\n[data]\nheld_out = "../{folder.name}"\n')
    return datasets.held_out(load(path), folder.parent)


def check(pictures: datasets.Pictures) -> None:
    """They say the same, and pycocotools takes them."""
    assert [path.name for path in pictures.paths] == ["a.png", "b.png", "c.png"]
    assert pictures.truth is not None
    named = {pictures.category_ids[0]: "cat", pictures.category_ids[1]: "dog"}
    found = [
        (pictures.image_ids.index(row["image_id"]), named[row["category_id"]], row["bbox"])
        for row in pictures.truth["annotations"]
    ]
    assert found == [(1, "dog", pytest.approx(BOX)), (2, "cat", pytest.approx(BOX))]
    right = [
        {"image_id": row["image_id"], "category_id": row["category_id"], "bbox": row["bbox"], "score": 0.9}
        for row in pictures.truth["annotations"]
    ]
    assert accuracy.evaluate(pictures.truth, right).map == pytest.approx(1)


def each(key: str, edit: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    truth = coco()
    for row in truth[key]:
        edit(row)
    return truth


@pytest.mark.parametrize(
    "truth",
    [
        coco(),
        each("annotations", lambda row: row.pop("area")),
        each("annotations", lambda row: row.pop("iscrowd")),
        each("annotations", lambda row: row.pop("id")),
        each("annotations", lambda row: row.update(id="x", area=None, iscrowd=False)),
        each("annotations", lambda row: row.update(image_id=str(row["image_id"]))),
        each("annotations", lambda row: row.update(category_id=float(row["category_id"]))),
        each("annotations", lambda row: row.update(bbox=[str(value) for value in row["bbox"]])),
        each("annotations", lambda row: row.update(bbox=None, segmentation=[[2, 4, 8, 4, 8, 12, 2, 12]])),
        each("images", lambda row: row.update(file_name=f"images/{row['file_name'].rpartition('/')[2]}")),
        each("images", lambda row: row.update(file_name=f".\\{row['file_name']}".replace("/", "\\"))),
        {
            **each("images", lambda row: row.update(id=f"p{row['id']}")),
            "annotations": each("annotations", lambda row: row.update(image_id=f"p{row['image_id']}"))["annotations"],
        },
    ],
)
def test_coco_of_other_tools(folder: Path, truth: dict[str, Any]) -> None:
    check(read(folder, truth))


@pytest.mark.parametrize(
    ("truth", "complaint"),
    [
        (each("annotations", lambda row: row.pop("bbox")), r"instances.json: annotations\[0\] bbox is 'missing'"),
        (
            each("annotations", lambda row: row.update(bbox=[])),
            r"annotations\[0\] bbox is \[\], but must be x, y, width",
        ),
        (each("annotations", lambda row: row.update(bbox=[1, 2, -3, 4])), r"annotations\[0\] bbox is \[1, 2, -3, 4\]"),
        (each("annotations", lambda row: row.update(bbox=[1, 2, float("nan"), 4])), r"annotations\[0\] bbox"),
        (each("annotations", lambda row: row.update(bbox={"x": 1})), r"annotations\[0\] bbox"),
        (each("annotations", lambda row: row.pop("image_id")), r"annotations\[0\] has no image_id"),
        (each("annotations", lambda row: row.update(image_id=99)), r"annotations\[0\] image_id is 99, but no image"),
        (each("annotations", lambda row: row.update(category_id=99)), r"annotations\[0\] category_id is 99"),
        (each("annotations", lambda row: row.update(area="large")), r"annotations\[0\] area or iscrowd is no number"),
        (each("images", lambda row: row.pop("id")), r"images\[0\] has no id"),
        (each("images", lambda row: row.pop("file_name")), r"images\[0\] has no file_name"),
        (each("images", lambda row: row.update(id=[1])), r"images\[0\] id is \[1\]"),
        (each("categories", lambda row: row.pop("name")), r"categories\[0\] has no name"),
        ({**coco(), "images": coco()["images"][:2]}, "1 pictures have no labels, like c.png"),
        ({**coco(), "annotations": {}}, "annotations is no list of objects"),
        ({**coco(), "annotations": [[1]]}, "annotations is no list of objects"),
        ({"images": []}, "'annotations' is missing"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, truth: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        read(folder, truth)


VOC = """<annotation><filename>x.png</filename><object><name>{name}</name><bndbox>
<xmin>3</xmin><ymin>5</ymin><xmax>8</xmax><ymax>12</ymax></bndbox></object></annotation>"""


@pytest.mark.parametrize("place", ["", "Annotations/"])
def test_pascal_voc(folder: Path, place: str) -> None:
    (folder / place).mkdir(exist_ok=True)
    (folder / place / "more").mkdir(exist_ok=True)
    (folder / f"{place}a.xml").write_text("<annotation/>")
    (folder / f"{place}b.xml").write_text(VOC.format(name="dog"))
    (folder / f"{place}more/c.xml").write_text(VOC.format(name="cat"))
    check(read(folder))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<annotation>", r"b.xml: cannot be read"),
        (VOC.format(name=""), r"b.xml: object 0 has no name"),
        (VOC.format(name="dog").replace("xmax", "x"), r"b.xml: object 0 \(dog\) has no bndbox with four numbers"),
        (VOC.format(name="dog").replace(">8<", ">1<"), r"b.xml: object 0 \(dog\) ends before it begins"),
        (VOC.format(name="cow"), r"the pictures alone \['cow'\]"),
    ],
)
def test_bad_pascal_voc(folder: Path, text: str, complaint: str) -> None:
    for name in ("a", "b", "more/c"):
        (folder / f"{name}.xml").write_text("<annotation/>")
    (folder / "b.xml").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read(folder)


@pytest.mark.parametrize(("classes", "numbers"), [("", (1, 0)), ("dog\ncat\n", (0, 1))])
def test_yolo(folder: Path, classes: str, numbers: tuple[int, int]) -> None:
    """5/20, 8/40, 6/20, 8/40; a picture without a file shows nothing."""
    (folder / "labels" / "more").mkdir(parents=True)
    for name, number in zip(("b", "more/c"), numbers, strict=True):
        (folder / "labels" / f"{name}.txt").write_text(f"{number} 0.25 0.2 0.3 0.2\n\n")
    if classes:
        (folder / "classes.txt").write_text(classes)
    check(read(folder))


@pytest.mark.parametrize(
    "line", ["2 0.5 0.5 0.1 0.1", "-1 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.1", "0 0.5 0.5 -1 0.1", "cat 1 1 1 1"]
)
def test_bad_yolo(folder: Path, line: str) -> None:
    (folder / "b.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(DataError, match=r"b.txt: line 2 is .* must be a class of 0\.\.1"):
        read(folder)


def test_no_labels_at_all_says_what_would_do(folder: Path) -> None:
    with pytest.raises(DataError, match=r"has no labels for its pictures[\s\S]*labels_from = \"fp32\""):
        read(folder)


def test_pictures_that_show_something_come_first(folder: Path) -> None:
    pictures = read(folder, coco()).some(2)
    assert [path.name for path in pictures.paths] == ["b.png", "c.png"]
    assert pictures.truth is not None
    assert len(pictures.truth["annotations"]) == 2
    assert len(pictures.image_ids) == 2


def test_labels_by_fp32(folder: Path) -> None:
    """What FP32 detects is its own label: mAP 1, and the pictures say whose labels they are."""
    from build.gate import scoring
    from build.graph.attach import attach
    from build.session import runner

    random = np.random.default_rng(0)
    for name in ("a.png", "b.png", "more/c.png"):
        Image.fromarray(random.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(folder / name)
    path = tiny_model.write(folder.parent / "tiny")
    path.write_text(f'{path.read_text()}\n[data]\nheld_out = "../pictures"\nlabels_from = "fp32"\n')
    spec: Spec = load(path)
    pictures = datasets.held_out(spec, folder.parent)
    assert pictures.labelled_by == "FP32"
    assert datasets.held_out(spec, folder.parent).truth == pictures.truth  # from the cache
    detect = scoring.detector(spec, runner(attach(spec)))
    assert scoring.score(pictures, detect, "").accuracy.map50 > 0.99
    path.write_text(path.read_text().replace("score_threshold = 0.1", "score_threshold = 1.0"))
    with pytest.raises(DataError, match=r"FP32 detects nothing with a score above 0\.3 on 3 pictures"):
        datasets.held_out(load(path), folder.parent)


def test_coco_is_read_before_the_rest(folder: Path) -> None:
    (folder / "b.txt").write_text("not YOLO")
    truth, ids = labels.read(*_with(folder))
    assert len(ids) == 3
    assert len(truth["annotations"]) == 2


def _with(folder: Path) -> tuple[Path, list[Path], tuple[str, ...]]:
    (folder / "instances.json").write_text(json.dumps(coco()))
    return folder, [folder / "a.png", folder / "b.png", folder / "more" / "c.png"], tiny_model.LABELS
