"""Labels of pictures as other tools write them, read into COCO's `instances`: COCO JSON, Pascal VOC XML, YOLO text.

pycocotools reads COCO as its own site writes it and nothing else; no library among those looked at reads all three
without OpenCV, torch or pandas. So each format is read here, and what is wrong is told with file, entry and field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from build.errors import DataError

COCO_FILE = "instances.json"
_VOC_FOLDERS, _YOLO_FOLDERS = ("", "Annotations", "annotations"), ("", "labels")


def read(folder: Path, paths: Sequence[Path], labels: Sequence[str]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The labels of some pictures of a folder.

    Args:
        folder: what the spec names; `instances.json` in it, or an .xml or .txt file per picture beside the pictures or
            in `Annotations`, `annotations` or `labels`.
        paths: the pictures, in this folder or below it.
        labels: the model's; YOLO's classes are their numbers where there is no classes.txt.

    Returns:
        COCO `instances` of exactly these pictures, with numbers for ids, and the id of each picture.

    Raises:
        DataError: there are no labels, or they cannot be read; names file, entry and field.
    """
    if (folder / COCO_FILE).is_file():
        return _coco(folder / COCO_FILE, folder, paths)
    readers = {".xml": (_VOC_FOLDERS, _voc), ".txt": (_YOLO_FOLDERS, _yolo)}
    for suffix, (places, reader) in readers.items():
        files = [_beside(folder, path, suffix, places) for path in paths]
        if any(file is not None for file in files):
            missing = [path.name for path, file in zip(paths, files, strict=True) if file is None]
            if missing and suffix == ".xml":
                raise DataError(f"{folder}: {len(missing)} pictures have no labels, like {missing[0]}")
            names = _yolo_classes(folder) or list(labels)
            rows = [reader(file, path, names) if file else [] for path, file in zip(paths, files, strict=True)]
            known = names if suffix == ".txt" else [*labels, *sorted({name for row in rows for name, _ in row})]
            return _instances(folder, paths, rows, list(dict.fromkeys(known)))
    raise DataError(
        f"{folder}: has no labels for its pictures",
        fix=f"put {COCO_FILE} (COCO), an .xml (Pascal VOC) or a .txt (YOLO) per picture there, or let FP32's own "
        'detections be the labels: [data] labels_from = "fp32"',
    )


def _instances(
    folder: Path, paths: Sequence[Path], rows: Iterable[Sequence[tuple[str, list[float]]]], names: Sequence[str]
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """COCO `instances` of boxes [x,y,w,h] in pixels, by picture."""
    ids = tuple(range(1, len(paths) + 1))
    annotations: list[dict[str, Any]] = []
    for image_id, row in zip(ids, rows, strict=True):
        for name, box in row:
            about = {"id": len(annotations) + 1, "image_id": image_id, "category_id": names.index(name) + 1}
            annotations.append({**about, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return {
        "images": [
            {"id": image_id, "file_name": path.relative_to(folder).as_posix()}
            for image_id, path in zip(ids, paths, strict=True)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, 1)],
    }, ids


def _beside(folder: Path, picture: Path, suffix: str, places: Sequence[str]) -> Path | None:
    """The file of the same name with another suffix, beside a picture or in a folder for labels."""
    inside = picture.relative_to(folder).with_suffix(suffix)
    choices = [folder / place / inside for place in places] + [
        folder / place / inside.name for place in places if place
    ]
    if "images" in picture.parts:  # .../images/a.jpg → .../labels/a.txt
        parts = list(picture.parts)
        place = len(parts) - 1 - parts[::-1].index("images")
        parts[place] = places[-1]
        choices.append(Path(*parts).with_suffix(suffix))
    return next((choice for choice in choices if choice.is_file()), None)


# -- COCO --------------------------------------------------------------------------------------------------------------


def _coco(file: Path, folder: Path, paths: Sequence[Path]) -> tuple[dict[str, Any], tuple[int, ...]]:
    try:
        given = json.loads(file.read_text(encoding="utf-8-sig"))
        lists = {key: given[key] for key in ("images", "annotations", "categories")}
        for key, value in lists.items():
            if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
                raise ValueError(f"{key} is no list of objects")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: no COCO instances file: {error if not isinstance(error, KeyError) else f'{error} is missing'}",
            fix="it must have the lists images, annotations and categories",
        ) from None
    categories: dict[str, dict[str, Any]] = {
        _key(file, "categories", i, row, "id"): {"id": i + 1, "name": str(_field(file, "categories", i, row, "name"))}
        for i, row in enumerate(lists["categories"])
    }
    by_name: dict[str, list[str]] = {}
    for i, row in enumerate(lists["images"]):
        name = str(_field(file, "images", i, row, "file_name")).replace("\\", "/")
        key = _key(file, "images", i, row, "id")
        for known in dict.fromkeys((name.removeprefix("./"), name.rpartition("/")[2])):
            by_name.setdefault(known, []).append(key)
    keys, missing = [], []
    for path in paths:
        inside = path.relative_to(folder).as_posix()
        found = by_name.get(inside) or by_name.get(path.name, [])
        if len(set(found)) > 1:
            raise DataError(f"{file}: several images have the file_name {path.name}, and none is {inside}")
        keys += found[:1]
        missing += [] if found else [path.name]
    if missing:
        raise DataError(f"{folder}: {len(missing)} pictures have no labels, like {missing[0]}")
    every = {_key(file, "images", i, row, "id") for i, row in enumerate(lists["images"])}
    ids = {key: number for number, key in enumerate(keys, 1)}
    if len(ids) < len(keys):
        twice = next(path.name for path, key in zip(paths, keys, strict=True) if keys.count(key) > 1)
        raise DataError(
            f"{file}: one image stands for several pictures called {twice}",
            fix="write file_name with the folder that the picture is in",
        )
    annotations: list[dict[str, Any]] = []
    for i, row in enumerate(lists["annotations"]):
        image = _key(file, "annotations", i, row, "image_id")
        category = _key(file, "annotations", i, row, "category_id")
        if image not in every:
            raise DataError(f"{file}: annotations[{i}] image_id is {row['image_id']!r}, but no image has this id")
        if category not in categories:
            raise DataError(f"{file}: annotations[{i}] category_id is {row['category_id']!r}, but no category has it")
        if image in ids:
            box = _box(file, i, row)
            try:
                sizes: dict[str, Any] = {
                    "area": float(row.get("area") or box[2] * box[3]),
                    "iscrowd": int(row.get("iscrowd") or 0),
                }
            except (TypeError, ValueError):
                raise DataError(f"{file}: annotations[{i}] area or iscrowd is no number: {_short(row)}") from None
            about: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": ids[image],
                "category_id": categories[category]["id"],
            }
            annotations.append({**about, "bbox": box, **sizes})
    images = [{"id": number, "file_name": path.relative_to(folder).as_posix()} for number, path in enumerate(paths, 1)]
    truth = {"images": images, "annotations": annotations, "categories": list(categories.values())}
    return truth, tuple(range(1, len(paths) + 1))


def _field(file: Path, place: str, index: int, row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None or row[name] == "":
        raise DataError(
            f"{file}: {place}[{index}] has no {name}: {_short(row)}", fix="write it with the labelling tool"
        )
    return row[name]


def _key(file: Path, place: str, index: int, row: Mapping[str, Any], name: str) -> str:
    """An id as text: some tools write "7" in one place and 7 in another."""
    value = _field(file, place, index, row, name)
    if isinstance(value, (dict, list, bool)):
        raise DataError(f"{file}: {place}[{index}] {name} is {value!r}, but must be a number or a text")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _box(file: Path, index: int, row: Mapping[str, Any]) -> list[float]:
    """bbox, else what the polygons of `segmentation` span: x,y,w,h in pixels."""
    box, polygons = row.get("bbox"), row.get("segmentation")
    if box is None and isinstance(polygons, list) and polygons and all(isinstance(one, list) for one in polygons):
        try:
            across = [float(value) for polygon in polygons for value in polygon[0::2]]
            down = [float(value) for polygon in polygons for value in polygon[1::2]]
            box = [min(across), min(down), max(across) - min(across), max(down) - min(down)]
        except (TypeError, ValueError):
            box = None
    try:
        values = [float(value) for value in box or ()]
        good = len(values) == 4 and all(map(math.isfinite, values)) and min(values[2:]) >= 0
    except (TypeError, ValueError):
        values, good = [], False
    if not good:
        raise DataError(
            f"{file}: annotations[{index}] bbox is {row.get('bbox', 'missing')!r}, but must be x, y, width and height "
            f"in pixels: {_short(row)}",
            fix="correct or remove this annotation",
        )
    return values


def _short(row: Mapping[str, Any]) -> str:
    text = json.dumps(row, default=str)
    return text if len(text) < 120 else f"{text[:117]}..."


# -- Pascal VOC --------------------------------------------------------------------------------------------------------


def _voc(file: Path, picture: Path, names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """The objects of one .xml file; its corners are counted from 1 and inclusive."""
    try:
        tree = ElementTree.parse(file)
    except (ElementTree.ParseError, OSError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    rows = []
    for index, node in enumerate(tree.iter("object")):
        name = (node.findtext("name") or "").strip()
        if not name:
            raise DataError(f"{file}: object {index} has no name")
        try:
            left, top, right, bottom = (
                float(node.findtext(f"bndbox/{corner}") or "") for corner in ("xmin", "ymin", "xmax", "ymax")
            )
        except ValueError:
            raise DataError(f"{file}: object {index} ({name}) has no bndbox with four numbers") from None
        if right < left or bottom < top:
            raise DataError(f"{file}: object {index} ({name}) ends before it begins: {left}, {top}, {right}, {bottom}")
        rows.append((name, [left - 1, top - 1, right - left + 1, bottom - top + 1]))
    return rows


# -- YOLO --------------------------------------------------------------------------------------------------------------


def _yolo_classes(folder: Path) -> list[str]:
    for place in (folder, folder / "labels", folder.parent):
        file = place / "classes.txt"
        if file.is_file():
            return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return []


def _yolo(file: Path, picture: Path, names: Sequence[str]) -> list[tuple[str, list[float]]]:
    """The lines of one .txt file: class, centre and size in fractions of the picture."""
    from PIL import Image

    try:
        with Image.open(picture) as opened:
            width, height = opened.size
            if opened.getexif().get(274, 1) >= 5:  # turned by a quarter
                width, height = height, width
    except OSError:
        return []  # whoever reads the picture says so
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, *values = line.split()
            name = names[int(label)] if int(label) >= 0 else ""
            across, down, wide, high = map(float, values[:4])
            if not name or min(wide, high) < 0 or not all(map(math.isfinite, (across, down, wide, high))):
                raise ValueError
        except (ValueError, IndexError):
            raise DataError(
                f"{file}: line {number} is {line.strip()!r}, but must be a class of 0..{len(names) - 1} and "
                "x, y, width, height in 0..1"
            ) from None
        rows.append((name, [(across - wide / 2) * width, (down - high / 2) * height, wide * width, high * height]))
    return rows
