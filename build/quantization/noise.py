"""Quantisation noise in what is detected: how far boxes and scores move where something is detected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from build.gate.matching import Candidates

METHOD = "boxes relative to their sides, and scores, weighted by score"
_LEAST_SIDE = 1e-3  # of the image


def decibels(exact: Sequence[Candidates], found: Sequence[Candidates]) -> float:
    """-10·log10 of the mean squared error of the candidates before suppression, weighted by FP32's best score of each.

    Neither how a model codes its boxes nor how large its logits are changes this, as it does not change what is
    detected. The error of a candidate is that of its coordinates as a share of the box's width or height, at most 1
    and averaged over the four, and that of its scores, added over the classes.

    Args:
        exact: FP32's candidates of each picture.
        found: the other graph's.
    """
    import numpy as np

    noise = total = 0.0
    for right, other in zip(exact, found, strict=True):
        weights = right.scores.max(-1)
        sides = np.maximum(right.boxes[:, 2:] - right.boxes[:, :2], _LEAST_SIDE)
        moved = np.minimum(np.abs(other.boxes - right.boxes) / np.tile(sides, 2), 1)
        error = np.square(moved).mean(-1) + np.square(other.scores - right.scores).sum(-1)
        noise += float(weights @ error)
        total += float(weights.sum())
    return -10 * float(np.log10(max(noise / max(total, 1e-30), 1e-12)))
