"""config.pbtxt: all that a client needs, the cores that are used, and what a plan gets."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc.model_config_pb2 import ModelInstanceGroup

from build.contract import Target
from build.errors import PublishError
from build.publish import config, repository
from build.publish.backend import Backend
from build.spec import Spec, load
from tests.build import tiny_model

ONNX, PLAN = Target("onnxruntime"), Target("tensorrt")
GOLDEN = Path(__file__).parent / "golden" / "tensorrt.pbtxt"


def test_config_says_all_that_a_client_needs(spec: Spec, stand_in: Backend) -> None:
    result = config.config(spec, 7, ONNX, "ab" * 32, stand_in)
    assert (result.name, result.backend, result.max_batch_size) == ("tiny", stand_in.name, 4)
    assert list(result.version_policy.specific.versions) == [7]
    assert [(i.name, i.data_type, list(i.dims)) for i in result.input] == [
        ("images", 2, [8, 8, 3]),
        ("score_threshold", 11, [1]),
        ("iou_threshold", 11, [1]),
    ]
    assert [(o.name, o.data_type, list(o.dims)) for o in result.output] == [
        ("num_detections", 8, [1]),
        ("detection_boxes", 11, [5, 4]),
        ("detection_scores", 11, [5]),
        ("detection_classes", 8, [5]),
    ]
    (group,) = result.instance_group
    threads = int(result.parameters["threads"].string_value)
    assert group.kind == ModelInstanceGroup.KIND_CPU
    runners = int(result.parameters["runners"].string_value)
    assert 1 <= runners * threads <= config.cores()
    assert group.count == runners + config.AHEAD
    own = {name: value.string_value for name, value in result.parameters.items() if name not in ("threads", "runners")}
    assert own == {
        "contract": "1",
        "input_width": "8",
        "input_height": "8",
        "color_order": "RGB",
        "resize": "stretch",
        "resample": "bilinear",
        "pad_value": "114",
        "labels": '["cat", "dog"]',
        "score_threshold": "0.1",
        "iou_threshold": "0.45",
        "runtime_thresholds": "true",
        "max_detections": "5",
        "precision": "fp32",
        "runtime": "onnxruntime",
        "manifest_sha256": "ab" * 32,
        "lowest_score_threshold": "0.01",
    }


@pytest.mark.parametrize(
    ("cores", "instances", "threads", "chosen"),
    [(8, 0, 0, (8, 1)), (8, 2, 0, (2, 4)), (8, 0, 4, (2, 4)), (1, 0, 0, (1, 1)), (2, 3, 0, (3, 1)), (4, 1, 2, (1, 2))],
)
def test_instances_and_threads_fill_the_cores(
    spec: Spec,
    stand_in: Backend,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    instances: int,
    threads: int,
    chosen: tuple[int, int],
) -> None:
    spec.path.write_text(spec.path.read_text() + f"instances = {instances}\nthreads = {threads}\n")
    monkeypatch.setattr(config, "cores", lambda: cores)
    serving = repository.recipe(load(spec.path), ONNX, stand_in)["serving"]
    assert (serving["instances"], serving["threads"]) == chosen


@pytest.fixture
def tensorrt_spec(spec: Spec) -> Spec:
    """Every setting of [serving] and the profiles."""
    text = spec.path.read_text().replace(
        "max_batch_size = 4",
        "max_batch_size = 4\ninstances = 2\nmax_queue_size = 64\nqueue_timeout_ms = 50\nqueue_delay_us = 100\n"
        "cuda_graphs = true",
    )
    profiles = ("\n[[tensorrt.profiles]]\nmin = {}\nopt = {}\nmax = {}\n".format(*s) for s in ((1, 1, 1), (2, 3, 4)))
    spec.path.write_text(text + "".join(profiles))
    return load(spec.path)


def test_the_config_of_a_plan_is_the_golden_one(tensorrt_spec: Spec) -> None:
    result = config.config(tensorrt_spec, 3, Target("tensorrt", "fp16"), "ab" * 32)
    config.check_engine(tensorrt_spec, result, tiny_model.engine_of(tensorrt_spec))
    text = config.text(result)
    if os.environ.get("WRITE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_a_plans_config_with_the_defaults(spec: Spec) -> None:
    result = config.config(spec, 1, PLAN, "")
    assert (result.platform, result.backend) == ("tensorrt_plan", "")
    assert result.instance_group[0].count == 1
    assert not result.instance_group[0].profile
    assert not result.HasField("optimization")
    assert [warm.batch_size for warm in result.model_warmup] == [1, 4]
    policy = result.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (256, 30_000_000)
    assert policy.allow_timeout_override


def test_only_what_gains_by_it_gets_requests_together(spec: Spec, stand_in: Backend) -> None:
    """Our backend runs every request by itself: two that one instance gets together would wait for each other."""
    assert not config.batches(config.config(spec, 1, ONNX, "", stand_in))
    assert config.batches(config.config(spec, 1, ONNX, "", Backend("python", "", {}, ())))
    assert config.batches(config.config(spec, 1, PLAN, ""))


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("batching", ["on", "off"])
def test_batching_can_be_asked_for_and_refused(spec: Spec, stand_in: Backend, runtime: str, batching: str) -> None:
    serving = dataclasses.replace(spec.serving, dynamic_batching=batching, queue_delay_us=200)
    served_by = stand_in if runtime == "onnxruntime" else None
    result = config.config(dataclasses.replace(spec, serving=serving), 1, Target(runtime), "", served_by)
    assert config.batches(result) == (batching == "on")
    assert result.dynamic_batching.max_queue_delay_microseconds == (200 if batching == "on" else 0)
    assert result.dynamic_batching.default_queue_policy.max_queue_size == 256  # overload is refused in any case


@pytest.mark.parametrize(
    ("tensor", "key", "value", "complaint"),
    [
        (0, "dtype", "FLOAT", r"inputs are .*images.*FLOAT\[-1, 8, 8, 3\]"),
        (0, "shape", [-1, 9, 8, 3], "inputs are"),
        (1, "name", "threshold", "inputs are"),
        (3, "dtype", "INT64", "outputs are .*INT64"),
        (4, "shape", [-1, 6, 4], "outputs are"),
        (0, "profiles", [[[1, 8, 8, 3]] * 3], "allow batches of 4, but the plan ends at 1"),
    ],
)
def test_a_plan_that_the_config_does_not_fit_is_not_published(
    tensor: int, key: str, value: Any, complaint: str, spec: Spec, built: Path, root: Path
) -> None:
    engine = tiny_model.engine_of(spec)
    engine["io"][tensor][key] = value
    if key == "profiles":
        for other in engine["io"][1:3]:
            other["profiles"] = []
    with pytest.raises(PublishError, match=complaint):
        repository.publish(spec, built, root, PLAN, {"engine": engine})
    assert not (root / "tiny").exists()
