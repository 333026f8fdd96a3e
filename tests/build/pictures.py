"""A folder of noise pictures with COCO labels, for models of a few pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write(folder: Path, count: int, labels: Sequence[str], *, size: int = 8, seed: int = 0) -> Path:
    """`count` PNG files of noise and instances.json with one box in each; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    names = [f"{i:04d}.png" for i in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / name)
    boxes = [[*rng.uniform(0, size / 2, 2).tolist(), *rng.uniform(1, size / 2, 2).tolist()] for _ in names]
    truth = {
        "images": [{"id": i + 1, "file_name": name, "width": size, "height": size} for i, name in enumerate(names)],
        "categories": [{"id": i + 1, "name": label} for i, label in enumerate(labels)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": i % len(labels) + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for i, box in enumerate(boxes)
        ],
    }
    (folder / "instances.json").write_text(json.dumps(truth))
    return folder
