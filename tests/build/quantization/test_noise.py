"""Noise in what is detected: by IoU's measure, whatever the code of boxes and the size of logits."""

from __future__ import annotations

import numpy as np
import pytest

from build.gate.matching import Candidates
from build.quantization.noise import decibels


def one(box: list[float], *scores: float) -> Candidates:
    return Candidates(np.array([box, [0, 0, 1, 1]], float), np.array([scores, [0.0] * len(scores)]))


BOX = [0.4, 0.4, 0.6, 0.5]  # 0.2 wide, 0.1 high


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (one([0.42, 0.4, 0.62, 0.5], 0.9, 0.1), 0.1**2 / 2),
        (one([0.4, 0.41, 0.6, 0.51], 0.9, 0.1), 0.1**2 / 2),
        (one(BOX, 0.7, 0.2), 0.2**2 + 0.1**2),
        (one([9, 9, 9, 9], 0.9, 0.1), 1.0),
    ],
)
def test_errors_are_shares_of_the_box_and_differences_of_scores(other: Candidates, error: float) -> None:
    assert decibels([one(BOX, 0.9, 0.1)], [other]) == pytest.approx(-10 * np.log10(error))


def test_what_is_not_detected_does_not_count() -> None:
    exact, moved = one(BOX, 0.9), one(BOX, 0.9)
    moved.boxes[1] = 0.5  # the second candidate has no score
    assert decibels([exact], [moved]) == pytest.approx(120)
    assert decibels([], []) == pytest.approx(120)
