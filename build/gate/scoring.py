"""What a detector finds in pictures, and what that is worth in mAP; gate, audit and servers are judged alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from build import contract
from build.errors import DataError
from build.gate import accuracy, datasets
from build.spec import Spec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from pycocotools.cocoeval import COCOeval
    from rich.console import Console

    from build.session import Runner

CURVE_THRESHOLD = 0.01  # COCO's mAP wants the whole precision-recall curve
SHOWN_THRESHOLD = 0.3  # of the boxes that are drawn and counted as seen
REPLICATES = 500


class Detected(NamedTuple):
    """What was detected in one picture: FP32 [n,4] x1,y1,x2,y2 in its pixels, scores [n], 0-based classes [n]."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int32]


# Pictures → what is in each: in process, or whatever stands for a server's client.
Detector = Callable[[Sequence[Path]], Sequence[Detected]]


def detector(spec: Spec, runner: Runner, batch: int = 1) -> Detector:
    """A detector from a served model that runs here, be it a session or a plan.

    Args:
        spec: how pictures become the input.
        runner: the model.
        batch: pictures in a run.
    """
    import numpy as np

    def detect(paths: Sequence[Path]) -> list[Detected]:
        results = []
        for start in range(0, len(paths), batch):
            part = [datasets.load(path, spec.input) for path in paths[start : start + batch]]
            outputs = runner(spec.nms.feeds(np.stack([pixels for pixels, _ in part]), CURVE_THRESHOLD))
            number, boxes, scores, classes = (np.asarray(outputs[name]) for name in contract.OUTPUTS)
            for row, (_, placement) in enumerate(part):
                kept = int(number[row, 0])
                inside = placement.to_image(boxes[row, :kept])
                results.append(Detected(inside, scores[row, :kept].copy(), classes[row, :kept].copy()))
        return results

    return detect


def coco_results(pictures: datasets.Pictures, detected: Sequence[Detected]) -> list[dict[str, Any]]:
    """COCO results of labelled pictures, in their own pixels."""
    return [
        {
            "image_id": image_id,
            "category_id": pictures.category_ids[label],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, row in zip(pictures.image_ids, detected, strict=True)
        for (x1, y1, x2, y2), score, label in zip(
            row.boxes.astype(float).tolist(), row.scores.tolist(), row.classes.tolist(), strict=True
        )
    ]


class Score(NamedTuple):
    """A detector's result: COCO's figures, the matches for resampling, and what was detected in each picture."""

    accuracy: accuracy.Accuracy
    curves: Curves
    detected: list[Detected]


def score(pictures: datasets.Pictures, detect: Detector, title: str, console: Console | None = None) -> Score:
    """Runs a detector over labelled pictures; those that cannot be read count as pictures without detections.

    Raises:
        DataError: more than one in twenty pictures cannot be read.
    """
    import numpy as np
    from rich.console import Console
    from rich.progress import Progress

    assert pictures.truth is not None
    nothing = Detected(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    detected: list[Detected] = []
    unreadable = 0
    show = console or Console(stderr=True, soft_wrap=True)
    with Progress(console=show, transient=True, disable=not show.is_terminal) as progress:
        task = progress.add_task(title, total=len(pictures))
        for start in range(0, len(pictures), 8):
            part = pictures.paths[start : start + 8]
            try:
                detected += detect(part)
            except DataError:
                for path in part:
                    try:
                        detected += detect([path])
                    except DataError as error:
                        unreadable += 1
                        detected.append(nothing)
                        if unreadable > datasets.MOST_UNREADABLE * len(pictures):
                            raise DataError(
                                f"{pictures.name}: {unreadable} of {start + len(part)} pictures cannot be read, the "
                                f"last one: {error.what}",
                                fix="mend or remove them",
                            ) from None
            progress.update(task, completed=len(detected))
    judge = accuracy.judge(pictures.truth, coco_results(pictures, detected))
    return Score(accuracy.accuracy(judge), Curves(judge), detected)


class Curves:
    """Every match that pycocotools found, kept so that mAP of any resampling of the pictures is a few sums.

    Args:
        judge: what `accuracy.judge` returned.
    """

    def __init__(self, judge: COCOeval) -> None:
        import numpy as np

        parameters = judge.params
        pictures, areas = len(parameters.imgIds), len(parameters.areaRng)
        most = parameters.maxDets[-1]
        self.pictures = pictures
        self._recalls = parameters.recThrs
        self._classes = []
        for k in range(len(parameters.catIds)):
            first = k * areas * pictures  # area "all" is the first
            held = [(i, matches) for i, matches in enumerate(judge.evalImgs[first : first + pictures]) if matches]
            positives = np.zeros(pictures)
            for i, matches in held:
                positives[i] = np.count_nonzero(np.asarray(matches["gtIgnore"]) == 0)
            if not positives.any():
                continue
            scores = np.concatenate([np.asarray(matches["dtScores"][:most], float) for _, matches in held])
            order = np.argsort(-scores, kind="mergesort")
            place = np.concatenate([np.full(len(matches["dtScores"][:most]), i) for i, matches in held])[order]
            ignored = np.concatenate([matches["dtIgnore"][:, :most] for _, matches in held], 1)[:, order].astype(bool)
            matched = np.concatenate([matches["dtMatches"][:, :most] for _, matches in held], 1)[:, order] > 0
            hit, miss = matched & ~ignored, ~matched & ~ignored
            self._classes.append((positives, scores[order], place.astype(int), hit, miss))

    def mean_average_precision(self, weights: NDArray[np.float64] | None = None) -> float:
        """mAP@[.5:.95] where picture i counts `weights[i]` times; without weights once each: pycocotools' figure."""
        import numpy as np

        each = np.ones(self.pictures) if weights is None else weights
        means = []
        for positives, _, place, hit, miss in self._classes:
            total = float(positives @ each)
            if total == 0:
                continue
            share = each[place]
            true, false = np.cumsum(hit * share, 1), np.cumsum(miss * share, 1)
            exact = true / np.maximum(true + false, np.spacing(1))
            best = np.maximum.accumulate(exact[:, ::-1], 1)[:, ::-1]
            best = np.concatenate([best, np.zeros((len(best), 1))], 1)
            at = [np.searchsorted(row, self._recalls, side="left") for row in true / total]
            means.append(np.take_along_axis(best, np.stack(at), 1).mean())
        return float(np.mean(means)) if means else float("nan")

    def seen(self) -> NDArray[np.float64]:
        """Per picture: right minus wrong boxes among those that a user would see, averaged over COCO's IoUs."""
        import numpy as np

        total = np.zeros(self.pictures)
        for _, scores, place, hit, miss in self._classes:
            shown = (hit.mean(0) - miss.mean(0)) * (scores >= SHOWN_THRESHOLD)
            total += np.bincount(place, shown, self.pictures)
        return total


def differences(reference: Curves, others: Sequence[Curves], replicates: int = REPLICATES) -> list[tuple[float, float]]:
    """95 % confidence interval of each other's mAP minus the reference's: paired bootstrap over pictures.

    All are scored on the same resampled pictures (Efron and Tibshirani 1993, chapters 8 and 13), with replacement,
    seeded; an interval reaches from the 2.5th to the 97.5th percentile of the replicates.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    count = reference.pictures
    drawn = np.empty((replicates, len(others)))
    for row in drawn:
        weights = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        base = reference.mean_average_precision(weights)
        row[:] = [other.mean_average_precision(weights) - base for other in others]
    return [(float(low), float(high)) for low, high in np.nanpercentile(drawn, [2.5, 97.5], axis=0).T]
