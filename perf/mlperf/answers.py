"""Whether what LoadGen was answered is right: every answer of a run, the accuracy log's mAP, and both modes alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.errors import DataError
from build.gate.scoring import Detected, coco_results
from perf.answers import Expected, difference
from perf.mlperf.child import OUTCOME, payload
from perf.mlperf.runs import ACCURACY

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from build.gate.accuracy import Accuracy
    from build.gate.datasets import Pictures
    from perf.mlperf.runs import Served

EXAMPLES = 3
_COLUMNS = 7


class Reference:
    """What the served file answers in this process, picture by picture, as LoadGen's payloads.

    Args:
        served: the model and its pictures.
        folder: of the served version.
    """

    def __init__(self, served: Served, folder: Path) -> None:
        self._served, self._folder = served, folder
        self._known: dict[int, NDArray[np.float32]] = {}
        self._expected: Expected | None = None

    def wrong(self, folder: Path) -> list[str]:
        """The answers of a run that are not the served file's within the gate's tolerance, a sentence each.

        Args:
            folder: of the run, with its outcome.json.
        """
        try:
            answers = json.loads((folder / OUTCOME).read_text())["answers"]
        except (OSError, ValueError, KeyError):
            return []
        self._learn({index for index, _, _ in answers})
        assert self._expected is not None or not answers
        sentences = []
        for index, data, count in answers:
            wanted = outputs_of(self._known[index])
            fault = difference(outputs_of(read(data)), wanted, self._expected.within)  # type: ignore[union-attr]
            if fault:
                sentences += [f"picture {index}: {fault}"] * count
        return sentences

    def _learn(self, indices: set[int]) -> None:
        from ssd_client.preprocess import input_array

        from perf.answers import expected_answers
        from perf.direct import thresholds

        new = sorted(indices - self._known.keys())
        if not new:
            return
        config = self._served.config
        loaded = [input_array(str(self._served.pictures[index]), config.preprocessing) for index in new]
        values = thresholds(config, self._served.score_threshold)
        self._expected = expected_answers(self._folder, config, [image for image, _ in loaded], values)
        for index, row, (_, placement) in zip(new, self._expected.rows, loaded, strict=True):
            outputs = {name: array[None] for name, array in row.items()}
            self._known[index] = payload(index, outputs, 0, placement)


def read(data: str) -> NDArray[np.float32]:
    """A payload in hexadecimal digits, as LoadGen logs it → FP32 [n,7]."""
    import numpy as np

    return np.frombuffer(bytes.fromhex(data), np.float32).reshape(-1, _COLUMNS)


def outputs_of(rows: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """A payload as a picture's outputs, with boxes in 0..1 of the picture."""
    import numpy as np

    return {
        "num_detections": np.array([len(rows)], np.int32),
        "detection_boxes": rows[:, [2, 1, 4, 3]],
        "detection_scores": rows[:, 5],
        "detection_classes": rows[:, 6].astype(np.int32) - 1,
    }


def logged(folder: Path) -> dict[int, str]:
    """What LoadGen's accuracy log holds: sample index → payload in hexadecimal digits, the first of each."""
    known: dict[int, str] = {}
    for entry in json.loads((folder / ACCURACY).read_text() or "[]"):
        known.setdefault(int(entry["qsl_idx"]), entry["data"])
    return known


def evaluate(folder: Path, pictures: Pictures) -> Accuracy:
    """COCO's figures of an accuracy run's log, by the project's own judge.

    Raises:
        DataError: pictures are missing from the log, or have no labels.
    """
    from build.gate import accuracy

    rows = logged(folder)
    missing = len(pictures) - len(rows)
    if missing or pictures.truth is None:
        raise DataError(
            f"{folder / ACCURACY} lacks {missing} of {len(pictures)} pictures", why="requests failed or it was ended"
        )
    sizes = {image["id"]: (image["width"], image["height"]) for image in pictures.truth["images"]}
    detected = []
    for index, image_id in enumerate(pictures.image_ids):
        outputs, (width, height) = outputs_of(read(rows[index])), sizes[image_id]
        boxes = outputs["detection_boxes"] * [width, height, width, height]
        detected.append(Detected(boxes, outputs["detection_scores"], outputs["detection_classes"]))
    return accuracy.evaluate(pictures.truth, coco_results(pictures, detected))


def same_in_both(performance: Path, accuracy: Path) -> dict[str, Any]:
    """Whether a performance run was answered as the accuracy run was, bit for bit, as MLPerf's TEST01 asks.

    Returns:
        `compared`: answers that LoadGen logged in both; `different`: which pictures' differ.
    """
    first, second = logged(performance), logged(accuracy)
    both = sorted(first.keys() & second.keys())
    return {"compared": len(both), "different": [index for index in both if first[index] != second[index]]}


def sentence(wrong: Sequence[str], checked: int) -> str:
    """Wrong answers as one problem."""
    return f"{len(wrong)} of {checked} answers were wrong: {'; '.join(wrong[:EXAMPLES])}"
