"""Labelled pictures for calibration and audit: a folder, a video, or a generator that the spec names.

The client's own code (ssd_client.preprocess) opens pictures and makes the model's input, so calibration, gate and audit
see the pixels that clients send.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build import contract, files
from build.errors import DataError
from build.gate import frames, labels
from build.spec import Input, Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from ssd_client.preprocess import Placement

FP32 = "fp32"
OWN_LABELS = 0.3  # a score; of FP32's own detections that stand for labels
MOST_UNREADABLE = 0.05


@dataclass(frozen=True)
class Pictures:
    """Pictures in the order of their names.

    Attributes:
        name: where they come from, for messages.
        paths: the files.
        truth: COCO `instances` of exactly these pictures; None where they have no labels.
        image_ids: the id of each picture in `truth`; empty without it.
        category_ids: the id in `truth` of each of the model's labels; empty without it.
        labelled_by: "FP32" where the labels are the FP32 model's own detections; else empty.
    """

    name: str
    paths: tuple[Path, ...]
    truth: dict[str, Any] | None = None
    image_ids: tuple[int, ...] = ()
    category_ids: tuple[int, ...] = ()
    labelled_by: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def spread(self, count: int) -> Pictures:
        """At most `count` of them, spread evenly, without their labels."""
        step = max(1, len(self.paths) // count)
        return Pictures(self.name, self.paths[::step][:count])

    def some(self, count: int) -> Pictures:
        """At most `count` of them with their labels: the first that show an object, then the first others."""
        if count >= len(self.paths):
            return self
        if self.truth is None:
            return replace(self, paths=self.paths[:count])
        shown = {annotation["image_id"] for annotation in self.truth["annotations"]}
        order = sorted(range(len(self.paths)), key=lambda place: (self.image_ids[place] not in shown, place))
        places = sorted(order[:count])
        ids = tuple(self.image_ids[place] for place in places)
        truth = {
            **self.truth,
            "images": [image for image in self.truth["images"] if image["id"] in ids],
            "annotations": [row for row in self.truth["annotations"] if row["image_id"] in ids],
        }
        return replace(self, paths=tuple(self.paths[place] for place in places), truth=truth, image_ids=ids)

    def digest(self) -> str:
        """SHA-256 over the files' contents, in order."""
        whole = hashlib.sha256()
        for path in self.paths:
            whole.update(hashlib.sha256(path.read_bytes()).digest())
        return whole.hexdigest()


def calibration(spec: Spec, cache: Path) -> Pictures:
    """The pictures that activations are measured on; their labels play no part.

    Args:
        spec: names them in [data].
        cache: where a generator writes its pictures.

    Raises:
        DataError: there are none.
    """
    if not spec.data.calibration:
        raise DataError(
            f"{spec.path}: [data] names no calibration pictures",
            why="without real pictures the clipping of activations would be a guess",
            fix="name a folder of about 500 typical pictures: [data] calibration (docs/spec.md)",
        )
    return _pictures(spec, spec.data.calibration, spec.data.calibration_count, cache, labelled=False)


def held_out(spec: Spec, cache: Path) -> Pictures:
    """The labelled pictures that a precision is judged on.

    Raises:
        DataError: there are none, or their labels are missing or do not fit the model's.
    """
    if not spec.data.held_out:
        raise DataError(
            f"{spec.path}: [data] names no held-out pictures",
            why="without labelled pictures nothing can tell how much accuracy a precision keeps",
            fix="name a folder with pictures and instances.json: [data] held_out (docs/spec.md)",
        )
    pictures = _pictures(spec, spec.data.held_out, spec.data.held_out_count, cache, labelled=True)
    return _by_fp32(spec, pictures, cache) if spec.data.labels_from == FP32 else pictures


def digest(spec: Spec) -> dict[str, str]:
    """SHA-256 of what a calibration depends on, by name: the generator, or the pictures themselves; {} without either.

    Raises:
        OSError: it cannot be read.
        DataError: the folder holds no pictures.
    """
    if not spec.data.calibration:
        return {}
    if spec.data.generator:
        path = spec.path.parent / spec.data.generator
        return {path.name: files.sha256(path)}
    path = spec.path.parent / spec.data.calibration
    if path.suffix.lower() in frames.SUFFIXES:
        return {path.name: files.sha256(path)}
    return {"calibration": calibration(spec, spec.path.parent).digest()}


def arrays(pictures: Pictures, into: Input, batch: int) -> Iterator[NDArray[np.uint8]]:
    """The readable pictures as UINT8 [b,H,W,3], b ≤ batch.

    Raises:
        DataError: more than one in twenty cannot be read; said after the last.
    """
    import numpy as np

    unreadable: list[str] = []
    rows: list[NDArray[np.uint8]] = []
    for path in pictures.paths:
        try:
            rows.append(load(path, into)[0])
        except DataError as error:
            unreadable.append(error.what)
        if len(rows) == batch:
            yield np.stack(rows)
            rows = []
    if rows:
        yield np.stack(rows)
    if len(unreadable) > MOST_UNREADABLE * len(pictures):
        raise DataError(
            f"{pictures.name}: {len(unreadable)} of {len(pictures)} pictures cannot be read, like {unreadable[0]}",
            why="they were damaged on their way, or are no pictures",
            fix=f"mend or remove them; up to {MOST_UNREADABLE:.0%} are left out silently",
        )
    if unreadable:
        _say(
            f"{pictures.name}: {len(unreadable)} of {len(pictures)} pictures cannot be read and were left out, like "
            f"{unreadable[0]}"
        )


def open_picture(path: Path) -> Image.Image:
    """A picture in 8-bit RGB, upright, as the client opens it.

    Raises:
        DataError: it cannot be read.
    """
    from ssd_client.exceptions import ImageError
    from ssd_client.preprocess import load_image

    try:
        return load_image(path)
    except ImageError as error:
        raise DataError(str(error)) from None


def photographs() -> list[Image.Image]:
    """Real photographs for models without pictures of their own: Grace Hopper, as it comes with matplotlib.

    Returns:
        RGB: the whole picture, mirrored, in parts and turned.
    """
    import matplotlib as mpl
    from PIL import ImageOps

    whole = open_picture(Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    width, height = whole.size
    upper, lower = whole.crop((0, 0, width, height // 2)), whole.crop((0, height // 2, width, height))
    middle = whole.crop((width // 6, height // 8, width * 5 // 6, height * 5 // 8))
    turned = [whole.rotate(degrees) for degrees in (10, -10)]
    return [whole, ImageOps.mirror(whole), upper, middle, *turned, ImageOps.mirror(middle), lower]


def load(path: Path, into: Input) -> tuple[NDArray[np.uint8], Placement]:
    """A picture as the client would send it.

    Returns:
        UINT8 [H,W,3], and where the picture lies in it, which brings boxes back to the picture's pixels.

    Raises:
        DataError: it cannot be read.
    """
    return to_input(open_picture(path), into)


def to_input(picture: Image.Image, into: Input) -> tuple[NDArray[np.uint8], Placement]:
    """A picture in 8-bit RGB, as `load` gives it."""
    import numpy as np
    from ssd_client.preprocess import preprocess

    pixels = np.empty((into.height, into.width, 3), np.uint8)
    return pixels, preprocess(picture, into.preprocessing, pixels)


def _pictures(spec: Spec, name: str, count: int, cache: Path, *, labelled: bool) -> Pictures:
    from ssd_client.preprocess import SUFFIXES

    truth: dict[str, Any] | None
    if spec.data.generator:
        paths, truth = _generated(spec.path.parent / spec.data.generator, name, count, cache / spec.model.name)
        pictures = Pictures(f"{spec.data.generator}: {name}", tuple(paths[:count]))
    else:
        folder = spec.path.parent / name
        if folder.is_file() and folder.suffix.lower() in frames.SUFFIXES:
            paths = frames.extract(folder, count, cache / spec.model.name, between=labelled)
        elif folder.is_dir():
            paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        else:
            raise DataError(
                f"{folder}: there is no such folder of pictures and no such video",
                why=f"{spec.path} names it in [data]",
            )
        pictures = Pictures(str(folder), tuple(paths[:count]))
        if labelled and pictures.paths and spec.data.labels_from != FP32:
            truth, ids = labels.read(folder, pictures.paths, spec.labels)
            return _labelled(pictures, truth, spec.labels, ids)
        truth = None
    if not pictures.paths:
        raise DataError(f"{pictures.name}: holds no pictures", fix=f"put some there: {', '.join(SUFFIXES)}")
    if not labelled or truth is None or spec.data.labels_from == FP32:
        return pictures
    return _labelled(pictures, truth, spec.labels)


def _by_fp32(spec: Spec, pictures: Pictures, cache: Path) -> Pictures:
    """Pictures whose labels are what the FP32 model itself detects in them with a score above OWN_LABELS.

    Raises:
        DataError: it detects nothing.
    """
    from build.graph.attach import attach
    from build.session import runner

    model = attach(spec)
    key = hashlib.sha256(model.SerializeToString(deterministic=True) + pictures.digest().encode()).hexdigest()[:16]
    file = cache / spec.model.name / f"labels-fp32-{key}.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        run, rows = runner(model), []
        for path in pictures.paths:
            pixels, placement = load(path, spec.input)
            number, boxes, scores, classes = (
                value[0] for value in map(run(spec.nms.feeds(pixels[None])).__getitem__, contract.OUTPUTS)
            )
            kept = scores[: int(number[0])] > OWN_LABELS
            found = placement.to_image(boxes[: len(kept)][kept]).astype(float).tolist()
            rows.append([found, classes[: len(kept)][kept].tolist()])
        files.write_json(file, rows)
    annotations: list[dict[str, Any]] = []
    for image_id, (boxes, classes) in enumerate(rows, 1):
        for (x1, y1, x2, y2), label in zip(boxes, classes, strict=True):
            if x2 > x1 and y2 > y1:
                about = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "iscrowd": 0}
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append({**about, "bbox": box, "area": box[2] * box[3]})
    if not annotations:
        raise DataError(
            f"{pictures.name}: FP32 detects nothing with a score above {OWN_LABELS} on {len(pictures)} pictures",
            why="they show none of the model's objects, or its input or thresholds are read wrongly",
            fix="name pictures with objects in them: [data] held_out",
        )
    truth = {
        "images": [{"id": i, "file_name": path.name} for i, path in enumerate(pictures.paths, 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(spec.labels, 1)],
    }
    ids, categories = tuple(range(1, len(pictures) + 1)), tuple(range(1, len(spec.labels) + 1))
    return Pictures(pictures.name, pictures.paths, truth, ids, categories, "FP32")


def _generated(path: Path, split: str, count: int, cache: Path) -> tuple[list[Path], dict[str, Any]]:
    """What a generator's `write_split` returns: the pictures and their COCO `instances`."""
    name = f"ssd_generator_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    try:
        if name not in sys.modules:
            module_spec = importlib.util.spec_from_file_location(name, path)
            if module_spec is None or module_spec.loader is None or not path.is_file():
                raise DataError(f"{path}: no Python file")
            _say(f"pictures are drawn by the model's own program, which runs now: {path.resolve()}")
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[name] = module
            module_spec.loader.exec_module(module)
        paths, truth = sys.modules[name].write_split(cache, split, count)
    except DataError:
        raise
    except Exception as error:  # the generator is the user's own program
        sys.modules.pop(name, None)
        raise DataError(
            f"{path}: write_split({split!r}, {count}) failed: {type(error).__name__}: {error}",
            fix="mend it, or correct [data] in spec.toml (docs/spec.md)",
        ) from error
    return list(paths), truth


def _say(text: str) -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)


def _labelled(
    pictures: Pictures, truth: dict[str, Any], labels: Sequence[str], image_ids: tuple[int, ...] = ()
) -> Pictures:
    """Pictures with the part of the labels that is about them, checked against the model's labels."""
    try:
        categories = {category["name"]: category["id"] for category in truth["categories"]}
        if set(categories) != set(labels):
            only_model, only_data = sorted(set(labels) - set(categories)), sorted(set(categories) - set(labels))
            raise DataError(
                f"{pictures.name}: the labels differ: the model alone has {only_model}, the pictures alone {only_data}",
                fix="name the COCO categories like the lines of labels.txt",
            )
        if image_ids:
            return replace(
                pictures,
                truth=truth,
                image_ids=image_ids,
                category_ids=tuple(categories[label] for label in labels),
            )
        ids = {image["file_name"]: image["id"] for image in truth["images"]}
        missing = [path.name for path in pictures.paths if path.name not in ids]
        if missing:
            raise DataError(f"{pictures.name}: {len(missing)} pictures have no labels, like {missing[0]}")
        image_ids = tuple(ids[path.name] for path in pictures.paths)
        kept = set(image_ids)
        part = {
            **truth,
            "images": [image for image in truth["images"] if image["id"] in kept],
            "annotations": [annotation for annotation in truth["annotations"] if annotation["image_id"] in kept],
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"{pictures.name}: its labels are no COCO instances: {error!r}") from None
    return Pictures(pictures.name, pictures.paths, part, image_ids, tuple(categories[label] for label in labels))
