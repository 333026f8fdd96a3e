"""The thresholds of a request, checked against what its model can do."""

from __future__ import annotations

from typing import Any

import numpy as np

from .config import ModelConfig
from .exceptions import InvalidInputError
from .messages import Input


def threshold_inputs(config: ModelConfig, batch: int, score: Any, iou: Any) -> list[Input]:
    """The inputs FP32 [batch,1] of a model with run-time thresholds; none for any other."""
    inputs = []
    for name, given, default in (
        ("score_threshold", score, config.score_threshold),
        ("iou_threshold", iou, config.iou_threshold),
    ):
        if not config.runtime_thresholds:
            if given is not None:
                raise InvalidInputError(
                    f"{name} is given, but model {config.name!r} has its thresholds built in",
                    fix="leave it out, or build the model with runtime_thresholds = true",
                )
            continue
        if given is None:
            inputs.append(Input(name, np.full((batch, 1), default, np.float32)))
            continue
        values = np.asarray(given)
        if values.dtype.kind not in "iuf" or values.shape not in ((), (batch, 1)):
            raise InvalidInputError(
                f"{name} is {values.dtype}{list(values.shape)}", fix=f"give a number, or float32[{batch}, 1]"
            )
        if not ((values >= 0) & (values <= 1)).all():  # false for NaN, too
            raise InvalidInputError(f"{name} is {values.tolist()}", fix="give numbers in 0..1")
        data = np.full((batch, 1), values, np.float32)
        floor = np.float32(config.lowest_score_threshold)
        if name == "score_threshold" and data.min() < floor:
            raise InvalidInputError(
                f"score_threshold is {data.min():g}, but model {config.name!r} drops everything up to {floor:g}",
                why="that is its lowest_score_threshold: the server would take it in place of a lower one",
                fix=f"give at least {floor:g}, or build the model with a lower [nms] lowest_score_threshold",
            )
        inputs.append(Input(name, data))
    return inputs


def fixed_thresholds(config: ModelConfig, score: Any, iou: Any) -> float | None:
    """What a model with built-in thresholds can still do: drop what lies below a higher score.

    That is exact: a better box is never suppressed by a worse one.
    """
    for name, given in (("score_threshold", score), ("iou_threshold", iou)):
        if given is not None and not 0 <= given <= 1:
            raise InvalidInputError(f"{name} is {given!r}", fix="give a number in 0..1")
    if (iou is not None and iou != config.iou_threshold) or (score is not None and score < config.score_threshold):
        raise InvalidInputError(
            f"score_threshold {score}, iou_threshold {iou}: model {config.name!r} has {config.score_threshold} and "
            f"{config.iou_threshold} built in",
            fix="leave them out, give a higher score_threshold, or build the model with runtime_thresholds = true",
        )
    return None if score is None else float(score)
