"""COCO accuracy of what a server answers: the client's detections, judged by build/gate/."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from build.gate.scoring import CURVE_THRESHOLD, Detected

if TYPE_CHECKING:
    from ssd_client import ModelConfig, SSDClient

    from build.gate.accuracy import Accuracy
    from build.gate.scoring import Detector


def evaluate_served(client: SSDClient, pictures: Sequence[Path], truth: dict[str, Any]) -> Accuracy:
    """Accuracy on `pictures`; image id = position + 1, category id = class + 1.

    Raises:
        SSDClientError: the server does not answer.
        SSDError: the ground truth does not fit.
    """
    from build.gate.accuracy import evaluate

    answers = client.detect(list(pictures), score_threshold=curve_threshold(client.model_config()))
    return evaluate(truth, [row for i, detections in enumerate(answers, start=1) for row in detections.to_coco(i)])


def curve_threshold(config: ModelConfig) -> float:
    """CURVE_THRESHOLD, or the lowest that the model takes."""
    return max(CURVE_THRESHOLD, config.lowest_score_threshold)


@contextlib.contextmanager
def serving(repository: Path, model: str) -> Iterator[tuple[str, Detector]]:
    """A server on `repository`, as the audit takes it: the served precision, and pictures → what is in each."""
    from ssd_client import SSDClient

    from build.serve import TritonServer

    with TritonServer(repository) as server, SSDClient(server.grpc_url, model=model, shared_memory="system") as client:

        def detect(pictures: Sequence[Path]) -> list[Detected]:
            answers = client.detect(list(pictures), score_threshold=curve_threshold(client.model_config()))
            return [Detected(answer.boxes, answer.scores, answer.class_ids) for answer in answers]

        yield client.model_config().precision, detect
