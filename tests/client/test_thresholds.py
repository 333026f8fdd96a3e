"""A request's thresholds against what its model can do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from ssd_client import InvalidInputError, ModelConfig
from ssd_client.thresholds import threshold_inputs

from tests.client.conftest import PARAMETERS

CONFIG = ModelConfig.from_triton("fake", 8, {**PARAMETERS, "lowest_score_threshold": "0.01"})


@pytest.mark.parametrize(
    "given", [0.01, float(np.float32(0.01)), np.float32(0.01), np.full((2, 1), 0.01, np.float32), 1]
)
def test_the_floor_itself_is_taken(given: Any) -> None:
    score, iou = threshold_inputs(CONFIG, 2, given, 0.0)
    assert score.data.tolist() == np.broadcast_to(np.float32(given), (2, 1)).tolist()
    assert not iou.data.any()


@pytest.mark.parametrize("given", [0, 0.0099, np.array([[0.5], [0.005]], np.float32)])
def test_what_the_model_would_raise_to_its_floor_is_refused(given: Any) -> None:
    words = r"drops everything up to 0\.01\n.*lowest_score_threshold.*\n.*give at least 0\.01"
    with pytest.raises(InvalidInputError, match=words):
        threshold_inputs(CONFIG, 2, given, None)


def test_a_model_that_does_not_say_its_floor_is_sent_what_was_asked_for() -> None:
    older = ModelConfig.from_triton("fake", 8, PARAMETERS)
    assert threshold_inputs(older, 1, 0, None)[0].data.tolist() == [[0.0]]
    assert not older.asks_like(dataclasses.replace(older, lowest_score_threshold=0.5))
