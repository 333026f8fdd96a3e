"""What the client accepts as a model's configuration, and how it refuses the rest."""

from __future__ import annotations

import dataclasses

import pytest
from ssd_client import ModelConfig, ModelConfigError
from ssd_client.config import MAX_ANSWER

from tests.client.conftest import LETTERBOX, PARAMETERS


def test_reads_every_parameter() -> None:
    config = ModelConfig.from_triton("m", 8, LETTERBOX)
    assert dataclasses.asdict(config) == {
        "name": "m",
        "max_batch_size": 8,
        "input_width": 64,
        "input_height": 48,
        "color_order": "BGR",
        "resize": "letterbox",
        "resample": "bilinear",
        "pad_value": 114,
        "labels": ("red", "blue", "checksum"),
        "score_threshold": 0.25,
        "iou_threshold": 0.45,
        "runtime_thresholds": False,
        "max_detections": 10,
        "precision": "fp32",
        "runtime": "onnxruntime",
        "manifest_sha256": "0" * 64,
        "version": "",
        "lowest_score_threshold": 0.0,
    }


def test_unknown_parameters_do_not_matter() -> None:
    assert ModelConfig.from_triton("m", 8, {**PARAMETERS, "threads": "2"}).labels == ("red", "blue", "checksum")


@pytest.mark.parametrize("missing", PARAMETERS)
def test_every_parameter_is_needed(missing: str) -> None:
    parameters = {key: value for key, value in PARAMETERS.items() if key != missing}
    with pytest.raises(ModelConfigError, match=f"'m' has no parameter '{missing}'"):
        ModelConfig.from_triton("m", 8, parameters)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("contract", "2"),
        ("contract", ""),
        ("input_width", "0"),
        ("input_width", "-3"),
        ("input_width", "300.0"),
        ("input_height", "three"),
        ("input_height", "²"),
        ("color_order", "rgb"),
        ("resize", "crop"),
        ("resample", "BILINEAR"),
        ("resample", "__class__"),
        ("pad_value", "256"),
        ("labels", "['circle']"),
        ("labels", '{"0": "circle"}'),
        ("labels", "[1]"),
        ("labels", "[]"),
        ("labels", "__import__('os').abort()"),
        ("labels", "[" * 100_000),
        ("score_threshold", "nan"),
        ("score_threshold", "-0.1"),
        ("iou_threshold", "1.1"),
        ("iou_threshold", "half"),
        ("runtime_thresholds", "True"),
        ("max_detections", "0"),
        ("max_detections", "9" * 5000),
        ("labels", "[" + "9" * 5000 + "]"),
        ("precision", "x" * 2000),
    ],
)
def test_wrong_values_are_named(key: str, value: str) -> None:
    with pytest.raises(ModelConfigError, match="what to do") as caught:
        ModelConfig.from_triton("m", 8, {**PARAMETERS, key: value})
    assert repr(value[:200]) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_model_without_batch_dimension_is_refused() -> None:
    with pytest.raises(ModelConfigError, match="max_batch_size 0"):
        ModelConfig.from_triton("m", 0, PARAMETERS)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"input_width": "65535", "input_height": "65535"}, "takes 65535 x 65535 pixels"),
        ({"max_detections": "100000000"}, "an answer would have 2400 MB"),
    ],
)
def test_absurd_models_are_refused(changed: dict[str, str], complaint: str) -> None:
    """Before anything is allocated for them."""
    with pytest.raises(ModelConfigError, match=complaint):
        ModelConfig.from_triton("m", 8, {**PARAMETERS, **changed})


def test_batches_keep_answers_small_enough() -> None:
    config = ModelConfig.from_triton("m", 1000, {**PARAMETERS, "max_detections": "100000"})
    assert config.max_batch_size == 27
    assert 27 * (4 + 100_000 * 24) < MAX_ANSWER < 28 * (4 + 100_000 * 24)
