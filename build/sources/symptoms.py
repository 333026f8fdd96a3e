"""Signs in the values that a file was read wrongly: what would otherwise be served without a word."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from build import contract
from build.errors import ImportModelError
from build.session import runner
from build.sources.front import Front
from build.sources.reading import IN_PIXELS, Reading

if TYPE_CHECKING:
    from build.sources.adapt import Adapted

_PICTURES = 3


def check_values(path: Path, adapted: Adapted, reading: Reading, front: Front) -> None:
    """Runs the adapted heads on noise and looks at their numbers.

    Args:
        path: the file, for messages.
        adapted: its heads.
        reading: what it was taken for; what the user stated is not questioned.
        front: its input.

    Raises:
        ImportModelError: the numbers contradict the reading; says which option mends it.
    """
    import numpy as np

    run = runner(adapted.model)
    pictures = front.noise(_PICTURES).transpose(0, 3, 1, 2)
    heads = [run({"pixels": picture[None]}) for picture in pictures]
    boxes, scores = (np.concatenate([head[name] for head in heads]) for name in contract.HEADS)
    if not (np.isfinite(scores).all() and (adapted.anchors is None or np.isfinite(boxes).all())):
        raise ImportModelError(f"{path}: gives values that are not finite on noise", fix="export it again, in FP32")
    activation = adapted.nms.get("score_activation", "softmax")
    fractions = bool((scores >= 0).all() and (scores <= 1).all())
    if "scores_are" not in reading.stated and activation != "none" and fractions:
        sums = np.abs(scores.sum(-1) - 1).max() < 1e-3
        raise ImportModelError(
            f"{path}: the class scores {reading.scores.name!r} lie in 0..1"
            + (", and those of every box sum up to 1" if sums else "")
            + f": they are probabilities already, and {activation} would be applied a second time",
            why="the export activates them in a way that is not one Softmax or Sigmoid node",
            fix="--scores-are probabilities, or --scores-are logits if they really are raw",
        )
    if "boxes_are" in reading.stated or adapted.anchors is None or not boxes.size:
        return
    ordered = ((boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])).mean()
    size = max(front.width, front.height)
    unit = (
        "0..1" if np.abs(boxes - 0.5).max() < 2 else "pixels" if boxes.min() > -size and boxes.max() > IN_PIXELS else ""
    )
    raw = "--boxes-are deltas if they really are raw"
    if ordered > 0.99 and unit:
        raise ImportModelError(
            f"{path}: the boxes {reading.boxes.name!r} look like corners x1,y1,x2,y2 in {unit} and not like deltas: "
            f"{ordered:.0%} have x2 > x1 and y2 > y1",
            why="the export decodes them already, and the anchors would move them a second time",
            fix=f"--boxes-are decoded, or {raw}",
        )
    if boxes.min() >= 0:
        raise ImportModelError(
            f"{path}: the boxes {reading.boxes.name!r} are not like deltas: of {boxes.size:,} numbers none is below 0",
            why="the export decodes them already, to a centre and a size, and the anchors would move them again",
            fix=f"--boxes-are decoded --box-order cxcywh, or {raw}",
        )
