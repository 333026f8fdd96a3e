"""COCO mean average precision, by pycocotools: the one judge of accuracy in this project."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from build.errors import SSDError

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval


@dataclass(frozen=True)
class Accuracy:
    """COCO metrics, each 0..1 (NaN where there is no such object).

    Attributes:
        map: AP averaged over IoU 0.50:0.05:0.95 and classes.
        map50, map75: AP at one IoU.
        map_small, map_medium, map_large: by object area: below 32², below 96², above, in pixels.
        by_class: AP@[.5:.95] of each label.
        images, objects: how many were evaluated.
    """

    map: float
    map50: float
    map75: float
    map_small: float
    map_medium: float
    map_large: float
    by_class: dict[str, float]
    images: int
    objects: int


def evaluate(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> Accuracy:
    """Scores detections against a COCO `instances` dictionary.

    Args:
        ground_truth: `images`, `annotations`, `categories` as in COCO.
        detections: COCO results: `image_id`, `category_id`, `bbox` (x,y,w,h in pixels), `score`.

    Raises:
        SSDError: a detection names an image or a category that the ground truth lacks, or there is nothing to score.
    """
    return accuracy(judge(ground_truth, detections))


def mean_average_precision(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> float:
    """COCO's mAP@[.5:.95] alone, as the gate asks for it (build/verify.py: Judge)."""
    return evaluate(ground_truth, detections).map


def judge(ground_truth: dict[str, Any], detections: Sequence[dict[str, Any]]) -> COCOeval:
    """The arguments of `evaluate` → pycocotools' COCOeval after its work, with every match of every picture in it.

    Raises:
        SSDError: as `evaluate`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    image_ids = {image["id"] for image in ground_truth["images"]}
    category_ids = {category["id"] for category in ground_truth["categories"]}
    foreign = [d for d in detections if d["image_id"] not in image_ids or d["category_id"] not in category_ids]
    if foreign:
        raise SSDError(
            f"{len(foreign)} of {len(detections)} detections name an unknown image or category, like {foreign[0]}",
            why="the labels of the model and of the data set differ, or another split was evaluated",
            fix="compare labels.txt with the categories of the ground truth",
        )
    if not ground_truth["annotations"]:
        raise SSDError("the ground truth has no annotation", fix="evaluate images that are labelled")

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = {"info": {}, **ground_truth}
        truth.createIndex()
        results = COCO()
        results.dataset = {
            "info": {},
            "images": ground_truth["images"],
            "categories": ground_truth["categories"],
            "annotations": [
                {**d, "id": i, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
                for i, d in enumerate(detections, start=1)
            ],
        }
        results.createIndex()
        done = COCOeval(truth, results, "bbox")
        done.evaluate()
        done.accumulate()
        done.summarize()
    return done


def accuracy(judge: COCOeval) -> Accuracy:
    """COCO's metrics of what `judge` returned."""
    import numpy as np

    ground_truth = judge.cocoGt.dataset

    def mean(values: Any) -> float:
        kept = values[values > -1]
        return float(np.mean(kept)) if kept.size else float("nan")

    precision = judge.eval["precision"]  # [IoU, recall, class, area, max detections]
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    return Accuracy(
        map=float(judge.stats[0]),
        map50=float(judge.stats[1]),
        map75=float(judge.stats[2]),
        map_small=mean(precision[:, :, :, 1, -1]),
        map_medium=mean(precision[:, :, :, 2, -1]),
        map_large=mean(precision[:, :, :, 3, -1]),
        by_class={names[cid]: mean(precision[:, :, i, 0, -1]) for i, cid in enumerate(judge.params.catIds)},
        images=len(ground_truth["images"]),
        objects=len(ground_truth["annotations"]),
    )
